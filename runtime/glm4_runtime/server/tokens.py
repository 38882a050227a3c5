"""/tokenize and /detokenize: what the model sees of a text, and back."""

from glm4_runtime.server import schema
from glm4_runtime.server.conversation import definitions
from glm4_runtime.server.engine import Engine
from glm4_runtime.server.errors import ApiError, Json


async def tokenize(engine: Engine, body: schema.TokenizeRequest) -> Json:
    engine.require_model(body.model)
    ids = await engine.prepare(lambda: _ids(engine, body))
    return Json({"count": len(ids), "max_model_len": engine.session.max_seq_len, "tokens": ids})


def _ids(engine: Engine, body: schema.TokenizeRequest) -> list[int]:
    if body.messages is None:
        return engine.tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
    if engine.conversation is None:
        raise ApiError(400, "this model has no chat template; give a prompt", param="messages")
    tools = definitions(body.tools or ())
    prompt = engine.conversation.render(body.messages, tools, body.add_generation_prompt is not False)
    return engine.tokenizer.encode(prompt, add_special_tokens=False)


async def detokenize(engine: Engine, body: schema.DetokenizeRequest) -> Json:
    engine.require_model(body.model)
    size = engine.tokenizer.vocab_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise ApiError(400, f"there is no token {wrong}: ids go from 0 to {size - 1}", param="tokens")
    text = await engine.prepare(lambda: engine.tokenizer.decode(body.tokens, body.skip_special_tokens))
    return Json({"prompt": text})
