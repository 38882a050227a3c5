"""What comes out of the scheduler is what a single run gives: batching, prefixes, drafts and masks change nothing."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from scheduling import Counting, Listener, draft_always, drive, submit

from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime import SamplingParams, Session
from glm4_runtime.errors import ModelError
from glm4_runtime.sampling import Sampler
from glm4_runtime.scheduler import Request, Scheduler
from glm4_runtime.scheduler.drafts.lookup import Match

SEEDS = range(24)
TIE = 1e-4  # logits of the single run that lie so close may come out in either order, in float32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_checkpoint):
    """The tiny checkpoint with sixteen slots."""
    folder = tmp_path_factory.mktemp("wide") / "bundle"
    export(tiny_checkpoint, folder, ExportOptions(precision="fp32", max_batch_size=16, parity=False))
    return folder


@pytest.fixture(scope="module")
def single(bundle):
    """A session that runs one request at a time."""
    with Session.open(bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def session(bundle):
    with Session.open(bundle, threads=1) as opened:
        yield opened


def alone(single, wanted):
    return [token.id for token in single.generate(wanted.prompt_ids, wanted.params, wanted.mask)]


def top_gap(single, wanted, output):
    """How far apart the two highest scores after prompt and ``output`` are, in a single run."""
    logits = single.prefill(0, [*wanted.prompt_ids, *output])[0]
    single.release(0)
    sampler = Sampler(wanted.params, wanted.prompt_ids, len(logits))
    for token in output:
        sampler.accept(token)
    second, first = np.partition(sampler._penalised(logits), -2)[-2:]
    return float(first - second)


def mixed_requests(rng):
    """Sixteen: prompts that share beginnings or not, short and long, plain and with all that changes logits."""
    starts = [rng.integers(4, 300, length).tolist() for length in (20, 45, 90)]
    kinds = [
        {},
        {},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.7, "presence_penalty": 0.3},
        {"logit_bias": {5: 3.0, 9: -100.0}},
        {"temperature": 0.9, "top_p": 0.9, "seed": 1},
        {"temperature": 1.1, "top_k": 20, "min_p": 0.02, "seed": 2},
    ]
    for _ in range(16):
        start = starts[rng.integers(3)] if rng.random() < 0.7 else []
        prompt = start[: rng.integers(len(start) + 1)] + rng.integers(4, 300, rng.integers(1, 60)).tolist()
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 40)),
            ignore_eos=bool(rng.random() < 0.8),
            **kinds[rng.integers(len(kinds))],
        )
        yield Request(tuple(prompt), params)


class Joining(Listener):
    """Lets another request in, and gives its own up, after so many tokens."""

    def __init__(self, after, join, give_up_after):
        super().__init__()
        self.after, self.join, self.give_up_after = after, join, give_up_after
        self.ticket = None

    def __call__(self, event):
        super().__call__(event)
        if self.join is not None and (len(self.tokens) >= self.after or self.done.is_set()):
            join, self.join = self.join, None
            join()
        if self.give_up_after is not None and len(self.tokens) >= self.give_up_after:
            self.ticket.cancel()


def run_mixed(session, requests, rng):
    """All of them, over 3 to 16 slots' worth of concurrency: some at once, each other one when another has come so far."""
    scheduler = Scheduler(session, step_tokens=int(rng.integers(8, 200)))
    listeners = []

    def join(i):
        def act():
            listener = listeners[i]
            listener.ticket = scheduler.submit(requests[i], listener)

        return act

    at_once = int(rng.integers(4, 16))
    for i in range(len(requests)):
        later = join(i + at_once) if i + at_once < len(requests) else None
        # whoever lets another in must come to its end or its place
        give_up = int(rng.integers(1, 20)) if rng.random() < 0.25 and later is None else None
        listeners.append(Joining(int(rng.integers(0, 6)), later, give_up))
    for i in range(at_once):
        join(i)()
    drive(scheduler)
    assert scheduler.stats().active == 0
    stats = scheduler.stats()
    scheduler.stop()
    assert session.free_slots() == list(range(16))
    return listeners, stats


