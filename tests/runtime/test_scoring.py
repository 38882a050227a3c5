"""Log-probabilities of given tokens, beside a float64 softmax of the session's own logits."""

import numpy as np
import pytest

from glm4_runtime import scoring
from glm4_runtime.errors import RequestError
from glm4_runtime.scoring import PromptScores, rows_per_run, windows
from glm4_runtime.session import Session


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


@pytest.fixture(scope="module")
def session(tiny_bundles):
    with Session.open(tiny_bundles["ort"]) as session:
        yield session


def expected(session, tokens):
    """Log-softmax of every position in float64, [tokens, vocab]."""
    logits = np.concatenate(list(session.score(tokens))).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 30), (40, 1), (40, 90), (166, 90)])
def test_a_continuation(session, before, after):
    tokens = ids(before + after)
    found = session.log_likelihood(tokens[:before], tokens[before:])
    rows = expected(session, tokens)[before - 1 : -1]
    np.testing.assert_allclose(found.logprobs, rows[np.arange(after), tokens[before:]], atol=2e-5)
    assert found.total == pytest.approx(found.logprobs.sum())
    assert found.greedy == bool((rows.argmax(axis=1) == tokens[before:]).all())
    assert session.free_slots() == [0, 1, 2, 3]


def test_the_likeliest_continuation_is_greedy(session):
    prompt = ids(20)
    best = [int(expected(session, prompt)[-1].argmax())]
    best.append(int(expected(session, prompt + best)[-1].argmax()))
    assert session.log_likelihood(prompt, best).greedy
    assert not session.log_likelihood(prompt, [best[0], (best[1] + 1) % 300]).greedy


def test_continuations_of_one_prompt_are_scored_as_alone(session):
    prompt, ends = ids(50), [ids(1, 1), ids(20, 2), [], ids(7, 3)]
    together = session.log_likelihoods(prompt, ends)
    for found, end in zip(together, ends, strict=True):
        alone = session.log_likelihood(prompt, end)
        assert np.array_equal(found.logprobs, alone.logprobs)
        assert (found.greedy, found.total) == (alone.greedy, alone.total)
    assert (together[2].total, together[2].greedy) == (0.0, True)


def test_a_continuation_is_run_in_blocks(session, monkeypatch):
    tokens = ids(100)
    whole = session.log_likelihood(tokens[:10], tokens[10:])
    monkeypatch.setattr(scoring, "_BLOCK_BYTES", 0)
    seen = []
    real = session._run_decoder
    monkeypatch.setattr(
        session, "_run_decoder", lambda *given: seen.append(given[1].shape[1]) or real(*given)
    )
    parts = session.log_likelihood(tokens[:10], tokens[10:])
    assert seen == [9, 16, 16, 16, 16, 16, 10]
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=2e-5)


def test_the_logits_of_one_run_are_bounded():
    assert rows_per_run(151552, 512) == 110
    assert rows_per_run(2048, 512) == 512
    assert rows_per_run(2**30, 512) == 16


@pytest.mark.parametrize("length", [2, 20, 33, 34, 65, 97, 100])
@pytest.mark.parametrize("context", [1, 8])
def test_a_text_of_any_length(tiny_bundles, session, length, context):
    tokens = ids(length)
    with Session.open(tiny_bundles["ort"], max_seq_len=32) as short:
        found = short.rolling_log_likelihood(tokens, context)
    wanted = []
    for begin, first, end in windows(length, 32, context):
        rows = expected(session, tokens[begin:end])
        wanted += [rows[place - begin - 1, tokens[place]] for place in range(first, end)]
    np.testing.assert_allclose(found.logprobs, wanted, atol=2e-5)
    assert len(found.logprobs) == length - 1


@pytest.mark.parametrize("context", [1, 3, 31])
def test_windows_give_each_token_once_and_fit(context):
    for length in range(2, 200):
        cut = list(windows(length, 32, context))
        assert [place for _, first, end in cut for place in range(first, end)] == list(range(1, length))
        assert all(end - begin - 1 <= 32 for begin, _, end in cut)
        assert all(first - begin >= context for begin, first, _ in cut[1:])


@pytest.mark.parametrize(
    ("prompt", "continuation", "words"),
    [
        ([], [5], "empty"),
        ([5] * 200, [5] * 58, "258 tokens"),
        ([5], [320], "320"),
        ([400], [5], "400"),
        ([5], [-1], "-1"),
    ],
)
def test_refusals_leave_no_slot_in_use(session, prompt, continuation, words):
    with pytest.raises(RequestError, match=words):
        session.log_likelihood(prompt, continuation)
    assert session.free_slots() == [0, 1, 2, 3]


def test_prompt_scores_are_filled_in_by_parts(session):
    tokens = ids(40)
    rows = np.concatenate(list(session.score(tokens)))
    scores = PromptScores(tokens, top=3)
    for start in (0, 17, 30):
        scores.take(start, rows[start : {0: 17, 17: 30, 30: 40}[start]])
    exact = expected(session, tokens)
    np.testing.assert_allclose(scores.logprobs, exact[np.arange(39), tokens[1:]], atol=2e-5)
    order = np.argsort(-exact, axis=1, kind="stable")
    for place in range(39):
        assert scores.ranks[place] == 1 + int(np.flatnonzero(order[place] == tokens[place + 1])[0])
        assert [token for token, _ in scores.top[place]] == order[place, :3].tolist()
    assert PromptScores(tokens, top=0).top == [()] * 39
