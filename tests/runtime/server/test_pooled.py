"""Embeddings and classification: the bundles that have no scheduler."""

import base64

import httpx
import numpy as np
import openai
import pytest
from checkpoints import LABELS

from glm4_runtime.session import Session

TEXTS = ["Call me Ishmael.", "The raven"]


@pytest.fixture
def served(bundle_of, server_of):
    """A function: a task's server as a context, its session opened beside it for the truth."""
    return lambda task, **options: (server_of(bundle_of(task), **options), Session.open(bundle_of(task)))


def test_embeddings(served):
    serving, session = served("encoder")
    with serving as server, session, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        expected = [session.encode(session.tokenizer.encode(text)) for text in TEXTS]
        answer = client.embeddings.create(model="encoder", input=TEXTS)  # base64 is this client's default
        assert [one.index for one in answer.data] == [0, 1]
        for one, vector in zip(answer.data, expected, strict=True):
            np.testing.assert_allclose(one.embedding, vector, rtol=1e-6)
        floats = client.embeddings.create(model="encoder", input=TEXTS[0], encoding_format="float")
        np.testing.assert_allclose(floats.data[0].embedding, expected[0], rtol=1e-6)
        ids = session.tokenizer.encode(TEXTS[0])
        of_ids = client.embeddings.create(model="encoder", input=ids)
        np.testing.assert_allclose(of_ids.data[0].embedding, expected[0], rtol=1e-6)
        assert of_ids.usage.prompt_tokens == of_ids.usage.total_tokens == len(ids)
        packed = httpx.post(
            f"{server.url}/v1/embeddings",
            json={"model": "encoder", "input": [TEXTS[0]], "encoding_format": "base64"},
        ).json()["data"][0]["embedding"]
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), expected[0])


def test_a_text_has_a_label(served):
    serving, session = served("sequence-classification")
    with serving as server, session:
        body = {"model": "sequence-classification", "input": TEXTS}
        answer = httpx.post(f"{server.url}/v1/classify", json=body).json()
        for one, text in zip(answer["data"], TEXTS, strict=True):
            logits = session.classify(session.tokenizer.encode(text)).astype(np.float64)
            shares = np.exp(logits) / np.exp(logits).sum()
            assert list(one["scores"]) == list(LABELS.values())
            np.testing.assert_allclose(list(one["scores"].values()), shares, rtol=1e-6)
            assert one["label"] == list(LABELS.values())[shares.argmax()]


def test_every_token_has_a_label(served):
    serving, session = served("token-classification")
    with serving as server, session:
        body = {"model": "token-classification", "input": TEXTS[0]}
        (one,) = httpx.post(f"{server.url}/v1/classify", json=body).json()["data"]
        ids = session.tokenizer.encode(TEXTS[0])
        assert [token["id"] for token in one["tokens"]] == ids
        labels = session.classify(ids).argmax(axis=1)
        assert [token["label"] for token in one["tokens"]] == [
            list(LABELS.values())[label] for label in labels
        ]


def test_they_do_nothing_else(served):
    serving, session = served("encoder")
    with serving as server, session:
        for path, more in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                           ("/v1/completions", {"prompt": "x"}), ("/v1/classify", {"input": "x"})):  # fmt: skip
            refused = httpx.post(server.url + path, json={"model": "encoder"} | more)
            assert refused.status_code == 400
            assert "exported for encoder" in refused.json()["error"]["message"]
        many = httpx.post(f"{server.url}/v1/embeddings", json={"model": "encoder", "input": ["x"] * 257})
        assert "takes 256" in many.json()["error"]["message"]
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_a_late_vector_is_not_waited_for(served):
    serving, session = served("encoder", request_timeout=1e-6)
    with serving as server, session:
        late = httpx.post(f"{server.url}/v1/embeddings", json={"model": "encoder", "input": "x"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "request_timeout"


def test_a_vector_that_is_not_finite_is_an_error(served, monkeypatch):
    serving, session = served("encoder")
    monkeypatch.setattr(
        type(session), "_run_encoder", lambda _self, ids: np.full((1, ids.shape[1], 8), np.nan, np.float32)
    )
    with serving as server, session:
        failed = httpx.post(f"{server.url}/v1/embeddings", json={"model": "encoder", "input": "x"})
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
