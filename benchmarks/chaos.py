"""Kills replicas and nodes of a Ray cluster while clients read: no answer may be lost or altered.

    python -m benchmarks.chaos --out benchmarks/results/chaos.json

Three Ray nodes run on this machine. Each ``--pause`` seconds a replica gets SIGKILL, or a node loses all its
processes and comes back later. The node of Ray's controller is not killed. 32 clients of a process of their own ask
questions of each kind; the wanted answers are those of an undisturbed server with one session.
"""

import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from glm4_runtime.cluster.described import DescribedBundle
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.keeper import Keeper
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.start import connect
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

_ROOT = Path(__file__).parents[1]
_STEP_TIMEOUT = 60.0
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
# Growth of the server's memory from the second to the last fifth of the run that counts as flat.
_FLAT = 1.1


class Nodes:
    """Three nodes; the first one has Ray's controller."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=_node())
        self._others = [self._cluster.add_node(**_node()) for _ in range(2)]
        connect(self._cluster.address)

    def replace_one(self, chance: random.Random) -> None:
        """Kill all processes of a node, and start another one."""
        victim = self._others.pop(chance.randrange(len(self._others)))
        self._cluster.remove_node(victim, allow_graceful=False)
        self._others.append(self._cluster.add_node(wait=False, **_node()))

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def _node() -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Killer:
    """Kills in turn: two replicas, then a node.

    Attributes:
        kills: replica or node -> count. ``memory``: MiB of the server at each kill. ``alive``: replicas at each kill.
    """

    def __init__(self, nodes: Nodes, fleet: Fleet, pids: dict[str, int]) -> None:
        self._nodes, self._fleet, self._pids = nodes, fleet, pids
        self._chance = random.Random(1)
        self.kills: Counter[str] = Counter()
        self.memory: list[float] = []
        self.alive: list[int] = []

    def kill(self) -> None:
        self.memory.append(_resident_mib())
        alive = sorted(self._fleet.stats_by_replica())
        self.alive.append(len(alive))
        if len(self.alive) % 3 == 0:
            self._nodes.replace_one(self._chance)
            self.kills["node"] += 1
        elif alive:
            with contextlib.suppress(ProcessLookupError):  # it died a moment ago
                os.kill(self._pids[self._chance.choice(alive)], signal.SIGKILL)
                self.kills["replica"] += 1


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_MIB


def _clients(url: str, out: Path, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.chaos_clients", url, "--out", str(out), *more]
    return subprocess.Popen(command, cwd=_ROOT)


def _asked(clients: "subprocess.Popen[bytes]", pause: float, kill: Callable[[], None]) -> None:
    """Wait for the clients. Ray starts nodes on the main thread only, so the kills are here."""
    while True:
        try:
            if clients.wait(pause):
                raise SystemExit("the clients failed")
            return
        except subprocess.TimeoutExpired:
            kill()


def _leaked(fleet: Fleet) -> int:
    """Slots that are still taken 30 s after the last answer."""
    end = time.monotonic() + 30
    while True:
        time.sleep(0.6)  # a report comes at least each 0.5 s
        taken = sum(one.active + one.queued for one in fleet.stats_by_replica().values())
        if not taken or time.monotonic() > end:
            return taken


def _flat(memory: list[float]) -> bool:
    fifth = max(1, len(memory) // 5)
    return statistics.median(memory[-fifth:]) <= _FLAT * statistics.median(
        memory[fifth : 2 * fifth] or memory
    )


def undisturbed(bundle: Path, out: Path) -> None:
    """Write the answers of a server with one session."""
    with Session.open(bundle, threads=1) as session, serving(session, ServerOptions(port=0)) as server:
        _asked(_clients(server.url, out), 600, lambda: None)


def disturbed(bundle: Path, folder: Path, seconds: float, pause: float, replicas: int) -> dict[str, Any]:
    """The figures of a run in which replicas and nodes are killed."""
    nodes, fleet, pids = Nodes(), Fleet(64), dict[str, int]()
    described = DescribedBundle(bundle, {})
    options = ReplicaOptions(str(bundle), described.manifest.model.eos_token_ids, 64, {"threads": 1})

    def make(name: str) -> RayReplica:
        replica = RayReplica(name, options, _STEP_TIMEOUT + 10, 0)
        pids[name] = replica.pid
        return replica

    keeper = Keeper(fleet, make, _STEP_TIMEOUT)
    killer = Killer(nodes, fleet, pids)
    try:
        with serving(described, ServerOptions(port=0, log_level="warning"), fleet) as server:
            keeper.start(replicas)
            more = ("--compare", str(folder / "wanted.json"), "--seconds", str(seconds))
            _asked(_clients(server.url, folder / "found.json", *more), pause, killer.kill)
            leaked = _leaked(fleet)
            keeper.stop()
    finally:
        nodes.close()
    memory = [round(one) for one in killer.memory]
    return {
        "answers": json.loads((folder / "found.json").read_text()),
        "kills": dict(killer.kills),
        "deaths": fleet.deaths,
        "migrations": fleet.migrations,
        "replicas_alive_at_kills": dict(sorted(Counter(killer.alive).items())),
        "leaked_slots": leaked,
        "server_memory_mib": memory,
        "memory_flat": _flat(memory),
    }


@click.command(help=__doc__.partition("\n")[0])
@click.option(
    "--bundle", type=click.Path(exists=True, path_type=Path), help="Default: the demo, exported for cpu."
)
@click.option("--seconds", default=600.0, show_default=True)
@click.option("--pause", default=10.0, show_default=True, help="Seconds between two kills.")
@click.option("--replicas", default=3, show_default=True)
@click.option("--least", default=3000, show_default=True, help="Answers that must be compared.")
@click.option("--out", type=click.Path(path_type=Path), help="File of the result.")
def main(
    bundle: Path | None, seconds: float, pause: float, replicas: int, least: int, out: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if bundle is None:
            bundle = folder / "glm4-tiny"
            demo = str(_ROOT / "demo" / "glm4-tiny")
            command = [sys.executable, "-m", "glm4_deploy", "export", demo, str(bundle), "--target", "cpu"]
            subprocess.run([*command, "--max-batch-size", "4"], check=True, cwd=_ROOT)
        undisturbed(bundle, folder / "wanted.json")
        found = disturbed(bundle, folder, seconds, pause, replicas)
    figures = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, shared with other work",
        "versions": {name: version(name) for name in ("ray", "numpy", "onnxruntime", "openai")},
        "command": f"python -m benchmarks.chaos {' '.join(sys.argv[1:])}".strip(),
        "seconds": seconds,
        "nodes": 3,
        "replicas": replicas,
    } | found
    text = json.dumps(figures, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")
    answers = figures["answers"]
    wrong = answers["lost"] or answers["altered"] or found["leaked_slots"] or not found["memory_flat"]
    if wrong or answers["equal"] < least:
        raise SystemExit("chaos found what must not be: see the figures above")


if __name__ == "__main__":
    main()
