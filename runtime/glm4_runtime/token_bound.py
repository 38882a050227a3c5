"""A lower bound for the number of tokens of a text, from its bytes alone, to refuse long texts before encoding."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


class TokenBound:
    """A lower bound for one byte-level BPE tokenizer.

    Let m(b) be the length, in bytes, of the longest token that contains the byte b. A token of L bytes has L bytes
    with m(b) >= L, so the sum of 1 / m(b) over its bytes is at most 1. Over a text, the sum is at most the number of
    tokens. If the tokenizer may drop or change bytes, the bound is 0.
    """

    def __init__(self, definition: str) -> None:
        """``definition``: the text of ``tokenizer.json``."""
        tokenizer = json.loads(definition)
        self._shares = _shares(tokenizer) if _keeps_bytes(tokenizer) else np.zeros(256)

    def least(self, text: str) -> int:
        """Minimum number of tokens of ``text``, without tokens that the tokenizer adds; 0 if unknown."""
        try:
            data = np.frombuffer(text.encode(), np.uint8)
        except UnicodeEncodeError:  # half a surrogate pair, which cannot be encoded
            return 0
        total = float(np.bincount(data, minlength=256) @ self._shares)
        return int(total * (1 - 1e-9))  # rounding must not increase the bound


def _keeps_bytes(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the bytes of a text's tokens are the bytes of the text."""
    model = tokenizer["model"]
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return (
        model.get("type") == "BPE"
        and not tokenizer.get("normalizer")
        and any(step.get("type") == "ByteLevel" for step in steps)
        and all(step.get("behavior") != "Removed" for step in steps)
        and all(letter in model["vocab"] for letter in _alphabet())
        and not any(token.get("lstrip") or token.get("rstrip") for token in tokenizer.get("added_tokens", ()))
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer.get("pretokenizers", (pre_tokenizer,)))


def _shares(tokenizer: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """1 / m(b) for each byte b."""
    byte_of = {letter: byte for byte, letter in enumerate(_alphabet())}
    added = [token["content"].encode() for token in tokenizer.get("added_tokens", ())]
    learnt = (
        [byte_of[letter] for letter in token if letter in byte_of] for token in tokenizer["model"]["vocab"]
    )
    longest = np.ones(256, np.int64)
    for token in (*added, *learnt):
        held = np.fromiter(token, np.uint8)
        longest[held] = np.maximum(longest[held], len(token))
    return 1 / longest


def _alphabet() -> list[str]:
    """The character for each byte in byte-level BPE (Radford et al., GPT-2's ``bytes_to_unicode``)."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]
