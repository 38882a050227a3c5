"""A causal LM in Triton: requests share the slots of one session, and each answers through its response sender."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from glm4_runtime.chat_prompts import ChatPrompts
from glm4_runtime.defaults import read_sampling_defaults
from glm4_runtime.errors import BundleError, Glm4Error, QueueFullError, RequestError, StoppedError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Scheduler
from glm4_runtime.session import Session
from glm4_runtime.tokenizer import Tokenizer
from glm4_runtime.triton_server.inputs import TritonRequest, read_request

LOOK = 0.2  # seconds between two looks for clients that left
DRAIN = 30.0  # seconds for running requests when the model is unloaded
TRITON_OUTPUTS = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")


@dataclass(eq=False)
class Answer:
    """One request under way. Used by the sending thread only.

    Attributes:
        sender: Triton's response sender.
        prompt: the prompt that the whole answer begins with; empty if it does not.
    """

    sender: Any
    outputs: Sequence[str]
    stream: bool
    prompt: str
    prompt_tokens: int
    pieces: list[str] = field(default_factory=list)
    tokens: int = 0


class Generating:
    """Runs requests on a scheduler. One thread of its own sends the responses, since sending may block."""

    def __init__(self, triton: Any, session: Session, max_queue: int = 64) -> None:
        """
        Args:
            triton: the module ``triton_python_backend_utils``.

        Raises:
            BundleError: the bundle has no tokenizer.
        """
        if session.tokenizer is None:
            raise BundleError(f"{session.folder} has no tokenizer.json; add it and export again")
        self._triton, self._session = triton, session
        self._tokenizer: Tokenizer = session.tokenizer
        self._defaults = read_sampling_defaults(session.folder)
        self._chat: ChatPrompts | None = None
        self._events: queue.SimpleQueue[tuple[Answer, Event] | None] = queue.SimpleQueue()
        self._open: dict[Answer, Any] = {}  # with the scheduler's handle
        self._lock = threading.Lock()
        self._scheduler = Scheduler(session, max_queue=max_queue)
        self._scheduler.start()
        self._thread = threading.Thread(target=self._send_all, name="triton-responses", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Start every request. Each is answered later, also with an error."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except Glm4Error as error:
                self._fail(sender, error)

    def close(self) -> None:
        self._scheduler.stop(DRAIN)
        self._events.put(None)
        self._thread.join()
        self._session.close()

    def _start(self, request: Any, sender: Any) -> None:
        asked = read_request(request, self._triton)
        params = SamplingParams(**self._defaults | dict(asked.sampling))
        ids, ends = self._prompt(asked)
        if not params.ignore_eos:
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
        prompt = asked.text if asked.echo and asked.text is not None else ""
        answer = Answer(sender, request.requested_output_names(), asked.stream, prompt, len(ids))
        with self._lock:  # the first event may come before submit returns
            work = Request(tuple(ids), params, logprobs=False)
            self._open[answer] = self._scheduler.submit(work, lambda event: self._events.put((answer, event)))

    def _prompt(self, asked: TritonRequest) -> tuple[list[int], tuple[int, ...]]:
        """The prompt's ids, and the tokens that end a turn."""
        if asked.messages is None:
            return self._tokenizer.encode(asked.text or ""), ()
        if self._chat is None:
            try:
                self._chat = ChatPrompts(self._session.folder, self._tokenizer)
            except BundleError as error:
                raise RequestError(f"{error}; send text_input instead of messages") from error
        return self._chat.prompt(asked.messages)[1], self._chat.ends

    # On the sending thread ------------------------------------------------------------------------

    def _send_all(self) -> None:
        looked = time.monotonic()
        while True:
            if time.monotonic() - looked >= LOOK:
                self._drop_who_left()
                looked = time.monotonic()
            try:
                found = self._events.get(timeout=LOOK)
            except queue.Empty:
                continue
            if found is None:
                return
            self._send(*found)

    def _send(self, answer: Answer, event: Event) -> None:
        with self._lock:
            if answer not in self._open:  # its client left
                return
        if isinstance(event, Generated):
            self._add(answer, event)
        elif isinstance(event, Failed):
            self._fail(answer.sender, event.error)
        if event.last:
            self._forget(answer)

    def _add(self, answer: Answer, event: Generated) -> None:
        token = event.token
        answer.tokens += 1
        answer.pieces.append(token.text)
        if answer.sender.is_cancelled():
            self._leave(answer)
        elif token.finish_reason is not None or (answer.stream and token.text):
            self._respond(answer, token.finish_reason)

    def _respond(self, answer: Answer, reason: str | None) -> None:
        values: dict[str, str | int] = {
            "text_output": answer.prompt + "".join(answer.pieces),
            "finish_reason": reason or "",
            "num_input_tokens": answer.prompt_tokens,
            "num_output_tokens": answer.tokens,
        }
        answer.pieces.clear()
        triton = self._triton
        tensors = [
            triton.Tensor(name, _tensor(values[name]))
            for name in TRITON_OUTPUTS
            if not answer.outputs or name in answer.outputs
        ]
        flags = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if reason is not None else 0
        answer.sender.send(triton.InferenceResponse(output_tensors=tensors), flags=flags)

    def _drop_who_left(self) -> None:
        with self._lock:
            waiting = list(self._open)
        for answer in waiting:
            if answer.sender.is_cancelled():
                self._leave(answer)

    def _leave(self, answer: Answer) -> None:
        """End a request whose client cancelled. Triton still needs the final flag."""
        handle = self._forget(answer)
        if handle is not None:
            handle.cancel()
        answer.sender.send(flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _forget(self, answer: Answer) -> Any:
        with self._lock:
            return self._open.pop(answer, None)

    def _fail(self, sender: Any, error: Glm4Error) -> None:
        triton = self._triton
        code = triton.TritonError.INTERNAL
        if isinstance(error, RequestError):
            code = triton.TritonError.INVALID_ARG
        elif isinstance(error, QueueFullError | StoppedError):
            code = triton.TritonError.UNAVAILABLE
        response = triton.InferenceResponse(error=triton.TritonError(str(error), code))
        sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _tensor(value: str | int) -> Any:
    return np.array([value.encode()], object) if isinstance(value, str) else np.array([value], np.uint32)
