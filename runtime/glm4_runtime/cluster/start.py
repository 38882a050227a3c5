"""Starts or joins a Ray cluster, and keeps a number of replicas alive on it."""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

from glm4_runtime.cluster.fleet import Fleet, Replica
from glm4_runtime.cluster.ray_module import require_ray
from glm4_runtime.cluster.watch import watch
from glm4_runtime.errors import Glm4Error, ReplicaError, StoppedError, UnavailableError

# Ray's variable by which a cluster of one machine listens on the loopback address only, also on Linux.
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

logger = logging.getLogger(__name__)

# Seconds to connect to a cluster.
_CONNECT = 5.0
# Seconds before a lost replica is started again. Doubled after each short life, up to the most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
# A replica that lived for fewer seconds had a short life.
_SHORT_LIFE = 30.0


def connect(address: str | None) -> None:
    """Join the cluster at ``address``, or start one on this machine's loopback address. Sends no usage statistics.

    The started cluster has a secret of its own, which its processes inherit: other users of the machine cannot use it.

    Raises:
        UnavailableError: no cluster answers, or none can be started.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a late call after the end starts a new cluster
    if address:
        _require_listener(address)
    else:
        os.environ.setdefault(_ONE_MACHINE, "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault(
            "RAY_AUTH_TOKEN", secrets.token_hex(32)
        )  # else Ray writes one into the home folder
    ray = require_ray()  # reads these variables when it is imported
    local = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **local)
    except Exception as error:  # Ray's errors have no common base class
        lines = str(error).splitlines() or [type(error).__name__]
        failed = (
            f"the Ray cluster at {address} cannot be joined" if address else "no Ray cluster can be started"
        )
        raise UnavailableError(f"{failed}: {lines[0]}") from error


def _require_listener(address: str) -> None:
    """Raises :class:`UnavailableError` if nothing listens at ``HOST:PORT``; Ray would try for over a minute."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:  # such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnavailableError(f"no Ray cluster answers at {address}: {reason}") from error


class Keeper:
    """Keeps ``count`` replicas in a fleet, one thread each: starts one, watches it, and replaces it."""

    def __init__(self, fleet: Fleet, make: Callable[[str], Replica], count: int, step_timeout: float) -> None:
        """``make``: starts the replica of a name; returns when it is ready."""
        self._fleet, self._make, self._step_timeout = fleet, make, step_timeout
        self._threads = [
            threading.Thread(target=self._keep, args=(index,), name=f"replica-{index}", daemon=True)
            for index in range(count)
        ]
        self._begun = threading.Condition()
        self._first: list[Glm4Error | None] = []  # the outcome of each first start
        self._end = threading.Event()

    def start(self) -> None:
        """Start all replicas, and wait for them. Raises the error of the first that cannot start."""
        for thread in self._threads:
            thread.start()
        with self._begun:
            self._begun.wait_for(lambda: any(self._first) or len(self._first) == len(self._threads))
        for error in self._first:
            if error is not None:
                self.stop()
                raise error

    def stop(self) -> None:
        """Replace no replica from now on."""
        self._end.set()

    def _keep(self, index: int) -> None:
        pause = _FIRST_PAUSE
        for life in range(1_000_000_000):
            if self._end.is_set() or self._fleet.closed:
                return
            began = time.monotonic()
            self._live(f"{index}", first=life == 0)
            short = time.monotonic() - began < _SHORT_LIFE
            pause = min(2 * pause, _LONGEST_PAUSE) if short and life else _FIRST_PAUSE
            self._end.wait(pause)

    def _live(self, name: str, first: bool) -> None:
        """One life of a replica."""
        error: Glm4Error | None = None
        replica: Replica | None = None
        try:
            replica = self._make(name)
            self._fleet.join(replica)
        except StoppedError:
            self._end.set()
        except Exception as failure:  # whatever Ray raises must not end the replacement of replicas
            error = failure if isinstance(failure, Glm4Error) else _unexpected(name, failure)
        if error is not None and not self._end.is_set():
            logger.error("replica %s did not start: %s", name, error)
        if first:
            with self._begun:
                self._first.append(error)
                self._begun.notify_all()
        if replica is not None and (error is not None or self._end.is_set()):
            replica.close()
        elif replica is not None:
            watch(self._fleet, replica, self._step_timeout)


def _unexpected(name: str, failure: Exception) -> ReplicaError:
    lines = str(failure).splitlines() or [""]
    return ReplicaError(f"replica {name} could not start ({type(failure).__name__}: {lines[0][:200]})")
