"""The routes and the middleware of the server."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from glm4_runtime.errors import Glm4Error
from glm4_runtime.server import chat, completions, log, pooled, schema, tokens
from glm4_runtime.server.anthropic.errors import is_asked
from glm4_runtime.server.anthropic.routes import add_routes as add_anthropic
from glm4_runtime.server.anthropic.routes import described_model, listed_models
from glm4_runtime.server.bodies import Bodies
from glm4_runtime.server.error_forms import error_response
from glm4_runtime.server.errors import ApiError, Json, api_error
from glm4_runtime.server.guard import Guarded, Recorded
from glm4_runtime.server.page import headers_of, whole_page
from glm4_runtime.server.proxy import Prefixed, shared_with
from glm4_runtime.server.responses.routes import add_routes as add_responses
from glm4_runtime.server.served_model import ServedModel

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

    from glm4_runtime.tracing import Traces

# Maximum seconds between two pieces of a body.
_LONGEST_SILENCE = 10.0
# FastAPI's own, since 0.165: it would export texts of errors wherever the environment names a collector.
_NO_TELEMETRY: "TelemetryConfig" = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody, "description": text}
    for status, text in {
        400: "What was asked cannot be served.",
        401: "No valid API key.",
        403: "The server does not allow this.",
        404: "No such model or route.",
        408: "The body took too long to arrive.",
        409: "Requests use it; try again when they have ended.",
        413: "The body is too long.",
        421: "The server was called by a name that is not its own.",
        429: "The queue is full; Retry-After says when to come back.",
        503: "The server is shutting down.",
        504: "The request took longer than allowed.",
    }.items()
}


def create_app(served: ServedModel, traces: "Traces | None" = None) -> FastAPI:
    """The application of a served model; starts and closes the model. ``traces``: makes the spans of requests."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        served.start()
        yield
        await asyncio.to_thread(served.close)

    app = FastAPI(
        title="glm4-deploy",
        description="A GLM-4-0414 bundle behind OpenAI's and Anthropic's APIs.",
        lifespan=lifespan,
        servers=[{"url": served.options.path_prefix}] if served.options.path_prefix else None,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
        responses=_ERRORS,
        exception_handlers={
            Glm4Error: _refused,
            RequestValidationError: _invalid,
            HTTPException: _http_error,
        },
    )
    _add_api(app, served)
    add_responses(app, served)
    add_anthropic(app, served)
    _add_operations(app, served)
    document = app.openapi
    app.openapi = lambda: _without_422(document())  # type: ignore[method-assign]
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    app.user_middleware = _middleware(served, paths, traces)
    return app


def _middleware(served: ServedModel, paths: list[str], traces: "Traces | None") -> list[Middleware]:
    """The middleware in the order in which a request passes it."""
    options = served.options
    bodies = Bodies(options.max_body_bytes, options.body_timeout, min(options.body_timeout, _LONGEST_SILENCE))
    return [
        *([Middleware(Prefixed, prefix=options.path_prefix)] if options.path_prefix else []),
        Middleware(Recorded, served=served, routes=paths, traces=traces),
        *shared_with(options.allow_origins),
        Middleware(Guarded, api_keys=options.api_keys, host_names=options.host_names, bodies=bodies),
    ]


def _add_api(app: FastAPI, served: ServedModel) -> None:
    @app.post("/v1/chat/completions", tags=["openai"], summary="Answer a conversation.")
    async def chat_completions(body: schema.ChatRequest, request: Request) -> Response:
        return await chat.chat(served, body, request)

    @app.post("/v1/completions", tags=["openai"], summary="Continue a text.")
    async def text_completions(body: schema.CompletionRequest, request: Request) -> Response:
        return await completions.complete(served, body, request)

    @app.post("/v1/embeddings", tags=["openai"], summary="A vector for each text (encoder bundles).")
    async def embeddings(body: schema.EmbeddingRequest) -> Response:
        return await pooled.embed(served, body)

    @app.post("/v1/classify", tags=["more"], summary="Labels for each text (classification bundles).")
    async def classify(body: schema.ClassifyRequest) -> Response:
        return await pooled.classify(served, body)

    @app.get("/v1/models", tags=["openai", "anthropic"], summary="The model, its LoRA adapters, and aliases.")
    async def models(request: Request) -> Response:
        found = [_model(served, name) for name in served.names.all]
        speaks_anthropic = is_asked(request.scope)
        return Json(listed_models(found) if speaks_anthropic else {"object": "list", "data": found})

    @app.get("/v1/models/{name:path}", tags=["openai", "anthropic"], summary="One model.")
    async def model(name: str, request: Request) -> Response:
        served.require_model(name)
        found = _model(served, name)
        return Json(described_model(found) if is_asked(request.scope) else found)

    @app.post("/v1/load_lora_adapter", tags=["more"], summary="Load a LoRA adapter as a further model.")
    async def load_lora_adapter(body: schema.LoadAdapterRequest) -> Response:
        log.record()["model"] = body.lora_name
        await served.prepare(lambda: served.load_adapter(body.lora_name, body.lora_path), slow=True)
        return Json(_model(served, body.lora_name))

    @app.post("/v1/unload_lora_adapter", tags=["more"], summary="Free a LoRA adapter.")
    async def unload_lora_adapter(body: schema.UnloadAdapterRequest) -> Response:
        log.record()["model"] = body.lora_name
        await served.prepare(lambda: served.unload_adapter(body.lora_name), slow=True)
        return Json({"id": body.lora_name, "object": "model", "deleted": True})

    @app.post("/tokenize", tags=["more"], summary="The tokens of a text or a conversation.")
    async def tokenize(body: schema.TokenizeRequest) -> Response:
        return await tokens.tokenize(served, body)

    @app.post("/detokenize", tags=["more"], summary="The text of tokens.")
    async def detokenize(body: schema.DetokenizeRequest) -> Response:
        return await tokens.detokenize(served, body)


