"""A server as an engine: its tokenizer by ``/tokenize`` and ``/detokenize``, and its log-probabilities of given tokens."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import httpx
import numpy as np
from lm_eval.api.model import LM

from glm4_deploy.metrics import Vector
from glm4_runtime.errors import Glm4Error

END = "<|endoftext|>"  # the family's end of a text
SECONDS = 3600.0  # a long text on a slow machine
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class Encoded:
    """What the harness reads of a call of a tokenizer of transformers."""

    input_ids: list[int] | list[list[int]]


class ServerTokenizer:
    """The tokenizer behind a server, with the methods that the harness calls of a tokenizer of transformers.

    Attributes:
        eos_token: the text that ends a text.
    """

    eos_token = END
    bos_token_id: int | None = None

    def __init__(self, base: str, model: str) -> None:
        """
        Args:
            base: the server's address with ``/v1``.
            model: the model's name there.

        Raises:
            Glm4Error: the server has no ``/tokenize``.
        """
        self._root, self._model = base.removesuffix("/v1"), model
        self.encode("")

    @cached_property
    def eos_token_id(self) -> int:
        return self.encode(END, add_special_tokens=False)[0]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._ids({"prompt": text, "add_special_tokens": add_special_tokens})

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._post("detokenize", {"tokens": list(ids)})["prompt"])

    def batch_decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(ids) for ids in rows]

    @overload
    def __call__(self, text: str, **options: Any) -> Encoded: ...
    @overload
    def __call__(self, text: list[str], **options: Any) -> Encoded: ...
    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> Encoded:
        if isinstance(text, str):
            return Encoded(self.encode(text, add_special_tokens))
        return Encoded([self.encode(one, add_special_tokens) for one in text])

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True, **_: Any
    ) -> str:
        """The text of a conversation by the server's template. Without a generation prompt, it ends in the last message."""
        ids = self._ids({"messages": messages, "add_generation_prompt": add_generation_prompt})
        rendered, begun = self.decode(ids), messages[-1]["content"].strip()
        return rendered if add_generation_prompt else rendered[: rendered.rindex(begun) + len(begun)]

    def _ids(self, body: dict[str, Any]) -> list[int]:
        return [int(token) for token in self._post("tokenize", body)["tokens"]]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return posted(f"{self._root}/{path}", body | {"model": self._model}, PROBE_SECONDS)
        except (httpx.HTTPError, ValueError) as error:
            raise Glm4Error(
                f"{self._root}/{path} does not answer ({error}); add --reference CHECKPOINT for its tokenizer"
            ) from error


def open_server(arguments: dict[str, Any]) -> LM:
    """The harness's model of a server. Without ``tokenizer`` in the arguments, the server's own is used.

    Args:
        arguments: those of ``local-completions``.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    if "tokenizer" in arguments:
        return LocalCompletionsAPI(tokenizer_backend="huggingface", **arguments)
    model = LocalCompletionsAPI(tokenizer_backend=None, **arguments)
    # The harness takes no tokenizer object: it makes one of a name.
    model.tokenizer = ServerTokenizer(arguments["base_url"].removesuffix("/completions"), arguments["model"])
    model.tokenizer_backend, model.tokenized_requests = "huggingface", True
    return model


def server_logprobs(model: LM, ids: Sequence[int]) -> Vector:
    """Log-probability of each token after the first, in nats, float64 [len(ids) - 1]."""
    body = {"model": model.model, "prompt": list(ids), "max_tokens": 0, "echo": True, "logprobs": 1}
    try:
        found = posted(model.base_url, body, SECONDS)["choices"][0]["logprobs"]["token_logprobs"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Glm4Error(
            f"{model.base_url} gives no log-probabilities of a prompt (echo with logprobs): {error}"
        ) from error
    return np.array(found[1 : len(ids)], np.float64)


def key_header() -> dict[str, str]:
    """The header with GLM4_API_KEY, as ``bench-serve`` sends it. The harness reads the same key from OPENAI_API_KEY."""
    key = os.environ.get("GLM4_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def posted(url: str, body: dict[str, Any], seconds: float) -> Any:
    """The JSON answer to a POST.

    Raises:
        httpx.HTTPError: no answer, or an error.
        ValueError: the answer is no JSON.
    """
    answer = httpx.post(url, json=body, timeout=seconds, headers=key_header())
    answer.raise_for_status()
    return answer.json()
