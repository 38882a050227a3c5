"""The grammar of a reply, and the mask of next tokens that llguidance derives from it.

One grammar describes the whole turn: the rest of the thinking, if it began; then either calls, or a newline (as GLM-4
writes it) and the answer.
"""

import contextlib
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import numpy as np
import numpy.typing as npt

from glm4_runtime.errors import QueueFullError, RequestError
from glm4_runtime.format_limits import require_plain
from glm4_runtime.grammar_trials import GrammarTrials
from glm4_runtime.reasoning import CLOSE
from glm4_runtime.stacks import run_with_stack
from glm4_runtime.thinking_budget import ThinkingBudget
from glm4_runtime.tokenizer import Tokenizer
from glm4_runtime.workers.grammars import COMPILING_STACK, compiled, reason

# Maximum number of calls in a constrained reply, so that a model that repeats itself ends.
MAX_CALLS = 16

# An uncertain model can write white space endlessly. So JSON may have one space, or a line break and its indentation.
_JSON_OPTIONS = {"whitespace_pattern": r"[ ]?|\n[ ]{0,32}"}
# References that can only mean the schema itself, though their # is missing.
_LOCAL = ("/$defs/", "/definitions/")
# Members of a schema that hold values, not schemas.
_DATA = ("const", "default", "enum", "examples")
_FREE = "start: ANY\nANY: /(.|\\n)*/"

# Maximum bytes of all compiled grammars together, as measured by their trials.
_MOST_HELD = 512 * 2**20
# Grammars whose trial took longer (in seconds) are compiled one at a time.
_QUICK = 0.05


@dataclass(frozen=True)
class AnswerFormat:
    """The format of the answer: a JSON schema, a regular expression, or a Lark grammar."""

    kind: Literal["json_schema", "regex", "grammar"]
    definition: Mapping[str, Any] | str


@dataclass(frozen=True)
class Function:
    """A function that may be called, with the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class ReplyFormat:
    """The format of one turn.

    answer     the format of the answer; None: free text
    functions  functions that may be called instead of an answer
    required   calls only: no answer
    max_calls  maximum number of calls
    turn       whether it is a turn of a chat, where GLM-4 writes a newline before its answer
    enveloped  whether calls are {"name": ..., "arguments": ...}, not a name, a newline and the arguments
    thinking_budget  most tokens of the thinking before its closing tag; None: no limit
    """

    answer: AnswerFormat | None = None
    functions: tuple[Function, ...] = ()
    required: bool = False
    max_calls: int = MAX_CALLS
    turn: bool = True
    enveloped: bool = False
    thinking_budget: int | None = None


@dataclass(frozen=True)
class Grammar:
    """What a mask is compiled from; ``thinking``: whether the reply starts inside the thinking."""

    reply: ReplyFormat
    thinking: bool


class GrammarMask:
    """The tokens that may come next in one sequence; implements ``TokenMask``.

    Attributes:
        grammar: with it, another process can compile the same mask.
    """

    def __init__(
        self,
        grammar: Grammar,
        matcher: llguidance.LLMatcher,
        vocab_size: int,
        share: "_TimeShare",
        budget: ThinkingBudget | None = None,
    ) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._budget = budget
        self._share = share
        self._taken = 0  # tokens that the matcher has consumed
        # added to the logits, which is faster than setting the forbidden ones
        self._bias = np.zeros(vocab_size, np.float32)
        self._compute()

    def advance(self, token: int) -> None:
        """Take the chosen token and compute the next mask."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._taken += 1
            self._compute()
        if self._budget is not None:
            self._budget.advance(token)

    def skip(self, tokens: Sequence[int]) -> None:
        """Take tokens that an earlier run chose, and compute the mask after the last one."""
        if tokens and not self._matcher.is_stopped():
            self._matcher.consume_tokens(list(tokens))
            self._taken += len(tokens)
            self._compute()
        if self._budget is not None:
            for token in tokens:
                self._budget.advance(token)

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Set the forbidden tokens in ``logits`` [vocab] to -inf, in place.

        Raises :class:`RequestError` if the grammar has become too expensive.
        """
        if self.failure is not None:
            raise RequestError(self.failure)
        logits += self._bias
        forced = None if self._budget is None else self._budget.forced
        if forced is not None:
            kept = logits[forced]
            logits[:] = -np.inf
            logits[forced] = kept

    @property
    def failure(self) -> str | None:
        """Why the grammar cannot continue; None if it can."""
        if not self._matcher.is_error():
            return None
        return f"the reply's grammar cannot be followed: {reason(self._matcher)}"

    @property
    def finished(self) -> bool:
        """Whether no token may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def copy(self) -> "GrammarMask":
        """A copy of the state for another sequence. Raises :class:`QueueFullError` if there is too little memory."""
        share, budget = self._share.another(), self._budget and self._budget.copy()
        matcher = self._matcher.deep_copy()
        return GrammarMask(self.grammar, matcher, len(self._bias), share, budget)

    def mark(self) -> tuple[int, ThinkingBudget | None]:
        """The state now, for :meth:`go_back`."""
        return self._taken, self._budget and self._budget.copy()

    def go_back(self, mark: tuple[int, ThinkingBudget | None]) -> None:
        """Forget the tokens after ``mark``."""
        taken, budget = mark
        if taken < self._taken:
            self._matcher.rollback(self._taken - taken)
            self._taken = taken
            self._compute()
        self._budget = budget and budget.copy()

    def _compute(self) -> None:
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, count=len(self._bias), bitorder="little")
            self._bias[:] = np.where(allowed, np.float32(0), np.float32(-np.inf))


