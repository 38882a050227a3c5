"""With drafts, every request gets the tokens, texts and log-probabilities that it gets without, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from cpu_operators import needs_cpu_operators
from scheduling import Counting, draft_always, submit

from glm4_runtime import SamplingParams, Session
from glm4_runtime.scheduler import Request, Scheduler
from glm4_runtime.structured import AnswerFormat, GrammarCompiler, ReplyFormat

pytestmark = needs_cpu_operators

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    },
    "required": ["name", "days"],
    "additionalProperties": False,
}
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 3},
    "truncated": {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 4},
    "repetition": {"repetition_penalty": 1.2, "temperature": 0.5, "seed": 5},
    "presence": {"frequency_penalty": 0.4, "presence_penalty": 0.3},
    "bias": {"logit_bias": {7: 2.0, 9: -100.0}, "temperature": 0.7, "seed": 6},
    "stop string": {"stop": (" the", "king"), "temperature": 0.6, "seed": 7},
}


@pytest.fixture(scope="module")
def session(demo_cpu):
    with Session.open(demo_cpu, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def compiler(session):
    return GrammarCompiler(
        session.tokenizer, session.manifest.model.vocab_size, session.manifest.model.eos_token_ids
    )


def drafts_of(demo_draft):
    return Session.open(demo_draft, threads=1)


def requests(tokenizer, tokens=40):
    prompts = [
        "And it came to pass, that",
        "And he said unto them, And he said",
        "The captain of the ship the captain",
    ]
    for place, options in enumerate(KINDS.values()):
        ids = tokenizer.encode(prompts[place % 3])
        params = SamplingParams(max_tokens=tokens + place, ignore_eos=place % 2 == 0, **options)
        yield Request(tuple(ids), params, top_logprobs=place % 3)


def events(scheduler, wanted):
    """All events of requests that run together; none may fail."""
    listeners = [submit(scheduler, one)[0] for one in wanted]
    while scheduler.stats().active or scheduler.stats().queued:
        scheduler.step()
    assert [listener.error for listener in listeners] == [None] * len(listeners)
    return [[*zip(one.tokens, one.tops, strict=True)] for one in listeners]


def same(session, wanted, draft=None, **options):
    """The statistics of a run with drafts, whose events must be those without drafts."""
    plain = Scheduler(session, speculation=False)
    expected = events(plain, wanted())
    plain.stop()
    scheduler = Scheduler(session, draft=draft, **options)
    assert repr(events(scheduler, wanted())) == repr(expected)  # NaN is equal to itself in a repr
    stats = scheduler.stats()
    scheduler.stop()
    return stats


@pytest.mark.parametrize("width", [1, 4, 13])
def test_lookup_changes_nothing_for_several_requests(session, monkeypatch, width):
    draft_always(monkeypatch, width)
    stats = same(session, lambda: list(requests(session.tokenizer)))
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_draft_model_changes_nothing_for_several_requests(session, demo_draft, monkeypatch, width):
    draft_always(monkeypatch, width)
    stats = same(session, lambda: list(requests(session.tokenizer)), drafts_of(demo_draft), speculation=False)
    assert 0.2 * stats.drafted_tokens < stats.accepted_tokens * (1 + width / 4)
    assert stats.accepted_tokens < stats.drafted_tokens


def test_both_drafters_together_with_measured_widths_change_nothing(session, demo_draft):
    stats = same(session, lambda: list(requests(session.tokenizer, 80)), drafts_of(demo_draft))
    assert stats.generated_tokens > 300


def masked(session, compiler, temperature):
    """Three under masks, of which one was made by hand and cannot be copied, and one without."""
    ids = tuple(session.tokenizer.encode("Answer: "))
    reply = ReplyFormat(AnswerFormat("json_schema", SCHEMA), turn=False)
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=5)
    return [
        Request(ids, params, mask=compiler.compile(reply, thinking=False)),
        Request(
            (*ids, 40), replace(params, seed=8), mask=compiler.compile(reply, thinking=False), top_logprobs=2
        ),
        Request(ids, replace(params, max_tokens=30, ignore_eos=True), mask=Counting(25)),
        Request(ids, params),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_drafts_change_nothing_under_masks(session, compiler, demo_draft, monkeypatch, kind, temperature):
    draft_always(monkeypatch, 4)
    draft = drafts_of(demo_draft) if kind == "model" else None
    stats = same(session, lambda: masked(session, compiler, temperature), draft, speculation=kind == "lookup")
    assert stats.drafted_tokens > 0


def test_a_thinking_budget_is_kept_under_drafts(session, compiler, demo_draft, monkeypatch):
    draft_always(monkeypatch, 4)
    reply = ReplyFormat(AnswerFormat("regex", "[a-z ]{3,20}"), turn=False, thinking_budget=6)
    params = SamplingParams(max_tokens=50, temperature=1.0, seed=1)
    ids = tuple(session.tokenizer.encode("Think: "))
    stats = same(
        session,
        lambda: [
            Request(ids, replace(params, seed=i), mask=compiler.compile(reply, thinking=True))
            for i in range(3)
        ],
        drafts_of(demo_draft),
        speculation=False,
    )
    assert stats.accepted_tokens > 0


def test_the_draft_model_honours_masks(session, compiler, demo_draft, monkeypatch):
    """Two models rarely agree under a mask that only one of them knows: here nine of ten tokens are forced."""
    draft_always(monkeypatch, 4)
    words = "".join(
        session.tokenizer.decode([token]) for token in session.tokenizer.encode("the white whale " * 6)
    )
    reply = ReplyFormat(AnswerFormat("regex", f"({words}){{3}}"), turn=False)
    ids = tuple(session.tokenizer.encode("Say: "))
    params = SamplingParams(max_tokens=60)
    stats = same(
        session,
        lambda: [Request(ids, params, mask=compiler.compile(reply, thinking=False))],
        drafts_of(demo_draft),
        speculation=False,
    )
    assert stats.accepted_tokens > 0.9 * stats.drafted_tokens


def test_choices_of_one_prompt_share_the_draft_models_prefix(session, demo_draft, monkeypatch):
    """n = 3: the draft model reads the prompt once."""
    draft_always(monkeypatch, 3)
    draft = drafts_of(demo_draft)
    read = []
    prefill = draft.prefill
    monkeypatch.setattr(
        draft, "prefill", lambda slot, ids, *rest: read.append(len(ids)) or prefill(slot, ids, *rest)
    )
    prompt = tuple(
        session.tokenizer.encode("And it came to pass, that the king said unto the people, Come. " * 6)
    )
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    stats = same(
        session,
        lambda: [Request(prompt, replace(params, seed=seed)) for seed in range(3)],
        draft,
        speculation=False,
    )
    assert stats.accepted_tokens > 0
    assert sum(read) < 1.3 * len(prompt)


def test_drafts_run_beside_prompts_and_requests_without_any(session, demo_draft, monkeypatch):
    """A long prompt is read in pieces while others decode with drafts, and the fourth has no draft in the end."""
    draft_always(monkeypatch, 4)
    long = tuple(np.random.default_rng(1).integers(10, 2000, 900).tolist())
    few = list(requests(session.tokenizer, 60))[:3]
    wanted = lambda: [*few, Request(long, SamplingParams(max_tokens=2, ignore_eos=True))]  # noqa: E731
    plain = Scheduler(session, speculation=False, step_tokens=64)
    expected = events(plain, wanted())
    plain.stop()
    scheduler = Scheduler(session, step_tokens=64, draft=drafts_of(demo_draft))
    assert repr(events(scheduler, wanted())) == repr(expected)
    assert scheduler.stats().accepted_tokens > 0
    scheduler.stop()


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 3, 12])
@pytest.mark.parametrize("error", [MemoryError, BrokenError])
def test_serving_goes_on_without_a_draft_model_that_fails(
    session, demo_draft, monkeypatch, caplog, after, error
):
    draft_always(monkeypatch, 3)
    draft, runs = drafts_of(demo_draft), []
    real = draft._run_decoder

    def run(*arguments):
        runs.append(arguments)
        if len(runs) > after:
            raise error("the draft model")
        return real(*arguments)

    monkeypatch.setattr(draft, "_run_decoder", run)
    same(session, lambda: list(requests(session.tokenizer)), draft, speculation=False)
    assert len(runs) == after + 1
    assert "goes on without it" in caplog.text


def test_logits_of_a_draft_model_that_are_not_numbers_end_it(session, demo_draft, monkeypatch, caplog):
    draft_always(monkeypatch, 3)
    draft = drafts_of(demo_draft)
    real = draft._run_decoder
    monkeypatch.setattr(draft, "_run_decoder", lambda *arguments: real(*arguments) * np.nan)
    stats = same(session, lambda: list(requests(session.tokenizer)), draft, speculation=False)
    assert stats.drafted_tokens == 0
    assert "goes on without it" in caplog.text


def test_a_draft_model_with_less_room_drafts_while_it_has_room(session, demo_draft, monkeypatch):
    """Its sequences may be shorter, and its slots fewer, than the model's."""
    draft_always(monkeypatch, 4)
    draft = Session.open(demo_draft, threads=1, max_seq_len=40, max_batch_size=2)
    stats = same(session, lambda: list(requests(session.tokenizer, 60)), draft, speculation=False)
    assert stats.accepted_tokens > 0


def test_a_sampled_draft_agrees_more_often_with_the_requests_random_numbers(session, demo_draft, monkeypatch):
    draft_always(monkeypatch, 1)
    wanted = [
        Request(
            tuple(session.tokenizer.encode("And it came to pass, that the")),
            SamplingParams(max_tokens=150, temperature=1.0, ignore_eos=True, seed=seed),
        )
        for seed in range(3)
    ]

    def share():
        scheduler = Scheduler(session, draft=drafts_of(demo_draft), speculation=False)
        events(scheduler, wanted)
        stats = scheduler.stats()
        scheduler.stop()
        return stats.accepted_tokens / stats.drafted_tokens

    with_same = share()
    real = np.random.Philox
    draws = np.random.default_rng(0)
    from glm4_runtime.scheduler.drafts.model import ModelDrafter

    choose = ModelDrafter._choose

    def other_numbers(self, job, row):
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "Philox", lambda **_: real(int(draws.integers(2**31))))
            return choose(self, job, row)

    monkeypatch.setattr(ModelDrafter, "_choose", other_numbers)
    assert with_same > 1.3 * share()
