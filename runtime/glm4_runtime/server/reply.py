"""Turns one sequence's tokens into a chat reply: thinking, answer, calls, log-probabilities."""

import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from glm4_runtime.reasoning import ThoughtSplitter
from glm4_runtime.scheduler import Generated
from glm4_runtime.text_pieces import TextPieces
from glm4_runtime.tool_calls import CallArguments, CallEnd, CallEvent, CallParser, CallStart, Content

Delta = dict[str, Any]
TokenBytes = Callable[[int], bytes]


class Calls:
    """The calls of a reply so far, in OpenAI's format.

    Attributes:
        closed: number of calls that have ended.
    """

    def __init__(self) -> None:
        self._begun: list[tuple[Delta, str, TextPieces]] = []
        self.closed = 0

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def listed(self) -> list[Delta]:
        return [
            head | {"function": {"name": name, "arguments": str(arguments)}}
            for head, name, arguments in self._begun
        ]

    def start(self, name: str) -> Delta:
        head = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self._begun.append((head, name, TextPieces()))
        return {"index": len(self) - 1, **head, "function": {"name": name, "arguments": ""}}

    def extend(self, arguments: str) -> Delta:
        self._begun[-1][2].add(arguments)
        return {"index": len(self) - 1, "function": {"arguments": arguments}}


@dataclass(frozen=True)
class CallRules:
    """Which tool calls a reply may hold.

    Attributes:
        functions: names of functions that may be called; empty: calls are text.
        anywhere: as for :class:`CallParser`.
        most: the reply ends after this number of calls.
        turn_token: ``<|assistant|>``, with which the model begins another turn of its own.
    """

    functions: Collection[str] = ()
    anywhere: bool = True
    most: int | None = None
    turn_token: int | None = None


NO_CALLS = CallRules()


class Reply:
    """Takes the tokens of one sequence; returns the deltas of a stream, and keeps the whole message.

    Attributes:
        finish_reason: None until the reply has ended.
        stop: the stop string that ended the reply; None if none did.
        tokens, thought_tokens: number of generated tokens, and of those inside the thinking.
        logprobs: if ``top`` is not None: one entry per token, except the end-of-sequence token.
    """

    def __init__(
        self,
        *,
        inside_thought: bool,
        call_rules: CallRules = NO_CALLS,
        ends: Collection[int] = (),
        token_bytes: TokenBytes | None = None,
    ) -> None:
        """
        ends: end-of-sequence tokens.
        token_bytes: given if log-probabilities were requested.
        """
        self._thoughts, self._call_rules = ThoughtSplitter(inside_thought), call_rules
        functions = call_rules.functions
        self._parser = CallParser(functions, call_rules.anywhere) if functions else None
        self._ends, self._token_bytes = frozenset(ends), token_bytes
        self._calls = Calls()
        self._reasoning, self._content = TextPieces(), TextPieces()
        self._unsent: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.tokens = self.thought_tokens = 0
        self.finish_reason: str | None = None
        self.stop: str | None = None

    def push(self, event: Generated) -> list[Delta]:
        """The deltas of this token, with ``reasoning_content``, ``content`` or ``tool_calls``."""
        token = event.token
        self.tokens += 1
        self.thought_tokens += self._thoughts.thinking
        if self._token_bytes is not None and not (token.id in self._ends and token.finish_reason == "stop"):
            self.logprobs.append(token_logprobs(event, self._token_bytes))
            self._unsent.append(self.logprobs[-1])
        thought, answer = self._thoughts.push(token.text)
        deltas = self._deltas(thought, self._parsed(answer))
        if token.id == self._call_rules.turn_token and self._parser is not None:
            deltas += self._deltas("", self._parser.boundary())
        if token.finish_reason is not None:
            thought, answer = self._thoughts.flush()
            events = self._parsed(answer) + ([] if self._parser is None else self._parser.flush())
            deltas += self._deltas(thought, events)
            self.stop = token.stop
            self.finish_reason = "tool_calls" if self._calls else token.finish_reason
            if token.finish_reason == "length":
                self.finish_reason = "length"
        elif self._full:
            self.finish_reason = "tool_calls"
        return deltas

    def take_logprobs(self) -> list[dict[str, Any]]:
        """The log-probabilities of the tokens since the last call."""
        taken, self._unsent = self._unsent, []
        return taken

    @property
    def message(self) -> dict[str, Any]:
        content = str(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls.listed}
        if self._reasoning:
            message["reasoning_content"] = str(self._reasoning)
        return message

    @property
    def _full(self) -> bool:
        most = self._call_rules.most
        return most is not None and self._calls.closed >= most

    def _parsed(self, answer: str) -> list[CallEvent]:
        if self._parser is None:
            return [Content(answer)] if answer else []
        return self._parser.push(answer)

    def _deltas(self, thought: str, events: Iterable[CallEvent]) -> list[Delta]:
        deltas: list[Delta] = []
        if thought:
            self._reasoning.add(thought)
            deltas.append({"reasoning_content": thought})
        for event in events:
            if self._full:  # one token may contain the end of a call and the beginning of unwanted text
                break
            if isinstance(event, Content):
                self._content.add(event.text)
                deltas.append({"content": event.text})
            elif isinstance(event, CallStart):
                deltas.append({"tool_calls": [self._calls.start(event.name)]})
            elif isinstance(event, CallArguments):
                deltas.append({"tool_calls": [self._calls.extend(event.text)]})
            elif isinstance(event, CallEnd):
                self._calls.closed += 1
        return deltas


def token_logprobs(event: Generated, token_bytes: TokenBytes) -> dict[str, Any]:
    """One entry of OpenAI's ``logprobs.content``."""
    entry = _token_logprob(event.token.id, event.token.logprob, token_bytes)
    return entry | {"top_logprobs": [_token_logprob(token, value, token_bytes) for token, value in event.top]}


# OpenAI's number for a probability of zero, because JSON has no -infinity.
_LOWEST = -9999.0


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _token_logprob(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}
