"""The kernel's machine code: which instructions it must have, in which order, and what it costs."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the plugins extra")

from benchmarks.sass import instructions
from glm4_plugins.compile import compile_kernel, disassembled
from glm4_plugins.launch import KernelShape, choices

KEPT = Path(__file__).with_name("kernel_costs.json")
"""Registers and shared memory by kernel. ``python tests/plugins/test_sass.py`` writes the file anew."""
# What multiplies, by branch: from registers everywhere, and where there are 64 rows from shared memory on 9.0 and 10.0.
FEW_ROWS = dict.fromkeys((80, 89, 90, 100, 120), "HMMA")
MANY_ROWS = FEW_ROWS | {90: "HGMMA", 100: "UTCHMMA"}
PRODUCTS = {"decode": FEW_ROWS, "extend": MANY_ROWS, "prompt": MANY_ROWS}
COPIES = ("LDGSTS", "UTMALDG")
LOCAL = ("STL", "LDL")
QUICK = [("decode", capability, "fp16") for capability in FEW_ROWS] + [
    ("extend", 90, "fp16"),
    ("prompt", 90, "fp16"),
    ("decode", 90, "int8"),
    ("decode", 90, "fp8"),
]
ALL = [
    (branch, capability, cache)
    for branch, kinds in PRODUCTS.items()
    for capability in kinds
    for cache in ("fp16", "int8", "fp8")
    if not (cache == "fp8" and capability < 89)
]


def compiled(branch, capability, cache):
    quantized = cache != "fp16"
    shape = KernelShape(32, 2, 128, 128**-0.5, 8, "fp16", quantized, branch, cache if quantized else "int8")
    return compile_kernel(shape, choices(capability, quantized)[0], capability)


def costs(kernel):
    return {"registers": kernel.registers, "shared_memory": kernel.shared_memory, "spilled": kernel.spilled}


def counter_faults(code):
    """What is wrong about the order around the counter of pieces, in words; the model of memory asks for all of it.

    Every thread stores; a barrier of the block; a fence to the device's scope; the count; the first-level cache
    emptied; a barrier; then loads past the first-level cache.
    """
    counts = [i for i, one in enumerate(code) if one.name == "ATOMG"]
    if len(counts) != 1 or "STRONG.GPU" not in code[counts[0]].opcode:
        return ["not one count, at the device's scope"]
    count = counts[0]
    strong = [i for i, one in enumerate(code) if one.opcode.startswith("LDG") and "STRONG.GPU" in one.opcode]
    stores = [i for i, one in enumerate(code[:count]) if one.name == "STG"]

    def places(name, start, stop):
        return [i for i in range(start, stop) if code[i].opcode.startswith(name)]

    if not strong or not stores or min(strong) < count:
        return ["pieces are not stored before the count and loaded after it"]
    last_store, first_load = max(stores), min(strong)
    fences = places("MEMBAR.ALL.GPU", last_store, count)
    emptied = places("CCTL.IVALL", count, first_load)
    faults = []
    if not fences:
        faults.append("no fence between the stores and the count")
    if not places("BAR.SYNC", last_store, fences[0] if fences else count):
        faults.append("no barrier between the stores and the fence")
    if not emptied:
        faults.append("the first-level cache is not emptied behind the count")
    if not places("BAR.SYNC", emptied[0] if emptied else count, first_load):
        faults.append("no barrier between the count and the loads")
    return faults


def check(branch, capability, cache):
    kernel = compiled(branch, capability, cache)
    code = instructions(disassembled(kernel.ptx, capability))
    names = {one.name for one in code}
    wanted = PRODUCTS[branch][capability]
    assert wanted in names
    assert names & {"HMMA", "HGMMA", "UTCHMMA"} == {wanted}
    assert names & set(COPIES)
    assert not names & set(LOCAL)
    assert kernel.spilled == 0
    if branch == "prompt":
        assert "ATOMG" not in names
    else:
        assert counter_faults(code) == []
    kept = json.loads(KEPT.read_text())
    if kept["triton"] == version("triton"):
        assert costs(kernel) == kept["kernels"][f"{branch} {capability} {cache}"]


@pytest.mark.parametrize(("branch", "capability", "cache"), QUICK)
def test_machine_code(branch, capability, cache):
    check(branch, capability, cache)


@pytest.mark.more
@pytest.mark.parametrize(("branch", "capability", "cache"), [case for case in ALL if case not in QUICK])
def test_machine_code_of_every_branch(branch, capability, cache):
    check(branch, capability, cache)


@pytest.fixture(scope="module")
def decoding():
    return instructions(disassembled(compiled("decode", 90, "fp16").ptx, 90))


@pytest.mark.parametrize("gone", ["MEMBAR.ALL.GPU", "CCTL.IVALL", "BAR.SYNC", "ATOMG"])
def test_a_missing_fence_or_barrier_is_noticed(decoding, gone):
    assert counter_faults(decoding) == []
    assert counter_faults([one for one in decoding if not one.opcode.startswith(gone)])


def test_a_fence_behind_the_count_is_noticed(decoding):
    fence = next(i for i, one in enumerate(decoding) if one.opcode.startswith("MEMBAR.ALL.GPU"))
    count = next(i for i, one in enumerate(decoding) if one.name == "ATOMG")
    moved = [*decoding[:fence], *decoding[fence + 1 : count + 1], decoding[fence], *decoding[count + 1 :]]
    assert counter_faults(moved) == ["no fence between the stores and the count"]


if __name__ == "__main__":
    table = {" ".join(map(str, case)): costs(compiled(*case)) for case in ALL}
    KEPT.write_text(json.dumps({"triton": version("triton"), "kernels": table}, indent=1) + "\n")
