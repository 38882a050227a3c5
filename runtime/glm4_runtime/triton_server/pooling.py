"""Classifiers and encoders in Triton: each text of a request is one run, and the answer comes at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glm4_runtime.errors import BundleError, Glm4Error, RequestError
from glm4_runtime.session import Session
from glm4_runtime.triton_server.inputs import texts

# The output of each task.
OUTPUT = {"sequence-classification": "logits", "token-classification": "logits", "encoder": "embedding"}


class Pooling:
    """Runs one text after the other, on Triton's thread."""

    def __init__(self, triton: Any, session: Session) -> None:
        """
        Raises:
            BundleError: the bundle has no tokenizer.
        """
        if session.tokenizer is None:
            raise BundleError(f"{session.folder} has no tokenizer.json; add it and export again")
        self._triton, self._session, self._tokenizer = triton, session, session.tokenizer
        self._task = session.manifest.task

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        self._session.close()

    def _answer(self, request: Any) -> Any:
        triton = self._triton
        try:
            rows = self._run(texts(request, triton))
        except Glm4Error as error:
            code = (
                triton.TritonError.INVALID_ARG
                if isinstance(error, RequestError)
                else triton.TritonError.INTERNAL
            )
            return triton.InferenceResponse(error=triton.TritonError(str(error), code))
        return triton.InferenceResponse(output_tensors=[triton.Tensor(OUTPUT[self._task], rows)])

    def _run(self, given: Sequence[str]) -> Any:
        """float32 [texts, labels or hidden]; for token classification [tokens, labels] of the one text."""
        if not given:
            raise RequestError("text_input is empty; send at least one string")
        if self._task == "token-classification":
            if len(given) > 1:
                raise RequestError(
                    f"text_input holds {len(given)} texts; send one, since each has its own length"
                )
            return self._session.classify(self._tokenizer.encode(given[0]))
        run = self._session.encode if self._task == "encoder" else self._session.classify
        return np.stack([run(self._tokenizer.encode(text)) for text in given])
