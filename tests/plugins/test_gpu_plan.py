"""How the GPU check goes about it: order, deadline, results after each case, the driver's launch, the tools' answers."""

import json
import subprocess
import time
from argparse import Namespace

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import engines, plan, precompile, report, timing, tools
from benchmarks.gpu_check.correctness import Inputs, cases, exact, quantized_cases
from benchmarks.gpu_check.tasks import Deadline, Task, run_tasks, wrong
from glm4_plugins.launch import choices

OPTIONS = Namespace(scratch=None, layers=None)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def empty():
    return dict(host={}, absent=[], refused=[], skipped=[])


# Tasks ----------------------------------------------------------------------------------------------


def test_results_are_written_after_every_case(tmp_path):
    """A machine that is taken away in the middle has told all that was known."""
    seen = []

    def look():
        path = tmp_path / "gpu-check.json"
        seen.append(json.loads(path.read_text()) if path.exists() else None)
        return dict(ok=True, number=len(seen))

    def fails():
        look()
        raise RuntimeError("an illegal address\nand more")

    results = empty()
    tasks = [Task("stripped", "a", look), Task("correctness", "b", fails), Task("correctness", "c", look)]
    run_tasks(tasks, results, Deadline(1), lambda kept: report.write(kept, tmp_path), lambda _: None)
    assert seen[0] is None
    assert seen[1]["stripped"] == [dict(ok=True, number=1)]
    assert seen[2]["refused"] == ["correctness: b: RuntimeError: an illegal address"]
    assert json.loads((tmp_path / "gpu-check.json").read_text()) == results
    assert not list(tmp_path.glob(".*"))
    assert wrong(results) == []


def test_after_the_deadline_nothing_is_begun():
    clock, results = Clock(), empty()

    def long():
        clock.now += 50
        return dict(ok=True)

    tasks = [Task("decode", str(i), long) for i in range(4)]
    run_tasks(tasks, results, Deadline(1.5, clock), lambda _: None, lambda _: None)
    assert len(results["decode"]) == 2
    assert results["skipped"] == ["decode: 2", "decode: 3"]
    assert "## No time was left for\n\n- decode: 2\n- decode: 3" in report.markdown(
        empty() | {"skipped": results["skipped"]}
    )


def test_what_runs_at_the_deadline_is_stopped():
    def forever():
        while True:
            time.sleep(0.01)

    results = empty()
    run_tasks([Task("endurance", "a", forever)], results, Deadline(0.002), lambda _: None, lambda _: None)
    assert results["refused"] == ["endurance: a: TimeoutError: stopped at the deadline"]


def test_a_record_that_is_wrong_is_found_in_any_part():
    results = empty() | dict(
        sanitizer=[dict(ok=True), dict(ok=False)], endurance=[dict(ok=False)], profile=[{}]
    )
    assert len(wrong(results)) == 2


# The plan -------------------------------------------------------------------------------------------


def parts_in_order():
    found = []
    for task in plan.planned(90, empty(), Deadline(1), OPTIONS):
        if not found or found[-1] != task.part:
            found.append(task.part)
    return found


def test_what_tells_most_comes_first():
    assert parts_in_order() == [
        "ceilings", "compiled", "correctness", "stripped", "decode", "prefill", "endurance", "correctness",
        "sanitizer", "profile", "sanitizer", "engines", "compiled", "correctness", "decode", "prefill",
    ]  # fmt: skip


def test_every_case_is_planned_once():
    tasks = list(plan.planned(90, empty(), Deadline(1), OPTIONS))
    names = [(task.part, task.name) for task in tasks]
    assert len(set(names)) == len(names)
    per_part = {part: sum(task.part == part for task in tasks) for part in command.PARTS}
    checked = len(list(cases(plan.SCALE))) * len(choices(90)) + 8 * len(choices(90, True))
    assert per_part["correctness"] == checked
    assert per_part["decode"] == len(timing.decode_cases())
    assert per_part["prefill"] == len(timing.prefill_cases())
    assert (per_part["sanitizer"], per_part["profile"]) == (2 * 5, 2)
    assert per_part["engines"] == len(engines.CANDIDATES)


def test_cases_of_tools_are_found_by_their_names():
    tasks = list(plan.planned(90, empty(), Deadline(1), OPTIONS))
    for task in tasks:
        if task.part in ("sanitizer", "profile"):
            assert plan.case_named(task.name.split()[-1]) is not None
    assert plan.case_named("float16-1x1x1-0+0") is None


@pytest.mark.parametrize(
    ("only", "parts"),
    [(["decode"], {"ceilings", "compiled", "decode"}), (["engines"], {"ceilings", "engines"}),
     (["stripped"], {"compiled", "stripped"}), (None, {"ceilings", "compiled", *command.PARTS})],
)  # fmt: skip
def test_a_part_brings_what_it_needs(only, parts):
    tasks = command.chosen(plan.planned(90, empty(), Deadline(1), OPTIONS), only)
    assert {task.part for task in tasks} == parts


@pytest.mark.parametrize(
    "given",
    [["--layers", "0"], ["--minutes", "0"], ["--minutes", "nan"], ["--only", "x"], ["--layers", "many"]],
)
def test_arguments_that_cannot_be_meant_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        command.parser().parse_args(given)
    assert given[0] in capsys.readouterr().err


