"""The sampler against the formulas written out token by token, and its draws against its distribution."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glm4_runtime.errors import RequestError
from glm4_runtime.sampling import Sampler, SamplingParams, _inverse_cdf, likeliest

VOCAB = 40
GLM4_VOCAB = 151552


def expected_distribution(logits, params, prompt, output):
    """Plain Python over a dict of token -> score. Returns it with how near any decision was to tipping."""
    scores = {token: float(x) for token, x in enumerate(logits)}
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in set(prompt) | set(output):
        x = scores[token]
        scores[token] = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    for token in set(output):
        scores[token] -= output.count(token) * params.frequency_penalty + params.presence_penalty
    ranking = sorted(scores, key=lambda token: (-scores[token], token))
    gaps = [scores[a] - scores[b] for a, b in itertools.pairwise(ranking)]
    if params.temperature == 0:
        return {ranking[0]: 1.0}, gaps[0]
    top = scores[ranking[0]]
    weight = {token: math.exp((scores[token] - top) / params.temperature) for token in ranking}
    kept = ranking[: params.top_k or len(ranking)]
    margin = min(gaps)
    if params.top_p < 1:
        whole, running, nucleus = math.fsum(weight[t] for t in kept), 0.0, []
        for token in kept:
            margin = min(margin, abs(running / whole - params.top_p))
            if running >= params.top_p * whole:
                break
            nucleus.append(token)
            running += weight[token]
        kept = nucleus
    margin = min([margin, *(abs(weight[t] - params.min_p) for t in kept if params.min_p and t != kept[0])])
    kept = [token for token in kept if weight[token] >= params.min_p]
    whole = math.fsum(weight[t] for t in kept)
    return {token: weight[token] / whole for token in kept}, margin


@st.composite
def requests(draw):
    tokens = st.integers(0, VOCAB - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0, 0.3, 1, 2.5])),
        top_p=draw(st.sampled_from([1, 0.9, 0.5, 0.01])),
        top_k=draw(st.sampled_from([0, 1, 3, VOCAB, VOCAB + 5])),
        min_p=draw(st.sampled_from([0, 0.05, 0.6])),
        repetition_penalty=draw(st.sampled_from([1, 1.3, 0.7])),
        frequency_penalty=draw(st.sampled_from([0, 0.4, -0.2])),
        presence_penalty=draw(st.sampled_from([0, 0.5, -1])),
        logit_bias=draw(st.dictionaries(tokens, st.floats(-5, 5, width=16), max_size=4)),
    )
    return params, draw(st.lists(tokens, max_size=8)), draw(st.lists(tokens, max_size=8))


@given(requests(), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_distribution_follows_the_formulas(request_, seed):
    params, prompt, output = request_
    logits = (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)
    expected, margin = expected_distribution(logits, params, prompt, output)
    assume(margin > 1e-4)  # a tie within float32's rounding may go either way

    sampler = Sampler(params, prompt, VOCAB)
    for token in output:
        sampler.accept(token)
    got = sampler.distribution(logits)

    assert got.dtype == np.float64
    assert set(np.flatnonzero(got)) == set(expected)
    np.testing.assert_allclose([got[t] for t in expected], list(expected.values()), rtol=1e-4)


@given(st.integers(1, 6000), st.sampled_from([0, 0.01, 1, 5]), st.floats(0.01, 0.9999), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_top_p_takes_the_fewest_highest_of_a_long_list_with_ties(length, spread, top_p, seed):
    logits = (np.random.default_rng(seed).integers(0, 50, length) * spread / 5).astype(np.float32)
    got = Sampler(SamplingParams(temperature=1, top_p=top_p), [], length).distribution(logits)

    full = np.exp(logits.astype(np.float64))
    full /= full.sum()
    kept = np.flatnonzero(got)
    ranking = sorted(range(len(full)), key=lambda t: (-full[t], t))
    assert sorted(ranking[: len(kept)]) == list(kept)
    share = full[kept].sum()
    assert share >= top_p - 1e-9
    assert share - full[ranking[len(kept) - 1]] < top_p + 1e-9


@pytest.mark.parametrize("params", [{}, {"temperature": 1, "top_k": 1}, {"temperature": 1, "top_p": 1e-9}])
def test_the_lowest_id_wins_a_tie(params):
    logits = np.array([0, 7, 3, 7, 7], np.float32)
    assert Sampler(SamplingParams(**params), [], 5).sample(logits).id == 1


def test_min_p_of_one_keeps_all_that_tie_for_the_highest():
    got = Sampler(SamplingParams(temperature=1, min_p=1), [], 4).distribution(
        np.array([3, 1, 3, 2], np.float32)
    )
    assert got.tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.2499999, 1), (0.25, 3), (0.999999, 3), (1 - 2**-53, 3), (1.0, 3)]
)
def test_the_cumulative_sum_is_inverted_to_its_very_ends(uniform, token):
    weights = np.array([0, 1, 0, 3, 0], np.float64) / 3
    assert _inverse_cdf(weights, uniform) == token


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = np.array([1, 1.001, -3e38, -np.inf], np.float32)
    assert Sampler(SamplingParams(temperature=1e-300), [], 4).distribution(logits).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}]
)
def test_draws_have_the_distribution_they_say(options):
    """Pearson's chi-square of 8000 draws; a fixed seed, so it passes or fails for good."""
    logits = (np.random.default_rng(5).standard_normal(VOCAB) * 1.5).astype(np.float32)
    sampler = Sampler(SamplingParams(temperature=0.9, seed=11, **options), [], VOCAB)
    expected = sampler.distribution(logits) * 8000
    drawn = np.bincount([sampler.sample(logits).id for _ in range(8000)], minlength=VOCAB)

    assert not drawn[expected == 0].any()
    possible = expected > 5
    squares = (drawn - expected)[possible] ** 2 / expected[possible]
    freedom = possible.sum() - 1
    assert squares.sum() < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_a_seed_decides_everything_and_a_step_stands_alone():
    logits = np.random.default_rng(0).standard_normal((30, VOCAB)).astype(np.float32)

    def run(seed, verify_until=0):
        sampler = Sampler(SamplingParams(temperature=2, seed=seed), [], VOCAB)
        ids = []
        for step, row in enumerate(logits):
            if step < verify_until:
                sampler.accept(reference[step])
                ids.append(reference[step])
            else:
                ids.append(sampler.sample(row).id)
        return ids

    reference = run(7)
    assert run(7) == reference
    assert run(7, verify_until=13) == reference  # accepted tokens count as steps
    assert run(8) != reference
    assert run(-7) != reference
    assert run(None) != run(None)


