"""``python -m benchmarks.gpu_check``: see the package."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PARTS = ("correctness", "stripped", "decode", "prefill", "endurance", "sanitizer", "profile", "engines")
TIMED = {"prefill", "decode", "engines"}  # parts that are held against the device's ceilings
INTERPRETED = 12  # length around which cases lie when Triton's interpreter computes them
MINUTES = 28
HOPPER = 90  # whose choices --plan shows where there is no GPU


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu-check", description="Attention kernel and engines: right, and how fast."
    )
    made.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    made.add_argument("--minutes", type=positive_float, default=MINUTES, help="when to end, whatever is left")
    made.add_argument(
        "--layers", type=positive, help="most layers of the whole models; as many as fit by default"
    )
    made.add_argument(
        "--scratch", type=Path, help="folder with room for a checkpoint, its ONNX and its engine"
    )
    made.add_argument(
        "--plan", action="store_true", help="print the cases in their order, and stop; needs no GPU"
    )
    made.add_argument(
        "--interpret",
        action="store_true",
        help="without a GPU: correctness by Triton's interpreter on small cases; writes no results",
    )
    made.add_argument("--case", metavar="NAME", help="one case of correctness, launched once; for tools")
    return made


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def arguments() -> argparse.Namespace:
    made = parser()
    options = made.parse_args()
    if options.interpret and set(options.only or ()) - {"correctness"}:
        made.error("--interpret checks correctness only: a time on the CPU would say nothing")
    return options


def host() -> dict[str, str]:
    import torch

    facts = dict(date=datetime.now(UTC).strftime("%Y-%m-%d"), python=platform.python_version())
    for package in ("torch", "triton", "tensorrt", "tensorrt_rtx", "onnxruntime-gpu"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts |= dict(
            device=torch.cuda.get_device_name(), capability=f"{major}.{minor}", cuda=str(torch.version.cuda)
        )
    return facts


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def interpreted() -> bool:
    from benchmarks.gpu_check.correctness import cases, check
    from glm4_plugins.launch import Tiles

    tiles = Tiles(32, 16, 1, 16, 1, 16, 1, 4, blocks=5, min_tiles=2)
    right = True
    for case in cases(INTERPRETED):
        if case.dtype != "bfloat16":  # the interpreter multiplies the bits of bfloat16, not its values
            result = check(case, tiles, "cpu")
            say(f"{'ok' if result['ok'] else 'WRONG'} {result}")
            right &= result["ok"]
    return right


def one_case(name: str) -> int:
    from benchmarks.gpu_check.correctness import check
    from benchmarks.gpu_check.plan import case_named, device_capability
    from glm4_plugins.launch import choices

    found = case_named(name)
    if found is None:
        say(f"there is no case {name}; --plan lists them")
        return 2
    result = check(found, choices(device_capability(), found.quantized)[0], "cuda", repeats=1)
    print(result)
    return 0 if result["ok"] else 1


def main() -> int:
    options = arguments()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        return 0 if interpreted() else 1
    import torch

    from benchmarks.gpu_check.plan import device_capability, planned
    from benchmarks.gpu_check.tasks import Deadline, run_tasks, wrong

    if options.plan:
        capability = device_capability() if torch.cuda.is_available() else HOPPER
        for task in chosen(planned(capability, {}, Deadline(options.minutes), options), options.only):
            print(f"{task.part}: {task.name}")
        return 0
    if not torch.cuda.is_available():
        say("gpu-check needs a CUDA device and there is none; --interpret checks small cases on the CPU")
        return 1
    if options.case:
        return one_case(options.case)
    from benchmarks.gpu_check import report

    results: dict[str, Any] = dict(host=host(), absent=[], refused=[], skipped=[])
    deadline = Deadline(options.minutes)
    tasks = list(chosen(planned(device_capability(), results, deadline, options), options.only))
    run_tasks(tasks, results, deadline, lambda kept: report.write(kept, options.out), say)
    for path in report.write(results, options.out):
        print(path)
    return 1 if wrong(results) or results["refused"] or results["skipped"] else 0


def chosen(tasks: Iterator[Any], only: list[str] | None) -> Iterator[Any]:
    """Tasks of the parts asked for, and those that they need: kernels compiled ahead, and ceilings of what is timed."""
    wanted = set(only or PARTS)
    wanted |= {"ceilings"} if wanted & TIMED else set()
    return (
        task
        for task in tasks
        if task.part in wanted or (task.part == "compiled" and wanted & set(PARTS[:-1]))
    )


if __name__ == "__main__":
    sys.exit(main())
