"""Formats that end llguidance's process, or cost it without end: each is refused in bounded time and memory."""

import random
import re
import resource
import threading
import time
from pathlib import Path

import llguidance
import numpy as np
import pytest

from glm4_runtime import grammar_trials
from glm4_runtime.errors import QueueFullError, RequestError
from glm4_runtime.structured import AnswerFormat, Function, GrammarCompiler, ReplyFormat
from glm4_runtime.tokenizer import Tokenizer
from glm4_runtime.workers.grammars import limits
from glm4_runtime.workers.pool import WorkerPool
from glm4_runtime.workers.worker import TaskLimits

EOS = (2038, 2045, 2047)
VOCAB = 2050
MIB = 2**20
SMALLEST = 1024 - 2**63


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(Path(__file__).parents[2] / "demo" / "glm4-tiny")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, EOS)


def schema(definition):
    return ReplyFormat(AnswerFormat("json_schema", definition), turn=False)


def lark(text):
    return ReplyFormat(AnswerFormat("grammar", text), turn=False)


def regex(text):
    return ReplyFormat(AnswerFormat("regex", text), turn=False)


def nested(depth):
    found = {}
    for _ in range(depth):
        found = {"items": found}
    return found


def patterns(count):
    return {"type": "string", "allOf": [{"pattern": f"a{{{n}}}.*b"} for n in range(count)]}


def rules(count):
    return "start: r0\n" + "".join(f'r{n}: "a" r{n + 1}\n' for n in range(count)) + f'r{count}: "c"'


def references(count):
    definitions = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{count}": {"type": "null"}}}


def patterned(count):
    names = {f"^(a|b)*{n}(c|d)*$": {"type": "integer"} for n in range(count)}
    return {"type": "object", "patternProperties": names}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (schema({"const": -(2**63)}), f"the smallest integer is {SMALLEST}"),
        (schema({"const": SMALLEST - 1}), f"the smallest integer is {SMALLEST}"),
        (schema({"enum": [1, {"a": [-(2**63)]}]}), f"the smallest integer is {SMALLEST}"),
        (schema({"type": "integer", "minimum": 1 - 2**63, "maximum": 1 - 2**63}), "the smallest integer"),
        (ReplyFormat(None, (Function("f", {"const": -(2**63)}),), required=True), "function 'f'"),
        (schema(patterns(13)), "an allOf of 13 patterns; at most 12"),
        (schema({"properties": {"a": patterns(300)}}), "an allOf of 300 patterns"),
        (schema(nested(121)), "nested deeper than 120 levels"),
        (schema(nested(100_000)), "nested deeper than 120 levels"),
        (lark(rules(1999)), "has 2001 rules; at most 2000"),
        (lark("start: a\n" + "?a.1 : \"b\"\n" * 2000), "has 2001 rules"),
        (regex("a" * (2**20 + 1)), "has 1048577 characters"),
    ],
)  # fmt: skip
def test_known_faults_are_named_before_a_worker_sees_them(compiler, monkeypatch, form, said):
    monkeypatch.setattr(grammar_trials, "_WORKERS", None)
    with pytest.raises(RequestError, match="cannot be enforced") as caught:
        compiler.compile(form, thinking=False)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (schema(references(3000)), "nested too deeply"),  # SIGSEGV
        (schema({"type": "integer", "multipleOf": 999_983}), "needs more|takes more"),
        (schema(patterned(300)), "processor time"),
        (regex("(a{1000}){1000}"), "128 MiB"),
        (schema({"const": "c" * 1_000_000}), "128 MiB"),
        (schema({"$ref": "#"}), "no text fits this format"),
        (regex("[a&&b]"), ""),
    ],
)
def test_what_a_worker_does_not_survive_is_refused(compiler, form, said):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RequestError, match="cannot be enforced") as caught:
        compiler.compile(form, thinking=False)
    assert re.search(said, str(caught.value))
    assert "backtrace" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - began < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    "form",
    [
        schema({"const": SMALLEST}),
        schema({"const": 2**64}),
        schema(nested(100)),
        schema({"properties": {"allOf": {"type": "string"}}, "allOf": [{"minProperties": 0}] * 20}),
        schema({"enum": [f"country number {n}" for n in range(5000)]}),
        lark(rules(1900)),
        lark("start: <|user|> | <[2046]>"),
        regex("|".join(f"w{n}" for n in range(10_000))),
    ],
)
def test_what_is_only_large_is_compiled(compiler, form):
    assert compiler.compile(form, thinking=True).failure is None


