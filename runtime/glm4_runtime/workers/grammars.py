"""The worker that tries grammars: compiles each one, and runs it for a few tokens.

A task is {grammar, vocabulary}; the answer is {refusal: reason}, or {held: bytes, seconds} of the compiled grammar. The
vocabulary is small: the control tokens, and one token per byte. Compiling costs the same with a large one.
"""

import random
import re
import time
from collections.abc import Mapping
from typing import Any

import llguidance

from glm4_runtime.stacks import run_with_stack
from glm4_runtime.workers import child

# Stacks in bytes. A trial has half the stack of the serving process. On musl, threads that compute masks have 1 MiB.
COMPILING_STACK = 32 * 2**20
_TRIAL_STACK = COMPILING_STACK // 2
_FOLLOWING_STACK = 2**19

# Number of tokens in a trial.
_STEPS = 32
# A line of the grammar, which llguidance shows below an error.
_LISTED = re.compile(r"\d+ \|")
# Additions to llguidance's messages: traces, and marks for omitted text.
_TAIL = re.compile(r"<(backtrace|non-verbose|state)\b.*", re.DOTALL)
_LONGEST_REASON = 300


def main(limits: str) -> None:
    child.answer_tasks(Grammars().answer, limits)


def limits() -> llguidance.LLParserLimits:
    """Limits for compiling a grammar and computing a mask. They count work and not time, so that they hold everywhere.

    A state of the lexer takes about 400 bytes, and each sequence has its own states. The other limits are llguidance's
    own, written out so that a newer version does not raise them.
    """
    return llguidance.LLParserLimits(
        verbose_errors=False,
        initial_lexer_fuel=1_000_000,
        max_grammar_size=500_000,
        max_lexer_states=100_000,
        max_items_in_row=2_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
    )


def compiled(tokens: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Raises ValueError with llguidance's reason if it refuses the grammar or the grammar allows no reply."""
    matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(reason(matcher))
    return matcher


def reason(matcher: llguidance.LLMatcher) -> str:
    """llguidance's message, without the listing and the state after it."""
    lines = [line.strip() for line in _TAIL.sub("", str(matcher.get_error())).splitlines()]
    said = [line for line in lines if line and line != "^" and not _LISTED.match(line)]
    text = " ".join(said[:4]) or "no reason was given"
    if text == "NoExtensionBias":  # of a grammar that never comes to a token
        return "no text fits this format; give one that some text can fit"
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


class Grammars:
    """Tries grammars with the most recent vocabulary."""

    def __init__(self) -> None:
        self._vocabulary: Mapping[str, Any] | None = None
        self._tokens: llguidance.LLTokenizer | None = None

    def answer(self, task: Mapping[str, Any]) -> dict[str, Any]:
        tokens = self._tokens_of(task["vocabulary"])
        before, began = child.resident(), time.process_time()
        try:
            matcher = run_with_stack(lambda: compiled(tokens, task["grammar"]), _TRIAL_STACK)
        except ValueError as error:
            return {"refusal": str(error)}
        seconds, held = time.process_time() - began, max(0, child.resident() - before)
        run_with_stack(lambda: _follow(matcher, task["vocabulary"]["size"]), _FOLLOWING_STACK)
        return {"held": held, "seconds": seconds}

    def _tokens_of(self, vocabulary: Mapping[str, Any]) -> llguidance.LLTokenizer:
        if self._tokens is None or self._vocabulary != vocabulary:
            self._vocabulary = vocabulary
            tokens = _Bytes(vocabulary["size"], vocabulary["control"], vocabulary["ends"])
            self._tokens = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(tokens),
                n_vocab=len(tokens.tokens),
                eos_token=vocabulary["ends"],
                slices=[],
            )
        return self._tokens


def _follow(matcher: llguidance.LLMatcher, first: int) -> None:
    """Feed random bytes, whose tokens begin at ``first``. A grammar that cannot continue is no failure; only a crash
    or a high cost is."""
    rng = random.Random(0)
    for _ in range(_STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_stopped():
            return
        allowed = [token for token in range(first, first + 256) if mask[token // 8] >> token % 8 & 1]
        if not allowed or not matcher.consume_token(rng.choice(allowed)):
            return


class _Bytes:
    """A vocabulary for llguidance: the control tokens at their ids, then one token per byte."""

    def __init__(self, size: int, control: Mapping[str, int], ends: list[int]) -> None:
        self.first = size
        self.tokens = [b""] * size + [bytes([byte]) for byte in range(256)]
        for name, token in control.items():
            self.tokens[token] = name.encode()
        self.special_token_ids = sorted({*control.values(), *ends})
        self.eos_token_id, self.bos_token_id = ends[0], None

    def __call__(self, text: bytes) -> list[int]:
        return [self.first + byte for byte in text]
