"""Spans of requests, by OpenTelemetry. Only a server with ``--traces`` imports this file.

Names are those of OpenTelemetry's conventions for HTTP and for generative AI, else they begin with ``glm4.``. Spans are
made from times that the server has anyway, when the request has ended. No attribute holds a text of the request or of
the answer, unless an option asks for these texts.
"""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from starlette.datastructures import Headers
from starlette.types import Scope

from glm4_runtime.install import DISTRIBUTION
from glm4_runtime.scheduler.api import Request
from glm4_runtime.server.sequence_times import SequenceTimes
from glm4_runtime.trace_options import TraceOptions

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
# Attributes from the request's line in the log.
_LOGGED = {
    "glm4.request.id": "id",
    "gen_ai.request.model": "model",
    "gen_ai.usage.input_tokens": "prompt_tokens",
    "gen_ai.usage.cache_read.input_tokens": "cached_tokens",
    "gen_ai.usage.output_tokens": "completion_tokens",
}
# Attributes from the sampling parameters.
_SAMPLING = {
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_p": "top_p",
    "gen_ai.request.top_k": "top_k",
    "gen_ai.request.frequency_penalty": "frequency_penalty",
    "gen_ai.request.presence_penalty": "presence_penalty",
    "gen_ai.request.seed": "seed",
}
_DELAY = "OTEL_BSP_SCHEDULE_DELAY"
# Seconds that the last spans get to leave the process at its end.
_LAST = 5.0
# A replica is killed without a word: its spans leave it after so many milliseconds, at latest.
_REPLICA_DELAY = 500.0


class Traces:
    """Makes the spans of one process."""

    def __init__(self, provider: TracerProvider, prompts: bool = False) -> None:
        """``prompts``: whether spans have the texts of prompts and answers."""
        self._provider, self._prompts = provider, prompts
        self._tracer: Tracer = provider.get_tracer(DISTRIBUTION)

    def begin(self, scope: Scope) -> "RequestTrace":
        """Begin the span of a request, as a child of the caller's span that the headers name."""
        return RequestTrace(self._tracer, scope, self._prompts)

    def order(self, headers: Mapping[str, str], began: float, attributes: Mapping[str, Any]) -> None:
        """Make the span of a replica's work, which ends now.

        Args:
            headers: of :attr:`RequestTrace.headers`.
            began: on the clock of ``time.monotonic()``.
        """
        start = time.time_ns() - round((time.monotonic() - began) * 1e9)
        context = propagate.extract(headers)
        self._tracer.start_span("replica", context, SpanKind.SERVER, attributes, start_time=start).end()

    def close(self) -> None:
        """Export the last spans. A collector that does not answer delays the end by a few seconds at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="glm4-traces", daemon=True)
        thread.start()
        thread.join(_LAST)


class RequestTrace:
    """The span of one HTTP request, and those of its parts.

    Attributes:
        headers: what makes spans of other processes children of this one.
    """

    def __init__(self, tracer: Tracer, scope: Scope, prompts: bool) -> None:
        self._tracer, self._prompts = tracer, prompts
        self._began = time.perf_counter()
        self._epoch = time.time_ns() - round(self._began * 1e9)
        self._method: str = scope["method"]
        self._times: Sequence[SequenceTimes] = ()
        self._masked = self._streams = False
        caller = propagate.extract(dict(Headers(scope=scope)))
        self._span = tracer.start_span(
            self._method, caller, SpanKind.SERVER, start_time=self._at(self._began)
        )
        self._context = set_span_in_context(self._span, caller)
        self.headers: dict[str, str] = {}
        propagate.inject(self.headers, self._context)

    def submitted(self, requests: Sequence[Request], times: Sequence[SequenceTimes], streams: bool) -> None:
        """Take what was submitted, and where its times will be."""
        self._times, self._streams = times, streams
        self._masked = any(one.mask is not None for one in requests)
        self._span.set_attributes(_asked(requests) | {"gen_ai.request.stream": streams})

    def end(self, route: str, status: int, model: str, fields: Mapping[str, Any]) -> None:
        """End the span.

        Args:
            route: with the names of its parameters instead of their values.
            model: the served model's name.
            fields: those of the request's line in the log.
        """
        if self._span.is_recording():
            self._span.update_name(_name(self._method, route, fields))
            self._span.set_attributes(self._answered(route, status, model, fields))
            if self._prompts:
                self._span.set_attributes(_texts(fields))
            if status >= 500 or (status < 400 and "error" in fields):  # the latter: a stream that failed
                self._span.set_status(Status(StatusCode.ERROR))
            self._make_parts()
        self._span.end()

    def _answered(self, route: str, status: int, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            "http.request.method": self._method,
            "http.route": route,
            "http.response.status_code": status,
        }
        found |= {name: fields[field] for name, field in _LOGGED.items() if fields.get(field) is not None}
        if status >= 400:
            found["error.type"] = str(status)
        elif "error" in fields:
            found["error.type"] = "stream"
        if route in _OPERATIONS:
            found |= {"gen_ai.operation.name": _OPERATIONS[route], "gen_ai.provider.name": DISTRIBUTION}
        if fields.get("model"):
            found["gen_ai.response.model"] = model
        if reasons := fields.get("finish_reasons"):
            unfinished = "error" if "error" in fields else "cancelled"
            found["gen_ai.response.finish_reasons"] = [reason or unfinished for reason in reasons]
        if self._streams and (seconds := fields.get("first_token_seconds")) is not None:
            found["gen_ai.response.time_to_first_chunk"] = seconds
        return found

    # Parts ------------------------------------------------------------------------------------------

    def _make_parts(self) -> None:
        if self._times:
            self._part("prepare", self._began, self._times[0].submitted, {})
        for index, times in enumerate(self._times):
            self._make_sequence({"glm4.sequence": index}, times)

    def _make_sequence(self, number: dict[str, Any], times: SequenceTimes) -> None:
        if times.started is None:  # it ended before its prompt was read, perhaps with a slot
            self._part("queue", times.submitted, time.perf_counter(), number | {"glm4.unfinished": True})
            return
        slot = max(times.submitted, times.started - times.prompt_seconds)
        self._part("queue", times.submitted, slot, number)
        self._part("prompt", slot, times.started, number)
        if times.first is None:
            return
        self._span.add_event("first_token", number, self._at(times.first))
        tokens = number | {"gen_ai.usage.output_tokens": times.tokens}
        masks = {"glm4.mask.seconds": round(times.mask_seconds, 6)} if self._masked else {}
        self._part("decode", times.first, times.last, tokens, masks)

    def _part(
        self,
        name: str,
        began: float,
        ended: float,
        attributes: dict[str, Any],
        masks: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """A span within the request's. ``masks``: attributes of an event that tells of its masks."""
        span = self._tracer.start_span(name, self._context, attributes=attributes, start_time=self._at(began))
        if masks:
            span.add_event("mask", masks, self._at(ended))
        span.end(self._at(ended))

    def _at(self, moment: float) -> int:
        """A moment of ``time.perf_counter()`` in nanoseconds since 1970."""
        return self._epoch + round(moment * 1e9)


