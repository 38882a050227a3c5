"""Metrics for Prometheus: the server's own measurements, and the scheduler's current counters."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from glm4_runtime.server.connections import Connections

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_MASK = (0.00001, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5)

# field of SchedulerStats -> metric, kind, description
_SCHEDULER = (
    ("queued", "glm4_queued_requests", GaugeMetricFamily, "Requests that wait for a slot."),
    ("active", "glm4_active_slots", GaugeMetricFamily, "Slots that hold a running request."),
    (
        "parked",
        "glm4_parked_requests",
        GaugeMetricFamily,
        "Requests that gave their slot back until their clients read.",
    ),
    ("slots", "glm4_slots", GaugeMetricFamily, "Slots of the session."),
    ("prompt_tokens", "glm4_prompt_tokens", CounterMetricFamily, "Prompt tokens taken."),
    ("cached_tokens", "glm4_cached_prompt_tokens", CounterMetricFamily, "Of these, reused from the cache."),
    ("stored_tokens", "glm4_disk_cached_prompt_tokens", CounterMetricFamily, "Of these, read from the disk."),
    ("generated_tokens", "glm4_generated_tokens", CounterMetricFamily, "Tokens generated."),
    (
        "drafted_tokens",
        "glm4_drafted_tokens",
        CounterMetricFamily,
        "Tokens guessed by prompt lookup or a draft model.",
    ),
    ("accepted_tokens", "glm4_accepted_tokens", CounterMetricFamily, "Of these, accepted by the model."),
    (
        "preemptions",
        "glm4_preemptions",
        CounterMetricFamily,
        "Slots given back by a request that went on later.",
    ),
    ("recomputed_tokens", "glm4_recomputed_tokens", CounterMetricFamily, "Tokens run again after that."),
    ("steps", "glm4_steps", CounterMetricFamily, "Rounds of the scheduler that ran the model."),
    ("step_seconds", "glm4_step_seconds", CounterMetricFamily, "Time of these rounds."),
    ("model_seconds", "glm4_model_seconds", CounterMetricFamily, "Of this, within the model."),
)


# fields of SchedulerStats that each replica reports, under names of their own, so that no sum counts twice
_BY_REPLICA = (
    "queued",
    "active",
    "slots",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "model_seconds",
)


class Metrics:
    def __init__(
        self, stats: Callable[[], Any], by_replica: Callable[[], Mapping[str, Any]] = lambda: {}
    ) -> None:
        self._registry = CollectorRegistry()
        self.follow(stats, by_replica)
        self.requests = Counter(
            "glm4_http_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self.first_token_seconds = self._histogram(
            "first_token", "From a sequence's submission to its first token.", _FIRST_TOKEN
        )
        self.inter_token_seconds = self._histogram(
            "inter_token", "Between two tokens of a sequence.", _INTER_TOKEN
        )
        self.request_seconds = self._histogram(
            "request", "From a request to the end of its answer.", _REQUEST
        )
        self.mask_seconds = self._histogram("mask", "One token of a reply with a prescribed form.", _MASK)
        self._registry.register(_SchedulerCollector(lambda: self._stats()))
        self._registry.register(_ReplicaCollector(lambda: self._by_replica()))

    def follow(self, stats: Callable[[], Any], by_replica: Callable[[], Mapping[str, Any]]) -> None:
        """Read the statistics of requests from these functions from now on."""
        self._stats, self._by_replica = stats, by_replica

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"glm4_{name}_seconds", text, buckets=buckets, registry=self._registry)

    def watch(self, connections: "Connections") -> None:
        """Report these connections as well."""
        self._registry.register(_ConnectionCollector(connections))

    def watch_log(self, dropped: Callable[[], int]) -> None:
        """Report how many lines of the log were dropped, too."""
        self._registry.register(_LogCollector(dropped))

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _SchedulerCollector(Collector):
    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:  # a bundle without a scheduler
            return
        for field, name, family, text in _SCHEDULER:
            yield family(name, text, value=float(getattr(stats, field)))
        outcomes = CounterMetricFamily("glm4_sequences", "Sequences by how they ended.", labels=["outcome"])
        for outcome, count in stats.requests.items():
            outcomes.add_metric([outcome], count)
        yield outcomes


class _ReplicaCollector(Collector):
    def __init__(self, by_replica: Callable[[], Mapping[str, Any]]) -> None:
        self._by_replica = by_replica

    def collect(self) -> Iterator[Metric]:
        found = self._by_replica()
        for field, name, family, text in _SCHEDULER if found else ():
            if field in _BY_REPLICA:
                metric = family(name.replace("glm4_", "glm4_replica_"), text, labels=["replica"])
                for replica, stats in found.items():
                    metric.add_metric([replica], float(getattr(stats, field)))
                yield metric


class _ConnectionCollector(Collector):
    def __init__(self, connections: "Connections") -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("glm4_connections", "Open connections.", value=len(self._connections))
        ended = CounterMetricFamily(
            "glm4_connections_ended", "Connections that the server ended, by the limit.", labels=["limit"]
        )
        for limit, count in self._connections.ended.items():
            ended.add_metric([limit], count)
        yield ended


class _LogCollector(Collector):
    def __init__(self, dropped: Callable[[], int]) -> None:
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "glm4_log_lines_dropped", "Lines of the log that nobody read in time.", value=self._dropped()
        )
