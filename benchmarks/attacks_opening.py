"""Attack the opening of bundles and checkpoints with generated changes of sound ones, each kept by its seed.

    python -m benchmarks.attacks_opening demo/glm4-tiny --what bundle --minutes 10 --out found.json

A process of its own opens one changed folder after the other, as the commands would: a bundle is opened, its tokenizer
and defaults are read, and it generates a few tokens; of a checkpoint everything is read that comes before an export's
work. An input is a finding where that process dies, takes too long or too much memory, or raises anything but a
refusal of one line. A finding is repeated by its seed:

    python -m benchmarks.attacks_opening demo/glm4-tiny --what bundle --seed 1234 --count 1
"""

import faulthandler
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from benchmarks.opening_inputs import CHANGES, forged
from glm4_runtime.errors import LONGEST, Glm4Error

# What one input may cost: seconds of processor time, seconds by the clock on a busy machine, bytes of the process.
MOST_SECONDS, HANGS = 10.0, 90.0
MOST_GROWN, ADDRESS_SPACE = 2 << 30, 8 << 30
ROOT = Path(__file__).parents[1]
TARGETS = ("ort", "cpu", "native")


class FindingError(Exception):
    """An input that cost too much, or that was refused as it must not be."""


def sound_ones(checkpoint: Path, what: str, folder: Path) -> list[Path]:
    """What is changed: bundles for each target of ONNX Runtime, or the checkpoint in one file and in shards."""
    from glm4_deploy.pipeline import ExportOptions, export

    if what == "bundle":
        for target in TARGETS:
            export(checkpoint, folder / target, ExportOptions(target=target, parity=False, max_seq_len=256))
        return [folder / target for target in TARGETS]
    return [in_shards(checkpoint, folder / "shards")]


