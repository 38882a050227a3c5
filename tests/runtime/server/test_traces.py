"""Traces: the spans of a request, their times, who their parents are, and what they never contain."""

import json
import os
import subprocess
import sys
import time

import httpx
import pytest
from collector import attributes, collecting
from local_replicas import LocalReplica, joined
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from glm4_runtime import trace_options, tracing
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.serve import DescribedBundle
from glm4_runtime.errors import RequestError, UnavailableError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session
from glm4_runtime.tracing import Traces

MODEL = "glm4-tiny"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}


class Kept:
    """The spans that a process has made, by their names."""

    def __init__(self, prompts=False):
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=DEFAULT_ON)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.traces = Traces(provider, prompts)

    def all(self, count=1):
        """Wait for ``count`` spans of requests: a span ends after its answer."""
        end = time.monotonic() + 20
        while sum(span.kind is SpanKind.SERVER for span in self._exporter.get_finished_spans()) < count:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self._exporter.get_finished_spans()

    def one(self, name, count=1):
        (found,) = [span for span in self.all(count) if span.name == name]
        return found

    def text(self):
        return " ".join(span.to_json() for span in self.all())


@pytest.fixture
def kept(monkeypatch):
    """A function that makes each server of this test keep its spans."""

    def keep(prompts=False):
        found = Kept(prompts)
        monkeypatch.setattr(trace_options, "started", lambda _: found.traces)
        return found

    return keep


@pytest.fixture
def traced(kept, demo_bundle):
    """The spans, and the URL of a server of the demo bundle."""
    found = kept()
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        yield found, server.url


def post(url, path, body, **headers):
    return httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60)


def test_a_chat_is_one_span_with_its_parts(traced):
    spans, url = traced
    answer = post(url, "/v1/chat/completions", CHAT | {"max_tokens": 8, "seed": 3}, **{"x-request-id": "one"})
    usage = answer.json()["usage"]
    span = spans.one(f"chat {MODEL}")
    assert span.kind is SpanKind.SERVER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "glm4-deploy",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0,
        "gen_ai.request.top_p": 1,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0,
        "gen_ai.request.presence_penalty": 0,
        "gen_ai.request.seed": 3,
        "gen_ai.response.model": MODEL,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "glm4.request.id": "one",
    }
    parts = [spans.one(name) for name in ("prepare", "queue", "prompt", "decode")]
    assert {part.parent.span_id for part in parts} == {span.context.span_id}
    assert [event.name for event in span.events] == ["first_token"]
    moments = [span.start_time]
    for part in parts:
        moments += [part.start_time, part.end_time]
    moments.append(span.end_time)
    assert moments == sorted(moments)
    prepare, queue, prompt, decode = parts
    assert prepare.end_time == queue.start_time
    assert queue.end_time == prompt.start_time
    assert prompt.end_time > prompt.start_time
    assert span.events[0].timestamp == decode.start_time
    assert decode.end_time > decode.start_time
    assert decode.attributes["gen_ai.usage.output_tokens"] == 8
    assert abs(span.end_time / 1e9 - time.time()) < 60


def test_names_are_those_of_the_conventions(traced):
    spans, url = traced
    post(url, "/v1/chat/completions", CHAT | {"n": 2, "max_tokens": 4, "stream": True})
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    used = {name for span in spans.all() for name in span.attributes}
    assert {"gen_ai.request.choice.count", "gen_ai.response.time_to_first_chunk"} <= used
    assert all(name.startswith(("http.", "glm4.", "error.")) or name in known for name in used)
    assert "chat" in {one.value for one in gen_ai_attributes.GenAiOperationNameValues}


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": "I", "max_tokens": 2}, f"text_completion {MODEL}"),
        ("/v1/responses", {"model": MODEL, "input": "I", "max_output_tokens": 2}, f"chat {MODEL}"),
        (
            "/v1/messages",
            {"model": MODEL, "messages": CHAT["messages"], "max_tokens": 2},
            f"chat {MODEL}",
        ),
        ("/tokenize", {"model": MODEL, "prompt": "I"}, "POST /tokenize"),
    ],
)
def test_each_route_names_its_operation(traced, path, body, name):
    spans, url = traced
    assert post(url, path, body).status_code == 200
    assert spans.one(name).attributes["http.route"] == path


