"""Passes the reports of one replica on to the fleet, until the replica dies, hangs or computes NaN."""

import logging

from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.lane import Replica
from glm4_runtime.cluster.order import ReplicaReport
from glm4_runtime.errors import DamagedModelError, ReplicaError
from glm4_runtime.scheduler import Failed

logger = logging.getLogger(__name__)


def watch(fleet: Fleet, replica: Replica, step_timeout: float) -> None:
    """Run until the replica is lost; then it is closed, and its requests go on elsewhere.

    Args:
        step_timeout: seconds of one step of the model after which the replica counts as hung.
    """
    try:
        while True:
            report = replica.report()
            _require_sound(report, step_timeout)
            fleet.deliver(replica.name, report)
    except ReplicaError as error:
        reason = str(error)
    except Exception as error:  # whatever Ray raises: requests of a replica that nobody watches would hang
        logger.exception("replica %s cannot be watched any more", replica.name)
        reason = f"its reports failed ({type(error).__name__})"
    fleet.lost(replica.name, reason)
    replica.close()


def _require_sound(report: ReplicaReport, step_timeout: float) -> None:
    """Raises :class:`ReplicaError` if a replica must be replaced. No event of such a report is delivered."""
    if report.step_seconds > step_timeout:
        raise ReplicaError(f"a step took over {step_timeout:g} s; see --step-timeout")
    for _, event in report.events:
        if isinstance(event, Failed) and isinstance(event.error, DamagedModelError):
            raise ReplicaError(str(event.error))