def test_sixteen_mixed_requests_are_each_as_if_alone(session, single, record_property):
    greedy, sampled, ties, flips, cached, aborted = 0, 0, 0, 0, 0, 0
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        requests = list(mixed_requests(rng))
        listeners, stats = run_mixed(session, requests, rng)
        cached += stats.cached_tokens
        aborted += stats.requests["cancelled"]
        for wanted, listener in zip(requests, listeners, strict=True):
            assert listener.error is None
            expected = alone(single, wanted)
            if not listener.done.is_set():
                expected = expected[: len(listener.tokens)]  # it gave up
            if wanted.params.temperature:
                sampled += 1
                flips += listener.ids != expected
                continue
            greedy += 1
            if listener.ids != expected:
                pairs = zip(listener.ids, expected, strict=False)
                first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
                assert first is not None, f"seed {seed}: ended elsewhere without another token"
                assert top_gap(single, wanted, expected[:first]) <= TIE, f"seed {seed}, token {first}"
                ties += 1
    for name, value in (("greedy", greedy), ("ties", ties), ("sampled", sampled), ("flips", flips)):
        record_property(name, value)
    print(
        f"{greedy} greedy, {ties} ties; {sampled} sampled, {flips} differ; {cached} cached, {aborted} aborted"
    )
    assert greedy > 150
    assert sampled > 50
    assert cached > 1000
    assert aborted > 10
    assert ties / greedy < 0.01
    assert flips / sampled < 0.01  # a random number may fall on the edge between two tokens


# Drafts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"frequency_penalty": 0.4},
        {"repetition_penalty": 1.2},
        {"temperature": 0.7, "seed": 5},
        {"temperature": 1.2, "top_k": 8, "seed": 6, "presence_penalty": 0.5},
    ],
)
@pytest.mark.parametrize("width", [1, 5, 32])
def test_drafts_change_no_token(session, single, monkeypatch, params, width):
    """Small top_k and a prompt that repeats itself: some of the drafts are right, and most are not."""
    draft_always(monkeypatch, width)
    scheduler = Scheduler(session)
    for seed in range(4):
        piece = np.random.default_rng(seed).integers(4, 300, 12).tolist()
        wanted = Request(
            (*piece, *piece, *piece[:5]), SamplingParams(max_tokens=120, ignore_eos=True, **params)
        )
        listener, _ = submit(scheduler, wanted)
        drive(scheduler)
        assert listener.ids == alone(single, wanted)
    assert scheduler.stats().drafted_tokens > 0
    if not params:
        assert scheduler.stats().accepted_tokens > 0


def test_a_right_draft_saves_steps_and_ends_in_time(session, single, monkeypatch):
    """Greedy decoding of this model falls into a loop, which drafts follow; the limit cuts them off exactly."""
    draft_always(monkeypatch, 16)
    scheduler = Scheduler(session)
    wanted = Request((5, 6, 7), SamplingParams(max_tokens=200, ignore_eos=True))
    expected = alone(single, wanted)
    for end in ({}, {"stop_token_ids": (expected[-1],)}, {"max_tokens": 199}):
        params = dataclasses.replace(wanted.params, **end)
        listener, _ = submit(scheduler, dataclasses.replace(wanted, params=params))
        drive(scheduler)
        assert listener.ids == alone(single, dataclasses.replace(wanted, params=params))
    stats = scheduler.stats()
    assert stats.accepted_tokens > stats.generated_tokens / 3
    assert stats.steps < stats.generated_tokens - stats.accepted_tokens + 8


def test_sampling_under_drafts_takes_the_tokens_it_takes_alone(session, single, monkeypatch):
    """Whatever is drafted, right or wrong: 60 seeds, with the likeliest tokens as drafts."""
    prompt = (7, 8, 9, 10, 7, 8)
    guess = [token.id for token in single.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))]
    monkeypatch.setattr(
        "glm4_runtime.scheduler.drafts.lookup.look_up",
        lambda ids, count: Match(np.array(guess[len(ids) - len(prompt) :][:count] or [5]), 6),
    )
    draft_always(monkeypatch, 4)
    scheduler = Scheduler(session)
    for seed in range(60):
        params = SamplingParams(temperature=1.0, top_k=4, max_tokens=6, seed=seed, ignore_eos=True)
        listener, _ = submit(scheduler, Request(prompt, params))
        drive(scheduler)
        assert listener.ids == alone(single, Request(prompt, params))
    stats = scheduler.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens  # some were right, some were not