def test_embeddings_have_their_own_operation(kept, bundle_of):
    spans = kept()
    with serving(Session.open(bundle_of("encoder")), ServerOptions(port=0)) as server:
        answer = post(server.url, "/v1/embeddings", {"model": "encoder", "input": ["one", "two"]})
        assert answer.status_code == 200
        span = spans.one("embeddings encoder")
    assert span.attributes["gen_ai.operation.name"] == "embeddings"
    assert span.attributes["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]


def test_several_replies_have_parts_of_their_own(traced):
    spans, url = traced
    post(url, "/v1/completions", {"model": MODEL, "prompt": ["I", "You"], "max_tokens": 3})
    for name in ("queue", "prompt", "decode"):
        parts = [span for span in spans.all() if span.name == name]
        assert [part.attributes["glm4.sequence"] for part in parts] == [0, 1]
    events = spans.one(f"text_completion {MODEL}").events
    assert sorted(event.attributes["glm4.sequence"] for event in events) == [0, 1]


def test_a_reply_with_a_form_tells_of_its_masks(traced):
    spans, url = traced
    post(url, "/v1/chat/completions", CHAT | {"max_tokens": 12, "response_format": {"type": "json_object"}})
    (event,) = spans.one("decode").events
    assert event.name == "mask"
    assert 0 < event.attributes["glm4.mask.seconds"] < 60


def test_the_span_is_a_child_of_the_callers(traced):
    spans, url = traced
    post(url, "/v1/chat/completions", CHAT | {"max_tokens": 2}, traceparent=f"00-{TRACE}-{CALLER}-01")
    assert {f"{span.context.trace_id:032x}" for span in spans.all()} == {TRACE}
    assert f"{spans.one(f'chat {MODEL}').parent.span_id:016x}" == CALLER


def test_what_the_caller_does_not_sample_makes_no_spans(traced):
    spans, url = traced
    post(url, "/v1/chat/completions", CHAT | {"max_tokens": 2}, traceparent=f"00-{TRACE}-{CALLER}-00")
    post(url, "/v1/chat/completions", CHAT | {"max_tokens": 2}, traceparent="00-nonsense-01")
    assert spans.one(f"chat {MODEL}").parent is None


@pytest.mark.parametrize(
    ("path", "body", "status", "name"),
    [
        ("/v1/chat/completions", CHAT | {"model": "other"}, 404, "POST /v1/chat/completions"),
        ("/v1/chat/completions", CHAT | {"temperature": -1}, 400, f"chat {MODEL}"),
        ("/v1/nowhere", {}, 404, "POST other"),
    ],
)
def test_a_refused_request_has_its_status(traced, path, body, status, name):
    spans, url = traced
    assert post(url, path, body).status_code == status
    span = spans.all()[-1]
    assert span.name in (name, f"POST {path}", "POST other")
    assert span.attributes["http.response.status_code"] == status
    assert span.attributes["error.type"] == str(status)
    assert span.status.status_code is StatusCode.UNSET  # the client is at fault


def test_a_stream_that_fails_is_an_error(kept, demo_bundle, scripted):
    from glm4_runtime.errors import ModelError
    from glm4_runtime.scheduler import Failed

    spans = kept()
    _, server, _ = scripted(Failed(ModelError("broken")))
    post(server.url, "/v1/chat/completions", CHAT)
    span = spans.all()[-1]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "500"
    assert spans.one("queue").attributes["glm4.unfinished"]
    assert "broken" not in spans.text()


def test_a_client_that_leaves_ends_the_span(kept, scripted):
    spans = kept()
    _, server, _ = scripted(["I", " am", None, "x"])
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        lines = answer.iter_lines()
        for _ in range(5):
            next(lines)
    span = spans.one(f"chat {MODEL}")
    assert span.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert spans.one("decode").attributes["gen_ai.usage.output_tokens"] == 2


SECRET = "xylophone"


def secrets_asked(url):
    """Requests, good and bad ones, with a secret in every place that takes a text."""
    tool = {"type": "function", "function": {"name": SECRET, "description": SECRET, "parameters": {}}}
    form = {
        "type": "json_schema",
        "json_schema": {"name": SECRET, "schema": {"type": "string", "const": SECRET}},
    }
    chat = {
        "model": MODEL,
        "messages": [{"role": "user", "content": SECRET}],
        "user": SECRET,
        "max_tokens": 9,
    }
    for more in (
        {"stop": [SECRET]},
        {"tools": [tool], "tool_choice": "required"},
        {"response_format": form},
        {"stream": True},
        {SECRET: SECRET},
        {"temperature": SECRET},
        {"model": SECRET},
        {"messages": [{"role": SECRET, "content": SECRET}]},
    ):
        post(url, "/v1/chat/completions", chat | more)
    post(url, "/v1/completions", {"model": MODEL, "prompt": SECRET, "max_tokens": 3, "echo": True})
    post(url, "/v1/responses", {"model": MODEL, "input": SECRET, "max_output_tokens": 3})
    post(url, "/v1/messages", chat | {"user": None, "system": SECRET})
    post(url, f"/v1/{SECRET}?{SECRET}", {})
    return 12


def test_texts_of_a_request_are_in_no_span(traced):
    spans, url = traced
    count = secrets_asked(url)
    spans.all(count)
    assert SECRET not in spans.text()


def test_texts_are_in_the_spans_that_ask_for_them(kept, demo_bundle, capfd):
    spans = kept(prompts=True)
    options = ServerOptions(port=0, traces="env", trace_prompts=True)
    with serving(Session.open(demo_bundle), options) as server:
        answer = post(server.url, "/v1/chat/completions", CHAT | {"max_tokens": 9}).json()
        span = spans.one(f"chat {MODEL}")
    (given,) = json.loads(span.attributes["gen_ai.input.messages"])
    assert given["role"] == "user"
    assert "Who are you?" in given["parts"][0]["content"]
    (reply,) = json.loads(span.attributes["gen_ai.output.messages"])
    content = answer["choices"][0]["message"]["content"]
    assert reply == {
        "role": "assistant",
        "parts": [{"type": "text", "content": content}],
        "finish_reason": "length",
    }
    logged = capfd.readouterr().err
    assert '"event": "request"' in logged
    assert "Who are you?" not in logged  # the log has an option of its own


def test_a_replica_makes_a_span_within_the_requests(kept, demo_bundle):
    spans, theirs = kept(), Kept()
    fleet = Fleet(max_queue=8)
    replica = joined(fleet, LocalReplica("a", demo_bundle, traces=theirs.traces))
    try:
        with serving(DescribedBundle(demo_bundle, {}), ServerOptions(port=0), fleet) as server:
            headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "x-request-id": "one"}
            post(server.url, "/v1/chat/completions", CHAT | {"max_tokens": 5}, **headers)
            span, order = spans.one(f"chat {MODEL}"), theirs.one("replica")
            assert spans.one("prompt").end_time > spans.one("prompt").start_time
    finally:
        fleet.stop(0)
        replica.close()
    assert order.parent.span_id == span.context.span_id
    assert f"{order.context.trace_id:032x}" == TRACE
    assert dict(order.attributes) == {
        "glm4.request.id": "one",
        "glm4.outcome": "length",
        "gen_ai.usage.output_tokens": 5,
    }
    assert order.start_time >= span.start_time


