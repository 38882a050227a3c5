"""/tokenize and /detokenize: text to token ids, and back."""

from collections.abc import Sequence

from glm4_runtime.prompts import Prompt
from glm4_runtime.server import schema
from glm4_runtime.server.conversation import definitions
from glm4_runtime.server.engine import Engine
from glm4_runtime.server.errors import ApiError, Json, encode
from glm4_runtime.server.messages import Message

_PIECE = 10_000


async def tokenize(engine: Engine, body: schema.TokenizeRequest) -> Json:
    engine.require_model(body.model)
    rendered = None if body.messages is None else await _rendered(engine, body, body.messages)
    return await engine.prepare(lambda: _tokenized(engine, body, rendered))


async def _rendered(engine: Engine, body: schema.TokenizeRequest, messages: Sequence[Message]) -> Prompt:
    if engine.conversation is None:
        raise ApiError(400, "this model has no chat template; give a prompt", param="messages")
    return await engine.rendered(
        messages, definitions(body.tools or ()), body.add_generation_prompt is not False
    )


def _tokenized(engine: Engine, body: schema.TokenizeRequest, rendered: Prompt | None) -> Json:
    ids = (
        engine.tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
        if rendered is None
        else engine.tokenizer.encode_prompt(rendered)
    )
    head = encode({"count": len(ids), "max_model_len": engine.session.max_seq_len})
    return Json.encoded(b'%b,"tokens":[%b]}' % (head[:-1], _listed(ids)))


def _listed(ids: Sequence[int]) -> bytes:
    """The ids as JSON, written in pieces: a single call for millions of ids would block all other threads."""
    pieces = (ids[start : start + _PIECE] for start in range(0, len(ids), _PIECE))
    return b",".join(encode(piece)[1:-1] for piece in pieces)


async def detokenize(engine: Engine, body: schema.DetokenizeRequest) -> Json:
    engine.require_model(body.model)
    size = engine.tokenizer.vocab_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise ApiError(400, f"there is no token {wrong}: ids go from 0 to {size - 1}", param="tokens")
    text = await engine.prepare(lambda: engine.tokenizer.decode(body.tokens, body.skip_special_tokens))
    return Json({"prompt": text})
