"""A request in a form that another process can take, and what a replica reports back."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from glm4_runtime.errors import RequestError
from glm4_runtime.scheduler import Event, Request, SchedulerStats
from glm4_runtime.structured import Grammar, GrammarCompiler, GrammarMask

Action = Literal["hold", "go_on", "lag", "catch_up", "cancel"]


@dataclass(frozen=True)
class Order:
    """One request as a replica receives it.

    Attributes:
        request: without its mask and its deadline, which are valid in one process only.
        grammar: the grammar of the reply, which the replica compiles. None: the reply is free.
        seconds: from now to the deadline. None: no deadline.
    """

    request: Request
    grammar: Grammar | None
    seconds: float | None


@dataclass(frozen=True)
class ReplicaReport:
    """What happened on a replica since its last report.

    Attributes:
        events: number of the order and event, in the order of their generation.
        step_seconds: how long the current step of the model has been running; 0 between steps.
    """

    events: tuple[tuple[int, Event], ...]
    stats: SchedulerStats
    step_seconds: float


@dataclass(frozen=True)
class Identity:
    """What must be equal on all replicas, because the tokens depend on it.

    Attributes:
        bundle: digest of the names and SHA-256 of all files of the bundle, with the weights.
        code: digest of the runtime's source files.
        kernels: digest of the library of CPU kernels, or the version of the runtime that has the kernels.
        target: the bundle's target, and the provider that runs it.
        limits: most tokens of a sequence, and number of slots.
        adapters: SHA-256 of each LoRA adapter by name.
    """

    bundle: str
    code: str
    kernels: str
    target: str
    limits: tuple[int, int]
    adapters: tuple[tuple[str, str], ...] = ()

    def differences(self, other: "Identity") -> list[str]:
        """Names of the attributes that differ."""
        return [name for name, value in vars(self).items() if getattr(other, name) != value]


def order_of(request: Request, generated: tuple[int, ...] = (), started: bool = False) -> Order:
    """The order of a request, of which ``generated`` tokens have been sent to the client already.

    Args:
        started: whether the client has the event :class:`Started`, with the scores of the prompt.

    Raises:
        RequestError: the request has a mask that is no grammar's.
    """
    grammar = None
    if request.mask is not None:
        if not isinstance(request.mask, GrammarMask):
            raise RequestError("replicas run masks of grammars only")
        grammar = request.mask.grammar
    seconds = None if request.deadline is None else request.deadline - time.monotonic()
    scores = None if started else request.prompt_logprobs
    sent = replace(request, mask=None, deadline=None, generated=generated, prompt_logprobs=scores)
    return Order(sent, grammar, seconds)


def request_of(order: Order, grammars: GrammarCompiler) -> Request:
    """The request of an order, with its mask after the generated tokens. Raises the errors of ``compile``."""
    deadline = None if order.seconds is None else time.monotonic() + order.seconds
    mask = None
    if order.grammar is not None:
        mask = grammars.compile(order.grammar.reply, order.grammar.thinking)
        mask.skip(order.request.generated)
    return replace(order.request, mask=mask, deadline=deadline)


def total(stats: Iterable[SchedulerStats]) -> SchedulerStats:
    """The sums of the statistics of several replicas."""
    found = list(stats)
    names = [one.name for one in fields(SchedulerStats) if one.name != "requests"]
    sums = {name: sum(getattr(one, name) for one in found) for name in names}
    outcomes = dict.fromkeys(outcome for one in found for outcome in one.requests)
    return SchedulerStats(
        requests={outcome: sum(one.requests.get(outcome, 0) for one in found) for outcome in outcomes}, **sums
    )
