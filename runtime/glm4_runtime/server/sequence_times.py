"""The moments of one sequence, as the event loop sees them."""

from dataclasses import dataclass

from glm4_runtime.scheduler import Generated, Started


@dataclass
class SequenceTimes:
    """All moments are on the clock of ``time.perf_counter()``.

    Attributes:
        submitted: when the backend got the request.
        started: when the prompt was read. None: it was not.
        first, last: the first token, and the last one so far; ``submitted`` before the first.
        prompt_seconds: from the sequence's slot to the end of its prompt.
        mask_seconds: sum over its masks.
    """

    submitted: float
    started: float | None = None
    first: float | None = None
    last: float = 0.0
    prompt_seconds: float = 0.0
    mask_seconds: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.last = self.submitted

    def begin(self, event: Started, now: float) -> None:
        self.started, self.prompt_seconds = now, event.prompt_seconds

    def take(self, event: Generated, now: float) -> float:
        """Count a token. Returns the seconds since the token before, or since the submission."""
        seconds, self.last = now - self.last, now
        if self.first is None:
            self.first = now
        self.tokens += 1
        self.mask_seconds += event.mask_seconds
        return seconds
