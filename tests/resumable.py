"""Requests of many kinds, whose answers depend on all that a request remembers: for tests of resumption."""

from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Request
from glm4_runtime.structured import AnswerFormat, Function, GrammarCompiler, ReplyFormat

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}  # fmt: skip
_SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11}

# kind -> sampling parameters, further fields of the request, format of the reply
KINDS = {
    "greedy": ({}, {}, None),
    "sampled": (_SAMPLED, {}, None),
    "filtered": ({"temperature": 1.2, "top_k": 20, "min_p": 0.02, "seed": 3}, {}, None),
    "penalties": (
        _SAMPLED | {"repetition_penalty": 1.2, "frequency_penalty": 0.6, "presence_penalty": 0.3},
        {},
        None,
    ),
    "logprobs": (_SAMPLED, {"logprobs": True, "top_logprobs": 4}, None),
    "stop strings": (_SAMPLED | {"stop": ("never to be seen", "e t")}, {}, None),
    "unicode": ({"logit_bias": {200: 4.0, 201: 4.0, 215: 4.0}, "temperature": 1.5, "seed": 5}, {}, None),
    "schema": (_SAMPLED, {}, ReplyFormat(AnswerFormat("json_schema", _SCHEMA))),
    "call": ({}, {}, ReplyFormat(None, (Function("weather", _SCHEMA),), required=True, max_calls=1)),
    "regex": (_SAMPLED, {}, ReplyFormat(AnswerFormat("regex", "[a-c]{10,20}"), turn=False)),
}


def compiler_of(session):
    model = session.manifest.model
    return GrammarCompiler(session.tokenizer, model.vocab_size, model.eos_token_ids)


def request_of_kind(kind, session, grammars, prompt="Once upon a time there was a", max_tokens=32):
    params, more, form = KINDS[kind]
    return Request(
        tuple(session.tokenizer.encode(prompt)),
        SamplingParams(max_tokens=max_tokens, **params),
        mask=None if form is None else grammars.compile(form, thinking=False),
        **{"logprobs": False} | more,
    )
