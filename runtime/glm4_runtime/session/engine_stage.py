"""Layers of a model as an engine, with their KV cache in GPU memory: a stage, or all layers of a bundle without stages.

The cache is allocated once, with the engine's capacity, and bound as past and present at the same address. A prefill
runs one sequence in any row. A decode step runs rows 0 ... n - 1. The second step with the same n captures a CUDA
graph, and later ones launch it. All contexts share the weights and one block of activations.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.arrays import Ids
from glm4_runtime.bundle import COUNTERS, PRESENT_COUNTERS, Manifest, StageInfo
from glm4_runtime.bundle.stage_manifest import stage_manifest
from glm4_runtime.errors import BundleError
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.cuda_memory import CudaMemory
from glm4_runtime.session.engine_files import ENGINES_OF_KIND, Engines, load_tensorrt
from glm4_runtime.session.engine_run import Array, Bound, EngineRun
from glm4_runtime.session.positions import SlotPositions
from glm4_runtime.session.stage import Hidden, Positions, Stage, Step
from glm4_runtime.session.staged import StagedSession

NO_GPU = "open the engine on a GPU host, or export the checkpoint with --target ort"
WIDTH_STEP = 64  # prefill widths: powers of two up to here, then multiples. Few shapes need few kernels


def padded_width(width: int, limit: int) -> int:
    """The padded width of a run of ``width`` positions, at most ``limit``."""
    step = 1 << (width - 1).bit_length() if width <= WIDTH_STEP else -(-width // WIDTH_STEP) * WIDTH_STEP
    return min(step, limit)


def padded(values: Array, width: int) -> Array:
    """``values`` [1, positions, ...] with zeros behind, up to ``width`` positions."""
    result = np.zeros((1, width, *values.shape[2:]), values.dtype)
    result[:, : values.shape[1]] = values
    return result


def require_no_options(provider: str | None, threads: int | None) -> None:
    """Refuse options of ONNX Runtime."""
    for name, value in (("provider", provider), ("threads", threads)):
        if value is not None:
            raise BundleError(f"the bundle is an engine, to which {name} means nothing; leave it out")


class EngineStage(Stage):
    """The layers of one engine, or of one engine per profile.

    Args:
        engines: closed together with the stage.
        manifest: of these layers alone.
        rows: of the cache.
        first_layer: number of the first layer.

    Attributes:
        chunk: maximum number of new positions of a run.

    Raises:
        BundleError: the GPU has no memory for the cache.
    """

    def __init__(self, engines: Engines, manifest: Manifest, rows: int, first_layer: int = 0) -> None:
        self.layers = manifest.model.num_layers
        self._manifest, self._cuda = manifest, engines.cuda
        self._profiles = {profile.name: profile for profile in engines.info.profiles}
        self.chunk = self._profiles["prefill"].axes["sequence"][2]
        self._entry, self._gives_logits = manifest.inputs[0].name, manifest.outputs[0].name == "logits"
        past = next(spec for spec in manifest.inputs if spec.name.startswith("past_key_values."))
        self._capacity = int(past.shape[2])
        self._closers = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.push(self._closers)
            self._closers.callback(engines.close)
            self._cache = self._new_cache(rows, range(first_layer, first_layer + self.layers))
            self._counters = self._new_counters()
            self._engines = engines
            self._prefill = EngineRun(engines, self._profiles["prefill"], manifest, 1, self._counters)
            self._decode: dict[int, EngineRun] = {}
            undo.pop_all()

    def _new_cache(self, rows: int, layers: range) -> CudaMemory:
        cache = CudaMemory(self._manifest, rows, self._cuda, layers)
        self._closers.callback(cache.free)
        try:
            cache.resize(self._capacity, 0)
        except MemoryError as error:
            raise BundleError(
                f"no GPU memory for a KV cache of {rows} slots of {self._capacity} positions; "
                "open the session with a lower max_batch_size, or export with a lower --max-seq-len"
            ) from error
        return cache

    def _new_counters(self) -> Bound:
        """The plugin's counters: one buffer as input and output, zero before and after every run."""
        for spec in self._manifest.inputs:
            if spec.name == COUNTERS:
                shape = tuple(int(axis) for axis in spec.shape)
                bound = shape, self._cuda.allocate_zeroed(4 * int(np.prod(shape)))
                return {COUNTERS: bound, PRESENT_COUNTERS: bound}
        return {}

    def run(self, values: Ids | Hidden, step: Step) -> Hidden:
        width = values.shape[1]
        if step.first_row == 0 and width == 1:
            return self._step(values, step)
        most = self._profiles["prefill"].axes["positions"][2]
        if self._gives_logits and step.logits_indices.shape[1] > most:
            return self._run_in_parts(values, step, most)
        room = min(self.chunk, self._capacity - step.past[0])
        values = padded(values, min(padded_width(width, self.chunk), room))
        inputs = self._inputs(values, step, np.array([width], np.int32))
        result = self._prefill.run(inputs, self._rows(step.first_row, 1))
        return result if self._gives_logits else result[:, :width]

    def _run_in_parts(self, values: Array, step: Step, most: int) -> Array:
        """Run in parts, because the engine has room for the logits of fewer positions."""
        parts, width, asked = [], values.shape[1], step.logits_indices[0]
        for start in range(0, width, most):
            stop = min(start + most, width)
            wanted = asked[(asked >= start) & (asked < stop)] - start
            indices = wanted if len(wanted) else np.array([stop - start - 1])
            part = Step(step.first_row, [step.past[0] + start], indices[None])
            logits = self.run(values[:, start:stop], part)
            if len(wanted):
                parts.append(logits.copy())
        return np.concatenate(parts, axis=1)

    def _step(self, values: Array, step: Step) -> Array:
        rows = len(values)
        if rows not in self._decode:
            bound = self._rows(0, rows) | self._counters
            self._decode[rows] = EngineRun(
                self._engines, self._profiles["decode"], self._manifest, rows, bound
            )
        first = Step(0, step.past, np.zeros((rows, 1), np.int64))
        return self._decode[rows].step(self._inputs(values, first, np.ones(rows, np.int32)))

    def _inputs(self, values: Array, step: Step, lengths: npt.NDArray[np.int32]) -> dict[str, Array]:
        inputs: dict[str, Any] = {
            self._entry: values,
            "past_lengths": np.asarray(step.past, np.int32),
            "query_lengths": lengths,
        }
        return inputs | ({"logits_indices": step.logits_indices} if self._gives_logits else {})

    def _rows(self, first_row: int, count: int) -> Bound:
        """Shape and address of every past and present; the two of a pair share both."""
        bound: Bound = {}
        for past, present, _, shape, address in self._cache.views(first_row, count):
            bound[past] = bound[present] = shape, address
        return bound

    def move(self, move: Move) -> None:
        self._cache.move(move)

    def clear(self, row: int) -> None:
        self._cache.clear(row)

    def resize(self, capacity: int, used: int) -> None:
        """The cache has the engine's capacity from the start, which is at least the session's limit."""

    def read(self, row: int, start: int, stop: int) -> Positions:
        raise NotImplementedError  # a session refuses a cache that is not in host memory

    def write(self, row: int, start: int, block: Positions) -> None:
        raise NotImplementedError

    def close(self) -> None:
        for run in self._decode.values():
            run.close()
        self._decode.clear()
        self._closers.close()


