"""Replicas on a real Ray cluster are killed while clients read: no answer is lost or changed."""

import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import openai
import pytest

from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed; run make .venv/.installed"
)

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
_SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
# further members of a request's body
BODIES = [
    {},
    _SAMPLED,
    _SAMPLED | {"frequency_penalty": 0.5, "extra_body": {"repetition_penalty": 1.1}},
    _SAMPLED | {"logprobs": True, "top_logprobs": 3},
    _SAMPLED | {"n": 2},
    _SAMPLED | {"stop": ["e t", "never to be seen"]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"tools": [TOOL], "tool_choice": "required"},
]
REQUESTS = 40


def ask(client, number):
    """The answer to one request as plain data, without ids and times; every second request is streamed."""
    body = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": f"Tell me story number {number % 5} of the old king."}],
        "max_tokens": 48,
    } | BODIES[number % len(BODIES)]
    if number % 2 == 0:
        whole = client.chat.completions.create(**body)
        return [choice.model_dump(exclude={"message": {"tool_calls": {"__all__": {"id"}}}}) for choice in whole.choices], (
            whole.usage.prompt_tokens, whole.usage.completion_tokens
        )  # fmt: skip
    texts, usage = {}, None
    for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.delta
            calls = [(call.function.name, call.function.arguments) for call in delta.tool_calls or ()]
            found = texts.setdefault(choice.index, [])
            found.append(
                (
                    delta.content or "",
                    calls,
                    choice.finish_reason,
                    choice.logprobs and choice.logprobs.model_dump(),
                )
            )
    joined = {
        index: ("".join(part[0] for part in parts), [part[1:] for part in parts if any(part[1:])])
        for index, parts in texts.items()
    }
    return joined, (usage.prompt_tokens, usage.completion_tokens)


def answers(url, on_answer=lambda: None):
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(8) as clients,
    ):

        def one(number):
            found = ask(client, number)
            on_answer()
            return found

        return list(clients.map(one, range(REQUESTS)))


@pytest.mark.alone
# at the end of Ray, a thread that starts a replica gets SystemExit, which ends the thread as it should
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_answer_is_lost_or_changed_when_replicas_are_killed(demo_cpu):
    from glm4_runtime.cluster.fleet import Fleet
    from glm4_runtime.cluster.ray_module import require_ray
    from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
    from glm4_runtime.cluster.serve import DescribedBundle
    from glm4_runtime.cluster.start import Keeper, connect

    with Session.open(demo_cpu, threads=1) as session, serving(session, ServerOptions(port=0)) as server:
        wanted = answers(server.url)
    connect(None)
    assert require_ray().util.get_node_ip_address() == "127.0.0.1"
    fleet, pids, ended, done = Fleet(64), {}, itertools.count(), threading.Event()
    try:
        bundle = DescribedBundle(demo_cpu, {})
        options = ReplicaOptions(str(demo_cpu), bundle.manifest.model.eos_token_ids, 64, {"threads": 1})

        def make(name):
            replica = RayReplica(name, options, 30.0, 0)
            pids[name] = replica.pid
            return replica

        keeper = Keeper(fleet, make, 3, 30.0)
        with serving(bundle, ServerOptions(port=0), fleet) as server:
            keeper.start()

            def kill():
                """Kill a replica after 8 answers, and another one once each moved request has a new token."""
                count = 0
                while not done.wait(0.02) and count < 2:
                    if (
                        heard[0] >= 8 * (count + 1)
                        and len(fleet.stats_by_replica()) >= 2
                        and not fleet.suspects
                    ):
                        os.kill(pids[str(count)], signal.SIGKILL)
                        count += 1

            heard = [0]

            def hear():
                heard[0] = next(ended) + 1

            killer = threading.Thread(target=kill)
            killer.start()
            found = answers(server.url, hear)
            done.set()
            killer.join()
            assert fleet.deaths >= 2
            assert fleet.migrations >= 1
            end = time.monotonic() + 20
            while any(one.active or one.queued for one in fleet.stats_by_replica().values()):
                assert time.monotonic() < end, "a slot is leaked"
                time.sleep(0.05)
            metrics = httpx.get(f"{server.url}/metrics").text
            assert 'glm4_replica_slots{replica="2"} 4.0' in metrics
            assert httpx.get(f"{server.url}/health/replicas").json()["replicas"]
            keeper.stop()
    finally:
        require_ray().shutdown()
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours == theirs, BODIES[number % len(BODIES)]
