"""Stages on a real Ray cluster of two nodes: the bits of the unstaged bundle, and what happens when a stage dies."""

import os
import signal
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cpu_operators import needs_cpu_operators
from local_replicas import joined
from scheduling import Listener
from staged_calls import assert_equal, driven, scored

from glm4_runtime.bundle import read_manifest
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.ray_module import require_ray
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.start import _set_variables, connect
from glm4_runtime.errors import BundleError, LostStageError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Failed, Generated, Request, Scheduler
from glm4_runtime.session import Session

pytestmark = [
    needs_cpu_operators,
    pytest.mark.alone,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; run make install"),
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, of which each has the files of one stage."""
    _set_variables(local=True)
    from ray.cluster_utils import Cluster

    nodes = [
        {
            "num_cpus": 1,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "resources": {f"stage-{number}": 1},
        }
        for number in (2, 1)
    ]
    cluster = Cluster(initialize_head=True, head_node_args=nodes[0])
    cluster.add_node(**nodes[1])
    connect(cluster.address)
    yield cluster
    require_ray().shutdown()
    cluster.shutdown()


@pytest.fixture
def session(cluster, demo_staged):
    with Session.open(demo_staged, threads=1, stages_on="ray") as session:
        yield session


def test_every_call_gives_the_bits_of_the_unstaged_bundle(cluster, demo_staged, demo_cpu):
    nodes = {stage_node(number) for number in (1, 2)}
    assert len(nodes) == 2
    for seed in range(2):
        assert_equal(driven(demo_staged, seed, stages_on="ray"), driven(demo_cpu, seed))
    assert_equal(scored(demo_staged, stages_on="ray"), scored(demo_cpu))


def stage_node(number):
    return next(n["NodeID"] for n in require_ray().nodes() if f"stage-{number}" in n["Resources"])


def test_a_stage_that_dies_ends_the_requests_and_the_session(session):
    scheduler, events = Scheduler(session), []
    scheduler.start()
    try:
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
        for number in range(3):
            scheduler.submit(Request((5, 6, 7 + number), params), events.append)
        wait_until(lambda: sum(isinstance(event, Generated) for event in events) > 9)
        os.kill(session.pids[1], signal.SIGKILL)
        wait_until(lambda: sum(isinstance(event, Failed) for event in events) == 3)
        errors = [event.error for event in events if isinstance(event, Failed)]
        assert all("stage 2 of the model is lost" in str(error) for error in errors)
        assert not scheduler.ready
    finally:
        scheduler.stop(0)
    for call in (lambda: session.prefill(0, [5]), lambda: session.prefill(1, [5])):
        with pytest.raises(LostStageError, match="open the bundle again") as caught:
            call()
        assert "\n" not in str(caught.value)


def wait_until(found):
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_replica_whose_stage_dies_loses_no_request(cluster, demo_staged, demo_cpu):
    """Two replicas, each with its scheduler and two stages; requests of the dead one go on on the other."""
    params = SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True)
    asked = [Request((5, 6, 7 + number), replace(params, seed=number)) for number in range(6)]
    with Session.open(demo_cpu, threads=1) as single:
        wanted = [[one.id for one in single.generate(each.prompt_ids, each.params)] for each in asked]
    options = ReplicaOptions(
        str(demo_staged),
        read_manifest(demo_staged).model.eos_token_ids,
        64,
        {"threads": 1, "stages_on": "ray"},
    )
    fleet, listeners = Fleet(64), [Listener() for _ in asked]
    try:
        replicas = [joined(fleet, RayReplica(name, options, 30.0, 0, 2)) for name in "ab"]
        for each, listener in zip(asked, listeners, strict=True):
            fleet.submit(each, listener)
        wait_until(lambda: all(len(listener.tokens) > 3 for listener in listeners))
        os.kill(replicas[0].stage_pids[1], signal.SIGKILL)
        assert all(listener.done.wait(60) for listener in listeners)
        wait_until(lambda: fleet.deaths == 1)
    finally:
        fleet.stop(0)
    assert [listener.ids for listener in listeners] == wanted
    assert fleet.migrations >= 1
    wait_until(lambda: not any(alive(pid) for replica in replicas for pid in replica.stage_pids))


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_an_error_of_a_stage_is_the_error_of_the_call(session):
    """A stage that raises goes on; only a dead one is lost."""
    session.prefill(0, [5, 6])
    before = session.decode({0: 7})[0]
    session.truncate(0, 2)
    with pytest.raises(IndexError):
        session._stages[1].clear(99)
    np.testing.assert_array_equal(session.decode({0: 7})[0], before)


def test_a_node_with_another_export_is_refused(cluster, demo_staged, monkeypatch):
    monkeypatch.setattr("glm4_runtime.cluster.stages.manifest_digest", lambda _: "another")
    with pytest.raises(BundleError, match="another export on the node of stage 1"):
        Session.open(demo_staged, stages_on="ray")
