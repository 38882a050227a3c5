"""Build the TensorRT-RTX engines of a large model's stages one after another, on a small disk and without a GPU.

    python benchmarks/make_checkpoint.py --size 32b --sparse CHECKPOINT
    python benchmarks/engine_stages.py CHECKPOINT --precision int8 --stages 3 --out RESULT.json

Each stage is traced, cut, checked and built as by ``glm4-deploy export --target tensorrt-rtx --stages``. The disk need not
hold the model: all weights are windows of one file of random numbers, each at another place. So no two weights are
equal, which TensorRT would store once. The builder hashes an engine while it writes, and the disk blocks behind are
freed at once (Linux). Less memory is mapped than in an export, and the builder's own memory is the same.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import platform
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_deploy.calibration import Prepared
from glm4_deploy.describe import describe
from glm4_deploy.engine_bundle import Part, build_report, make_engine
from glm4_deploy.pipeline import _parts_of, _save, _trace
from glm4_deploy.plan import EngineBuild, ExportOptions, Plan, make_plan
from glm4_deploy.show import shown_progress
from glm4_exporters.aligned_file import ALIGNMENT
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine.kinds import engine_version
from glm4_exporters.engine.profiles import engine_profiles
from glm4_exporters.stages import stage_profiles
from glm4_exporters.weights import Edits, StoredTensor, WrittenWeights, attach, layout
from glm4_runtime.bundle import FileEntry
from glm4_runtime.bundle.stage_manifest import stage_manifest

TARGET = "tensorrt-rtx"
PUNCH_HOLE = 3  # fallocate's FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
AT_ONCE = 1 << 24  # random numbers
UNKNOWN = FileEntry("0" * 64, 0)  # of files that are never written


def place_windows(tensors: list[StoredTensor]) -> tuple[list[StoredTensor], int]:
    """The tensors at overlapping places, and the size of the file that holds them all."""
    placed = [dataclasses.replace(tensor, offset=i * ALIGNMENT) for i, tensor in enumerate(tensors)]
    return placed, max(tensor.offset + tensor.nbytes for tensor in placed)


def write_numbers(path: Path, size: int) -> None:
    """Random float16 numbers between 0.01 and 0.03: finite and positive in every type that reads them."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        while file.tell() < size:
            file.write((0.01 + 0.02 * rng.random(AT_ONCE, np.float32)).astype(np.float16).tobytes())


@contextlib.contextmanager
def freed_behind(folder: Path, part: Part) -> Iterator[None]:
    """Free the disk blocks of the part's engines while they are written. The files keep their sizes, and read as zeros."""
    ended, libc = threading.Event(), ctypes.CDLL(None)

    def free() -> None:
        for path in {folder / profile.file for profile in part.profiles}:
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                length = os.fstat(file.fileno()).st_size
                libc.fallocate(file.fileno(), PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(length or 1))

    def watch() -> None:
        while not ended.wait(0.2):
            free()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def build_stage(part: Part, build: EngineBuild, work: Path | None) -> dict[str, Any]:
    """Build the engine of one stage, and remove it."""
    model = part.models["shared"]
    tensors = layout(model)
    windows, size = place_windows(tensors)
    with tempfile.TemporaryDirectory(dir=work) as name, shown_progress() as progress:
        folder = Path(name)
        write_numbers(folder / part.weights, size)
        attach(model, windows, part.weights)
        _save(model, folder / part.graph)
        with freed_behind(folder, part):
            built = make_engine(folder, part, build, progress)
    return {
        "layers": part.manifest.model.num_layers,
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "files": {file: {"sha256": e.sha256, "bytes": e.bytes} for file, e in built.files.items()},
        "build": build_report(built),
    }


def parts_of_plan(plan: Plan, build: EngineBuild) -> Iterator[Part]:
    prepared = Prepared(Edits())
    model = _trace(plan, prepared)
    with tempfile.TemporaryDirectory() as empty:
        written = WrittenWeights((UNKNOWN,) * len(plan.stages), UNKNOWN.sha256)
        manifest = describe(plan, prepared, model, Path(empty), written)
    profiles = engine_profiles(plan.task, plan.limits, build.layout, build.attention)
    models = _parts_of(plan, model, plan.graph_cache)
    for number, (stage, own) in enumerate(zip(plan.stages, models, strict=True), 1):
        shape = stage_manifest(manifest, stage)
        yield Part(shape, stage.graph, stage.weights, {"shared": own}, stage_profiles(profiles, number))


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--precision", default="int8", show_default=True)
@click.option("--stages", type=click.IntRange(2), default=2, show_default=True)
@click.option("--max-seq-len", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Folder of temporary files.")
def main(
    checkpoint: Path, precision: str, stages: int, max_seq_len: int, out: Path, work: Path | None
) -> None:
    """Build every stage of CHECKPOINT, and write times, sizes, hashes and memory to a JSON file."""
    options = ExportOptions(TARGET, precision, max_seq_len=max_seq_len, parity=False, stages=(stages,))
    result: dict[str, Any] = {
        "command": f"python benchmarks/engine_stages.py {checkpoint.name} --precision {precision} --stages {stages} "
        f"--max-seq-len {max_seq_len}",
        "what": "a model of random weights, which are windows of one file; each engine was hashed while it was written, "
        "and not kept; two cores that had other work",
        "tensorrt_rtx": engine_version(TARGET),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "stages": [],
    }
    with Checkpoint.load(checkpoint) as source:
        plan = make_plan(source, options)
    assert plan.engine is not None
    result["options"] = dataclasses.asdict(plan.options)
    for part in parts_of_plan(plan, plan.engine):
        result["stages"].append(build_stage(part, plan.engine, work))
        out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
