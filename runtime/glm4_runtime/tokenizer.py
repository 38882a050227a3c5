"""Text to token ids and back, whole or as a stream, with the checkpoint's own ``tokenizer.json``."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from glm4_runtime.bundle.file_names import TOKENIZER, TOKENIZER_CONFIG
from glm4_runtime.bundle.json_file import read_object, read_small
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.prompts import Prompt
from glm4_runtime.token_bound import TokenBound

# What to do about a side file of a checkpoint or bundle that is not as it should be.
FROM_CHECKPOINT = "copy it from the original checkpoint"

# The limits under which a worker tries to read a file; GLM-4's takes a second and 300 MiB.
_TRIAL = {"seconds": 20, "deadline": 60, "memory": 2**31, "answer": 2**20}
# SHA-256 of the files that this process need not try again.
_TRIED: set[bytes] = set()
_TRYING = threading.Lock()

# The prefix of every GLM-4 sequence; chat templates and some users write it into the text.
_PREFIX = "[gMASK]"
# A byte-level decoder's output for bytes that are not, or not yet, UTF-8.
_REPLACEMENT = "\ufffd"
# Number of characters that take about 10 ms to encode.
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
        # A tokenizer.json may contain truncation or padding from its training. Never cut a request silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain: tokenizers.Tokenizer | None = None
        self._making = threading.Lock()
        self._bound: TokenBound | None = None  # created at first use, because only a server needs it
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
        """Raises :class:`BundleError` if ``tokenizer.json`` is missing or cannot be read."""
        file = Path(path) / TOKENIZER
        if not file.is_file():
            raise BundleError(f"{file} is missing: copy it from the checkpoint, or work with token ids")
        data = read_small(file, BundleError, FROM_CHECKPOINT)
        _require_readable(file, data)
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises no narrower exception
            raise BundleError(f"{file} is not a tokenizer that can be read: {error}") from error
        return cls(backend, special_token_names(read_tokenizer_config(path)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Adds the prefix of ``tokenizer.json`` (GLM-4: [gMASK]<sop>), unless the text already
        begins with it, as a rendered chat template does."""
        _require_unicode(text)
        prefixed = text.startswith(_PREFIX)
        special = add_special_tokens and not prefixed
        # the library's batch call lets other threads run meanwhile
        if len(text) > _LONG_TEXT:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
        else:
            encoding = self._backend.encode(text, add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a conversation's prompt. Control tokens come only from the template; marked names are plain
        text."""
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
        """A copy of the tokenizer that treats names of control tokens as text. Created at first use."""
        with self._making:
            if self._plain is None:
                self._plain = tokenizers.Tokenizer.from_str(self.to_json())
                self._plain.encode_special_tokens = True
        return self._plain

    def least_tokens(self, text: str) -> int:
        """Minimum number of tokens from :meth:`encode`, without encoding; 0 if unknown."""
        if self._bound is None:
            self._bound = TokenBound(self.to_json())
        return self._bound.least(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. Bytes that are not UTF-8 become U+FFFD; ids without a token are dropped."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_of(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise RequestError(f"the tokenizer has no token {token!r}")
        return int(found)

    def first_ids(self) -> list[int]:
        """The ids that :meth:`encode` puts before every text."""
        ids: list[int] = self._backend.encode("").ids
        return ids

    def has_token(self, token: str) -> bool:
        return self._backend.token_to_id(token) is not None

    def token_of(self, token_id: int) -> str:
        """The token as the vocabulary spells it; for byte-level tokens this differs from its text."""
        found = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if found is None:
            raise RequestError(
                f"the tokenizer has no token {token_id}: ids go from 0 to {self.vocab_size - 1}"
            )
        return str(found)

    def to_json(self) -> str:
        """The tokenizer as ``tokenizer.json``, for other libraries."""
        return str(self._backend.to_str())

    def has_text(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether this id has a text. Padded logits contain ids without one."""
        if skip_special_tokens and token_id in self.special_ids:
            return False
        return 0 <= token_id < self.vocab_size and self._backend.id_to_token(token_id) is not None


def start_trial(folder: Path) -> None:
    """Try a folder's tokenizer in the background, while something else is opened; :class:`Tokenizer` then need not."""

    def trial() -> None:
        with contextlib.suppress(BundleError, OSError):  # told when the tokenizer is asked for
            file = folder / TOKENIZER
            _require_readable(file, read_small(file, BundleError, FROM_CHECKPOINT))

    threading.Thread(target=trial, name="glm4-tokenizer", daemon=True).start()


def _require_readable(file: Path, data: bytes) -> None:
    """Read a tokenizer in a worker first: the library ends the process on some that are damaged.

    Raises:
        BundleError: with the library's reason, or the worker's end.
    """
    digest = hashlib.sha256(data).digest()
    with _TRYING:
        if digest not in _TRIED:
            _try(file)
            _TRIED.add(digest)


def _try(file: Path) -> None:
    from glm4_runtime.workers import frames
    from glm4_runtime.workers.worker import TaskLimits, Worker, WorkerError

    worker = Worker("glm4_runtime.workers.tokenizer_trials", TaskLimits(**_TRIAL))
    try:
        # The worker may have another locale, so it gets the bytes of the path.
        wrong = worker.ask(frames.encode(os.fsencode(file).decode("latin-1")))
    except WorkerError as error:
        wrong = f"the library that reads it fails: {error}"
    finally:
        worker.end()
    if wrong is not None:
        raise BundleError(f"{file} is not a tokenizer that can be read: {wrong}; {FROM_CHECKPOINT}")


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: half a surrogate pair at {error.start}"
        ) from error


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a model folder; empty if there is none."""
    file = Path(folder) / TOKENIZER_CONFIG
    if not file.is_file():
        return {}
    return read_object(file, BundleError, FROM_CHECKPOINT)


def special_token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role: every ``*_token`` entry, a string or {"content": string}."""
    contents = {
        role: value.get("content") if isinstance(value, Mapping) else value
        for role, value in config.items()
        if role.endswith("_token")
    }
    return {role: content for role, content in contents.items() if isinstance(content, str)}


class TextStream:
    """Decodes tokens one by one. Never returns half a character; all pieces together equal decoding all tokens.

    A character of several bytes may be spread over tokens. Bytes that are not (yet) UTF-8 decode to U+FFFD. An
    unfinished character at the end is exactly one U+FFFD, so everything before a last U+FFFD is final. For each
    token, only a window of ids is decoded again: the ids since the text was last complete, and the ids of the piece
    before as context, because some decoders treat the start of a text differently.
    """

    # An unfinished character has at most three bytes, and each token in the window has at least one.
    _UNFINISHED = 3
    _LONG = 16

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._context = 0  # number of ids in the window that are only context
        self._given = 0  # number of characters of the window's text that were returned

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
        """The text that is still held back, decoded as the end of a text. Resets the stream."""
        out = self._decode(self._window)[self._given :]
        self._window, self._context, self._given = [], 0, 0
        return out

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)

    def _split(self, text: str) -> None:
        """Cut a window that many real U+FFFD keep open, at a position where the two parts decode like the whole."""
        for first in range(len(self._window) - 1, len(self._window) - 2 - self._UNFINISHED, -1):
            head, tail = self._decode(self._window[:first]), self._decode(self._window[first:])
            if tail and head + tail == text:
                del self._window[:first]
                self._context = 0
                self._given -= len(head)
                return
