"""The session for engines of TensorRT and TensorRT-RTX. Needs no torch, no Triton and no plugin library.

The cache is allocated once, with the engine's capacity, and bound as past and present at the same address. A prefill
runs one sequence in any row. A decode step runs rows 0 ... n - 1. The second step with the same n captures a CUDA
graph, and later ones launch it. All contexts share the weights and one block of activations.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from glm4_runtime.bundle import COUNTERS, PRESENT_COUNTERS, Manifest
from glm4_runtime.errors import BundleError
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.base import Ids, Logits, Session
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.cuda_memory import CudaMemory
from glm4_runtime.session.engine_files import ENGINES_OF_KIND, Engines, load_tensorrt
from glm4_runtime.session.engine_run import Bound, EngineRun

NO_GPU = "open the engine on a GPU host, or export the checkpoint with --target ort"
WIDTH_STEP = 64  # prefill widths: powers of two up to here, then multiples. Few shapes need few kernels


def padded_width(width: int, limit: int) -> int:
    """The padded width of a run of ``width`` positions, at most ``limit``."""
    step = 1 << (width - 1).bit_length() if width <= WIDTH_STEP else -(-width // WIDTH_STEP) * WIDTH_STEP
    return min(step, limit)


class TensorRtSession(Session):
    """A bundle whose dialect is ``tensorrt-rtx`` or ``tensorrt``."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        max_seq_len: int,
        max_batch_size: int,
        *,
        provider: str | None,
        threads: int | None,
    ) -> None:
        super().__init__(folder, manifest, max_seq_len, max_batch_size)
        for name, value in (("provider", provider), ("threads", threads)):
            if value is not None:
                raise BundleError(f"the bundle is an engine, to which {name} means nothing; leave it out")
        assert manifest.engine is not None
        trt = load_tensorrt(manifest.engine)
        self._closers = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.push(self._closers)
            self._cuda = Cuda("tensorrt-rtx", NO_GPU)
            self._closers.callback(self._cuda.close)
            kind = manifest.engine.kind
            self.provider = f"{kind} {trt.__version__}, GPU {self._cuda.capability()}"
            self._open_runs(ENGINES_OF_KIND[kind](trt, folder, manifest, self._cuda, self.skipped))
            undo.pop_all()

    def _open_runs(self, engines: Engines) -> None:
        self._closers.callback(engines.close)
        manifest, profiles = self.manifest, {p.name: p for p in engines.info.profiles}
        if manifest.kv_cache is None:
            self._encode = EngineRun(engines, profiles["encode"], manifest, 1, {})
            return
        self._prefill_profile = profiles["prefill"]
        self.prefill_chunk = min(self.prefill_chunk, self._prefill_profile.axes["sequence"][2])
        self._capacity = _cache_capacity(manifest)
        self._cache = CudaMemory(manifest, self.max_batch_size, self._cuda)
        self._closers.callback(self._cache.free)
        try:
            self._cache.resize(self._capacity, 0)
        except MemoryError as error:
            raise BundleError(
                f"no GPU memory for a KV cache of {self.max_batch_size} slots of {self._capacity} positions; "
                "open the session with a lower max_batch_size, or export with a lower --max-seq-len"
            ) from error
        self._counters = self._new_counters()
        self._prefill = EngineRun(engines, self._prefill_profile, manifest, 1, self._counters)
        self._decode: dict[int, EngineRun] = {}
        self._new_decode: Callable[[int], EngineRun] = lambda rows: EngineRun(
            engines, profiles["decode"], manifest, rows, self._rows(0, rows) | self._counters
        )

    def _new_counters(self) -> Bound:
        """The plugin's counters: one buffer as input and output, zero before and after every run."""
        for spec in self.manifest.inputs:
            if spec.name == COUNTERS:
                shape = tuple(int(axis) for axis in spec.shape)
                bound = shape, self._cuda.allocate_zeroed(4 * int(np.prod(shape)))
                return {COUNTERS: bound, PRESENT_COUNTERS: bound}
        return {}

    def _run_decoder(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        count, width = ids.shape
        if first_row == 0 and width == 1:
            return self._step(ids, past)
        asked = self._prefill_profile.axes["positions"][2]
        if logits_indices.shape[1] > asked:
            return self._run_in_parts(first_row, ids, past, logits_indices, asked)
        assert count == 1
        room = self._capacity - past[0]
        padded = min(padded_width(width, self._prefill_profile.axes["sequence"][2]), room)
        tokens = np.zeros((1, padded), np.int64)
        tokens[:, :width] = ids
        return self._prefill.run(
            {
                "input_ids": tokens,
                "past_lengths": np.asarray(past, np.int32),
                "query_lengths": np.array([width], np.int32),
                "logits_indices": logits_indices,
            },
            self._rows(first_row, 1),
        )

    def _run_in_parts(
        self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids, asked: int
    ) -> Logits:
        """Run in parts, because the engine has room for the logits of fewer positions."""
        parts, width = [], ids.shape[1]
        for start in range(0, width, asked):
            stop = min(start + asked, width)
            wanted = logits_indices[0][(logits_indices[0] >= start) & (logits_indices[0] < stop)] - start
            indices = wanted if len(wanted) else np.array([stop - start - 1])
            logits = self._run_decoder(first_row, ids[:, start:stop], [past[0] + start], indices[None])
            if len(wanted):
                parts.append(logits.copy())
        return np.concatenate(parts, axis=1)

    def _step(self, ids: Ids, past: Sequence[int]) -> Logits:
        rows = len(past)
        if rows not in self._decode:
            self._decode[rows] = self._new_decode(rows)
        return self._decode[rows].step(
            {
                "input_ids": ids,
                "past_lengths": np.asarray(past, np.int32),
                "query_lengths": np.ones(rows, np.int32),
                "logits_indices": np.zeros((rows, 1), np.int64),
            }
        )

    def _rows(self, first_row: int, count: int) -> Bound:
        """Shape and address of every past and present; the two of a pair share both."""
        bound: Bound = {}
        for past, present, _, shape, address in self._cache.views(first_row, count):
            bound[past] = bound[present] = shape, address
        return bound

    def _run_encoder(self, ids: Ids) -> Logits:
        width = ids.shape[1]
        assert self.manifest.engine is not None
        padded = padded_width(width, self.manifest.engine.profiles[0].axes["sequence"][2])
        tokens = np.zeros((1, padded), np.int64)
        tokens[:, :width] = ids
        result = self._encode.run({"input_ids": tokens, "query_lengths": np.array([width], np.int32)}, {})
        return result[:, :width] if "sequence" in self.manifest.outputs[0].shape else result

    def _move_row(self, move: Move) -> None:
        self._cache.move(move)

    def _clear_row(self, row: int) -> None:
        self._cache.clear(row)

    def _fit_cache(self, needed: int) -> None:
        """The cache has the engine's capacity from the start, which is at least ``max_seq_len``."""

    def close(self) -> None:
        for run in getattr(self, "_decode", {}).values():
            run.close()
        self._closers.close()


def _cache_capacity(manifest: Manifest) -> int:
    shape = next(spec.shape for spec in manifest.inputs if spec.name.startswith("past_key_values."))
    assert isinstance(shape[2], int)
    return shape[2]
