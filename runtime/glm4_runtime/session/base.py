"""The base of all sessions: slots, limits, chunks, and errors that do not affect other slots.

A subclass adds the kernels and the memory: the abstract methods.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np

from glm4_runtime.arrays import Ids as Ids
from glm4_runtime.arrays import Logits as Logits
from glm4_runtime.bundle import Manifest
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.errors import ModelError, RequestError, SlotError
from glm4_runtime.generate import Token, Vocabulary, generate
from glm4_runtime.kv_cache import Move, SlotTable
from glm4_runtime.places import PROCESS
from glm4_runtime.sampling import SamplingParams, TokenMask
from glm4_runtime.scoring import LogLikelihood, log_likelihoods, rolling_log_likelihood
from glm4_runtime.session.blocks import Blocks
from glm4_runtime.session.checks import require_task, require_tokens
from glm4_runtime.session.slot_steps import SlotSteps
from glm4_runtime.side_files import check_bundle
from glm4_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from glm4_runtime.prefix_store.store import PrefixStore

DEFAULT_CHUNK = 512


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a slot that run together.

    Attributes:
        ids: int64 [width].
        past: positions before them.
        first_asked: the first position whose logits are asked for; ``width`` or more: none is.
    """

    ids: Ids
    past: int
    first_asked: int

    @property
    def end(self) -> int:
        return self.past + len(self.ids)

    @property
    def asked(self) -> bool:
        return self.first_asked < len(self.ids)

    @property
    def indices(self) -> Ids:
        """The positions whose logits are computed, int64 [1, positions]: at least one."""
        return np.arange(min(self.first_asked, len(self.ids) - 1), len(self.ids))[None]


class Decoding(Protocol):
    """A decode step that may still run."""

    def result(self) -> tuple[list[int], Logits]:
        """Wait for the step; called once. See :meth:`Session.decode_block`. A failed step changes no slot."""


@dataclass(frozen=True)
class Decoded:
    """A decode step that has ended."""

    slots: list[int]
    logits: Logits

    def result(self) -> tuple[list[int], Logits]:
        return self.slots, self.logits


