"""Build the TensorRT-RTX engines of a large model's stages one after another, on a small disk and without a GPU.

    python benchmarks/make_checkpoint.py --size 32b --sparse CHECKPOINT
    python benchmarks/engine_stages.py CHECKPOINT --precision int8 --stages 3 --out RESULT.json

Each stage is traced, cut, written, checked and built as by ``glm4-deploy export --target tensorrt-rtx --stages``. Two
things differ, so that the disk holds the weights and the engine of one stage only. The weights are drawn at random when
they are read, because a sparse checkpoint holds zeros. And each stage's files are removed before the next stage, after
the engine has been hashed. There is no calibration and no parity.
"""

import dataclasses
import json
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from glm4_deploy.calibration import Prepared
from glm4_deploy.describe import describe
from glm4_deploy.engine_bundle import Part, build_report, make_engine
from glm4_deploy.pipeline import _parts_of, _save, _trace
from glm4_deploy.plan import EngineBuild, ExportOptions, Plan, make_plan
from glm4_deploy.show import shown_progress
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine.kinds import engine_version
from glm4_exporters.engine.profiles import engine_profiles
from glm4_exporters.stages import stage_profiles
from glm4_exporters.weights import Edits, WrittenWeights, attach, layout, write_files
from glm4_runtime.bundle import FileEntry, Manifest
from glm4_runtime.bundle.stage_manifest import stage_manifest

TARGET = "tensorrt-rtx"
DRAWN = 1 << 25  # random numbers, drawn once and read from ever other places
AT_ONCE = 1 << 22  # numbers of one block
UNKNOWN = FileEntry("0" * 64, 0)  # of files that do not exist yet


class DrawnCheckpoint(Checkpoint):
    """A checkpoint whose weights are random. Norms are near 1 and rows of matrices have norm 1."""

    def row_blocks(self, name: str, *buffers: Tensor) -> Iterator[tuple[int, Tensor]]:  # noqa: ARG002
        shape = self.tensors[name].shape
        rows, width = shape[0], int(torch.Size(shape[1:]).numel())
        scale = 1.0 if "embed_tokens" in name else 0.1 if "norm" in name else width**-0.5
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        step = max(64, AT_ONCE // width // 64 * 64)
        for first in range(0, rows, step):
            count = min(step, rows - first) * width
            start = int(torch.randint(len(NUMBERS) - count, (), generator=generator))
            block = NUMBERS[start : start + count] * scale + (1.0 if "norm" in name else 0.0)
            yield first, block.reshape(-1, *shape[1:])


NUMBERS = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).bfloat16()


def build_stage(
    source: Checkpoint, plan: Plan, build: EngineBuild, part: Part, number: int, work: Path
) -> dict[str, Any]:
    """Write one stage, build its engine, and remove both."""
    model, start = part.models["shared"], time.monotonic()
    with tempfile.TemporaryDirectory(dir=work) as name, shown_progress() as progress:
        folder = Path(name)
        tensors = layout(model)
        written = write_files(source, {folder / part.weights: tensors}, Edits(), progress)
        attach(model, tensors, part.weights)
        _save(model, folder / part.graph)
        seconds = time.monotonic() - start
        built = make_engine(folder, part, build, progress)
    return {
        "layers": plan.stages[number].layers,
        "weight_bytes": written.files[0].bytes,
        "write_seconds": round(seconds, 2),
        "files": {file: dataclasses.asdict(entry) for file, entry in built.files.items()},
        **build_report(built),
    }


def parts_of_plan(plan: Plan, build: EngineBuild) -> Iterator[Part]:
    prepared = Prepared(Edits())
    model = _trace(plan, prepared)
    with tempfile.TemporaryDirectory() as empty:
        written = WrittenWeights((UNKNOWN,) * len(plan.stages), UNKNOWN.sha256)
        manifest: Manifest = describe(plan, prepared, model, Path(empty), written)
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
        "what": "a model of random weights; each stage's weights and engine were removed before the next stage",
        "tensorrt_rtx": engine_version(TARGET),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "stages": [],
    }
    with DrawnCheckpoint.load(checkpoint) as source:
        plan = make_plan(source, options)
        assert plan.engine is not None
        result["options"] = dataclasses.asdict(plan.options)
        for number, part in enumerate(parts_of_plan(plan, plan.engine)):
            result["stages"].append(build_stage(source, plan, plan.engine, part, number, work or out.parent))
            out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
