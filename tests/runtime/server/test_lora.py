"""LoRA adapters as models of the API: chosen by name, in one batch, loaded and unloaded while the server runs."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from cpu_operators import needs_cpu_operators

from glm4_runtime.errors import CheckpointError, RequestError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

pytestmark = needs_cpu_operators
PROMPT = "The capital of France is the city of"
BASE, NAMES = "glm4-tiny", ("poet", "clerk")


@pytest.fixture(scope="module")
def expected(demo_slots, demo_adapters):
    """Greedy text of each model alone, from a session."""
    texts = {}
    with Session.open(demo_slots) as session:
        ids = session.tokenizer.encode(PROMPT)
        for name, folder in demo_adapters.items():
            session.load_adapter(name, folder)
        for name in (None, *demo_adapters):
            session.adapter = name
            tokens = [token.id for token, _ in zip(session.generate(ids), range(16), strict=False)]
            texts[name or BASE] = session.tokenizer.decode(tokens)
    assert len(set(texts.values())) == 4
    return texts


@pytest.fixture
def server(demo_slots, demo_adapters):
    lora = tuple(f"{name}={demo_adapters[name]}" for name in NAMES)
    options = ServerOptions(port=0, adapters=lora, allow_lora_loading=True, aliases=("verse=poet",))
    with serving(Session.open(demo_slots), options) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def text(client, model, **options):
    asked = dict(model=model, prompt=PROMPT, max_tokens=16, temperature=0, extra_body={"ignore_eos": True})
    return client.completions.create(**asked | options).choices[0].text


def post(server, route, **body):
    return httpx.post(f"{server.url}/v1/{route}", json=body, timeout=60)


def test_models_are_listed_and_chosen_by_name(client, expected):
    assert [model.id for model in client.models.list()] == [BASE, *NAMES, "verse"]
    assert client.models.retrieve("poet").parent == BASE
    assert not hasattr(client.models.retrieve(BASE), "parent")
    for name in (BASE, *NAMES):
        assert text(client, name) == expected[name]
    assert text(client, "verse") == expected["poet"]
    with pytest.raises(openai.NotFoundError, match="no model 'coder'"):
        text(client, "coder")


def test_all_apis_choose_by_the_name(server, client):
    """Chat, Anthropic's messages and responses make the same conversation's answer."""
    turns = [{"role": "user", "content": "Tell me of the sea."}]
    asked = dict(temperature=0)
    answers = {}
    for name in (BASE, "poet"):
        chat = client.chat.completions.create(model=name, messages=turns, max_tokens=12, **asked)
        message = post(server, "messages", model=name, messages=turns, max_tokens=12, **asked).json()
        response = post(server, "responses", model=name, input=turns, max_output_tokens=12, **asked).json()
        answers[name] = chat.choices[0].message.content
        assert message["content"][0]["text"] == answers[name]
        assert response["output"][-1]["content"][0]["text"] == answers[name]
    assert answers[BASE] != answers["poet"]


def test_one_batch_mixes_adapters(client, expected):
    """More requests than slots, twice: the second time with a prefix cache full of all models."""
    for _ in range(2):
        asked = [(BASE, *NAMES)[i % 3] for i in range(18)]
        with ThreadPoolExecutor(18) as pool:
            found = list(pool.map(lambda name: text(client, name), asked))
        assert found == [expected[name] for name in asked]


def test_a_prefix_is_shared_by_requests_of_one_adapter_only(client):
    def cached(model):
        answer = client.completions.create(model=model, prompt=long, max_tokens=2, temperature=0)
        return answer.usage.prompt_tokens_details.cached_tokens

    long = PROMPT * 8
    assert cached("poet") == 0
    assert cached(BASE) == 0
    assert cached("clerk") == 0
    assert cached("poet") > 16
    assert cached(BASE) > 16


def test_adapters_come_and_go_while_requests_run(server, client, expected, demo_adapters):
    loaded = post(server, "load_lora_adapter", lora_name="coder", lora_path=str(demo_adapters["coder"]))
    assert loaded.status_code == 200
    assert loaded.json()["parent"] == BASE
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(text, client, name) for name in (BASE, "poet", "clerk")]
        assert text(client, "coder") == expected["coder"]
        assert [one.result() for one in others] == [expected[name] for name in (BASE, "poet", "clerk")]
    freed = post(server, "unload_lora_adapter", lora_name="coder")
    assert (freed.status_code, freed.json()["deleted"]) == (200, True)
    with pytest.raises(openai.NotFoundError):
        text(client, "coder")
    # a new adapter under the old name reads nothing that the old one cached
    assert post(
        server, "load_lora_adapter", lora_name="coder", lora_path=str(demo_adapters["poet"])
    ).is_success
    assert text(client, "coder") == expected["poet"]
    assert text(client, "clerk") == expected["clerk"]


def test_an_adapter_in_use_is_not_unloaded(server, client):
    stream = client.completions.create(
        model="poet",
        prompt=PROMPT,
        max_tokens=200,
        stream=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    refused = post(server, "unload_lora_adapter", lora_name="poet")
    if refused.status_code == 409:  # else the request was done already
        assert "unload it when they have ended" in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "adapter_in_use"
    assert sum(1 for _ in stream) > 10
    assert post(server, "unload_lora_adapter", lora_name="clerk").status_code == 200


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("load_lora_adapter", dict(lora_name="x"), 400, "lora_path: it is required"),
        ("load_lora_adapter", dict(lora_name="", lora_path="y"), 400, "at least 1 character"),
        ("load_lora_adapter", dict(lora_name="x", lora_path="/nowhere"), 400, "has no adapter_config.json"),
        ("load_lora_adapter", dict(lora_name="poet", lora_path="/nowhere"), 400, "a model 'poet' already"),
        ("load_lora_adapter", dict(lora_name=BASE, lora_path="/nowhere"), 400, "a model 'glm4-tiny' already"),
        ("load_lora_adapter", dict(lora_name="x", lora_path="y", rank=3), 400, "there is no such option"),
        ("unload_lora_adapter", dict(lora_name="x"), 404, "no adapter 'x' is loaded"),
        ("unload_lora_adapter", dict(lora_name=BASE), 404, "no adapter 'glm4-tiny' is loaded"),
        ("unload_lora_adapter", dict(lora_name="verse"), 404, "no adapter 'verse' is loaded"),
    ],
)
def test_refusals(server, route, body, status, message):
    answer = post(server, route, **body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_full_table_is_refused(server, demo_adapters):
    path = str(demo_adapters["coder"])
    assert post(server, "load_lora_adapter", lora_name="x", lora_path=path).status_code == 200
    full = post(server, "load_lora_adapter", lora_name="y", lora_path=path)
    assert full.status_code == 400
    assert "all 3 adapter slots" in full.json()["error"]["message"]


def test_loading_is_off_unless_allowed(demo_slots, demo_adapters):
    with serving(Session.open(demo_slots), ServerOptions(port=0)) as server:
        for route in ("load_lora_adapter", "unload_lora_adapter"):
            body = dict(lora_name="x", lora_path=str(demo_adapters["poet"]))
            answer = post(server, route, **body if route.startswith("load") else dict(lora_name="x"))
            assert answer.status_code == 403
            assert "start it with --allow-lora-loading" in answer.json()["error"]["message"]


def test_a_bundle_without_slots_takes_none(demo_cpu, demo_adapters):
    with serving(Session.open(demo_cpu), ServerOptions(port=0, allow_lora_loading=True)) as server:
        answer = post(server, "load_lora_adapter", lora_name="x", lora_path=str(demo_adapters["poet"]))
        assert answer.status_code == 400
        assert "takes no adapters at run time" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(adapters=("poet",)), "must be NAME=DIR"),
        (dict(adapters=("poet=a", "poet=b")), "the name 'poet' twice"),
        (dict(adapters=("glm4-tiny=a",)), "'glm4-tiny', which the model has"),
        (dict(adapters=("poet=a",), aliases=("x=clerk",)), "the models are 'glm4-tiny', 'poet'"),
        (dict(adapters=("poet=a",), aliases=("poet=poet",)), "a name that the server has already"),
    ],
)
def test_names_are_checked_before_the_bundle_is_opened(demo_slots, options, message):
    with pytest.raises(RequestError, match=message):
        ServerOptions(port=0, **options).names(demo_slots)


def test_an_adapter_that_does_not_fit_stops_the_start(demo_slots, tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"has no adapter_config\.json"),
        serving(Session.open(demo_slots), ServerOptions(port=0, adapters=(f"x={tmp_path}",))),
    ):
        pass