def _add_operations(app: FastAPI, served: ServedModel) -> None:
    page = whole_page()
    page_headers = headers_of(page)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/health/live", tags=["operations"], summary="Whether the process answers.")
    async def live() -> Response:
        return Json({"status": "live"})

    @app.get("/health", tags=["operations"], summary="Whether new requests are taken.")
    @app.get("/health/ready", tags=["operations"], summary="Whether new requests are taken.")
    async def ready() -> Response:
        served.require_ready()
        return Json({"status": "ready"})

    @app.get("/health/replicas", include_in_schema=False)  # only a backend with replicas has this route
    async def replicas() -> Response:
        found = served.stats_by_replica()
        if not found:
            raise ApiError(404, "this server has no replicas; /health/ready says whether it takes requests")
        load = {
            name: {"active": one.active, "queued": one.queued, "slots": one.slots}
            for name, one in found.items()
        }
        return Json({"replicas": load})

    @app.get("/metrics", tags=["operations"], summary="Figures for Prometheus.")
    async def metrics() -> Response:
        return Response(served.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _model(served: ServedModel, name: str) -> dict[str, Any]:
    adapter = served.names.adapter_of(name)
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "glm4-deploy",
        "max_model_len": served.session.max_seq_len,
        "task": served.session.manifest.task,
        **({} if adapter is None else {"parent": served.name}),
    }


async def _refused(request: Request, error: Exception) -> Response:
    told = api_error(error)
    log.refusal(told, error)
    return error_response(told, request.scope)


async def _invalid(request: Request, error: Exception) -> Response:
    """The response to a body that is not JSON, or does not fit the route: its first error."""
    assert isinstance(error, RequestValidationError)
    # a value may fit none of several types; the error at the deepest place is the most helpful
    first = max(error.errors(), key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")))
    kind, place = first["type"], list(first["loc"][1:])
    if kind == "json_invalid":
        return await _refused(request, ApiError(400, _not_json(request, place[0], first["ctx"]["error"])))
    if not place and not isinstance(error.body, dict):
        return await _refused(request, ApiError(400, _no_object(request, error.body)))
    if kind in ("unsupported", "unknown"):
        place.append(first["ctx"]["option"])
    path = _path(place, error.body)
    message = _SAID.get(kind, first["msg"]).removeprefix("Value error, ")
    where = f"{path}: " if path and kind != "unsupported" else ""
    return await _refused(request, ApiError(400, f"{where}{message}"[:500], param=path or None))


# our texts for pydantic's most frequent errors
_SAID = {
    "missing": "it is required",
    "model_attributes_type": "it must be a JSON object",
}
_SEND = "send a JSON object with the header 'Content-Type: application/json'"


def _not_json(request: Request, place: int | str, reason: str) -> str:
    length = request.headers.get("content-length")
    return f"the body is not JSON: {reason} at character {place} of {length or 'it'}; {_SEND}"


def _no_object(request: Request, body: Any) -> str:
    """Why the body was not read: FastAPI parses a body only if its Content-Type is JSON."""
    if not body and not isinstance(body, list):
        return f"the body is empty; {_SEND}"
    if isinstance(body, bytes):
        given = request.headers.get("content-type")
        said = f"its Content-Type is {given[:100]!r}" if given else "it has no Content-Type"
        return f"the body was not read, because {said}; {_SEND} (curl: -H 'Content-Type: application/json')"
    return f"the body is JSON, but no object; {_SEND}"


def _path(parts: Sequence[str | int], body: Any) -> str:
    """The place in the body. pydantic's path also contains the types it tried; these are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            if isinstance(body, list) and part < len(body):
                body, text = body[part], f"{text}[{part}]"
        elif isinstance(body, dict) and (part in body or part == parts[-1]):
            body, text = body.get(part), f"{text}.{part}" if text else part
    return text[:200]


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {
        404: f"there is no {request.url.path[:200]!r} here",
        405: f"{request.method} is not possible here",
    }
    status = error.status_code if error.status_code in known else 400
    response = await _refused(request, ApiError(status, known.get(status) or _unparsed(request)))
    response.headers.update(error.headers or {})
    return response


def _unparsed(request: Request) -> str:
    """Why the body could not be parsed, although its error is no JSON error."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        return f"the body has the Content-Encoding {encoding[:40]!r}; send it without compression"
    return "the body cannot be parsed: it is not UTF-8, is nested too deeply, or has a number of thousands of digits"


def _without_422(document: dict[str, Any]) -> dict[str, Any]:
    """Remove status 422 from the document: this server answers 400 to a bad body."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return document
