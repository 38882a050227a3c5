"""Tries grammars in a worker process before this process compiles them, because some crash or never end.

The same grammar is tried once; outcomes are cached by content.
"""

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glm4_runtime.errors import Glm4Error, RequestError
from glm4_runtime.workers.pool import WorkerPool
from glm4_runtime.workers.worker import TaskLimits, WorkerError

_WORKERS = WorkerPool(
    "glm4_runtime.workers.grammars", TaskLimits(seconds=1, deadline=20, memory=128 * 2**20, answer=2**20)
)

# Number of cached outcomes: a hash and a short text each.
_MOST_KEPT = 4096


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: the reason of a refusal, or the cost.

    Attributes:
        held: bytes of the compiled grammar.
        seconds: processor time to compile it.
    """

    refusal: str | None = None
    held: int = 0
    seconds: float = 0.0


class GrammarTrials:
    """Trials with one vocabulary; safe to use from any thread."""

    def __init__(self, vocab_size: int, control: Mapping[str, int], ends: Sequence[int]) -> None:
        """``control``: ids of control tokens by name; a grammar may refer to them."""
        self._vocabulary = {"size": vocab_size, "control": dict(control), "ends": list(ends)}
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[bytes, Outcome] = OrderedDict()

    def warm(self) -> None:
        """Start a worker and give it the vocabulary, in the background."""
        threading.Thread(target=self._warm, name="glm4-warm-grammars", daemon=True).start()

    def require(self, grammar: str) -> Outcome:
        """The cost of ``grammar``.

        Raises :class:`RequestError` if it is refused or costs too much.
        """
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            outcome = self._outcomes.get(key)
        if outcome is None:
            outcome = self._tried(grammar)
            self._keep(key, outcome)
        if outcome.refusal is not None:
            raise RequestError(f"this format cannot be enforced: {outcome.refusal}")
        return outcome

    def _tried(self, grammar: str) -> Outcome:
        try:
            answer = _WORKERS.call({"grammar": grammar, "vocabulary": self._vocabulary})
        except WorkerError as error:
            return Outcome(f"{error}; give a smaller or simpler one")
        return Outcome(**answer)

    def _keep(self, key: bytes, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes[key] = outcome
            while len(self._outcomes) > _MOST_KEPT:
                self._outcomes.popitem(last=False)

    def _warm(self) -> None:
        with contextlib.suppress(Glm4Error):  # the first request will report it
            self.require('{"grammars": [{"lark_grammar": "start: \\"a\\""}]}')