def test_a_format_is_tried_once(compiler, monkeypatch):
    good, bad = schema({"const": "once"}), schema(patterned(301))
    with monkeypatch.context() as patch:
        patch.setattr(
            grammar_trials,
            "_WORKERS",
            WorkerPool("glm4_runtime.workers.grammars", TaskLimits(0.2, 10, 128 * MIB, MIB)),
        )
        compiler.compile(good, thinking=False)
        with pytest.raises(RequestError, match=r"0\.2 s of processor time"):
            compiler.compile(bad, thinking=False)
        patch.setattr(grammar_trials, "_WORKERS", None)
        compiler.compile(good, thinking=False)
        with pytest.raises(RequestError, match=r"0\.2 s of processor time"):
            compiler.compile(bad, thinking=False)


def test_many_at_once_each_get_their_own_outcome(compiler):
    outcomes = {}

    def ask(number):
        form = schema(references(3000 + number) if number % 3 == 0 else {"const": number})
        try:
            mask = compiler.compile(form, thinking=False)
        except RequestError as error:
            outcomes[number] = str(error)
        else:
            outcomes[number] = mask.failure

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outcome in outcomes.items():
        assert (outcome is not None and "too deeply" in outcome) if number % 3 == 0 else outcome is None
    assert len(outcomes) == 12


def test_compiled_grammars_share_a_bounded_memory(tokenizer, monkeypatch):
    monkeypatch.setattr("glm4_runtime.structured._MOST_HELD", 16 * MIB)
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS)
    large = schema({"enum": [f"country number {n}" for n in range(12_000)]})
    masks = [compiler.compile(large, thinking=False)]
    with pytest.raises(QueueFullError, match="memory for formats"):
        masks += [masks[0].copy() for _ in range(100)]
    masks.clear()
    assert compiler.compile(large, thinking=False).failure is None


@pytest.mark.parametrize(
    ("limit", "form", "said"),
    [
        ({"step_lexer_fuel": 100}, regex(r"(\w{1,500}\s){1,500}"), "too many expressions"),
        ({"max_lexer_states": 300}, regex(r"(\w{1,500}\s){1,500}"), "too many states"),
        ({"max_items_in_row": 3}, lark('start: s\ns: s s | "a" | "b" "c"'), "3"),
    ],
)
def test_a_mask_that_needs_too_much_work_ends_its_sequence(compiler, monkeypatch, limit, form, said):
    """Masks are computed in the serving process; these limits are what holds each of them to a share of it."""
    low = llguidance.LLParserLimits(verbose_errors=False, **limit)
    monkeypatch.setattr("glm4_runtime.workers.grammars.limits", lambda: low)
    mask, rng = compiler.compile(form, thinking=False), random.Random(0)
    for _ in range(300):
        if mask.failure is not None:
            break
        logits = np.zeros(VOCAB, np.float32)
        mask.apply(logits)
        mask.advance(int(rng.choice(np.flatnonzero(logits == 0))))
    assert mask.failure.startswith("the reply's grammar cannot be followed: ")
    assert said in mask.failure
    with pytest.raises(RequestError, match="cannot be followed"):
        mask.apply(np.zeros(VOCAB, np.float32))


def test_the_limits_of_a_mask_are_what_was_measured():
    served = limits()
    assert (served.step_lexer_fuel, served.step_max_items) == (200_000, 50_000)
    assert (served.max_lexer_states, served.max_items_in_row) == (100_000, 2_000)