def _name(method: str, route: str, fields: Mapping[str, Any]) -> str:
    """The conventions' name: operation and model, or method and route."""
    if route in _OPERATIONS and fields.get("model"):
        return f"{_OPERATIONS[route]} {fields['model']}"
    return f"{method} {route}"


def _asked(requests: Sequence[Request]) -> dict[str, Any]:
    """Attributes of what was asked. Stop strings are left out, because they are texts of the client."""
    params = requests[0].params
    found = {name: getattr(params, field) for name, field in _SAMPLING.items()}
    if len(requests) > 1:
        found["gen_ai.request.choice.count"] = len(requests)
    return {name: value for name, value in found.items() if value is not None}


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """Prompts and answers as JSON, in the form of the conventions."""
    given = [{"role": "user", "parts": [_text(prompt)]} for prompt in fields.get("prompts", ())]
    reasons = fields.get("finish_reasons", ())
    answers = [
        {"role": "assistant", "parts": _parts(answer), "finish_reason": reason or ""}
        for answer, reason in zip(fields.get("answers", ()), reasons, strict=False)
    ]
    found = {"gen_ai.input.messages": given, "gen_ai.output.messages": answers}
    return {name: json.dumps(messages) for name, messages in found.items() if messages}


def _text(content: Any, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "content": content}


def _parts(answer: str | Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of an answer: a text, or a message of a chat."""
    if isinstance(answer, str):
        return [_text(answer)]
    parts = [_text(answer["reasoning_content"], "reasoning")] if answer.get("reasoning_content") else []
    parts += [_text(answer["content"])] if answer.get("content") else []
    return parts + [
        {
            "type": "tool_call",
            "id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
        }
        for call in answer.get("tool_calls", ())
    ]


def exporting(options: TraceOptions) -> Traces:
    """Traces that are sent to a collector by OTLP over HTTP. The variables ``OTEL_...`` set all else."""
    own = {"service.name": DISTRIBUTION} | _version()
    if options.replica:
        own["service.instance.id"] = options.replica
    provider = TracerProvider(resource=Resource.create(own).merge(OTELResourceDetector().detect()))
    delay = _REPLICA_DELAY if options.replica and _DELAY not in os.environ else None
    exporter = OTLPSpanExporter(endpoint=options.url)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=delay))
    return Traces(provider, options.prompts)


def _version() -> dict[str, str]:
    try:
        return {"service.version": version(DISTRIBUTION)}
    except PackageNotFoundError:  # a checkout
        return {}
