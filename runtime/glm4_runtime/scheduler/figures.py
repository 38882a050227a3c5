"""The scheduler's counters. One thread writes. A reader may see a step half counted, but never a torn number."""

from dataclasses import dataclass, field

from glm4_runtime.scheduler.api import SchedulerStats
from glm4_runtime.scheduler.drafts import Draft

OUTCOMES = ("stop", "length", "cancelled", "timeout", "failed", "stopped")


@dataclass
class Figures:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    stored_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    seconds_per_request: float = 0.0
    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))

    def ended(self, outcome: str, seconds: float) -> None:
        """Count a request that has ended, and the seconds that it held a slot."""
        self.requests[outcome] += 1
        self.seconds_per_request += (seconds - self.seconds_per_request) * 0.1

    def drafted(self, draft: Draft, right: int) -> None:
        """Count the tokens of a draft, of which the first ``right`` were right."""
        self.drafted_tokens += len(draft.ids)
        self.accepted_tokens += right

    def snapshot(self, queued: int, active: int, parked: int, slots: int) -> SchedulerStats:
        return SchedulerStats(
            queued=queued,
            active=active,
            parked=parked,
            slots=slots,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed_tokens,
            stored_tokens=self.stored_tokens,
            requests=dict(self.requests),
            steps=self.steps,
            step_seconds=self.step_seconds,
            model_seconds=self.model_seconds,
        )
