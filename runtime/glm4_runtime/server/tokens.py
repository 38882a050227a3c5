"""/tokenize and /detokenize: text to token ids, and back."""

from collections.abc import Sequence

from glm4_runtime.prompts import Prompt
from glm4_runtime.server import schema
from glm4_runtime.server.conversation import definitions
from glm4_runtime.server.errors import ApiError, Json, encode
from glm4_runtime.server.messages import Message
from glm4_runtime.server.served_model import ServedModel

_PIECE = 10_000


async def tokenize(served: ServedModel, body: schema.TokenizeRequest) -> Json:
    served.require_model(body.model)
    rendered = None if body.messages is None else await _rendered(served, body, body.messages)
    return await served.prepare(lambda: _tokenized(served, body, rendered))


async def _rendered(served: ServedModel, body: schema.TokenizeRequest, messages: Sequence[Message]) -> Prompt:
    if served.conversation is None:
        raise ApiError(400, "this model has no chat template; give a prompt", param="messages")
    return await served.rendered(
        messages, definitions(body.tools or ()), body.add_generation_prompt is not False
    )


def _tokenized(served: ServedModel, body: schema.TokenizeRequest, rendered: Prompt | None) -> Json:
    ids = (
        served.tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
        if rendered is None
        else served.tokenizer.encode_prompt(rendered)
    )
    head = encode({"count": len(ids), "max_model_len": served.session.max_seq_len})
    return Json.encoded(b'%b,"tokens":[%b]}' % (head[:-1], _listed(ids)))


def _listed(ids: Sequence[int]) -> bytes:
    """The ids as JSON, written in pieces: a single call for millions of ids would block all other threads."""
    pieces = (ids[start : start + _PIECE] for start in range(0, len(ids), _PIECE))
    return b",".join(encode(piece)[1:-1] for piece in pieces)


async def detokenize(served: ServedModel, body: schema.DetokenizeRequest) -> Json:
    served.require_model(body.model)
    size = served.tokenizer.vocab_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise ApiError(400, f"there is no token {wrong}: ids go from 0 to {size - 1}", param="tokens")
    text = await served.prepare(lambda: served.tokenizer.decode(body.tokens, body.skip_special_tokens))
    return Json({"prompt": text})