def open_engine_stage(
    folder: Path, manifest: Manifest, stage: StageInfo, rows: int, cuda: Cuda, skipped: dict[str, str]
) -> EngineStage:
    """Open one stage of a bundle of engines on the GPU of ``cuda``.

    Args:
        skipped: receives the reason if a step cannot be recorded as a CUDA graph.

    Raises:
        BundleError: the engine cannot run here, or the GPU lacks memory. UnavailableError: TensorRT is not installed.
    """
    assert manifest.engine is not None
    trt, own = load_tensorrt(manifest.engine), stage_manifest(manifest, stage)
    engines = ENGINES_OF_KIND[manifest.engine.kind](trt, folder, own, cuda, skipped)
    return EngineStage(engines, own, rows, stage.first_layer)


class EngineStagedSession(StagedSession):
    """All stages on one GPU. Hidden states go from stage to stage through host memory."""

    _cuda: Cuda

    @property
    def copies_positions(self) -> bool:
        return False

    def _read_row(self, row: int, start: int, stop: int) -> Positions:
        return SlotPositions._read_row(self, row, start, stop)  # refuses: the cache is on the GPU

    def _write_row(self, row: int, start: int, block: Positions) -> None:
        SlotPositions._write_row(self, row, start, block)

    def close(self) -> None:
        super().close()
        self._cuda.close()


def open_engine_stages(
    folder: Path,
    manifest: Manifest,
    max_seq_len: int,
    max_batch_size: int,
    *,
    provider: str | None,
    threads: int | None,
) -> StagedSession:
    """Open all stages of a bundle of engines in this process, on one GPU; they run one after another.

    Raises:
        BundleError: an engine cannot run here. UnavailableError: TensorRT is not installed.
    """
    require_no_options(provider, threads)
    assert manifest.engine is not None
    trt, skipped = load_tensorrt(manifest.engine), dict[str, str]()
    stages: list[EngineStage] = []
    with contextlib.ExitStack() as undo:
        cuda = Cuda("tensorrt-rtx", NO_GPU)
        undo.callback(cuda.close)
        for stage in manifest.stages:
            stages.append(open_engine_stage(folder, manifest, stage, max_batch_size, cuda, skipped))
            undo.callback(stages[-1].close)
        name = f"{manifest.engine.kind} {trt.__version__}, GPU {cuda.capability()}"
        session = EngineStagedSession(folder, manifest, max_seq_len, max_batch_size, stages, name, {})
        undo.pop_all()
    session._cuda, session.skipped = cuda, skipped
    session.prefill_chunk = min(session.prefill_chunk, *(stage.chunk for stage in stages))
    return session