class _Memory:
    """The shared memory budget of compiled grammars, in bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        with self._lock:
            if self._held + size > self._most:
                raise QueueFullError(
                    "the formats of other requests fill the memory for formats", retry_after=5
                )
            self._held += size

    def give(self, size: int) -> None:
        with self._lock:
            self._held -= size


class _TimeShare:
    """One grammar's part of the budget; returned when nothing refers to it."""

    def __init__(self, memory: _Memory, size: int) -> None:
        memory.take(size)
        self._memory, self._size = memory, size
        weakref.finalize(self, memory.give, size)

    def another(self) -> "_TimeShare":
        return _TimeShare(self._memory, self._size)


class GrammarCompiler:
    """Turns formats into masks for one tokenizer. Safe to use from any thread.

    A worker process tries each new format first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._trials = GrammarTrials(vocab_size, tokenizer.control_tokens, eos_token_ids)
        self._trials.warm()
        self._tokens = llguidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(eos_token_ids)
        )
        self._vocab_size = vocab_size
        self._closing = tokenizer.encode(f"\n{CLOSE}", add_special_tokens=False)
        self._memory = _Memory(_MOST_HELD)
        self._slow = threading.Lock()

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; for a control token, its name."""
        found: bytes = self._tokens.decode_bytes([token])
        return found

    def compile(self, reply: ReplyFormat, thinking: bool) -> GrammarMask:
        """The mask for the first token of a reply, which may start inside the thinking.

        Raises :class:`RequestError` if a schema or grammar is invalid, unsupported by llguidance, or too expensive,
        and :class:`QueueFullError` if too many others are being compiled.
        """
        try:
            require_plain(reply)
            grammar = json.dumps({"grammars": _grammars(reply, thinking)})
        except (ValueError, RecursionError) as error:
            raise RequestError(f"this format cannot be enforced: {error}") from error
        trial = self._trials.require(grammar)
        share = _TimeShare(self._memory, trial.held)
        with self._slow if trial.seconds > _QUICK else contextlib.nullcontext():
            try:
                matcher = run_with_stack(lambda: compiled(self._tokens, grammar), COMPILING_STACK)
            except ValueError as error:
                raise RequestError(f"this format cannot be enforced: {error}") from error
        budget = None
        if thinking and reply.thinking_budget is not None:
            budget = ThinkingBudget(reply.thinking_budget, self._closing, self.token_bytes)
        return GrammarMask(Grammar(reply, thinking), matcher, self._vocab_size, share, budget)


def _grammars(reply: ReplyFormat, thinking: bool) -> list[dict[str, Any]]:
    """The grammar of the turn, and the grammars of its parts that it refers to."""
    parts: dict[str, dict[str, Any]] = {}
    ways = []
    if not reply.required:
        parts["answer"] = {"lark_grammar": _FREE} if reply.answer is None else _answer(reply.answer)
        ways.append('"\\n" @answer' if reply.turn else "@answer")
    if reply.functions:
        for index, function in enumerate(reply.functions):
            parts[f"arguments_{index}"] = {"json_schema": _schema(function.parameters)}
        calls = " | ".join(
            _call(function.name, f"@arguments_{index}", reply.enveloped)
            for index, function in enumerate(reply.functions)
        )
        more = f' ("\\n" call){{0,{reply.max_calls - 1}}}' if reply.max_calls > 1 else ""
        ways.append(f"{'blank ' * reply.enveloped}call{more}")
    lines = [f"start: {'thought blank ' * thinking}({' | '.join(ways)})"]
    if reply.functions:
        lines.append(f"call: {calls}")
    if thinking:
        lines.append("thought[lazy]: /(.|\\n)*<\\/think>/")
    if thinking or reply.enveloped:
        lines.append("blank: /\\n?/")
    turn = {"name": "turn", "lark_grammar": "\n".join(lines)}
    return [turn, *({"name": name, **part} for name, part in parts.items())]


def _call(name: str, arguments: str, enveloped: bool) -> str:
    """One call in Lark; ``arguments`` is the name of the grammar of its arguments."""
    if enveloped:
        head = '{"name": ' + json.dumps(name) + ', "arguments": '
        return f'{json.dumps(head)} {arguments} "}}"'
    return f"{json.dumps(name + chr(10))} {arguments}"


def _answer(answer: AnswerFormat) -> dict[str, Any]:
    if isinstance(answer.definition, Mapping):
        return {"json_schema": _schema(answer.definition)}
    if answer.kind == "grammar":
        return {"lark_grammar": answer.definition}
    (part,) = json.loads(llguidance.LLMatcher.grammar_from_regex(answer.definition))["grammars"]
    return {"lark_grammar": part["lark_grammar"]}


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**_with_local_references(schema), "x-guidance": _JSON_OPTIONS}


def _with_local_references(schema: Any) -> Any:
    """Write ``#/$defs/NAME`` for ``/$defs/NAME``, which LiteLLM sends to Anthropic's API."""
    if isinstance(schema, list):
        return [_with_local_references(member) for member in schema]
    if not isinstance(schema, Mapping):
        return schema
    local = {key: value if key in _DATA else _with_local_references(value) for key, value in schema.items()}
    reference = local.get("$ref")
    if isinstance(reference, str) and reference.startswith(_LOCAL):
        local["$ref"] = f"#{reference}"
    return local
