"""``python -m benchmarks.gpu_check``: see the package."""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PARTS = ("correctness", "prefill", "decode", "engines")
INTERPRETED = 12  # length around which cases lie when Triton's interpreter computes them
ON_GPU = 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Attention kernel and engines: right, and how fast."
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument(
        "--scratch", type=Path, help="folder with room for a checkpoint, its ONNX and its engine"
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="without a GPU: correctness by Triton's interpreter on small cases; writes no results",
    )
    options = parser.parse_args()
    if options.interpret and set(options.only or ()) - {"correctness"}:
        parser.error("--interpret checks correctness only: a time on the CPU would say nothing")
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


def correctness(interpret: bool) -> list[dict[str, Any]]:
    from benchmarks.gpu_check.correctness import cases, check
    from glm4_plugins.launch import Tiles

    if interpret:
        device, scale = "cpu", INTERPRETED
        choices: tuple[Tiles, ...] = (Tiles(32, 16, 1, 16, 1, 4, decode_blocks=5, min_tiles=2),)
    else:
        device, scale, choices = "cuda", ON_GPU, device_choices()
    results = []
    for case in cases(scale):
        if interpret and case.dtype == "bfloat16":
            continue  # the interpreter multiplies the bits of bfloat16, not its values
        for tiles in choices:
            results.append(check(case, tiles, device))
            say(f"{'ok' if results[-1]['ok'] else 'WRONG'} {results[-1]}")
    return results


def device_choices() -> tuple[Any, ...]:
    import torch

    from glm4_plugins.launch import choices
    from glm4_plugins.torch_kernel import known_capability

    return choices(known_capability(torch.device("cuda")))


def engine_records(bandwidth: float, results: dict[str, Any], scratch: Path | None) -> list[dict[str, Any]]:
    from benchmarks.gpu_check.engines import (
        check_engines,
    )  # needs what exports need, which the kernels do not

    return check_engines(bandwidth, results["absent"], results["refused"], say, scratch)


def main() -> int:
    options = arguments()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        return 0 if all(check["ok"] for check in correctness(True)) else 1
    import torch

    if not torch.cuda.is_available():
        say("gpu-check needs a CUDA device and there is none; --interpret checks small cases on the CPU")
        return 1
    from benchmarks.gpu_check import report, timing

    parts = options.only or PARTS
    results: dict[str, Any] = dict(host=host(), absent=[], refused=[])
    steps: dict[str, Callable[[], Any]] = {"correctness": lambda: correctness(False)}
    if {"prefill", "decode", "engines"} & set(parts):
        bandwidth, rate = timing.copy_bandwidth(), timing.matmul_rate()
        results["ceilings"] = dict(copy_bytes_per_second=bandwidth, matmul_per_second=rate)
        for name, cases in (("prefill", timing.prefill_cases()), ("decode", timing.decode_cases())):
            steps[name] = lambda cases=cases: [
                timing.measured(case, device_choices(), bandwidth, rate) for case in cases
            ]
        steps["engines"] = lambda: engine_records(bandwidth, results, options.scratch)
    for name in parts:
        say(f"{name} ...")
        try:
            results[name] = steps[name]()
        except Exception as error:
            # A part that fails must not take the others' results with it; the report says so.
            results["refused"].append(f"{name}: {type(error).__name__}: {error}")
            say(results["refused"][-1])
    for path in report.write(results, options.out):
        print(path)
    checks = (*results.get("correctness", ()), *results.get("engines", ()))
    wrong = [check for check in checks if not check["ok"]]
    return 1 if wrong or results["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
