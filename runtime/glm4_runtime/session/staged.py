"""The session of a bundle of stages: slots, limits and chunks as in every session, and the stages one after another.

If the stages overlap, further runs begin before the first has ended: one works in each stage. Each stage runs its calls in
order. So the caches hold the same as if the runs had come one after another.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from glm4_runtime.arrays import Ids, Logits
from glm4_runtime.bundle import Manifest
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.base import Chunk, Decoding
from glm4_runtime.session.growing import GrowingSession
from glm4_runtime.session.stage import Pending, Positions, Stage, Step, undone

# Positions of a prompt that run together where stages overlap. Smaller chunks fill the stages sooner, but a product of
# fewer rows takes longer per row.
OVERLAPPING_CHUNK = 128


NO_LOGITS: Logits = np.empty((0, 0, 0), np.float32)


@dataclass(frozen=True)
class _Fed:
    """A run of a prompt's chunk whose logits nobody needs; the slot held ``past`` positions before."""

    slot: int
    past: int
    pending: Pending


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
        self._fed: deque[_Fed] = deque()
        self._failed: dict[
            int, tuple[int, BaseException]
        ] = {}  # by slot: its length before the run that failed
        self.use(stages)

    def use(self, stages: Iterable[Stage]) -> None:
        """Run on these stages from now on, whose caches hold nothing or the same as those of the stages before."""
        self._stages = tuple(stages)
        if all(stage.overlaps for stage in self._stages):
            self.pipeline_depth, self.prefill_chunk = len(self._stages), OVERLAPPING_CHUNK

    def load_adapter(self, name: str, folder: str | Path) -> None:  # noqa: ARG002  no stage takes adapters
        raise BundleError(
            f"{self.folder} has stages, which take no adapters at run time; merge the adapter with --lora"
        )

    @property
    def usable(self) -> bool:
        return not any(stage.lost for stage in self._stages)

    @property
    def copies_positions(self) -> bool:
        return True

    @property
    def kernels(self) -> Mapping[str, str]:
        return self._kernels

    # Runs -------------------------------------------------------------------------------------

    def _run_decoder(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        return self._begin(first_row, ids, past, logits_indices).result()

    def _run_encoder(self, ids: Ids) -> Logits:  # noqa: ARG002  the manifest's checks allow stages of decoders only
        raise RequestError("a bundle of stages generates text, and neither classifies nor encodes")

    def _begin(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Pending:
        """Begin a run of all stages; its result is the logits of the last one."""
        step = Step(first_row, past, logits_indices)
        first, *others = self._stages
        pending = first.begin(ids, step)
        for stage in others:
            pending = stage.begin(pending, step)
        return pending

    @property
    def _most_ahead(self) -> int:
        """The number of chunks that may be begun before the result of an earlier one: one for each stage."""
        return self.pipeline_depth if self.pipeline_depth > 1 else 0

    def _chunks(
        self,
        slot: int,
        token_ids: Sequence[int] | Ids,
        logits: Literal["none", "last", "all"] | int,
        chunk: int | None = None,
    ) -> Iterator[Logits]:
        self._raise_failure(slot)
        return super()._chunks(slot, token_ids, logits, chunk)

    def _run_chunks(self, slot: int, ids: Ids, first_asked: int, chunk: int) -> Iterator[Logits]:
        before = self._slots.length(slot)
        try:
            yield from super()._run_chunks(slot, ids, first_asked, chunk)
        except BaseException:  # this call has raised the error, and later ones shall not
            self._forget(slot, before)
            raise

    def _results(self, slot: int, chunks: Sequence[Chunk]) -> Iterator[Logits]:
        asked: deque[Pending] = deque()
        for one in chunks:
            self._fit_cache(max(self._slots.needed(), chunks[-1].end))
            pending = self._begin(self._slots.row(slot), one.ids[None], [one.past], one.indices)
            self._slots.set_length(slot, one.end)
            if not one.asked:
                self._fed.append(_Fed(slot, one.past, pending))
                self._land(self._most_ahead)
                yield NO_LOGITS
            else:
                asked.append(pending)
            if len(asked) > self._most_ahead:
                yield self._landed(slot, asked.popleft())
        while asked:
            yield self._landed(slot, asked.popleft())

    def _landed(self, slot: int, pending: Pending) -> Logits:
        """The logits of a run, after all earlier runs of its slot have succeeded."""
        self._settle(slot)
        result: Logits = pending.result()
        return result

    def decode_block(self, tokens: Mapping[int, int]) -> tuple[list[int], Logits]:
        return self.begin_decode(tokens).result()

    def run_block(self, tokens: Mapping[int, Sequence[int]]) -> tuple[list[int], Logits]:
        for slot in tokens:
            self._settle(slot)
        return super().run_block(tokens)

    def begin_decode(self, tokens: Mapping[int, int]) -> Decoding:
        for slot in tokens:
            self._settle(slot)
        first = 0
        if self.pipeline_depth > 1 and all(slot in self._slots for slot in tokens):
            first = self._slots.nearest(list(tokens))
        slots, past, ids = self._decode_inputs(tokens, first)
        pending = self._begin(first, ids, past, np.zeros((len(slots), 1), np.int64))
        for slot, length in zip(slots, past, strict=True):
            self._slots.set_length(slot, length + 1)
        return _Step(self, slots, past, pending)

    def undo(self, slots: Sequence[int], past: Sequence[int]) -> None:
        """Forget the position of a decode step that failed, in the slots that have gone no further."""
        for slot, length in zip(slots, past, strict=True):
            if slot in self._slots and self._slots.length(slot) == length + 1:
                self._slots.set_length(slot, length)

    # Runs whose results nobody has waited for ---------------------------------------------------

    def _land(self, most: int) -> None:
        """Wait until at most so many fed chunks run. Remembers the first error of each slot."""
        while len(self._fed) > most:
            one = self._fed.popleft()
            try:
                one.pending.result()
            except BaseException as error:
                self._failed.setdefault(one.slot, (one.past, error))

    def _settle(self, slot: int) -> None:
        """Wait for all fed chunks of a slot. Raises their first error, until the slot is freed or truncated."""
        if any(one.slot == slot for one in self._fed):
            self._land(0)
        self._raise_failure(slot)

    def _raise_failure(self, slot: int) -> None:
        if self._failed and slot in self._failed:
            raise self._failed[slot][1]

    def _forget(self, slot: int, length: int = 0) -> None:
        """Drop the runs of a slot that begin at ``length`` or later. The stages still run them, before what comes next."""
        self._fed = deque(one for one in self._fed if one.slot != slot or one.past < length)
        if slot in self._failed and self._failed[slot][0] >= length:
            del self._failed[slot]

    # Slots --------------------------------------------------------------------------------------

    def truncate(self, slot: int, length: int) -> None:
        if any(one.slot == slot for one in self._fed):
            self._land(0)
        if slot in self._failed:
            self._slots.set_length(slot, self._failed.pop(slot)[0])
        super().truncate(slot, length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._settle(source)
        super().copy_prefix(source, target, length)

    def release(self, slot: int) -> None:
        super().release(slot)
        self._forget(slot)

    def discard(self, slot: int) -> None:
        try:
            super().discard(slot)
        finally:
            self._forget(slot)

    def read_positions(self, slot: int, start: int, stop: int) -> Positions:
        self._settle(slot)
        return super().read_positions(slot, start, stop)

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
        self._fed.clear()
        for stage in self._stages:
            stage.close()
        self._stages = ()


@dataclass(frozen=True)
class _Step:
    """A decode step of a staged session; implements ``Decoding``."""

    session: StagedSession
    slots: list[int]
    past: list[int]
    pending: Pending

    def result(self) -> tuple[list[int], Logits]:
        try:
            logits: Logits = self.pending.result()
        except BaseException:
            self.session.undo(self.slots, self.past)
            raise
        return self.slots, logits[:, 0]