class Session(Blocks, abc.ABC):
    """One opened bundle. Not thread-safe: one thread drives a session.

    Attributes:
        manifest: the bundle's manifest.
        max_seq_len, max_batch_size: this session's limits, at most the bundle's.
        provider: the device's kernels in use; ``skipped`` says by name why others are not used.
        prefill_chunk: maximum number of new positions per run; longer prompts run in chunks.
        pipeline_depth: number of decode steps that may run at the same time, one in each stage. If stages do not overlap,
            this is 1.
        threads: threads within one operator. None: all cores.
        adapter: the adapter of sequences for which :meth:`use_adapter` chose none. None: the base model.
    """

    pipeline_depth = 1
    threads: int | None = None

    def __init__(self, folder: Path, manifest: Manifest, max_seq_len: int, max_batch_size: int) -> None:
        self.folder, self.manifest = folder, manifest
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.prefill_chunk = DEFAULT_CHUNK
        self.provider = ""
        self.skipped: dict[str, str] = {}
        self.adapter = None
        self._slots = SlotTable(max_batch_size)
        self._adapter_of = {}
        self._tokenizer: Tokenizer | None = None
        self._warnings: tuple[str, ...] | None = None

    @staticmethod
    def open(
        bundle: str | Path,
        *,
        provider: str | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        threads: int | None = None,
        verify: bool = False,
        stages_on: str = PROCESS,
    ) -> "Session":
        """Open a bundle for generation, classification or encoding.

        Args:
            provider: an ONNX Runtime execution provider by name; by default the manifest decides.
            max_seq_len, max_batch_size: lower limits than the bundle's, to save memory.
            threads: threads within one operator; all cores by default.
            verify: hash the weights completely; otherwise every small file and 64 blocks of the weights.
            stages_on: where the stages of a bundle of stages run: ``"process"`` is this one, ``"ray"`` is Ray actors.
                Call ``ray.init`` before to join a cluster; otherwise one starts on this machine.

        Raises:
            BundleError: no bundle, a damaged one, or one that cannot run here; says what to do.
        """
        from glm4_runtime.session import open_session

        return open_session(
            Path(bundle),
            provider=provider,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            threads=threads,
            verify=verify,
            stages_on=stages_on,
        )

    # What a subclass adds ------------------------------------------------------------------

    @abc.abstractmethod
    def _run_encoder(self, ids: Ids) -> Logits:
        """Run ids [1, S] without a cache and return the graph's one output."""

    @abc.abstractmethod
    def _clear_row(self, row: int) -> None:
        """Set a row of every layer's cache to zeros."""

    @abc.abstractmethod
    def _fit_cache(self, needed: int) -> None:
        """Have room for ``needed`` positions, at most ``max_seq_len``, in each row. The positions in use stay.

        Raises:
            SlotError: no memory for them. Nothing has changed then.
        """

    @property
    def usable(self) -> bool:
        """False after a failure that ends the session: each further call fails."""
        return True

    @abc.abstractmethod
    def close(self) -> None:
        """Free memory and threads. The session cannot be used afterwards."""

    # The protocol ----------------------------------------------------------------------------

    def prefill(
        self, slot: int, token_ids: Sequence[int] | Ids, logits: Literal["none", "last", "all"] | int = "last"
    ) -> Logits:
        """Append tokens to a slot, which may already hold some, and return the requested logits.

        Args:
            logits: ``"last"`` for the last position, ``"all"``, k for the last k, or ``"none"``. With ``"none"``, stages
                that overlap may still run when this returns. If such a run fails, later calls for this slot raise the
                error, until the slot is freed, or truncated to what it held before the run.

        Returns:
            float32 [positions, vocab], a copy for the caller.

        Raises:
            SlotError: no such slot, or not enough room in it. RequestError: no or bad tokens.
                Neither changes any slot.
        """
        parts = list(self._chunks(slot, token_ids, logits))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.manifest.model.vocab_size), np.float32)

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Logits]:
        """Append one token to each of the given slots, in one step; returns each slot's logits, float32 [vocab].

        Raises:
            SlotError: a slot that is not in use or is full. RequestError: a bad token.
                Neither changes any slot.
        """
        if not tokens:
            return {}
        slots, logits = self.decode_block(tokens)
        return {slot: row.copy() for slot, row in zip(slots, logits, strict=True)}

    def decode_block(self, tokens: Mapping[int, int]) -> tuple[list[int], Logits]:
        """Like :meth:`decode`, without a copy per slot. Returns the slots, and their logits in that order as float32
        [slots, vocab], which the next run may overwrite."""
        slots, past, ids = self._decode_inputs(tokens, 0)
        result = self._run_decoder(0, ids, past, np.zeros((len(slots), 1), np.int64))
        for slot, length in zip(slots, past, strict=True):
            self._slots.set_length(slot, length + 1)
        return slots, result[:, 0]

    def begin_decode(self, tokens: Mapping[int, int]) -> "Decoding":
        """Like :meth:`decode_block`, but may return before the step has ended, if stages overlap. Until then, further
        steps may begin for other slots.

        Errors of the step are raised by the result.
        """
        return Decoded(*self.decode_block(tokens))

    def truncate(self, slot: int, length: int) -> None:
        """Forget all positions of a slot from ``length`` on; length 0 keeps the slot in use."""
        self._require_slot(slot, in_use=True)
        if not 0 <= length <= self._slots.length(slot):
            raise SlotError(
                f"slot {slot} holds {self._slots.length(slot)} positions and cannot be truncated to {length}"
            )
        self._slots.set_length(slot, length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Start the free slot ``target`` with the first ``length`` positions of ``source``.

        Raises:
            SlotError: a wrong slot or length, or other adapters: keys and values belong to one adapter.
        """
        self._require_slot(source, in_use=True)
        self._require_slot(target)
        if target in self._slots:
            raise SlotError(f"slot {target} is in use; release it first")
        if not 0 <= length <= self._slots.length(source):
            raise SlotError(f"slot {source} holds {self._slots.length(source)} positions, not {length}")
        theirs = self.adapter_of(source)
        if self._adapter_of.setdefault(target, theirs) != theirs:
            raise SlotError(
                f"slot {source} has {theirs or 'no adapter'}, but slot {target} has {self._adapter_of[target] or 'none'}; "
                "a prefix belongs to one adapter"
            )
        row = self._slots.add(target)
        self._move_row(Move(self._slots.row(source), row, length))
        self._slots.set_length(target, length)

    def release(self, slot: int) -> None:
        """Free a slot. Releasing a free one does nothing."""
        self._require_slot(slot)
        self._adapter_of.pop(slot, None)
        if slot in self._slots:
            self._slots.remove(slot)

    def discard(self, slot: int) -> None:
        """Free a slot whose contents may be NaN or infinite, and set its memory to zeros. Attention may multiply
        memory beyond a sequence's end by zero, and zero times NaN would damage the next sequence in this slot."""
        self._require_slot(slot)
        if slot in self._slots:
            try:
                self._clear_row(self._slots.row(slot))
            finally:
                self._slots.remove(slot)
                self._adapter_of.pop(slot, None)

    def length(self, slot: int) -> int:
        """Positions in a slot; 0 if it is not in use."""
        self._require_slot(slot)
        return self._slots.length(slot)

    def free_slots(self) -> list[int]:
        return self._slots.free()

    def score(self, token_ids: Sequence[int], chunk: int = DEFAULT_CHUNK) -> Iterator[Logits]:
        """Teacher-forced logits of every position, in order, as float32 [<= chunk, vocab] blocks.

        Takes a free slot until the iterator is exhausted or closed. Checks its arguments at once.
        """
        require_task(self.manifest, "causal-lm", "score")
        if chunk < 1:
            raise RequestError(f"chunk is {chunk}, but must be at least 1")
        require_tokens(token_ids, self.manifest.model.vocab_size)
        if len(token_ids) > self.max_seq_len:
            raise RequestError(
                f"{len(token_ids)} tokens exceed this session's max_seq_len {self.max_seq_len}"
            )

        def blocks() -> Iterator[Logits]:
            slot = self.next_slot()
            try:
                yield from self._chunks(slot, token_ids, "all", chunk)
            finally:
                self.release(slot)

        return blocks()

    def log_likelihood(self, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> LogLikelihood:
        """The log-probabilities of a continuation's tokens after a prompt. Needs a free slot."""
        return self.log_likelihoods(prompt_ids, [continuation_ids])[0]

    def log_likelihoods(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[LogLikelihood]:
        """As :meth:`log_likelihood`, for several continuations of one prompt. The prompt runs once."""
        require_task(self.manifest, "causal-lm", "score")
        return log_likelihoods(self, prompt_ids, continuations)

    def rolling_log_likelihood(self, token_ids: Sequence[int], context: int = 1) -> LogLikelihood:
        """The log-probabilities of all tokens of a text after the first, however long the text is.

        Args:
            context: tokens of the previous window at the beginning of each further window.
        """
        require_task(self.manifest, "causal-lm", "score")
        return rolling_log_likelihood(self, token_ids, context)

    def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        mask: TokenMask | None = None,
        store: "PrefixStore | None" = None,
    ) -> Iterator[Token]:
        """Continue a prompt; yields each token with its id and the text it completes.

        Args:
            store: the prefix cache on disk, from which the prompt may start.

        Takes a free slot until the iterator is exhausted or closed.
        """
        require_task(self.manifest, "causal-lm", "generate")
        require_tokens(token_ids, self.manifest.model.vocab_size)
        steps = SlotSteps(self, store)
        vocabulary = Vocabulary.of(self.manifest.model, self.tokenizer)
        tokens = generate(
            steps, vocabulary, params or SamplingParams(), list(token_ids), self.max_seq_len, mask
        )

        def released_at_the_end() -> Iterator[Token]:
            try:
                yield from tokens
            except RequestError:  # including logits that are not finite
                steps.discard()
                raise
            finally:
                steps.release()

        return released_at_the_end()

    def classify(self, token_ids: Sequence[int]) -> Logits:
        """Label logits: float32 [labels] for a sequence, [tokens, labels] for tokens."""
        require_task(self.manifest, ("sequence-classification", "token-classification"), "classify")
        logits: Logits = self._encoded(token_ids)[0].copy()
        return logits

    def encode(self, token_ids: Sequence[int]) -> Logits:
        """One L2-normalised vector, float32 [hidden], pooled as the manifest says."""
        require_task(self.manifest, "encoder", "encode")
        vector: Logits = self._encoded(token_ids)[0, -1]
        return vector / np.float32(max(float(np.linalg.norm(vector)), 1e-12))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None if the checkpoint had none.

        Raises:
            BundleError: it cannot be read, or does not fit the model or another file of the bundle.
        """
        if self._tokenizer is None and TOKENIZER in self.manifest.files:
            tokenizer = Tokenizer.from_folder(self.folder)
            self._warnings = tuple(check_bundle(self.folder, self.manifest, tokenizer))
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def warnings(self) -> tuple[str, ...]:
        """Unusual values of the bundle's side files, one line each. Reads the tokenizer; raises its errors."""
        tokenizer = self.tokenizer
        if self._warnings is None:
            self._warnings = tuple(check_bundle(self.folder, self.manifest, tokenizer))
        return self._warnings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # How it is done --------------------------------------------------------------------------

    def _decode_inputs(self, tokens: Mapping[int, int], first_row: int) -> tuple[list[int], list[int], Ids]:
        """As :meth:`_gathered` for a decode step; returns also the tokens in that order, [slots, 1]."""
        slots, past = self._gathered(list(tokens), list(tokens.values()), 1, first_row)
        return slots, past, np.array([[tokens[slot]] for slot in slots], np.int64)

    def _chunks(
        self,
        slot: int,
        token_ids: Sequence[int] | Ids,
        logits: Literal["none", "last", "all"] | int,
        chunk: int | None = None,
    ) -> Iterator[Logits]:
        """Check a prefill, then return an iterator that runs it chunk by chunk.

        A chunk without requested logits computes those of one position, and drops them.
        """
        require_task(self.manifest, "causal-lm", "prefill")
        self._require_slot(slot)
        require_tokens(token_ids, self.manifest.model.vocab_size)
        self._require_room(slot, len(token_ids))
        named = {"none": 0, "last": 1, "all": len(token_ids)}
        count = named.get(logits, logits) if isinstance(logits, str) else logits
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= len(token_ids):
            raise RequestError(
                f"logits is {logits!r}, but must be 'none', 'last', 'all' or 0 ... {len(token_ids)}"
            )
        ids = np.asarray(token_ids, np.int64)
        return self._run_chunks(
            slot, ids, len(ids) - count, min(chunk or self.prefill_chunk, self.prefill_chunk)
        )

    def _run_chunks(self, slot: int, ids: Ids, first_asked: int, chunk: int) -> Iterator[Logits]:
        was_in_use, before = slot in self._slots, self._slots.length(slot)
        if not was_in_use:
            self._adapter_of.setdefault(slot, self.adapter)
            self._slots.add(slot)
        try:
            self._fit_cache(max(self._slots.needed(), before + len(ids)))
            chunks = [
                Chunk(ids[start : start + chunk], before + start, max(0, first_asked - start))
                for start in range(0, len(ids), chunk)
            ]
            for one, result in zip(chunks, self._results(slot, chunks), strict=True):
                if one.asked:
                    yield result[0].copy()
        except BaseException:
            # A failed run has written only beyond the old end, so restoring the length undoes the prefill.
            if was_in_use:
                self._slots.set_length(slot, before)
            elif slot in self._slots:
                self.release(slot)
            raise

    def _results(self, slot: int, chunks: Sequence[Chunk]) -> Iterator[Logits]:
        """Run the chunks of a slot in order; yields the logits of each, [1, positions, vocab]."""
        for one in chunks:
            # between chunks, other calls may shrink the cache
            self._fit_cache(max(self._slots.needed(), chunks[-1].end))
            result = self._run_decoder(self._slots.row(slot), one.ids[None], [one.past], one.indices)
            self._slots.set_length(slot, one.end)
            yield result

    def _encoded(self, token_ids: Sequence[int]) -> Logits:
        require_tokens(token_ids, self.manifest.model.vocab_size)
        if len(token_ids) > self.max_seq_len:
            raise RequestError(
                f"{len(token_ids)} tokens exceed this session's max_seq_len {self.max_seq_len}"
            )
        result = self._run_encoder(np.asarray(token_ids, np.int64)[None])
        if not np.isfinite(result).all():
            raise ModelError(
                "the model gave outputs that are not finite; export the bundle with --activations bf16 or fp32"
            )
        return result

    def next_slot(self) -> int:
        """The first slot that is not in use. Raises :class:`SlotError` if there is none."""
        free = self._slots.free()
        if not free:
            raise SlotError(f"all {self.max_batch_size} slots are in use; release one first")
        return free[0]

    def _require_room(self, slot: int, count: int) -> None:
        length = self._slots.length(slot)
        if length + count > self.max_seq_len:
            raise SlotError(
                f"slot {slot} holds {length} of {self.max_seq_len} positions and has no room for {count} more; "
                "truncate or release it"
            )
