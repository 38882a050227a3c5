"""Serves a bundle by replicas on a Ray cluster, behind the same HTTP app as a single session."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import Manifest, read_manifest
from glm4_runtime.chat_template import start_template_worker
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.ray_module import require_installed, require_ray
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.start import Keeper, connect
from glm4_runtime.errors import RequestError
from glm4_runtime.opening import check_opening
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.run import bind, serve_model
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.session import limits_of
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
    ray, session = require_ray(), dict(cluster.session)
    if session.get("threads") is None and cluster.address is None:
        session["threads"] = max(1, (os.cpu_count() or 1) // cluster.replicas)
    gpus = 1 if manifest.target != "cpu" and ray.cluster_resources().get("GPU") else 0
    chosen = ReplicaOptions(
        str(served.session.folder.resolve()), served.ends, served.options.max_queue, session
    )
    # an actor that hangs in a step without releasing Python's lock leaves its reports unanswered
    patience = cluster.step_timeout + 10
    return lambda name: RayReplica(name, chosen, patience, gpus)
