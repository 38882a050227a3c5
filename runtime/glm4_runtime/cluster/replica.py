"""The Ray actor of a replica, and the server's side of it. Ray is imported only when a cluster starts."""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm4_runtime.cluster.identity import identity
from glm4_runtime.cluster.order import Action, Identity, Order, ReplicaReport
from glm4_runtime.cluster.places import Places
from glm4_runtime.cluster.ray_module import require_ray
from glm4_runtime.cluster.work import ReplicaWork
from glm4_runtime.errors import Glm4Error, ReplicaError
from glm4_runtime.prefix_store.limits import DEFAULT_BYTES
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.scheduler import Scheduler
from glm4_runtime.session import Session
from glm4_runtime.session.warm_up import warm_up
from glm4_runtime.trace_options import TraceOptions, started

# Seconds for which a replica waits for events before it reports none.
_REPORT = 0.5
# Threads of an actor by the kind of call: a waiting report must not delay orders.
_THREADS = {"orders": 1, "reports": 1}


@dataclass(frozen=True)
class ReplicaOptions:
    """
    Attributes:
        bundle: the folder, which must exist under this path on each node.
        ends: ids of the tokens that end a reply.
        max_queue: most requests that wait within the replica.
        session: options of ``Session.open``.
        traces: where the replica sends its spans. None: it makes none.
        adapters: name and folder of each LoRA adapter; the folders must exist under these paths on each node.
        cache: folder of the prefix cache on disk; replicas on one machine share the folder. None: there is none.
        cache_bytes: maximum size of the folder.
    """

    bundle: str
    ends: tuple[int, ...]
    max_queue: int
    session: dict[str, Any] = field(default_factory=dict)
    traces: TraceOptions | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    cache: Path | None = None
    cache_bytes: int = DEFAULT_BYTES


class ReplicaActor:
    """Runs in a process of Ray's. Its methods are those of :class:`ReplicaWork`."""

    def __init__(self, options: ReplicaOptions) -> None:
        _log_orders()
        traces = started(options.traces)
        self._session = Session.open(options.bundle, **options.session)
        warm_up(self._session)
        for name, folder in options.adapters:
            self._session.load_adapter(name, folder)
        self._adapters = options.adapters
        store = None
        if options.cache is not None:
            store = PrefixStore(options.cache, options.cache_bytes, self._session)
        scheduler = Scheduler(self._session, max_queue=options.max_queue, store=store)
        self._work = ReplicaWork(self._session, scheduler, options.ends, traces)

    def describe(self) -> tuple[Identity, int, int, Sequence[int]]:
        """Identity, number of slots, process id, and the process ids of the stages that are actors."""
        mine = identity(self._session, self._adapters)
        return mine, self._session.max_batch_size, os.getpid(), getattr(self._session, "pids", ())

    def submit(self, number: int, order: Order) -> None:
        self._work.submit(number, order)

    def act(self, number: int, action: Action) -> None:
        self._work.act(number, action)

    def report(self) -> ReplicaReport:
        return self._work.report(_REPORT)


def _named(options: ReplicaOptions, name: str) -> ReplicaOptions:
    """The options with the replica's name in its traces."""
    return replace(options, traces=options.traces and replace(options.traces, replica=name))


def _log_orders() -> None:
    """Write one line for each order into the log of Ray's worker, in the folder of Ray's session."""
    orders = logging.getLogger("glm4_runtime.cluster.work")
    orders.setLevel(logging.INFO)
    orders.addHandler(logging.StreamHandler())
    orders.propagate = False


class RayReplica:
    """A running actor; implements ``Replica``."""

    def __init__(
        self, name: str, options: ReplicaOptions, patience: float, gpus: int, stages: int = 0
    ) -> None:
        """Start an actor and wait until it has opened the bundle.

        Args:
            patience: seconds for which the actor may leave a report unanswered.
            gpus: GPUs that the actor needs.
            stages: number of stages that run on actors of their own, in a placement group with this one.

        Raises:
            Glm4Error: the bundle cannot be opened there, or the actor died.
        """
        ray = require_ray()
        self.name, self._patience = name, patience
        self._places = Places(stages) if stages else None
        kind = ray.remote(
            concurrency_groups=_THREADS,
            num_cpus=0,
            num_gpus=gpus,
            scheduling_strategy="SPREAD" if self._places is None else self._places.of(0),
            max_restarts=0,
        )(ReplicaActor)
        self._actor = kind.remote(_named(options, name))
        try:
            self.identity, self.slots, self.pid, self.stage_pids = ray.get(self._actor.describe.remote())
        except ray.exceptions.RayError as error:
            self.close()
            raise _cause(error, name) from error

    def submit(self, number: int, order: Order) -> None:
        self._call("submit", number, order)

    def act(self, number: int, action: Action) -> None:
        self._call("act", number, action)

    def report(self) -> ReplicaReport:
        ray = require_ray()
        try:
            asked = self._actor.report.options(concurrency_group="reports").remote()
            found: ReplicaReport = ray.get(asked, timeout=self._patience)
            return found
        except ray.exceptions.RayError as error:
            raise ReplicaError(f"{type(error).__name__} of replica {self.name}") from error

    def close(self) -> None:
        ray = require_ray()
        with contextlib.suppress(Exception):  # the actor or the whole cluster may be gone
            ray.kill(self._actor)
        if self._places is not None:
            self._places.close()

    def _call(self, method: str, *arguments: Any) -> None:
        with contextlib.suppress(Exception):  # a dead actor: the next report says so
            getattr(self._actor, method).options(concurrency_group="orders").remote(*arguments)


def _cause(error: Exception, name: str) -> Glm4Error:
    """The error of a replica that could not start: its own, or Ray's in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Glm4Error):
        return cause
    for line in reversed(str(error).splitlines()):
        if "Error: " in line:
            return ReplicaError(f"replica {name} could not start: {line.strip()}")
    return ReplicaError(f"replica {name} could not start: {type(error).__name__}")
