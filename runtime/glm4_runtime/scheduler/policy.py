"""Who gets how much of a step, and how long the others wait. Pure: no session, no thread, no clock."""

import math
from collections.abc import Sequence


def prefill_budget(step_tokens: int, decoding: int) -> int:
    """Prompt tokens that one step may take: what decoding leaves, and never nothing."""
    return max(1, step_tokens - decoding)


def shares(rests: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each unfinished prompt, in order of arrival, one step takes.

    Prompts whose rest fits a fair share are finished at once, so a short one never waits for a long one;
    what is left goes to the others by arrival, which finishes the first of them soonest. The longest of n
    prompts gets at least an n-th of every budget's worth of steps: none starves.
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
    """Seconds until a slot takes the next request from the queue, at the pace of late; at least one."""
    return float(max(1, math.ceil(seconds_per_request / slots)))
