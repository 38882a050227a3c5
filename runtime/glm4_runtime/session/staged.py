"""The session of a bundle of stages: slots, limits and chunks as in every session, and the stages one after another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from glm4_runtime.arrays import Ids, Logits
from glm4_runtime.bundle import Manifest
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.growing import GrowingSession
from glm4_runtime.session.stage import Hidden, Positions, Stage, Step, undone


class StagedSession(GrowingSession):
    """A causal LM whose layers are in several stages. All stages use the same rows of their caches for a slot."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        max_seq_len: int,
        max_batch_size: int,
        stages: Sequence[Stage],
        provider: str,
        kernels: Mapping[str, str],
    ) -> None:
        super().__init__(folder, manifest, max_seq_len, max_batch_size)
        self.provider, self._kernels = provider, kernels
        self._stages = tuple(stages)

    def load_adapter(self, name: str, folder: str | Path) -> None:  # noqa: ARG002  no stage takes adapters
        raise BundleError(
            f"{self.folder} has stages, which take no adapters at run time; merge the adapter with --lora"
        )

    def _run_decoder(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        step = Step(first_row, past, logits_indices)
        values: Ids | Hidden = ids
        for stage in self._stages:
            values = stage.run(values, step)
        return cast("Logits", values)  # of the last stage

    def _run_encoder(self, ids: Ids) -> Logits:  # noqa: ARG002  the manifest's checks allow stages of decoders only
        raise RequestError("a bundle of stages generates text, and neither classifies nor encodes")

    def _move_row(self, move: Move) -> None:
        done: list[Stage] = []
        try:
            for stage in self._stages:
                stage.move(move)
                done.append(stage)
        except BaseException:
            if move.swapped_length:  # without it, the target is a free row, and the source has not changed
                for stage in done:
                    stage.move(undone(move))
            raise

    @property
    def copies_positions(self) -> bool:
        return True

    @property
    def kernels(self) -> Mapping[str, str]:
        return self._kernels

    def _read_row(self, row: int, start: int, stop: int) -> Positions:
        return np.concatenate([stage.read(row, start, stop) for stage in self._stages])

    def _write_row(self, row: int, start: int, block: Positions) -> None:
        ends = np.cumsum([2 * stage.layers for stage in self._stages])
        for stage, part in zip(self._stages, np.split(block, ends[:-1]), strict=True):
            stage.write(row, start, part)

    def _clear_row(self, row: int) -> None:
        for stage in self._stages:
            stage.clear(row)

    def _resize_cache(self, capacity: int) -> None:
        done: list[Stage] = []
        used = self._slots.longest()
        try:
            for stage in self._stages:
                stage.resize(capacity, used)
                done.append(stage)
        except MemoryError:
            if capacity < self._capacity:
                return  # every stage still has at least this capacity
            for stage in done:
                stage.resize(self._capacity, used)
            raise

    def close(self) -> None:
        for stage in self._stages:
            stage.close()
        self._stages = ()
