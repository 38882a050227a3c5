"""Serves a bundle by replicas on a Ray cluster, behind the same HTTP app as a single session."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import Manifest, read_manifest
from glm4_runtime.bundle.manifest_checks import ONNX_RUNTIME
from glm4_runtime.chat_template import start_template_worker
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.ray_module import require_installed, require_ray
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.start import Keeper, connect
from glm4_runtime.errors import RequestError, UnavailableError
from glm4_runtime.opening import check_opening
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.run import bind, serve_model
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.session import RUNTIMES, limits_of
from glm4_runtime.session.ort import cores
from glm4_runtime.side_files import check_bundle
from glm4_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class ClusterOptions:
    """
    Attributes:
        replicas: number of replicas.
        address: of a running Ray cluster. None: a local one is started.
        step_timeout: seconds of one step of the model after which a replica is replaced.
        session: options of ``Session.open`` for each replica.
    """

    replicas: int
    address: str | None = None
    step_timeout: float = 300.0
    session: dict[str, Any] = field(default_factory=dict)


class DescribedBundle:
    """The facts of a bundle that replicas open; implements ``OpenBundle``. It loads no weights."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """Raises :class:`BundleError` if the bundle is damaged, and :class:`RequestError` if it does not generate."""
        self.folder, self.manifest = folder, read_manifest(folder)
        if self.manifest.task != "causal-lm":
            raise RequestError(
                f"this bundle was exported for {self.manifest.task}; replicas need causal-lm: serve it without --replicas"
            )
        self.max_seq_len, _ = limits_of(
            self.manifest, options.get("max_seq_len"), options.get("max_batch_size")
        )
        check_opening(folder, self.manifest, hashes=bool(options.get("verify")))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        has_one = (self.folder / "tokenizer.json").exists()
        return Tokenizer.from_folder(self.folder) if has_one else None

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(check_bundle(self.folder, self.manifest, self.tokenizer))

    def close(self) -> None:
        """Nothing is open."""


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
        fleet = Fleet(options.max_queue)
        described = DescribedBundle(bundle, cluster.session)
        served = ServedModel(described, options, fleet)
        connect(cluster.address)
        keeper = Keeper(
            fleet, _maker(served, described.manifest, cluster), cluster.replicas, cluster.step_timeout
        )
        try:
            keeper.start()
            serve_model(served, sockets)
        finally:
            keeper.stop()
            fleet.stop(0)
            require_ray().shutdown()
    finally:
        for bound in sockets:
            bound.close()


def _maker(served: ServedModel, manifest: Manifest, cluster: ClusterOptions) -> Callable[[str], RayReplica]:
    chosen = ReplicaOptions(
        str(served.session.folder.resolve()),
        served.ends,
        served.options.max_queue,
        session_options(manifest, cluster),
    )
    gpus = gpus_of_each(manifest, cluster, require_ray())
    # an actor that hangs in a step without releasing Python's lock leaves its reports unanswered
    patience = cluster.step_timeout + 10
    return lambda name: RayReplica(name, chosen, patience, gpus)


def session_options(manifest: Manifest, cluster: ClusterOptions) -> dict[str, Any]:
    """The options of each replica's session. On one machine, replicas that compute on the CPU share its cores."""
    options = dict(cluster.session)
    divides = RUNTIMES.get(manifest.dialect) == ONNX_RUNTIME and cluster.address is None
    if divides and options.get("threads") is None:
        options["threads"] = max(1, cores() // cluster.replicas)
    return options


def gpus_of_each(manifest: Manifest, cluster: ClusterOptions, ray: Any) -> int:
    """The number of GPUs that each replica asks Ray for.

    Raises:
        UnavailableError: too few GPUs are free. Ray would wait for more without a word.
    """
    on_cpu = not manifest.may_use_gpu or cluster.session.get("provider") == "CPUExecutionProvider"
    if on_cpu or not ray.cluster_resources().get("GPU"):
        return 0
    free = ray.available_resources().get("GPU", 0)
    if free < cluster.replicas:
        raise UnavailableError(
            f"each of the {cluster.replicas} replicas needs a GPU, and {free:g} are free in the Ray cluster; "
            "lower --replicas"
        )
    return 1
