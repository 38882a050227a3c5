"""The estimate of the attention kernel's time: machine code as it is read, and figures that follow from it."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the plugins extra")

from benchmarks import attention_estimate
from benchmarks.attention_estimate import Case, estimate
from benchmarks.sass import instructions, loops
from benchmarks.sm_walk import GPUS, MEMORY_READ, SECOND_LEVEL, Walk, Work
from glm4_plugins.launch import Share

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LISTING = """
        /*0000*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR12][R2.64] ;
.L_x_0:
        /*0020*/                   HMMA.16816.F32 R8, R4, R12, R8 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
"""
ONE_BLOCK = Share("decode", 1, 16, 128, 0, 0, 0, 0, 1, ())


def test_machine_code_is_read():
    code = instructions(LISTING)
    constant, load, product, jump, *_ = code
    assert [i.name for i in code] == ["LDC", "LDG", "HMMA", "BRA", "EXIT", "BRA"]
    assert (constant.writes, constant.constants) == (("R2", "R3"), (0x210,))
    assert (load.guard, load.writes, load.reads, load.bytes) == (
        "P0",
        ("R4", "R5", "R6", "R7"),
        ("UR12", "R2"),
        16,
    )
    assert product.writes == ("R8", "R9", "R10", "R11")
    assert set(product.reads) == {f"R{i}" for i in (4, 5, 6, 7, 12, 13, 8, 9, 10, 11)}
    assert (product.label, jump.target) == (".L_x_0", ".L_x_0")
    assert loops(code) == {2: 3}


def test_a_walk_waits_for_what_it_uses():
    """The product needs a register that comes from the second-level cache; without the load it does not wait."""
    gpu, work = GPUS["H100"], Work(ONE_BLOCK, 0, 1, 1)
    names = {0x210: "query"}
    with_load = Walk(gpu, names, 4, work, instructions(LISTING)).now
    without = Walk(
        gpu,
        names,
        4,
        work,
        instructions("\n".join(line for line in LISTING.split("\n") if "LDG" not in line)),
    ).now
    assert with_load - without > SECOND_LEVEL - 40


def test_the_kept_estimates_of_the_first_kernel():
    """What an audit had worked out by hand."""
    kept = json.loads((RESULTS / "attention-estimate-first.json").read_text())
    shares = {
        tuple(r["case"][n] for n in ("batch", "past", "new", "cache")): r["of_copy"]
        for r in kept["estimates"]
    }
    wanted = {(8, 8192, 1, "fp16"): 80, (8, 32768, 1, "fp16"): 96, (1, 8192, 1, "fp16"): 28}
    assert {case: round(100 * shares[case]) for case in wanted} == wanted
    assert kept["kind"] == "estimates"


@pytest.fixture(scope="module")
def short_and_long():
    return [estimate(Case(8, past, 1), GPUS["H100"]) for past in (1024, 32768)]


def test_an_estimate_follows_the_memory(short_and_long):
    short, long = short_and_long
    assert short.of_copy < long.of_copy < MEMORY_READ
    assert long.microseconds * 3.0e6 * long.of_copy == pytest.approx(long.case.cache_bytes, rel=0.01)
    faster = estimate(long.case, GPUS["H200"])
    assert 1 < long.microseconds / faster.microseconds < 4.3 / 3.0
    assert dataclasses.asdict(faster.share) == dataclasses.asdict(long.share)


def test_the_page_says_what_it_is_and_shows_both_kernels(short_and_long):
    records = [dataclasses.asdict(e) for e in short_and_long]
    text = attention_estimate.page(GPUS["H100"], records[1:], [records[1] | {"of_copy": 0.123}])
    assert "estimates, nothing here was measured" in text
    assert text.count("| 8 | 32768 | 1 |") == 1
    assert "(12 %)" in text
