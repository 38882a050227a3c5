"""Starts or joins a Ray cluster."""

import os
import secrets
import socket
import sys

from glm4_runtime.cluster.ray_module import require_installed, require_ray
from glm4_runtime.errors import UnavailableError

# Ray's variable by which a cluster of one machine listens on the loopback address only, also on Linux.
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# Results up to this size are sent in the reply of a call. Ray would store those above 100 KB as shared objects: a decode step
# of eight requests in two stages then took 47 ms and not 43.
_SENT = "RAY_max_direct_call_object_size", str(2**20)

# Seconds to connect to a cluster.
_CONNECT = 5.0


def ensure_connected() -> bool:
    """Start a cluster on this machine, unless this process has one already. Returns whether it was started.

    Raises:
        UnavailableError: Ray is missing, or it was imported before, so that the cluster could have no secret of its own.
    """
    require_installed()
    ray = sys.modules.get("ray")  # not imported yet: see connect
    if ray is not None and ray.is_initialized():
        return False
    if ray is not None and "RAY_AUTH_MODE" not in os.environ:
        raise UnavailableError(
            "Ray was imported before the bundle was opened, and has no cluster; call ray.init first, or import Ray later"
        )
    connect(None)
    return True


def connect(address: str | None) -> None:
    """Join the cluster at ``address``, or start one on this machine's loopback address. Sends no usage statistics.

    The started cluster has a secret of its own, which its processes inherit: other users of the machine cannot use it.

    Raises:
        UnavailableError: no cluster answers, or none can be started.
    """
    if address:
        _require_listener(address)
    _set_variables(local=not address)
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


def _set_variables(local: bool) -> None:
    """Set what Ray reads when it is imported. The secret stays the same in a process: Ray reads it once."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else a late call after the end starts a new cluster
    if local:
        os.environ.setdefault(_ONE_MACHINE, "0")
        os.environ.setdefault(*_SENT)
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault(
            "RAY_AUTH_TOKEN", secrets.token_hex(32)
        )  # else Ray writes one into the home folder


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
