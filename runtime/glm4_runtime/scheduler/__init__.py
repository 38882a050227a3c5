"""Runs many requests on the slots of one session: order, reuse of prefixes, and steps."""

from glm4_runtime.sampling import TokenMask
from glm4_runtime.scheduler.api import Event, Failed, Generated, Request, SchedulerStats, Started
from glm4_runtime.scheduler.job import Ticket
from glm4_runtime.scheduler.scheduler import Scheduler
from glm4_runtime.scheduler.view import SchedulerView, SlotView

__all__ = [
    "Event",
    "Failed",
    "Generated",
    "Request",
    "Scheduler",
    "SchedulerStats",
    "SchedulerView",
    "SlotView",
    "Started",
    "Ticket",
    "TokenMask",
]
