"""The interface between the HTTP server and whatever generates: the local scheduler, or replicas on a cluster."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from glm4_runtime.bundle import Manifest
from glm4_runtime.scheduler.api import Event, Request, SchedulerStats
from glm4_runtime.tokenizer import Tokenizer


class Handle(Protocol):
    """The caller's handle on one request. All methods may be called from any thread, also after the end."""

    @property
    def held(self) -> bool:
        """Whether :meth:`hold` was called last."""

    def hold(self) -> None:
        """Pause generation. Events of tokens that were generated before still arrive."""

    def go_on(self) -> None:
        """Resume generation after :meth:`hold`."""

    @property
    def lagging(self) -> bool:
        """Whether :meth:`lag` was called last."""

    def lag(self) -> None:
        """State that the client does not read, so that another request may have its slot."""

    def catch_up(self) -> None:
        """State that the client reads again after :meth:`lag`."""

    def cancel(self) -> None:
        """End the request. No event arrives after this method returns."""


class Backend(Protocol):
    """Runs requests: token ids with sampling parameters, a grammar's mask, end conditions and prompt scores."""

    def start(self) -> None:
        """Begin to run requests; called once."""

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Handle:
        """Queue a request, from any thread. ``on_event`` runs on a thread of the backend and must not block.

        The listener receives :class:`Started`, then one :class:`Generated` for each token. A :class:`Failed` ends the
        request at any time. Nothing follows the last event.

        Raises:
            RequestError: it cannot be served. QueueFullError: try again after its ``retry_after``.
            StoppedError: the backend is stopping.
        """

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load a LoRA adapter, while requests run. Blocks until it is loaded.

        Raises:
            BundleError: the bundle or the backend takes no adapters. CheckpointError: the adapter does not fit.
            RequestError: the name is taken, or all slots are.
        """

    def unload_adapter(self, name: str) -> None:
        """Free a LoRA adapter. Blocks until it is freed.

        Raises:
            RequestError: no such adapter. BusyError: requests with this adapter wait or run.
        """

    def stop(self, drain: float | None = None) -> None:
        """Refuse new requests and let running ones finish, for at most ``drain`` seconds if given. Then fail the
        rest, and return."""

    def stats(self) -> SchedulerStats:
        """The current statistics; with replicas, their sums. Callable from any thread."""

    def stats_by_replica(self) -> Mapping[str, SchedulerStats]:
        """The statistics of each replica that is alive, by its name; empty if the backend has no replicas."""

    @property
    def ready(self) -> bool:
        """Whether a request would be run now, and not refused for lack of a replica."""


class OpenBundle(Protocol):
    """The facts that a server needs of the bundle that its backend runs. A ``Session`` has them, too.

    Attributes:
        max_seq_len: most tokens of prompt and output together.
        tokenizer: None: the bundle has none.
    """

    folder: Path
    manifest: Manifest
    max_seq_len: int

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is unusual about the bundle's side files, one line each."""

    def close(self) -> None:
        """Free memory and threads, if there are any."""
