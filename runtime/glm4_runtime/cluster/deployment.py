"""The replicas of one bundle: their number follows the load, and another bundle can take their place."""

import threading
import time
from collections.abc import Callable

from glm4_runtime.cluster.described import DescribedBundle
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.keeper import Keeper
from glm4_runtime.cluster.lane import Replica
from glm4_runtime.cluster.scaling import ReplicaCount, Scaler
from glm4_runtime.server import log
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.run import Server
from glm4_runtime.server.served_model import ServedModel

# Seconds between two looks at the load.
_LOOK = 1.0

Maker = Callable[[str], Replica]


class Version:
    """One state of the bundle's folder: its server's side, its replicas, and who keeps them alive."""

    def __init__(self, described: DescribedBundle, options: ServerOptions, before: "Version | None") -> None:
        """``before``: the version that this one replaces."""
        self.fleet: Fleet = Fleet(options.max_queue, None if before is None else before.fleet)
        metrics = None if before is None else before.served.metrics
        self.served: ServedModel = ServedModel(described, options, self.fleet, metrics)
        self.keeper: Keeper

    def keep(self, make: Maker, step_timeout: float) -> None:
        self.keeper = Keeper(self.fleet, make, step_timeout)

    def end(self) -> None:
        """End the replicas, which have no requests any more."""
        self.keeper.stop()
        self.served.close()


class Deployment:
    """
    Attributes:
        current: the version that gets new requests.
    """

    def __init__(
        self,
        describe: Callable[[], DescribedBundle],
        options: ServerOptions,
        count: ReplicaCount,
        step_timeout: float,
    ) -> None:
        """``describe``: reads the bundle's folder."""
        self._describe, self._options, self._count = describe, options, count
        self._step_timeout = step_timeout
        self.current = Version(describe(), options, None)
        self._changing = threading.Lock()
        self._end = threading.Event()
        self._make: Callable[[ServedModel], Maker]
        self._room: Callable[[], bool]

    def start(self, make: Callable[[ServedModel], Maker], room: Callable[[], bool] = lambda: True) -> None:
        """Start the least number of replicas, and wait for them.

        Args:
            make: what starts the replicas of a model.
            room: whether one more replica can start beside the others.

        Raises:
            Glm4Error: the error of the first replica that cannot start.
        """
        self._make, self._room = make, room
        self.current.keep(make(self.current.served), self._step_timeout)
        self.current.keeper.start(self._count.least)
        if not self._count.fixed:
            threading.Thread(target=self._scale, name="scale", daemon=True).start()

    def stop(self) -> None:
        self._end.set()
        self.current.keeper.stop()
        self.current.fleet.stop(0)

    # Load -------------------------------------------------------------------------------------------

    def _scale(self) -> None:
        scaler = Scaler(self._count)
        while not self._end.wait(_LOOK):
            with self._changing:
                fleet, keeper = self.current.fleet, self.current.keeper
                if not fleet.slots_of_each:
                    continue
                wanted = scaler.wanted(time.monotonic(), fleet.requests, fleet.slots_of_each)
                if wanted != len(keeper):
                    log.write("scaling", replicas=len(keeper), wanted=wanted, requests=fleet.requests)
                    keeper.resize(wanted)

    # Change -----------------------------------------------------------------------------------------

    def change(self, server: Server) -> None:
        """Read the bundle's folder again, and replace the replicas one by one. No request is refused for this.

        Requests finish on replicas of the bundle that they began with. If the new bundle cannot be served, the old one
        stays. Blocks until the old replicas have ended.
        """
        if not self._changing.acquire(timeout=_LOOK):  # a look at the load is shorter
            log.write("change_refused", "warning", error="the last change of the bundle has not ended yet")
            return
        try:
            log.write("change_began", model=self.current.served.name)
            version = Version(self._describe(), self._options, self.current)
            version.keep(self._make(version.served), self._step_timeout)
            self._replace(server, version)
            log.write("change_ended", model=version.served.name, replicas=len(version.keeper))
        except Exception as error:  # the old replicas go on, whatever the new folder holds
            log.write("change_failed", "error", error=f"{type(error).__name__}: {error}")
        finally:
            self._changing.release()

    def _replace(self, server: Server, new: Version) -> None:
        """The new version gets the new requests as soon as it has half of the replicas. Until then the old one can stay,
        after that the new one does."""
        old, count = self.current, len(self.current.keeper)
        new.served.start()
        ended = None
        try:
            for ready in range(1, count + 1):
                room = self._room()
                if not room:
                    _shrink(old)
                new.keeper.add(insist=ended is not None)
                if ended is None and 2 * ready >= count:
                    ended, self.current = server.change(new.served), new
                if room:
                    _shrink(old)
        except Exception as error:
            if ended is None:
                new.end()
                old.keeper.resize(count)  # they may fail to start, as the folder has another bundle now
                raise
            log.write("change_disturbed", "error", error=f"{type(error).__name__}: {error}")
            new.keeper.resize(count)
        assert ended is not None
        ended.wait()
        old.end()
        new.fleet.succeeded()


def _shrink(old: Version) -> None:
    """End one replica; the last one stays until no request needs it."""
    if len(old.keeper) > 1:
        old.keeper.remove()