def test_layers_are_kept_to_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**13, 10**13))
    monkeypatch.setattr(engines, "layers_that_fit", lambda *_: 17)
    made = []
    monkeypatch.setattr(engines, "write_checkpoint", lambda *given: made.append(given))
    for most, expected in ((None, 17), (4, 4), (40, 17)):
        with engines.checkpoint_of(engines.SIZES["9b"], tmp_path, most) as (_, layers):
            assert layers == expected
            assert made[-1][1]["num_hidden_layers"] == expected


def test_the_cuda_provider_runs_quantized_bundles_too():
    ours = [c.precision for c in engines.CANDIDATES if c.provider == "CUDAExecutionProvider"]
    assert ours == ["fp16", "int8", "int4"]


def test_torch_compiles_each_case_anew(monkeypatch):
    """After some shapes it would run RoPE eagerly."""
    order = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: order.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda f, **_: order.append("compile") or f)
    monkeypatch.setattr(timing, "problems_of", lambda _: [])
    monkeypatch.setattr(timing, "milliseconds", lambda _: 1.0)
    monkeypatch.setattr(timing, "torchs", lambda *_: [])
    for _ in range(2):
        timing.compare(timing.decode_cases()[0], ())
    assert order == ["reset", "compile"] * 2


def test_a_kernel_is_compiled_ahead_once_per_type_heads_and_batch():
    plain = list(cases(plan.SCALE))
    needed = precompile.kernels_of(plain, choices(90)[:1])
    assert len(needed) == 2 * 4 * 3  # types, heads, batches of 1, 4 (for 3) and 8 (for 5)
    assert {len(case.lengths) for case, _ in needed} == {1, 4, 8}


# An int8 cache ---------------------------------------------------------------------------------------


def test_int8_inputs_and_what_they_mean():
    case = next(iter(quantized_cases(10)))
    inputs = Inputs.random(case, "cpu")
    keys, scale = inputs.tensors["past_key"], inputs.scales["key_scale"]
    assert keys.dtype == torch.int8
    assert (keys[1, :, case.pasts[1] :] == 119).all()
    stored = {name: inputs.tensors[name].clone() for name in ("past_key", "past_value")}
    past, new = case.pasts[0], case.lengths[0]
    _, wanted_keys, wanted_values = exact(inputs, 0)
    for side, wanted in (("key", wanted_keys), ("value", wanted_values)):
        steps = wanted / inputs.scales[f"{side}_scale"].double()[:, None]
        stored[f"past_{side}"][0, :, : past + new] = steps.round().clamp(-127, 127).to(torch.int8)
    assert torch.equal(stored["past_key"][0, :, :past], keys[0, :, :past])
    assert (wanted_keys[:, :past] == keys[0, :, :past].double() * scale.double()[:, None]).all()
    rough, exactly = exact(inputs, 0, stored)[0], exact(inputs, 0)[0]
    assert 0 < float((rough - exactly).abs().max()) < 0.1  # rounding new tokens shows, and is small


# The tools' answers -----------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/usr/bin/{name}")


def answering(text, seen=None):
    def run(command, **options):
        if seen is not None:
            seen.append((command, options))
        return subprocess.CompletedProcess(command, 0, text, "")

    return run


@pytest.mark.parametrize(
    ("said", "errors"),
    [
        ("{'ok': True}\n========= ERROR SUMMARY: 0 errors\n", 0),
        (
            "========= Invalid __global__ write of size 2 bytes\n=========     at x\n========= ERROR SUMMARY: 3 errors\n",
            3,
        ),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        (
            "========= Error: Race reported between Write\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error)\n",
            1,
        ),
    ],
)
def test_the_sanitizers_summary_is_read(installed, said, errors):
    seen = []
    record = tools.sanitized("memcheck", "a-case", 500, answering(said, seen))
    assert (record["errors"], record["ok"]) == (errors, errors == 0)
    assert bool(record["first"]) == bool(errors)
    (command_line, options) = seen[0]
    assert command_line[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert command_line[-2:] == ["--case", "a-case"]
    assert options["timeout"] == tools.LONGEST


def test_a_tool_without_a_verdict_is_no_success(installed):
    with pytest.raises(RuntimeError, match="gave no summary"):
        tools.sanitized("memcheck", "a", 9, answering("Segmentation fault\n"))
    with pytest.raises(RuntimeError, match="saw no launch"):
        tools.profiled("a", 9, answering("==ERROR== ERR_NVGPUCTRPERM\n"))

    def slow(command, **options):
        assert options["timeout"] == 9
        raise subprocess.TimeoutExpired(command, options["timeout"])

    with pytest.raises(RuntimeError, match="compute-sanitizer took more than 9 s"):
        tools.sanitized("memcheck", "a", 9, slow)


def test_a_tool_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(tools.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="ncu is not installed"):
        tools.profiled("a", 9, answering(""))


NCU = """==PROF== Connected to process 12
{'ok': True}
==PROF== Disconnected from process 12
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","partial_rope_gqa_attention","Command line","gpu__time_duration.sum","ns","10,000"
"0","12","partial_rope_gqa_attention","Command line","launch__registers_per_thread","register/thread","254"
"1","12","partial_rope_gqa_attention","Command line","gpu__time_duration.sum","ns","21,504"
"1","12","partial_rope_gqa_attention","Command line","something_else","%","1"
"""


def test_metrics_of_the_last_launch_are_kept(installed):
    record = tools.profiled("a", 9, answering(NCU))
    assert record["metrics"] == {
        "gpu__time_duration.sum": "21,504 ns",
        "launch__registers_per_thread": "254 register/thread",
    }
    text = report.markdown(empty() | {"profile": [record]})
    assert "## Nsight Compute: a\n\n- gpu__time_duration.sum: 21,504 ns" in text
