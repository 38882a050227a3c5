"""How a step is shared among prompts, and how long others wait. Pure functions: no session, thread or clock."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRules:
    """How a batch shares its session.

    Attributes:
        step_tokens: maximum tokens of one step, prompts and decoding together.
        prefix_cache: whether slots keep their contents for prompts with the same prefix.
        most_parked: maximum number of parked jobs.
    """

    step_tokens: int
    prefix_cache: bool
    most_parked: int


def prefill_budget(step_tokens: int, decoding: int) -> int:
    """Prompt tokens that one step may read: the rest after decoding, at least one."""
    return max(1, step_tokens - decoding)


def shares(rests: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each unfinished prompt, in order of arrival, one step reads.

    A prompt whose rest fits an equal share is finished at once, so a short prompt never waits for a long one. The
    remaining budget goes to the others in order of arrival, so that the first finishes soonest. The longest of n
    prompts gets at least 1/n of the budget over time, so none starves.
    """
    if not rests:
        return []
    fair = budget // len(rests)
    taken = [rest if rest <= fair else 0 for rest in rests]
    left = budget - sum(taken)
    for place, rest in enumerate(rests):
        if rest > fair:
            taken[place] = min(rest, left)
            left -= taken[place]
    return taken


def retry_after(slots: int, seconds_per_request: float) -> float:
    """Estimated seconds until a slot is free for the next request; at least one."""
    return float(max(1, math.ceil(seconds_per_request / slots)))
