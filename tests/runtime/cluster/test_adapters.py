"""LoRA adapters on replicas: each replica loads them at its start, and orders name them."""

import time

import pytest
from cpu_operators import needs_cpu_operators

from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.order import order_of
from glm4_runtime.cluster.replica import ReplicaActor, ReplicaOptions
from glm4_runtime.errors import RequestError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Generated, Request
from glm4_runtime.session import Session

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@needs_cpu_operators
def test_a_replica_runs_orders_with_its_adapters(demo_slots, demo_adapters):
    adapters = tuple((name, str(folder)) for name, folder in demo_adapters.items())
    expected = {}
    with Session.open(demo_slots) as session:
        prompt = tuple(session.tokenizer.encode("The capital of France is"))
        session.load_adapter("poet", demo_adapters["poet"])
        for name in (None, "poet"):
            session.adapter = name
            expected[name] = [token.id for token in session.generate(prompt, GREEDY)]
        eos = session.manifest.model.eos_token_ids
    actor = ReplicaActor(ReplicaOptions(str(demo_slots), eos, 8, adapters=adapters))
    try:
        assert [name for name, _ in actor.describe()[0].adapters] == list(demo_adapters)
        for number, name in enumerate((None, "poet")):
            actor.submit(number, order_of(Request(prompt, GREEDY, adapter=name)))
        found = {0: [], 1: []}
        end = time.monotonic() + 60
        while min(map(len, found.values())) < 8 and time.monotonic() < end:
            for number, event in actor.report().events:
                found[number] += [event.token.id] if isinstance(event, Generated) else []
        assert found == {0: expected[None], 1: expected["poet"]}
    finally:
        actor._work._scheduler.stop()
        actor._session.close()


@needs_cpu_operators
def test_replicas_with_other_adapters_are_other_replicas(demo_slots, demo_adapters):
    folders = demo_adapters["poet"], demo_adapters["clerk"]
    identities = []
    for folder in folders:
        actor = ReplicaActor(ReplicaOptions(str(demo_slots), (1,), 8, adapters=(("x", str(folder)),)))
        identities.append(actor.describe()[0])
        actor._session.close()
    assert identities[0].differences(identities[1]) == ["adapters"]


def test_a_fleet_loads_nothing_later():
    for call in (lambda fleet: fleet.load_adapter("x", "y"), lambda fleet: fleet.unload_adapter("x")):
        with pytest.raises(RequestError, match="give all adapters at the start by serve --lora NAME=DIR"):
            call(Fleet(4))
