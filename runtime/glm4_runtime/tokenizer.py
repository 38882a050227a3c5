"""Text to token ids and back, whole and as a stream, by the checkpoint's own ``tokenizer.json``."""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.prompts import Prompt
from glm4_runtime.token_bound import TokenBound

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# What GLM-4 starts every sequence with, in text that a chat template or a careful user wrote.
_PREFIX = "[gMASK]"
# What a byte-level decoder shows for bytes that aren't UTF-8, or not yet.
_REPLACEMENT = "\ufffd"
# Characters that take some 10 ms to encode.
_LONG_TEXT = 8192


class Tokenizer:
    """The tokenizer of one model folder.

    control_tokens  the control tokens' names and ids, such as {"<|user|>": 151336}
    special_ids     those ids, which decoding leaves out
    special_tokens  their roles in tokenizer_config.json: {"eos_token": "<|endoftext|>", ...}
    vocab_size      one more than the largest id; the model's logits are often wider, padded
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        # A tokenizer.json may carry its training's truncation or padding along: never cut a request silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain: tokenizers.Tokenizer | None = None
        self._making = threading.Lock()
        self._bound: TokenBound | None = None  # made at first use, as only a server needs it
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens or {}))
        self.control_tokens: Mapping[str, int] = MappingProxyType(
            {
                added.content: token
                for token, added in backend.get_added_tokens_decoder().items()
                if added.special
            }
        )
        self.special_ids = frozenset(self.control_tokens.values())
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Raises :class:`BundleError` where ``tokenizer.json`` is missing or cannot be read."""
        file = Path(path) / TOKENIZER
        if not file.is_file():
            raise BundleError(f"{file} is missing: copy it from the checkpoint, or work with token ids")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{file} is not a tokenizer that can be read: {error}") from error
        return cls(backend, special_token_names(read_tokenizer_config(path)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, after the prefix that ``tokenizer.json`` prescribes (GLM-4: [gMASK]<sop>)
        unless the text already begins with it, as a rendered chat template does."""
        _require_unicode(text)
        prefixed = text.startswith(_PREFIX)
        special = add_special_tokens and not prefixed
        # of the library's ways to encode, the one for batches lets other threads run meanwhile
        if len(text) > _LONG_TEXT:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
        else:
            encoding = self._backend.encode(text, add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a conversation's prompt: the template's control tokens, and all else as plain text."""
        if not prompt.mark:
            return self.encode(prompt.marked, add_special_tokens=False)
        text = prompt.marked
        _require_unicode(text)
        (found,) = self._backend.encode_batch([text], add_special_tokens=False)
        controls = [
            (token, span)
            for token, span in zip(found.ids, found.offsets, strict=True)
            if token in self.special_ids
        ]
        starts = [0, *(end for _, (_, end) in controls)]
        ends = [*(start for _, (start, _) in controls), len(text)]
        between = [text[a:b].replace(prompt.mark, "") for a, b in zip(starts, ends, strict=True)]
        plain = self._plain_backend().encode_batch_fast(between, add_special_tokens=False)
        ids: list[int] = list(plain[0].ids)
        for (token, _), encoding in zip(controls, plain[1:], strict=True):
            ids += [token, *encoding.ids]
        return ids

    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for which names of control tokens are text. Made at first use: it is a copy."""
        with self._making:
            if self._plain is None:
                self._plain = tokenizers.Tokenizer.from_str(self.to_json())
                self._plain.encode_special_tokens = True
        return self._plain

    def least_tokens(self, text: str) -> int:
        """Tokens that :meth:`encode` gives at least, without encoding; 0 where that is not known."""
        if self._bound is None:
            self._bound = TokenBound(self.to_json())
        return self._bound.least(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that aren't UTF-8 come as U+FFFD, ids without a token as nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_of(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise RequestError(f"the tokenizer has no token {token!r}")
        return int(found)

    def token_of(self, token_id: int) -> str:
        """The token as the vocabulary spells it, which for byte-level tokens is not its text."""
        found = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if found is None:
            raise RequestError(
                f"the tokenizer has no token {token_id}: ids go from 0 to {self.vocab_size - 1}"
            )
        return str(found)

    def to_json(self) -> str:
        """The tokenizer as its own ``tokenizer.json``, for libraries that read one."""
        return str(self._backend.to_str())

    def has_text(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether decoding this id can contribute anything: a model's padded logits reach ids it can't."""
        if skip_special_tokens and token_id in self.special_ids:
            return False
        return 0 <= token_id < self.vocab_size and self._backend.id_to_token(token_id) is not None


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: half a surrogate pair at {error.start}"
        ) from error


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a model folder; empty where there is none."""
    file = Path(folder) / TOKENIZER_CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise BundleError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BundleError(f"{file} must hold a JSON object")
    return config


def special_token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The roles of special tokens: every ``*_token`` entry, given as a string or as {"content": string}."""
    contents = {
        role: value.get("content") if isinstance(value, Mapping) else value
        for role, value in config.items()
        if role.endswith("_token")
    }
    return {role: content for role, content in contents.items() if isinstance(content, str)}


class TextStream:
    """Text out of tokens as they come: never half a character, and in sum what decoding them all gives.

    A character of several bytes may be spread over tokens. Bytes that are not (yet) UTF-8 decode to U+FFFD,
    and an unfinished character at the end is exactly one of them, so all but a last U+FFFD is settled.
    What is decoded anew for a token is a window of the few ids since the text was last whole, after the ids
    of the previous such piece: decoders that treat the start of a text differently need that context.
    """

    # An unfinished character has at most three bytes, and each token of the window at least one.
    _UNFINISHED = 3
    _LONG = 16

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._context = 0  # so many ids of the window are there only for context
        self._given = 0  # so many characters of the window's text are out

    def push(self, token_id: int) -> str:
        """The text that this token completes, often none."""
        if not self._tokenizer.has_text(token_id, self._skip_special_tokens):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = len(text) - text.endswith(_REPLACEMENT)
        out = text[self._given : settled]
        self._given = max(self._given, settled)
        if settled == len(text):
            del self._window[: self._context]
            self._context = len(self._window)
            self._given = len(self._decode(self._window))
        elif len(self._window) - self._context > self._LONG:
            self._split(text)
        return out

    def flush(self) -> str:
        """What is still held back, as decoding shows it at the end of a text; the stream starts over."""
        out = self._decode(self._window)[self._given :]
        self._window, self._context, self._given = [], 0, 0
        return out

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)

    def _split(self, text: str) -> None:
        """Cut a window that a run of real U+FFFD keeps open, where the two parts decode as the whole does."""
        for first in range(len(self._window) - 1, len(self._window) - 2 - self._UNFINISHED, -1):
            head, tail = self._decode(self._window[:first]), self._decode(self._window[first:])
            if tail and head + tail == text:
                del self._window[:first]
                self._context = 0
                self._given -= len(head)
                return
