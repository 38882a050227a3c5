"""Serves a bundle by replicas on a Ray cluster, behind the same HTTP app as a single session."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import Manifest
from glm4_runtime.bundle.manifest_checks import ONNX_RUNTIME
from glm4_runtime.chat_template import start_template_worker
from glm4_runtime.cluster.deployment import Deployment
from glm4_runtime.cluster.described import DescribedBundle, place_of
from glm4_runtime.cluster.ray_module import require_installed, require_ray
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.scaling import ReplicaCount
from glm4_runtime.cluster.start import connect
from glm4_runtime.errors import UnavailableError
from glm4_runtime.places import RAY
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.run import bind, serve_model
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.session import RUNTIMES
from glm4_runtime.session.ort import cores
from glm4_runtime.trace_options import TraceOptions


@dataclass(frozen=True)
class ClusterOptions:
    """
    Attributes:
        replicas: least and most number of replicas.
        address: of a running Ray cluster. None: a local one is started.
        step_timeout: seconds of one step of the model after which a replica is replaced.
        session: options of ``Session.open`` for each replica.
    """

    replicas: ReplicaCount
    address: str | None = None
    step_timeout: float = 300.0
    session: dict[str, Any] = field(default_factory=dict)


def serve_replicas(bundle: Path, options: ServerOptions, cluster: ClusterOptions) -> None:
    """Start the replicas, and answer requests until SIGTERM or SIGINT; then finish running requests.

    Raises:
        UnavailableError: Ray is not installed, or no cluster answers.
        Glm4Error: the error of a replica that cannot open the bundle.
    """
    require_installed()
    options.names(bundle)
    sockets = bind(options.host, options.port)
    try:
        start_template_worker()
        deployment = Deployment(
            lambda: DescribedBundle(bundle, cluster.session), options, cluster.replicas, cluster.step_timeout
        )
        connect(cluster.address)
        ray = require_ray()
        gpus = gpus_of_each(deployment.current.served.session.manifest, cluster, ray)
        try:
            deployment.start(
                lambda served: _maker(served, cluster, gpus),
                lambda: ray.available_resources().get("GPU", 0) >= gpus,
            )
            serve_model(deployment.current.served, sockets, deployment.change)
        finally:
            deployment.stop()
            ray.shutdown()
    finally:
        for bound in sockets:
            bound.close()


def _maker(served: ServedModel, cluster: ClusterOptions, gpus: int) -> Callable[[str], RayReplica]:
    chosen = ReplicaOptions(
        str(served.session.folder.resolve()),
        served.ends,
        served.options.max_queue,
        session_options(served.session.manifest, cluster),
        _traces(served.options),
        tuple((name, str(Path(folder).resolve())) for name, folder in served.options.adapter_folders.items()),
        served.options.cache and served.options.cache.resolve(),
        served.options.cache_bytes,
    )
    # an actor that hangs in a step without releasing Python's lock leaves its reports unanswered
    patience = cluster.step_timeout + 10
    stages = len(served.session.manifest.stages) if chosen.session["stages_on"] == RAY else 0
    return lambda name: RayReplica(name, chosen, patience, gpus, stages)


def _traces(options: ServerOptions) -> TraceOptions | None:
    """The options of a replica's traces, with the variables ``OTEL_...`` of this process."""
    found = options.trace_options
    variables = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    return found and replace(found, environment=variables)


def session_options(manifest: Manifest, cluster: ClusterOptions) -> dict[str, Any]:
    """The options of each replica's session. On one machine, replicas that compute on the CPU share its cores, and so do
    their stages."""
    options = {**cluster.session, "stages_on": place_of(manifest, cluster.session)}
    divides = RUNTIMES.get(manifest.dialect) == ONNX_RUNTIME and cluster.address is None
    if divides and options.get("threads") is None:
        stages = len(manifest.stages) if options["stages_on"] == RAY else 1
        options["threads"] = max(1, cores() // (cluster.replicas.most * stages))
    return options


def gpus_of_each(manifest: Manifest, cluster: ClusterOptions, ray: Any) -> int:
    """The number of GPUs that each replica asks Ray for.

    Raises:
        UnavailableError: too few GPUs are free. Ray would wait for more without a word.
    """
    on_cpu = (
        not manifest.may_use_gpu
        or manifest.stages
        or cluster.session.get("provider") == "CPUExecutionProvider"
    )
    if on_cpu or not ray.cluster_resources().get("GPU"):
        return 0
    free = ray.available_resources().get("GPU", 0)
    if free < cluster.replicas.least:
        raise UnavailableError(
            f"each of the {cluster.replicas.least} replicas needs a GPU, and {free:g} are free in the Ray cluster; "
            "lower --replicas"
        )
    return 1
