"""The session for engines of TensorRT and TensorRT-RTX. Needs no torch, no Triton and no plugin library.

:class:`~glm4_runtime.session.engine_stage.EngineStage` has the layers of a causal LM and their cache.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm4_runtime.arrays import Ids, Logits
from glm4_runtime.bundle import Manifest
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.base import Session
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.engine_files import ENGINES_OF_KIND, Engines, load_tensorrt
from glm4_runtime.session.engine_run import EngineRun
from glm4_runtime.session.engine_stage import NO_GPU, EngineStage, padded, padded_width, require_no_options
from glm4_runtime.session.stage import Step


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
        require_no_options(provider, threads)
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
        if self.manifest.kv_cache is None:
            self._closers.callback(engines.close)
            profile = next(p for p in engines.info.profiles if p.name == "encode")
            self._encode = EngineRun(engines, profile, self.manifest, 1, {})
            return
        self._stage = EngineStage(engines, self.manifest, self.max_batch_size)
        self._closers.callback(self._stage.close)
        self.prefill_chunk = min(self.prefill_chunk, self._stage.chunk)

    def _run_decoder(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        return self._stage.run(ids, Step(first_row, past, logits_indices))

    def _run_encoder(self, ids: Ids) -> Logits:
        width = ids.shape[1]
        assert self.manifest.engine is not None
        limit = self.manifest.engine.profiles[0].axes["sequence"][2]
        tokens = padded(ids, padded_width(width, limit))
        result = self._encode.run({"input_ids": tokens, "query_lengths": np.array([width], np.int32)}, {})
        return result[:, :width] if "sequence" in self.manifest.outputs[0].shape else result

    def _move_row(self, move: Move) -> None:
        self._stage.move(move)

    def _clear_row(self, row: int) -> None:
        self._stage.clear(row)

    def _fit_cache(self, needed: int) -> None:
        """The cache has the engine's capacity from the start, which is at least ``max_seq_len``."""

    def close(self) -> None:
        self._closers.close()