def in_shards(checkpoint: Path, folder: Path) -> Path:
    """A copy of small files, and of the weights in two files with an index."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number in range(2):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        part = names[number::2]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def open_bundle(folder: Path) -> str:
    from glm4_deploy.folders import require_bundle
    from glm4_deploy.inspect import inspect_bundle
    from glm4_runtime import Session
    from glm4_runtime.defaults import recommended_params

    require_bundle(folder)
    inspect_bundle(folder)
    with Session.open(folder, max_batch_size=1, threads=1) as session:
        ids = [1, 2, 3] if session.tokenizer is None else session.tokenizer.encode("a text")
        if session.manifest.task == "causal-lm":
            list(session.generate(ids, recommended_params(folder, max_tokens=3, seed=0)))
    return "opened"


def open_checkpoint(folder: Path) -> str:
    from glm4_deploy.cache_key import cache_key
    from glm4_deploy.folders import require_checkpoint
    from glm4_deploy.inspect import inspect_checkpoint
    from glm4_deploy.plan import ExportOptions, make_plan
    from glm4_deploy.side_files import compare_side_files
    from glm4_exporters.checkpoint import Checkpoint
    from glm4_runtime.defaults import read_sampling_defaults

    require_checkpoint(folder)
    inspect_checkpoint(folder)
    options = ExportOptions()
    with Checkpoint.load(folder) as source:
        make_plan(source, options)
        read_sampling_defaults(folder)
        compare_side_files(source)
    cache_key(folder, options)
    return "opened"


OPEN = {"bundle": open_bundle, "checkpoint": open_checkpoint}


def attempt(what: str, sound: list[Path], work: Path, seed: int) -> str:
    """What became of an input: "opened" or "refused". Raises :class:`FindingError`."""
    done = forged(sound[seed % len(sound)], work / "forged", what, seed)
    began, before = time.process_time(), _peak_from_now()
    try:
        became = OPEN[what](work / "forged")
    except Glm4Error as error:
        message = str(error)
        if len(message) > LONGEST or not message.isprintable():
            raise FindingError(f"{done}: a refusal of {len(message)} characters") from error
        became = "refused"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise FindingError(
            f"{done}: {type(error).__name__} {str(error)[:200]!r} at {Path(where.filename).name}:{where.lineno}"
        ) from error
    took, grew = time.process_time() - began, peak() - before
    if took > MOST_SECONDS or grew > MOST_GROWN:
        raise FindingError(f"{done}: {took:.0f} s, {grew >> 20} MiB")
    return f"{done.partition(':')[0]}, {became}"


def _peak_from_now() -> int:
    """Bytes in memory now; :func:`peak` then tells the most since."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that this process has had in memory, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def attempts(what: str, sound: list[Path], seed: int, count: int | None, until: float) -> None:
    """Try inputs; a line before each says which, and a line after what became of it."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    number = 0
    with tempfile.TemporaryDirectory() as work:
        while (count is None or number < count) and time.time() < until:
            print("try", seed + number, flush=True)
            faulthandler.dump_traceback_later(HANGS, exit=True)
            try:
                print("was", attempt(what, sound, Path(work), seed + number), flush=True)
            except FindingError as finding:
                print("finding", json.dumps(str(finding)), flush=True)
            faulthandler.cancel_dump_traceback_later()
            number += 1


def hunted(command: list[str], seed: int, until: float) -> tuple[Counter[str], list[str], int]:
    """Outcomes and findings of a child that is started again after whatever ends it, and the next seed."""
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    last = seed
    with tempfile.TemporaryFile() as errors, subprocess.Popen(
        [*command, "--seed", str(seed)], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == "try":
                last, seed = int(rest), int(rest) + 1
            elif word == "was":
                outcomes[rest] += 1
            else:
                findings.append(f"seed {last}: {json.loads(rest)}")
        code = child.wait()
        errors.seek(max(0, errors.tell() - 1000))
        if code and time.time() < until:
            said = " ".join(errors.read().decode(errors="replace").split())[-500:]
            findings.append(f"seed {last}: the process ended with {code}: {said}")
    return outcomes, findings, seed


def child_command(sound: list[Path], what: str) -> list[str]:
    """The command of a child that tries inputs in its own process."""
    return [sys.executable, "-m", "benchmarks.attacks_opening", *map(str, sound), "--child", "--what", what]


def hunt(checkpoint: Path, what: str, seed: int, minutes: float, count: int | None = None) -> dict[str, Any]:
    """Try inputs for some minutes, or so many; what came of them, and how to repeat it."""
    until, first, seeds = time.time() + 60 * minutes, seed, 0
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        sound = sound_ones(checkpoint, what, Path(folder))
        parts = [*child_command(sound, what), "--until", str(until)]
        while time.time() < until and (count is None or seeds < count):
            options = [] if count is None else ["--count", str(count - seeds)]
            more, found, seed = hunted([*parts, *options], seed, until)
            outcomes += more
            findings += found
            seeds = seed - first
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("onnxruntime", "onnx", "tokenizers")},
        "command": f"python -m benchmarks.attacks_opening {checkpoint} --what {what} --seed {first} --minutes {minutes:g}",
        "seeds": [first, seed - 1],
        "outcomes": dict(sorted(outcomes.items())),
        "findings": findings,
    }


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--what", type=click.Choice(list(CHANGES)), default="bundle", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first input.")
@click.option("--count", type=int, help="So many inputs, in place of a time.")
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Keep what came of it here, as JSON.")
@click.option("--child", is_flag=True, hidden=True)
@click.option("--until", type=float, default=float("inf"), hidden=True)
def main(
    folders: tuple[Path, ...], what: str, seed: int, count: int | None, minutes: float, out: Path | None, child: bool, until: float
) -> None:  # fmt: skip
    """Change and open what FOLDERS hold: a sound checkpoint with a tokenizer."""
    if child:
        attempts(what, list(folders), seed, count, until)
        return
    report = hunt(folders[0], what, seed, minutes, count)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if out is not None:
        out.write_text(text + "\n", "utf-8")
    print(text)
    sys.exit(bool(report["findings"]))


if __name__ == "__main__":
    main()
