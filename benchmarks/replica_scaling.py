"""Throughput and latencies of 1, 2 and 4 replicas on two Ray nodes of this machine.

    python -m benchmarks.replica_scaling BUNDLE --out benchmarks/results/replica-scaling

Each round serves by each number of replicas in turn, each with one thread, and runs ``glm4-deploy bench-serve`` against
the server. Before that the official openai client asks a few questions of each kind; its answers must be those of one
session without Ray.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import openai

from benchmarks.chaos_clients import ask, questions
from glm4_runtime.bundle import read_manifest
from glm4_runtime.cluster.described import DescribedBundle
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.keeper import Keeper
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.start import connect
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

_NODES = 2
_STEP_TIMEOUT = 120.0
_LATEST = 120.0  # seconds for replicas to come and to go


class Fixture:
    """A server whose number of replicas changes.

    Attributes:
        url: of the server.
    """

    def __init__(self, bundle: Path) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(_NODES - 1):
            self._cluster.add_node(**node)
        connect(self._cluster.address)
        described = DescribedBundle(bundle, {})
        options = ReplicaOptions(str(bundle), described.manifest.model.eos_token_ids, 64, {"threads": 1})
        self._fleet = Fleet(64)
        self._keeper = Keeper(
            self._fleet,
            lambda name: RayReplica(name, options, _STEP_TIMEOUT + 10, 0),
            _STEP_TIMEOUT,
        )
        self._keeper.start(1)
        self._serving = serving(described, ServerOptions(port=0, log_level="warning"), self._fleet)
        self.url = self._serving.__enter__().url

    def resize(self, count: int) -> None:
        """Start or end replicas, and wait until exactly ``count`` serve."""
        self._keeper.resize(count)
        end = time.monotonic() + _LATEST
        while len(self._fleet.stats_by_replica()) != count:
            if time.monotonic() > end:
                raise SystemExit(f"{count} replicas did not come within {_LATEST:g} s")
            time.sleep(0.1)

    def close(self) -> None:
        import ray

        self._keeper.stop()
        self._serving.__exit__(None, None, None)
        ray.shutdown()
        self._cluster.shutdown()


def answers(url: str) -> list[Any]:
    """What the openai client gets for a question of each kind, once streamed and once whole."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        model = client.models.list().data[0].id
        return [ask(client, model, *question) for question in questions(prompts=1)]


def bench_serve(url: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The runs of ``glm4-deploy bench-serve``, one for each number of clients."""
    command = [sys.executable, "-m", "glm4_deploy", "bench-serve", url, "--json", *arguments]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    runs: list[dict[str, Any]] = report["runs"]
    if any(run["failed"] for run in runs):
        raise SystemExit(f"requests failed: {[run['errors'] for run in runs]}")
    return runs


def median_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds: tokens per second, and seconds to the first token and of a further token."""
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        **{
            f"{name}_{percentile}": round(statistics.median(run[name][percentile] for run in runs), 4)
            for name in ("first_token_seconds", "per_token_seconds")
            for percentile in ("p50", "p99")
        },
    }


@click.command(help=__doc__.partition("\n")[0])
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--replicas", default="1,2,4", show_default=True, metavar="N,...")
@click.option("--rounds", default=3, show_default=True)
@click.option("--clients", default="1,4,8", show_default=True, metavar="N,...", help="Of bench-serve.")
@click.option("--requests", default=24, show_default=True, help="Of bench-serve, for each number of clients.")
@click.option("--max-tokens", default=32, show_default=True, help="Of bench-serve.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Add the result to OUT.json, under the bundle's name."
)
def main(
    bundle: Path,
    replicas: str,
    rounds: int,
    clients: str,
    requests: int,
    max_tokens: int,
    out: Path | None,
) -> None:
    bundle = bundle.resolve()
    counts = [int(one) for one in replicas.split(",")]
    with Session.open(bundle, threads=1) as session, serving(session, ServerOptions(port=0)) as server:
        wanted = answers(server.url)
    arguments = [
        "--clients", clients, "--requests", str(requests), "--max-tokens", str(max_tokens), "--prompt-words", "64",
    ]  # fmt: skip
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    equal = True
    fixture = Fixture(bundle)
    try:
        for number in range(rounds):
            for count in counts:
                fixture.resize(count)
                equal &= number > 0 or answers(fixture.url) == wanted
                for run in bench_serve(fixture.url, arguments):
                    found.setdefault((count, run["clients"]), []).append(run)
    finally:
        fixture.close()
    manifest = read_manifest(bundle)
    figures = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores for replicas, server and clients",
        "versions": {name: version(name) for name in ("ray", "numpy", "onnxruntime", "openai")},
        "command": f"python -m benchmarks.replica_scaling {' '.join(sys.argv[1:])}",
        "model": f"{manifest.model.num_layers} layers, hidden {manifest.model.hidden_size}, {manifest.precision}",
        "nodes": _NODES,
        "rounds": rounds,
        "openai_answers_equal_one_session": equal,
        "runs": [
            {"replicas": count, "clients": asked, **median_of(runs)} for (count, asked), runs in found.items()
        ],
    }
    click.echo(json.dumps(figures, indent=2))
    if out is not None:
        path = out.with_suffix(".json")
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, bundle.name: figures}, indent=2) + "\n")
    if not equal:
        raise SystemExit("an answer of the replicas differs from that of one session")


if __name__ == "__main__":
    main()