def test_spans_reach_a_collector(demo_bundle, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=open")
    with (
        collecting() as collector,
        serving(Session.open(demo_bundle), ServerOptions(port=0, traces=collector.url)) as server,
    ):
        post(server.url, "/v1/chat/completions", CHAT | {"max_tokens": 2})
        httpx.get(f"{server.url}/health")
        httpx.get(f"{server.url}/metrics")
    assert set(collector.paths) == {"/v1/traces"}
    assert collector.headers[0]["x-key"] == "open"
    ((resource, spans),) = collector.resources
    assert resource["service.name"] == "glm4-deploy"
    assert resource["deployment.environment"] == "test"
    assert [span.name for span in spans] == ["prepare", "queue", "prompt", "decode", f"chat {MODEL}"]
    assert attributes(spans[-1])["gen_ai.usage.output_tokens"] == 2


def test_the_environment_names_the_collector_and_the_service(demo_bundle, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{collector.url}/base")
        with serving(Session.open(demo_bundle), ServerOptions(port=0, traces="env")) as server:
            httpx.get(f"{server.url}/v1/models")
    assert collector.paths == ["/base/v1/traces"]
    ((resource, spans),) = collector.resources
    assert resource["service.name"] == "mine"
    assert [span.name for span in spans] == ["GET /v1/models"]


@pytest.mark.parametrize("traces", [None, "env"])
def test_fastapi_exports_nothing_of_its_own(demo_bundle, monkeypatch, traces):
    """Since 0.165 it can export requests, figures and errors, and the environment can switch this on."""
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with serving(Session.open(demo_bundle), ServerOptions(port=0, traces=traces)) as server:
            post(server.url, "/v1/chat/completions", CHAT | {"max_tokens": 2})
            post(server.url, "/v1/chat/completions", {"messages": SECRET})
    assert collector.paths == ["/v1/traces"] * (traces is not None)
    assert [span.name for span in collector.spans if span.kind == 2] == (
        [f"chat {MODEL}", "POST /v1/chat/completions"] * (traces is not None)
    )


def test_a_collector_that_is_gone_delays_neither_answers_nor_the_end(demo_bundle, monkeypatch):
    monkeypatch.setattr(tracing, "_LAST", 0.2)
    with collecting() as collector:
        url = collector.url
    with serving(Session.open(demo_bundle), ServerOptions(port=0, traces=url)) as server:
        assert post(server.url, "/v1/chat/completions", CHAT | {"max_tokens": 2}).status_code == 200
        began = time.monotonic()
    assert time.monotonic() - began < 9  # the exporter itself would try for 10 s


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector", "http://", "http://a b", ""])
def test_a_wrong_endpoint_is_refused(endpoint):
    with pytest.raises(RequestError, match="OTLP over HTTP, such as http"):
        ServerOptions(traces=endpoint)


def test_prompts_need_traces():
    with pytest.raises(RequestError, match="add --traces"):
        ServerOptions(trace_prompts=True)


def test_a_path_of_the_endpoint_is_kept():
    urls = {
        "http://a:4318": "http://a:4318/v1/traces",
        "https://a/": "https://a/v1/traces",
        "http://a/otlp/v1/traces": "http://a/otlp/v1/traces",
        "env": None,
    }
    assert {given: trace_options.TraceOptions(given).url for given in urls} == urls


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(trace_options, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"needs OpenTelemetry; run .*pip install .*\[otel\]"):
        ServerOptions(traces="http://127.0.0.1:4318")


def test_an_unknown_name_in_the_environment_is_one_line(monkeypatch):
    code = (
        "from glm4_runtime.trace_options import TraceOptions, started\n"
        "from glm4_runtime.errors import UnavailableError\n"
        "try:\n    started(TraceOptions('env'))\n"
        "except UnavailableError as error:\n    print(error)\n"
    )
    environment = os.environ | {"OTEL_PROPAGATORS": "nonsense", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "check the variables OTEL_..." in done.stdout
    assert done.stdout.count("\n") == 1


def test_nothing_is_imported_while_traces_are_off(demo_bundle):
    code = (
        "import sys\n"
        "from glm4_runtime.session import Session\n"
        "from glm4_runtime.server import ServerOptions\n"
        "from glm4_runtime.server.run import serving\n"
        "import httpx\n"
        f"with serving(Session.open({str(demo_bundle)!r}), ServerOptions(port=0)) as server:\n"
        f"    body = {CHAT | {'max_tokens': 2}!r}\n"
        "    assert httpx.post(server.url + '/v1/chat/completions', json=body, timeout=60).status_code == 200\n"
        "ours = ('glm4_runtime.tracing', 'opentelemetry.sdk', 'opentelemetry.exporter')\n"  # FastAPI has the API
        "print(*sorted(name for name in sys.modules if name.startswith(ours)))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
