"""/v1/embeddings and /v1/classify: one vector, or labels, for each input."""

import base64
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from glm4_runtime.arrays import Logits
from glm4_runtime.server import log, schema
from glm4_runtime.server.completions import as_list, encoded
from glm4_runtime.server.errors import ApiError, Json
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.session import Session

MAX_INPUTS = 256


async def embed(served: ServedModel, body: schema.EmbeddingRequest) -> Json:
    inputs, vectors = await _run(served, body, "encoder", Session.encode)
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if packed else vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    return _listed(served, inputs, data)


async def classify(served: ServedModel, body: schema.ClassifyRequest) -> Json:
    task = served.session.manifest.task
    tasks = ("sequence-classification", "token-classification")
    inputs, results = await _run(served, body, task if task in tasks else tasks[0], Session.classify)
    if task == "sequence-classification":
        data = [{"index": index} | _scored(served, logits) for index, logits in enumerate(results)]
    else:
        data = [
            {"index": index, "tokens": [_token(served, *pair) for pair in zip(ids, logits, strict=True)]}
            for index, (ids, logits) in enumerate(zip(inputs, results, strict=True))
        ]
    return _listed(served, inputs, data)


async def _run(
    served: ServedModel,
    body: schema.EmbeddingRequest | schema.ClassifyRequest,
    task: str,
    work: Callable[[Session, tuple[int, ...]], Logits],
) -> tuple[list[tuple[int, ...]], list[Logits]]:
    served.require_model(body.model)
    if served.session.manifest.task != task:
        raise ApiError(
            400,
            f"this server's bundle was exported for {served.session.manifest.task}, and this route needs {task}",
        )
    session = served.session
    assert isinstance(session, Session)  # other backends only generate
    deadline = time.monotonic() + served.options.request_timeout
    given = as_list(body.input)
    if len(given) > MAX_INPUTS:
        raise ApiError(400, f"{len(given)} inputs were given; this server takes {MAX_INPUTS}", param="input")
    inputs = await served.prepare(lambda: [encoded(served, one) for one in given])
    log.record().update(model=body.model, user=body.user, prompt_tokens=sum(map(len, inputs)))
    if served.options.keeps_prompts:
        log.record()["prompts"] = given
    return inputs, [await served.pooled(partial(work, session, ids), deadline) for ids in inputs]


def _packed(vector: Logits) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _token(served: ServedModel, token: int, logits: Logits) -> dict[str, Any]:
    return {"id": token, "token": served.tokenizer.decode([token], skip_special_tokens=False)} | _scored(
        served, logits
    )


def _scored(served: ServedModel, logits: Logits) -> dict[str, Any]:
    """The most likely label, and every label's probability."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    shares = (weights / weights.sum()).tolist()
    labels = served.session.manifest.model.labels or tuple(f"LABEL_{index}" for index in range(len(shares)))
    return {"label": labels[int(np.argmax(shares))], "scores": dict(zip(labels, shares, strict=True))}


def _listed(served: ServedModel, inputs: list[tuple[int, ...]], data: list[dict[str, Any]]) -> Json:
    count = sum(map(len, inputs))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Json({"object": "list", "model": served.name, "data": data, "usage": usage})