def test_a_graph_that_takes_one_token_of_each_request_drafts_for_single_requests(session, monkeypatch):
    """GroupQueryAttention, target ort: with a past, several new tokens need a batch of one."""
    draft_always(monkeypatch, 4)
    scheduler = Scheduler(session)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    for seed in range(3):
        submit(scheduler, Request((5, 6, 5, 6, seed + 9, 5, 6), params))
    drive(scheduler)
    assert scheduler.stats().drafted_tokens == 0
    submit(scheduler, Request((5, 6, 5, 6, 5, 6), params, mask=Counting(30)))
    wait(scheduler)
    assert scheduler.stats().drafted_tokens > 0


# Masks ------------------------------------------------------------------------------------------


def wait(scheduler, seconds=10):
    """Drive steps while masks are worked out elsewhere."""
    end = time.monotonic() + seconds
    while scheduler.stats().active or scheduler.stats().queued:
        scheduler.step()
        assert time.monotonic() < end


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 4}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("seconds", [0.0, 0.003])
def test_masks_are_as_in_a_single_run(session, single, params, seconds):
    scheduler = Scheduler(session)
    params = SamplingParams(max_tokens=40, ignore_eos=True, **params)
    masks = [Counting(7 + i, seconds) for i in range(4)]
    listeners = [submit(scheduler, Request((5, 6, i + 7), params, mask=m))[0] for i, m in enumerate(masks)]
    free, _ = submit(scheduler, Request((5, 6, 7), params))
    wait(scheduler)
    for i, (listener, mask) in enumerate(zip(listeners, masks, strict=True)):
        assert listener.ids == alone(single, Request((5, 6, i + 7), params, mask=Counting(7 + i)))
        assert [token // 10 for token in listener.ids] == list(range(1, 8 + i))
        assert [token.finish_reason for token in listener.tokens] == [None] * (6 + i) + ["stop"]
        assert mask.threads
        assert threading.current_thread().name not in mask.threads
    assert free.ids == alone(single, Request((5, 6, 7), params))


def test_max_tokens_ends_a_masked_request_without_its_mask(session):
    scheduler = Scheduler(session)
    mask = Counting(9)
    listener, _ = submit(scheduler, Request((5, 6), SamplingParams(max_tokens=3), mask=mask))
    wait(scheduler)
    assert (len(listener.ids), listener.tokens[-1].finish_reason) == (3, "length")
    assert len(mask.seen) == 2


@pytest.mark.alone
def test_a_slow_mask_does_not_hold_up_the_others(session):
    scheduler = Scheduler(session)
    slow, _ = submit(scheduler, Request((5, 6), SamplingParams(max_tokens=5), mask=Counting(9, 0.3)))
    quick, _ = submit(scheduler, Request((5, 6), SamplingParams(max_tokens=100, ignore_eos=True)))
    while not quick.done.is_set():
        scheduler.step()
    assert len(slow.tokens) < 2
    wait(scheduler)
    assert len(slow.tokens) == 5


@pytest.mark.alone
def test_a_mask_that_is_ready_wakes_the_thread(session):
    """Twenty tokens, each waiting 2 ms for its mask; the thread's own pace without being woken is 50 ms."""
    scheduler = Scheduler(session)
    scheduler.start()
    began = time.monotonic()
    listener, _ = submit(scheduler, Request((5, 6), SamplingParams(max_tokens=21), mask=Counting(20, 0.002)))
    assert listener.done.wait(10)
    assert time.monotonic() - began < 0.8
    assert len(listener.ids) == 20
    scheduler.stop()


def test_a_failing_mask_fails_its_request_only(session, single):
    scheduler = Scheduler(session)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    failing, _ = submit(scheduler, Request((5, 6), params, mask=Counting(9, fails_at=3)))
    other, _ = submit(scheduler, Request((5, 6), params))
    wait(scheduler)
    assert isinstance(failing.error, ModelError)
    assert "cannot go on" in str(failing.error)
    assert len(failing.tokens) == 3
    assert other.ids == alone(single, Request((5, 6), params))


def test_cancelling_while_a_mask_is_worked_out(session):
    scheduler = Scheduler(session)
    listener, ticket = submit(scheduler, Request((5, 6), SamplingParams(), mask=Counting(9, 0.2)))
    scheduler.step()
    ticket.cancel()
    scheduler.step()
    assert scheduler.stats().active == 0
    assert listener.tokens == []
    scheduler.stop()
