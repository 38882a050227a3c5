"""Passes the reports of one replica on to the fleet, until the replica dies, hangs or computes NaN."""

from glm4_runtime.cluster.fleet import Fleet, Replica
from glm4_runtime.cluster.order import ReplicaReport
from glm4_runtime.errors import DamagedModelError, ReplicaError
from glm4_runtime.scheduler import Failed


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
        fleet.lost(replica.name, str(error))
        replica.close()


def _require_sound(report: ReplicaReport, step_timeout: float) -> None:
    """Raises :class:`ReplicaError` if a replica must be replaced. No event of such a report is delivered."""
    if report.step_seconds > step_timeout:
        raise ReplicaError(f"a step took over {step_timeout:g} s; see --step-timeout")
    for _, event in report.events:
        if isinstance(event, Failed) and isinstance(event.error, DamagedModelError):
            raise ReplicaError(str(event.error))
