"""Checks the free room on all disks that an export writes to, before its first step."""

import shutil
from math import prod
from pathlib import Path

from glm4_deploy.plan import Plan
from glm4_exporters.architecture import EMBEDDING, expected_tensors
from glm4_exporters.engine.profiles import engine_profiles
from glm4_exporters.stages import stage_shapes
from glm4_runtime.bundle.safetensors_file import PAGE
from glm4_runtime.errors import ExportError

PARTS = (
    3  # maximum number of stored tensors per tensor of the checkpoint: codes, scales, zero points or a copy
)
# Size of an engine divided by the size of its weights: 1.005 for the 9B in int8, 1.007 in int4 (benchmarks/results).
ENGINE_SHARE = 1.02
# Size of a new timing cache. An assumption, not measured.
TIMING_CACHE = 64 * 2**20


def require_room(plan: Plan, place: Path) -> None:
    """Refuse an export whose files, temporary ones included, do not fit the disks.

    Args:
        place: the place of the bundle; its parent folders may not exist yet.

    Raises:
        ExportError: how much is needed, how much is free, and where.
    """
    needed: dict[int, int] = {}
    for path, size in _written(plan, place):
        folder = next(one for one in (path, *path.parents) if one.is_dir())
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + size
        if (free := shutil.disk_usage(folder).free) < needed[disk]:
            raise ExportError(
                f"this export writes {needed[disk] / 1e9:.1f} GB below {folder}, which has {free / 1e9:.1f} GB free; "
                "make room, or choose another place"
            )


def _written(plan: Plan, place: Path) -> list[tuple[Path, int]]:
    """Paths, with the bytes that exist at the same time."""
    weights, build = weight_file(plan), plan.engine
    if build is None:
        return [(place.parent, weights)]
    files = {p.file for p in engine_profiles(plan.task, plan.limits, build.layout, build.attention)}
    written = [(place.parent, weights + _engines(plan, weights, len(files), build.keep_onnx))]
    if build.timing_cache is not None:
        path = Path(build.timing_cache).absolute()
        written.append((path.parent, _timing_cache(path)))
    return written


def _engines(plan: Plan, weights: int, copies: int, keeps_onnx: bool) -> int:
    """Bytes of the engines that exist beside all weights, and of the weights for the parser.

    The ONNX files of a stage are deleted after its build. Then its engine takes their place.
    """
    wholes = [expected_tensors(plan.config, plan.task)]
    parts = [stage_shapes(plan.config, plan.task, stage) for stage in plan.stages] or wholes
    for_parser = max(map(plan.form.parser_bytes, parts))
    largest = max(map(plan.form.weight_bytes, parts))
    grown = (ENGINE_SHARE * copies - 1) * weights  # all engines, in place of all weights
    beside = ENGINE_SHARE * copies * weights if keeps_onnx or not plan.stages else max(grown, 0) + largest
    return round(beside) + for_parser


def weight_file(plan: Plan) -> int:
    """Upper bound for the bundle's data files: weights, tables of cosines and sines in each, and padding to pages."""
    shapes, config = expected_tensors(plan.config, plan.task), plan.config
    tables = 2 * 4 * config.positions * config.rotary_dim // 2 * max(1, len(plan.stages))
    tied = 4 * prod(shapes[EMBEDDING]) if plan.stages and config.tie_word_embeddings else 0
    return (
        plan.form.weight_bytes(shapes)
        + tied
        + tables
        + PAGE * PARTS * (len(shapes) + 2 * max(1, len(plan.stages)))
    )


def _timing_cache(path: Path) -> int:
    """The new file exists beside the old one until it replaces it."""
    return max(TIMING_CACHE, path.stat().st_size if path.is_file() else 0)
