"""The log-probabilities of a prompt's tokens, in OpenAI's legacy form and as ``prompt_logprobs``."""

import codecs
from collections.abc import Sequence
from typing import Any

from glm4_runtime.scoring import PromptScores
from glm4_runtime.server.reply import finite
from glm4_runtime.server.served_model import ServedModel

_UTF8 = codecs.getincrementaldecoder("utf-8")

Entry = dict[str, Any]


def prompt_entries(
    served: ServedModel, ids: Sequence[int], given: str | Sequence[int], scores: PromptScores, top: int
) -> list[Entry]:
    """One entry per prompt token, in the form of generated tokens. The first has no log-probability.

    Args:
        given: the prompt as the client sent it. Tokens that the tokenizer added before a text have width 0.
        top: how many of the likeliest tokens to list.
    """
    name = served.require_grammars().token_bytes
    added = _added(served, ids, given)
    decoder, characters = _UTF8("replace"), 0
    entries = []
    for place, token in enumerate(ids):
        entry = _entry(name(token), None if place == 0 else float(scores.logprobs[place - 1]))
        entry["offset"] = characters
        best = scores.top[place - 1][:top] if place else ()
        entry["top_logprobs"] = [_entry(name(other), value) for other, value in best] if place else None
        if place >= added:
            characters += len(decoder.decode(bytes(entry["bytes"])))
        entries.append(entry)
    return entries


def prompt_logprobs(
    served: ServedModel, ids: Sequence[int], scores: PromptScores, top: int
) -> list[dict[str, Any] | None]:
    """At each position, by token id: the likeliest tokens and the prompt's own, with rank and text. None for the
    first."""
    name = served.require_grammars().token_bytes

    def described(token: int, value: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": finite(value),
            "rank": rank,
            "decoded_token": name(token).decode("utf-8", "replace"),
        }

    listed: list[dict[str, Any] | None] = [None]
    for place, token in enumerate(ids[1:]):
        best = enumerate(scores.top[place][:top], 1)
        found = {str(other): described(other, value, rank) for rank, (other, value) in best}
        own = described(token, float(scores.logprobs[place]), int(scores.ranks[place]))
        listed.append(found | ({} if str(token) in found else {str(token): own}))
    return listed


def _entry(data: bytes, logprob: float | None) -> Entry:
    value = None if logprob is None else finite(logprob)
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": value}


def _added(served: ServedModel, ids: Sequence[int], given: str | Sequence[int]) -> int:
    """Number of tokens that the tokenizer added before the text."""
    if not isinstance(given, str):
        return 0
    prefix = served.tokenizer.encode("")
    alone = served.tokenizer.encode(given, add_special_tokens=False)
    return len(prefix) if len(ids) == len(prefix) + len(alone) else 0
