"""A conversation with one session, turn by turn. The KV cache keeps the common prefix of the turns."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glm4_runtime.arrays import Logits
from glm4_runtime.chat_prompts import ChatPrompts
from glm4_runtime.drafted import DraftedGeneration
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.generate import FinishReason, Token, Vocabulary, generate
from glm4_runtime.prefix_store.single import prefill
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.reasoning import ThoughtSplitter, begins_inside
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.session import Session
from glm4_runtime.text_pieces import TextPieces


@dataclass(frozen=True)
class TurnPiece:
    """The text that one token adds to the thinking or to the answer. The last one has a ``finish_reason``."""

    thought: str
    answer: str
    finish_reason: FinishReason | None


class Dialogue:
    """Holds one slot of ``session`` until it is closed.

    Attributes:
        messages: the conversation so far, in the template's form, without thinking.
        prompt_tokens, cached_tokens: tokens of the last turn's prompt, and how many of them came from the cache.
    """

    def __init__(
        self,
        session: Session,
        params: SamplingParams,
        system: str | None = None,
        store: PrefixStore | None = None,
        drafted: DraftedGeneration | None = None,
    ) -> None:
        """
        Args:
            store: the prefix cache on disk, from which turns may start.
            drafted: generates all turns with a draft model; it has the session and the store.
        """
        if session.tokenizer is None:
            raise BundleError(f"{session.folder} has no tokenizer.json; add it and export again")
        self._session, self._system = session, system
        self._vocabulary = Vocabulary.of(session.manifest.model, session.tokenizer)
        self._prompts = ChatPrompts(session.folder, session.tokenizer)
        if not params.ignore_eos:
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *self._prompts.ends))
        self._params, self._drafted = params, drafted
        self._steps = _KeptSlot(session, store)
        self.messages: list[dict[str, Any]] = []
        self.prompt_tokens = self.cached_tokens = 0
        self.forget()

    def forget(self) -> None:
        """Start over."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def close(self) -> None:
        self._steps.release()

    def say(self, text: str) -> Generator[TurnPiece, None, None]:
        """The model's turn after ``text``. If the caller stops early, the conversation keeps the partial answer. A
        turn with only thinking is kept with an empty answer. A turn that fails before it begins is removed.

        Raises :class:`RequestError` if the template refuses the message or the prompt does not fit.
        """
        self.messages.append({"role": "user", "content": text})
        answer, begun = TextPieces(), False
        try:
            for piece in self._turn():
                begun = True
                answer.add(piece.answer)
                yield piece
        finally:
            if begun:
                self.messages.append({"role": "assistant", "content": str(answer)})
            else:
                self.messages.pop()

    def _turn(self) -> Iterator[TurnPiece]:
        prompt, ids = self._prompts.prompt(self.messages)
        self.prompt_tokens = len(ids)
        tokens = self._tokens(ids)
        splitter = ThoughtSplitter(begins_inside(prompt.text))
        try:
            for token in tokens:
                self.cached_tokens = (self._drafted or self._steps).cached_tokens
                thought, answer = splitter.push(token.text)
                if token.finish_reason is not None:
                    last = splitter.flush()
                    thought, answer = thought + last[0], answer + last[1]
                yield TurnPiece(thought, answer, token.finish_reason)
        except RequestError:  # among them, logits that are not finite
            if self._drafted is None:
                self._steps.discard()
            raise
        finally:
            tokens.close()

    def _tokens(self, ids: Sequence[int]) -> Generator[Token, None, None]:
        if self._drafted is not None:
            return self._drafted.generate(ids, self._params)
        self._steps.keep(ids)
        return generate(self._steps, self._vocabulary, self._params, ids, self._session.max_seq_len)


class _KeptSlot:
    """One slot, as :class:`Steps`. It keeps the prefix that the next prompt shares."""

    def __init__(self, session: Session, store: PrefixStore | None) -> None:
        self._session, self._store = session, store
        self._slot = session.free_slots()[0]
        self.held: list[int] = []
        self.cached_tokens = 0  # tokens of the last prompt that were not computed

    def keep(self, prompt: Sequence[int]) -> None:
        """Truncate the slot to the common prefix with ``prompt``. Its last token always runs again, for its logits."""
        pairs = enumerate(zip(self.held, prompt[:-1], strict=False))
        common = next(
            (at for at, (held, new) in pairs if held != new), min(len(self.held), max(0, len(prompt) - 1))
        )
        if common < len(self.held):
            self._session.truncate(self._slot, common)
            del self.held[common:]

    def prefill(self, ids: Sequence[int]) -> Logits:
        logits, self.cached_tokens = prefill(self._session, self._store, self._slot, ids)
        self.held = list(ids)
        return logits

    def decode(self, token: int) -> Logits:
        logits = self._session.decode({self._slot: token})[self._slot]
        self.held.append(token)
        return logits

    def room(self) -> int:
        """The whole slot before the prompt runs; afterwards, the rest."""
        return self._session.max_seq_len

    def release(self) -> None:
        self._session.release(self._slot)
        self.held = []

    def discard(self) -> None:
        self._session.discard(self._slot)
        self.held = []
