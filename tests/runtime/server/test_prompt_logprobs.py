"""Log-probabilities of prompts over HTTP: what evaluation harnesses ask for."""

import httpx
import numpy as np
import pytest

from glm4_runtime.session import Session

MODEL = "glm4-tiny"
TEXT = "In the beginning God created the"


@pytest.fixture(scope="module")
def session(demo_bundle):
    with Session.open(demo_bundle) as session:
        yield session


@pytest.fixture(scope="module")
def ask(server):
    def post(status=200, **body):
        asked = {"model": MODEL, "temperature": 0} | body
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json()

    return post


def expected(session, ids):
    """Log-softmax of every position in float64, [tokens, vocab]."""
    logits = np.concatenate(list(session.score(ids))).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echo_with_logprobs(ask, session, max_tokens):
    ids = session.tokenizer.encode(TEXT)
    found = ask(prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens, ignore_eos=True)
    (choice,) = found["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("[gMASK]<sop>" + TEXT)
    assert choice["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == max_tokens
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert len({len(values) for values in logprobs.values()}) == 1
    assert len(logprobs["tokens"]) == len(ids) + max_tokens
    assert "".join(logprobs["tokens"]) == choice["text"]
    offsets = logprobs["text_offset"]
    assert [
        choice["text"][at:][: len(token)] for at, token in zip(offsets, logprobs["tokens"], strict=True)
    ] == (logprobs["tokens"])
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    rows = expected(session, ids)
    given = np.array(logprobs["token_logprobs"][1 : len(ids)])
    np.testing.assert_allclose(given, rows[np.arange(len(ids) - 1), ids[1:]], atol=2e-5)
    # as the harness tells whether a token is the likeliest one
    greedy = [
        value == max(top.values())
        for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        if value is not None
    ]
    assert greedy[: len(ids) - 1] == (rows[:-1].argmax(axis=1) == ids[1:]).tolist()
    assert all(greedy[len(ids) - 1 :])


def test_a_text_has_the_width_it_was_sent_with(ask, session):
    """[gMASK]<sop>, which the tokenizer adds, is listed and takes no place in the text."""
    (choice,) = ask(prompt=TEXT, echo=True, logprobs=0, max_tokens=0)["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == TEXT
    assert logprobs["tokens"][:2] == ["[gMASK]", "<sop>"]
    assert logprobs["text_offset"][:3] == [0, 0, 0]
    assert "".join(logprobs["tokens"][2:]) == TEXT
    assert logprobs["text_offset"][-1] == len(TEXT) - len(logprobs["tokens"][-1])
    assert [set(top) for top in logprobs["top_logprobs"][1:]] == [{token} for token in logprobs["tokens"][1:]]
    ids = ask(prompt=session.tokenizer.encode(TEXT), echo=True, logprobs=0, max_tokens=0)
    assert ids["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"]


def test_the_end_of_a_sequence_is_listed(ask, session):
    """The harness drops the last entry, which must not be one of the prompt's."""
    end = session.manifest.model.eos_token_ids[0]
    ids = session.tokenizer.encode(TEXT)
    found = ask(prompt=ids, echo=True, logprobs=1, max_tokens=1, logit_bias={str(end): 100})
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])


def test_several_prompts_and_choices(ask):
    both = ask(prompt=[TEXT, "Call me"], n=2, echo=True, logprobs=2, max_tokens=2, prompt_logprobs=1)[
        "choices"
    ]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    assert both[0]["logprobs"] == both[1]["logprobs"]
    assert both[2]["prompt_logprobs"] == both[3]["prompt_logprobs"]
    alone = ask(prompt="Call me", echo=True, logprobs=2, max_tokens=2)["choices"][0]
    assert alone["logprobs"]["tokens"] == both[2]["logprobs"]["tokens"]
    np.testing.assert_allclose(
        alone["logprobs"]["token_logprobs"][1:], both[2]["logprobs"]["token_logprobs"][1:], atol=1e-5
    )
    assert "prompt_logprobs" not in alone


def test_a_prompt_that_is_kept_is_scored_again(ask):
    """What others left in the cache gives no logits, and so is not used."""
    asked = {"prompt": TEXT * 4, "echo": True, "logprobs": 1, "max_tokens": 1}
    ask(prompt=TEXT * 4, max_tokens=1)
    first, second = ask(**asked), ask(**asked)
    assert (
        first["choices"][0]["logprobs"]["token_logprobs"]
        == second["choices"][0]["logprobs"]["token_logprobs"]
    )
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert ask(prompt=TEXT * 4, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] > 30


def test_prompt_logprobs(ask, session):
    ids = session.tokenizer.encode(TEXT)
    (choice,) = ask(prompt=ids, prompt_logprobs=3, max_tokens=1)["choices"]
    assert choice["logprobs"] is None
    assert not choice["text"].startswith("[gMASK]")
    rows = expected(session, ids)
    listed = choice["prompt_logprobs"]
    assert listed[0] is None
    for place, found in enumerate(listed[1:]):
        order = np.argsort(-rows[place], kind="stable")
        assert list(found)[:3] == [str(token) for token in order[:3]]
        own = found[str(ids[place + 1])]
        assert own["rank"] == 1 + int(np.flatnonzero(order == ids[place + 1])[0])
        assert own["logprob"] == pytest.approx(rows[place, ids[place + 1]], abs=2e-5)
        assert len(found) == 3 + (own["rank"] > 3)
    assert listed[-1][str(ids[-1])]["decoded_token"] == " the"


def test_a_prompt_as_long_as_the_model_can_be_scored(ask, session):
    whole = [5 + place % 900 for place in range(session.max_seq_len)]
    found = ask(prompt=whole, echo=True, logprobs=1, max_tokens=0)
    assert len(found["choices"][0]["logprobs"]["tokens"]) == 2048
    assert (
        ask(400, prompt=whole, echo=True, logprobs=1, max_tokens=1)["error"]["code"]
        == "context_length_exceeded"
    )


def test_without_tokens_and_scores_a_prompt_is_only_taken(ask):
    assert ask(prompt=TEXT, max_tokens=0)["choices"][0]["text"] == ""
    assert ask(prompt=TEXT, max_tokens=0, echo=True)["choices"][0]["text"] == TEXT


def test_a_stream_without_scores_may_have_no_tokens(server):
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 0, "echo": True, "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert f'"text":"{TEXT}"' in answer.text
    assert '"finish_reason":"length"' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_others_go_on_while_a_long_prompt_is_scored(server_of, demo_bundle, monkeypatch):
    """A scored prompt shares the steps as any other does, and its logits are bounded."""
    from scheduling import drive, submit

    from glm4_runtime import scoring
    from glm4_runtime.sampling import SamplingParams
    from glm4_runtime.scheduler import Request, Scheduler

    monkeypatch.setattr(scoring, "_BLOCK_BYTES", 0)  # 16 rows a run
    with Session.open(demo_bundle) as session:
        widths = []
        real = session._run_decoder
        monkeypatch.setattr(
            session, "_run_decoder", lambda *given: widths.append(given[3].shape[1]) or real(*given)
        )
        scheduler = Scheduler(session, step_tokens=64)
        ids = tuple(5 + place % 900 for place in range(300))
        scored, _ = submit(scheduler, Request(ids, SamplingParams(max_tokens=1), prompt_logprobs=1))
        other, _ = submit(scheduler, Request((5, 6, 7), SamplingParams(max_tokens=4, ignore_eos=True)))
        drive(scheduler)
        assert len(other.tokens) == 4
        assert max(widths) <= 16
        rows = expected(session, list(ids))
        found = scored.started.scores.logprobs
        np.testing.assert_allclose(found, rows[np.arange(299), ids[1:]], atol=2e-5)