def test_neighbouring_steps_are_independent():
    """Counters that shared words would make consecutive numbers repeat or correlate."""
    sampler = Sampler(SamplingParams(temperature=1, seed=3), [], 1000)
    ids = np.array([sampler.sample(np.zeros(1000, np.float32)).id for _ in range(4000)])
    assert len(set(ids.tolist())) > 950
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05


@given(requests(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_the_callers_logits_stay_as_they_are_and_ruled_out_tokens_are_never_taken(request_, seed):
    params, prompt, output = request_
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(VOCAB).astype(np.float32)
    logits[rng.permutation(VOCAB)[: rng.integers(VOCAB)]] = -np.inf
    logits.flags.writeable = False
    sampler = Sampler(dataclasses.replace(params, seed=seed), prompt, VOCAB)
    for token in output:
        sampler.accept(token)
    assert logits[sampler.sample(logits).id] > -np.inf


@pytest.mark.parametrize("temperature", [0, 1])
def test_logprob_is_the_models_own(temperature):
    logits = np.array([2, -1, 0.5, -np.inf], np.float32)
    params = SamplingParams(temperature=temperature, seed=1, logit_bias={1: 100})
    sampled = Sampler(params, [], 4).sample(logits)
    assert sampled.id == 1
    exact = -1 - math.log(math.exp(2) + math.exp(-1) + math.exp(0.5))
    assert sampled.logprob == pytest.approx(exact, abs=1e-6)


def test_penalties_grow_with_what_was_said():
    """Equal logits: each token already said is pushed behind the others, so greedy goes round them all."""
    sampler = Sampler(SamplingParams(frequency_penalty=0.5), [2, 2, 2], 3)
    assert [sampler.sample(np.zeros(3, np.float32)).id for _ in range(9)] == [0, 1, 2] * 3
    # more distinct tokens than the counts were first made for
    sampler = Sampler(SamplingParams(presence_penalty=2), [], 500)
    assert [sampler.sample(np.zeros(500, np.float32)).id for _ in range(500)] == list(range(500))


@pytest.mark.parametrize(
    ("bad", "message"),
    [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "ruled out")],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_degenerate_logits_are_refused(bad, message, temperature):
    logits = np.full(8, -1, np.float32)
    logits[:] = bad if bad == -math.inf else logits
    logits[3] = bad
    with pytest.raises(RequestError, match=message):
        Sampler(SamplingParams(temperature=temperature), [], 8).sample(logits)


def test_an_overflowing_penalty_is_refused():
    logits = np.array([3e38, 0], np.float32)
    with pytest.raises(RequestError, match="infinite"):
        Sampler(SamplingParams(temperature=1, repetition_penalty=0.01), [0], 2).sample(logits)


def test_logits_of_another_width_are_a_defect():
    with pytest.raises(ValueError, match="shape"):
        Sampler(SamplingParams(), [], 8).sample(np.zeros((1, 8), np.float32))


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({"logit_bias": {8: 1.0}}, []),
        ({"stop_token_ids": [3, 9]}, []),
        ({}, [0, 8]),
        ({}, [-1]),
        ({}, [0.5]),
        ({}, [2**70]),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(options, prompt):
    with pytest.raises(RequestError, match=r"token"):
        Sampler(SamplingParams(**options), prompt, 8)


def test_accepting_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(RequestError, match="from 0 to 7"):
        Sampler(SamplingParams(), [], 8).accept(8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", None),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", False),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("seed", 2**63),
        ("seed", 1.0),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("ignore_eos", 1),
        ("stop", ["a", ""]),
        ("stop", ""),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", b"ab"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 12),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: "x" * 500}),
    ],
)
def test_bad_parameters_are_refused_in_one_short_line(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 160


def test_parameters_are_kept_in_one_form():
    bias = {np.int64(3): 1}
    params = SamplingParams(
        temperature=1,
        stop="end",
        stop_token_ids=[np.int32(4), 5],
        logit_bias=bias,
        seed=-(2**63),
        top_k=np.int64(2),
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (4, 5)
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    bias[np.int64(9)] = 1
    assert params.logit_bias == {3: 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3


@pytest.mark.parametrize(
    "options", [{"top_p": 0.95}, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.999, "min_p": 0.1}]
)
def test_no_step_sorts_the_whole_vocabulary(options, monkeypatch):
    sorted_lengths = []
    argsort = np.argsort

    def spy(values, **kwargs):
        sorted_lengths.append(len(values))
        return argsort(values, **kwargs)

    monkeypatch.setattr(np, "argsort", spy)
    logits = np.random.default_rng(1).standard_normal(GLM4_VOCAB).astype(np.float32)
    Sampler(SamplingParams(temperature=1.5, **options), [], GLM4_VOCAB).sample(logits)
    assert sorted_lengths
    assert max(sorted_lengths) <= 512


class Only:
    """A mask that allows the given ids."""

    finished = False

    def __init__(self, *allowed):
        self.allowed = list(allowed)

    def advance(self, _token):
        raise AssertionError("the sampler never advances a mask")

    def apply(self, logits):
        kept = logits[self.allowed].copy()
        logits[:] = -np.inf
        logits[self.allowed] = kept


@pytest.mark.parametrize("temperature", [0, 1.0, 50.0])
def test_a_mask_has_the_last_word_and_leaves_the_logits_alone(temperature):
    logits = np.linspace(5, -5, VOCAB).astype(np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingParams(temperature=temperature, seed=3, logit_bias={0: 100}), [1], VOCAB)
    taken = {sampler.choose(logits, Only(7, 9)) for _ in range(40)}
    assert taken <= {7, 9}
    assert 7 in taken
    assert logits.tobytes() == before.tobytes()
    assert sampler.sample(logits, Only(9)).logprob == pytest.approx(
        Sampler(SamplingParams(), [1], VOCAB).sample(logits).logprob + logits[9] - logits[0], abs=1e-5
    )
    with pytest.raises(RequestError, match="every token is ruled out"):
        sampler.choose(logits, Only())


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, True),
        ({"top_k": 5}, True),  # of no effect at temperature 0
        ({"temperature": 0.1}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"presence_penalty": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_it_knows_when_the_highest_logit_decides(params, expected):
    assert Sampler(SamplingParams(**params), [1], VOCAB).takes_the_highest is expected


def test_the_likeliest_come_best_first_and_ties_by_id():
    logits = np.array([1, 3, 2, 3, 0], np.float32)
    assert likeliest(logits, 3).tolist() == [1, 3, 2]
    assert likeliest(logits, 1).tolist() == [1]
