"""What each replica gets of the cores and the GPUs. No test here needs Ray."""

from dataclasses import replace

import pytest

from glm4_runtime.bundle import read_manifest
from glm4_runtime.cluster.scaling import ReplicaCount
from glm4_runtime.cluster.serve import ClusterOptions, gpus_of_each, session_options
from glm4_runtime.errors import UnavailableError


class Resources:
    """Ray's answers on its GPUs; Ray leaves out a kind of which there is none."""

    def __init__(self, gpus, free):
        self._all, self._free = gpus, free

    def cluster_resources(self):
        return {"GPU": float(self._all)} if self._all else {}

    def available_resources(self):
        return {"GPU": float(self._free)} if self._free else {}


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def manifest(demo_cpu):
    return read_manifest(demo_cpu)


@pytest.mark.parametrize(
    ("dialect", "address", "asked", "threads"),
    [
        ("cpu", None, None, 4),
        ("ort", None, None, 4),
        ("ort", None, 3, 3),
        ("cpu", "auto", None, None),  # the cores of other machines are not known here
        ("tensorrt", None, None, None),  # an engine refuses threads
        ("tensorrt-rtx", None, None, None),
    ],
)
def test_replicas_of_one_machine_share_its_cores(manifest, monkeypatch, dialect, address, asked, threads):
    monkeypatch.setattr("glm4_runtime.cluster.serve.cores", lambda: 9)
    found = session_options(
        replace(manifest, dialect=dialect),
        ClusterOptions(ReplicaCount(2, 2), address, session={"threads": asked}),
    )
    assert found["threads"] == threads


@pytest.mark.parametrize(
    ("asked", "place", "threads"), [(None, "ray", 2), ("ray", "ray", 2), ("process", "process", 4)]
)
def test_stages_share_the_cores_of_their_replica(demo_staged, monkeypatch, asked, place, threads):
    monkeypatch.setattr("glm4_runtime.cluster.serve.cores", lambda: 9)
    cluster = ClusterOptions(ReplicaCount(2, 2), session={"stages_on": asked})
    staged = read_manifest(demo_staged)
    assert session_options(staged, cluster) == {"stages_on": place, "threads": threads}
    assert gpus_of_each(replace(staged, providers=(CUDA, CPU)), cluster, Resources(8, 8)) == 0
    engines = replace(staged, dialect="tensorrt-rtx")
    assert session_options(engines, ClusterOptions(ReplicaCount(2, 2)))["stages_on"] == "process"


@pytest.mark.parametrize(
    ("providers", "provider", "gpus", "each"),
    [
        ((CPU,), None, 8, 0),
        ((CUDA, CPU), CPU, 8, 0),
        ((CUDA, CPU), None, 0, 0),
        ((CUDA, CPU), None, 8, 1),
    ],
)
def test_a_replica_gets_a_gpu_unless_it_computes_on_the_cpu(manifest, providers, provider, gpus, each):
    options = ClusterOptions(ReplicaCount(2, 2), session={"provider": provider})
    assert gpus_of_each(replace(manifest, providers=providers), options, Resources(gpus, gpus)) == each


def test_an_engine_gets_a_gpu(manifest):
    assert (
        gpus_of_each(
            replace(manifest, providers=(), engine=object()),
            ClusterOptions(ReplicaCount(2, 2)),
            Resources(2, 2),
        )
        == 1
    )


@pytest.mark.parametrize("free", [0, 1])
def test_more_replicas_than_free_gpus_are_refused(manifest, free):
    with pytest.raises(UnavailableError, match=f"each of the 2 replicas needs a GPU, and {free} are free"):
        gpus_of_each(
            replace(manifest, providers=(CUDA,)), ClusterOptions(ReplicaCount(2, 2)), Resources(4, free)
        )
