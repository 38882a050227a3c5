"""The order of the cases: what tells most comes first, so that a run that is cut short has told the most."""

import atexit
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check import endurance, stripped, timing, tools
from benchmarks.gpu_check.correctness import Case, cases, check, quantized_cases
from benchmarks.gpu_check.precompile import kernels_of, precompile
from benchmarks.gpu_check.tasks import Deadline, Results, Task
from glm4_plugins.launch import Tiles, choices
from glm4_plugins.torch_kernel import known_capability

SCALE = 1000  # positions around which the lengths of cases lie
SMALL = 60  # of those that run under compute-sanitizer, which takes many times as long
# A prefill and a decode step of each kind, and an int8 cache, by their place in the lists of cases.
SANITIZED, SANITIZED_INT8 = (1, 3, 5, 17), (0,)
PROFILED = (18, 19)  # one long sequence, and five uneven ones, in bfloat16 with the 9B's heads


def device_capability() -> int:
    """The GPU's compute capability, or the next lower one that has block sizes."""
    return known_capability(torch.device("cuda"))


def planned(capability: int, results: Results, deadline: Deadline, options: Namespace) -> Iterator[Task]:
    """All tasks in their order.

    Args:
        results: where tasks find the ceilings that an earlier one measured.
        options: ``scratch`` and ``layers`` of the command line.
    """
    processors = None
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    wide, quantized = (choices(capability, of_int8, processors) for of_int8 in (False, True))
    plain, int8 = list(cases(SCALE)), list(quantized_cases(SCALE))
    timed = timing.first_cases()
    yield Task("ceilings", "copy and product", partial(ceilings, results))
    yield Task("compiled", "first block sizes", lambda: precompile(kernels_of((*plain, *timed), wide[:1])))
    yield from _correct(plain, wide[:1])
    yield from _stripped(capability, wide)
    yield from _timed(timed, wide, results)
    yield from _enduring(wide[0])
    yield from _correct(int8, quantized[:1])
    yield from _tools([plain[i].name for i in PROFILED], deadline)
    yield from _engines(results, options)
    yield Task("compiled", "other block sizes", lambda: precompile(kernels_of(plain, wide[1:])))
    yield from _correct(plain, wide[1:])
    yield from _correct(int8, quantized[1:])
    rest = [case for case in (*timing.decode_cases(), *timing.prefill_cases()) if case not in timed]
    yield from _timed(rest, wide, results)


def ceilings(results: Results) -> None:
    """The device's own rates, measured in this run."""
    results["ceilings"] = dict(
        copy_bytes_per_second=timing.copy_bandwidth(), matmul_per_second=timing.matmul_rate()
    )


def _correct(some: Sequence[Case], tiles: Sequence[Tiles]) -> Iterator[Task]:
    for one in tiles:
        for case in some:
            yield Task("correctness", f"{case.name}, {_sizes(one)}", partial(check, case, one, "cuda"))


def _stripped(capability: int, tiles: Sequence[Tiles]) -> Iterator[Task]:
    def run(case: Case, one: Tiles, attribute: bool) -> dict[str, Any]:
        from benchmarks.gpu_check.driver import Driver

        return stripped.check(case, one, capability, attribute, Driver())

    for one in (
        tiles[0],
        tiles[-1],
    ):  # the last needs less shared memory than the driver gives without being asked
        for attribute in (True, False):
            for case in stripped.CASES if attribute else stripped.CASES[:1]:
                asked = "with" if attribute else "without"
                name = f"{case.name}, {_sizes(one)}, {asked} the shared-memory attribute"
                yield Task("stripped", name, partial(run, case, one, attribute))


def _timed(some: Sequence[Case], tiles: Sequence[Tiles], results: Results) -> Iterator[Task]:
    def run(case: Case) -> dict[str, Any]:
        rates = results["ceilings"]
        return timing.measured(case, tiles, rates["copy_bytes_per_second"], rates["matmul_per_second"])

    for case in some:
        part = "decode" if case.lengths[0] == 1 else "prefill"
        name = f"{len(case.pasts)} x {case.pasts[0]}+{case.lengths[0]}"
        yield Task(part, name, partial(run, case))


def _enduring(tiles: Tiles) -> Iterator[Task]:
    for case in endurance.UNEVEN:
        yield Task(
            "endurance", f"{endurance.LAUNCHES} x {case.name}", partial(endurance.launches, case, tiles)
        )
    yield Task("endurance", "two layers in a CUDA graph", partial(endurance.layers_in_a_graph, tiles))


def case_named(name: str) -> Case | None:
    """Of all cases of correctness, also the small ones."""
    every = (make(scale) for scale in (SCALE, SMALL) for make in (cases, quantized_cases))
    return next((case for some in every for case in some if case.name == name), None)


def _tools(profiles: Sequence[str], deadline: Deadline) -> Iterator[Task]:
    plain, int8 = list(cases(SMALL)), list(quantized_cases(SMALL))
    sanitized = [*(plain[i].name for i in SANITIZED), *(int8[i].name for i in SANITIZED_INT8)]

    def sanitize(tool: str, name: str) -> dict[str, Any]:
        return tools.sanitized(tool, name, deadline.left())

    def profile(name: str) -> dict[str, Any]:
        return tools.profiled(name, deadline.left())

    for name in sanitized:
        yield Task("sanitizer", f"memcheck {name}", partial(sanitize, "memcheck", name))
    for name in profiles:
        yield Task("profile", name, partial(profile, name))
    for name in sanitized:
        yield Task("sanitizer", f"racecheck {name}", partial(sanitize, "racecheck", name))


def _engines(results: Results, options: Namespace) -> Iterator[Task]:
    from benchmarks.gpu_check import engines  # needs what exports need, which the kernels do not

    models = engines.WholeModels(options.scratch, options.layers)
    atexit.register(models.close)

    def run(candidate: engines.Candidate) -> dict[str, Any] | None:
        if reason := engines.why_absent(candidate):
            if reason not in results["absent"]:
                results["absent"].append(reason)
            return None
        return models.run(candidate, results["ceilings"]["copy_bytes_per_second"])

    for candidate in engines.CANDIDATES:
        yield Task("engines", candidate.name, partial(run, candidate))


def _sizes(tiles: Tiles) -> str:
    return f"{tiles.block_m}x{tiles.block_n}/{tiles.decode_n}"
