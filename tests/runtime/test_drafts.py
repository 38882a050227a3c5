"""Which drafts are made: prompt lookup, measured chances and costs, and the plan with the most tokens per second."""

import random
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4_runtime.scheduler.drafts import Drafter, Drafting, Offer
from glm4_runtime.scheduler.drafts.chance import Chances, expected_tokens
from glm4_runtime.scheduler.drafts.costs import Allowance, StepCosts
from glm4_runtime.scheduler.drafts.lookup import look_up


def ids(*numbers):
    return np.array(numbers, np.int64)


def test_look_up_finds_the_latest_of_the_longest_matches():
    draft = look_up(ids(1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3), 2)
    assert (draft.ids.tolist(), draft.matched) == ([4, 9], 3)
    draft = look_up(ids(7, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3), 2)
    assert (draft.ids.tolist(), draft.matched) == ([5, 8], 2)


def test_look_up_goes_on_with_a_repetition():
    assert look_up(ids(5, 1, 2, 3, 1, 2, 3), 7).ids.tolist() == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2, 3], [3, 1, 2, 3]])
def test_look_up_wants_two_tokens_that_match(tokens):
    assert look_up(ids(*tokens), 4) is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_look_up_is_what_a_plain_search_finds(tokens):
    def match(end):
        length = 0
        while length < min(6, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        return length

    best = max(((match(end), end) for end in range(len(tokens) - 1)), default=(0, 0))
    draft = look_up(ids(*tokens), 1)
    assert (draft is None) == (best[0] < 2)
    if draft is not None:
        assert (draft.matched, draft.ids.tolist()) == (best[0], [tokens[best[1] + 1]])


# Chances and costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("chance", "drafted", "tokens"), [(0, 8, 1), (1, 8, 9), (0.5, 2, 1.75), (0.7, 0, 1)])
def test_expected_tokens_of_a_draft(chance, drafted, tokens):
    assert expected_tokens(chance, drafted) == pytest.approx(tokens)


def test_a_new_request_begins_with_the_chance_of_the_others():
    chances = Chances(0.5)
    assert chances.of("new") == 0.5
    for _ in range(40):
        chances.learn("good", 4, wrong=False)
    assert chances.of("new") > 0.9
    for _ in range(20):
        chances.learn("bad", 0, wrong=True)
    assert chances.of("bad") < 0.3
    assert chances.of("good") > 0.85
    chances.forget("bad")
    assert chances.of("bad") == chances.of("new")


def test_costs_between_measured_widths_are_interpolated_and_beyond_them_grow_slowly():
    costs = StepCosts()
    assert costs.plain(4) is None
    costs.add_plain(4, 1.0)
    assert costs.drafted(4, 8) == pytest.approx(1 + 4 * StepCosts.SLOPE)
    for _ in range(40):
        costs.add_drafted(4, 12, 1.8)
    assert costs.drafted(4, 8) == pytest.approx(1.4)
    assert costs.drafted(4, 12) == pytest.approx(1.8)
    assert costs.drafted(4, 22) == pytest.approx(1.8 + 10 * StepCosts.SLOPE)


def test_a_slow_run_is_forgotten():
    costs = StepCosts()
    costs.add_plain(1, 1.0)
    costs.add_drafted(1, 5, 50.0)
    assert costs.drafted(1, 5) < 1.6  # one slow run does not exclude the width
    for _ in range(9):
        costs.add_drafted(1, 5, 50.0)
    for _ in range(700):
        costs.add_plain(1, 1.0)
    assert costs.drafted(1, 5) < 1.3


def test_the_allowance_is_one_percent_of_the_steps_without_drafts():
    allowance = Allowance()
    for _ in range(200):
        allowance.add_plain()
    assert allowance.allows(1.9)
    assert not allowance.allows(2.1)
    allowance.spend(1.5)
    assert not allowance.allows(0.6)


# The plan, in simulated time -----------------------------------------------------------------------


class Job:
    """What a plan reads of a job, and the chance that a drafted token of it is right."""

    def __init__(self, chance):
        self.chance, self.count, self.lease = chance, 0, object()
        self.continuation = types.SimpleNamespace(limit=10**9)


class Simulated(Drafter):
    """Drafts that cost so many plain steps a token; None: nothing, as prompt lookup."""

    name = "simulated"

    def __init__(self, clock, cost):
        self.clock, self.cost = clock, cost
        self.kinds = {"simulated": 0.6}
        self.lag = {}

    def offer(self, job):
        made = self.cost is not None
        return Offer(self, "simulated", 32, None if made else np.zeros(32, np.int64), self.lag.get(job, 0))

    def draft(self, wanted):
        self.clock.now += max(wanted.values()) * self.cost
        return {job: np.zeros(width, np.int64) for job, width in wanted.items()}

    def seconds(self, _jobs, width):
        return width * self.cost


class Simulation:
    """Steps of some jobs whose costs and chances are known."""

    def __init__(self, monkeypatch, chances, *, cost, slope, draft_cost=None, several=True):
        self.now, self.tokens, self.steps = 0.0, 0, 0
        self.random = random.Random(0)
        self.jobs = [Job(chance) for chance in chances]
        self.cost, self.slope = cost, slope
        self.drafter = Simulated(self, draft_cost)
        self.drafting = Drafting([self.drafter], several)
        self.widths = []
        clock = types.SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr("glm4_runtime.scheduler.drafts.drafting.time", clock)

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def step(self):
        jobs = self.jobs
        drafts = self.drafting.drafts(jobs, 1000, 512)
        width = max((len(draft.ids) for draft in drafts.values()), default=0)
        seconds = self.cost * (1 + self.slope * len(jobs) * width)
        self.now += seconds
        self.drafting.stepped(jobs, list(drafts.values()), seconds)
        self.widths.append([len(drafts[job].ids) if job in drafts else 0 for job in jobs])
        for job in jobs:
            self.take(job, drafts.get(job))

    def take(self, job, draft):
        right = 0
        while draft is not None and right < len(draft.ids) and self.random.random() < job.chance:
            right += 1
        self.tokens += right + 1
        if draft is not None:
            self.drafting.judged(job, draft, right, right < len(draft.ids), len(self.jobs))
        else:
            self.drafting.compared(job, 0 if self.random.random() < job.chance else 1)

    @property
    def speedup(self):
        """Tokens per second over those without drafts."""
        return self.tokens / self.now * self.cost / len(self.jobs)

    def best(self, chance, draft_cost=0.0):
        """The speedup of the best fixed width."""
        return max(
            expected_tokens(chance, width) / (1 + self.slope * len(self.jobs) * width + width * draft_cost)
            for width in range(33)
        )


@pytest.mark.parametrize("jobs", [1, 4, 8])
@pytest.mark.parametrize("chance", [0.5, 0.8, 0.96])
def test_lookup_comes_near_the_best_fixed_width(monkeypatch, jobs, chance):
    one = Simulation(monkeypatch, [chance] * jobs, cost=0.05, slope=0.05).run(600)
    assert one.speedup > 0.9 * one.best(chance)


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("chance", [0.6, 0.7, 0.8])
def test_a_model_comes_near_the_best_fixed_width(monkeypatch, jobs, chance):
    one = Simulation(monkeypatch, [chance] * jobs, cost=0.5, slope=0.02, draft_cost=0.07).run(600)
    assert one.speedup > 0.9 * one.best(chance, 0.14)


@pytest.mark.parametrize("draft_cost", [None, 0.1])
@pytest.mark.parametrize("jobs", [1, 4])
def test_drafts_that_are_never_right_cost_almost_nothing(monkeypatch, jobs, draft_cost):
    one = Simulation(monkeypatch, [0.0] * jobs, cost=0.5, slope=0.05, draft_cost=draft_cost)
    one.run(40)  # what nothing was known of
    one.tokens = one.now = 0
    assert one.run(2000).speedup > 0.985
    assert sum(map(sum, one.widths[:40])) < 40 * jobs


def test_drafts_start_again_when_they_become_right(monkeypatch):
    one = Simulation(monkeypatch, [0.0], cost=0.5, slope=0.02, draft_cost=0.05).run(1000)
    one.jobs[0].chance = 0.9
    assert max(map(max, one.run(1500).widths[-100:])) >= 4


def test_each_request_has_its_own_drafts(monkeypatch):
    """One is easy, one is not: only the first is drafted, and the other one is only padded."""
    one = Simulation(monkeypatch, [0.95, 0.0], cost=0.5, slope=0.01, draft_cost=0.05).run(400)
    easy, hard = np.array(one.widths[-100:]).mean(axis=0)
    assert easy > 4
    assert hard < 2


def test_the_first_step_has_no_draft_because_nothing_is_known_of_costs(monkeypatch):
    one = Simulation(monkeypatch, [0.9], cost=0.5, slope=0.01).run(2)
    assert one.widths[0] == [0]
    assert one.widths[1][0] > 0


def test_several_requests_get_no_drafts_where_a_run_takes_one_token_of_each(monkeypatch):
    one = Simulation(monkeypatch, [0.9, 0.9], cost=0.5, slope=0.01, several=False).run(20)
    assert not np.any(one.widths)


def test_a_draft_is_never_longer_than_the_room_the_limit_and_the_step(monkeypatch):
    one = Simulation(monkeypatch, [0.99], cost=0.5, slope=0.0).run(200)
    job = one.jobs[0]
    for room, limit, tokens, most in (
        (3, 100, 512, 3),
        (100, 4, 512, 3),
        (100, 100, 6, 4),
        (0, 9, 9, 0),
        (9, 1, 9, 0),
    ):
        job.continuation.limit = limit
        drafts = one.drafting.drafts([job], room, tokens)
        assert max((len(draft.ids) for draft in drafts.values()), default=0) == most


def test_a_drafter_that_fails_is_dropped(monkeypatch, caplog):
    one = Simulation(monkeypatch, [0.9], cost=0.5, slope=0.01, draft_cost=0.01).run(20)
    assert one.widths[-1][0] > 0
    monkeypatch.setattr(one.drafter, "draft", lambda _wanted: 1 / 0)
    one.run(20)
    assert not np.any(one.widths[-19:])
    assert "goes on without it" in caplog.text
