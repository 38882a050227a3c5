"""A conversation in one slot: what it says, what it keeps, and what it forgets."""

import pytest

from glm4_runtime.dialogue import Dialogue
from glm4_runtime.errors import RequestError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.session import Session

TURNS = ("Who are you?", "And what can you do?", "Hello")


@pytest.fixture(scope="module")
def session(demo_bundle):
    with Session.open(demo_bundle, max_batch_size=1) as session:
        yield session


@pytest.fixture
def dialogue(session):
    dialogue = Dialogue(session, SamplingParams(max_tokens=60))
    yield dialogue
    dialogue.close()


def said(dialogue, text):
    return "".join(piece.answer for piece in dialogue.say(text))


def test_turns_are_those_of_a_fresh_cache(dialogue, session):
    answers, reused = [], []
    for turn in TURNS:
        answers.append(said(dialogue, turn))
        reused.append((dialogue.cached_tokens, dialogue.prompt_tokens))
    dialogue.close()
    for count in range(len(TURNS)):
        fresh = Dialogue(session, SamplingParams(max_tokens=60))
        for turn, answer in zip(TURNS[:count], answers[:count], strict=True):
            fresh.messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        assert said(fresh, TURNS[count]) == answers[count]
        fresh.close()
    assert reused[0] == (0, 9)
    assert all(prompt - 12 < cached < prompt for cached, prompt in reused[1:])


def test_forgetting_keeps_the_system_message(session):
    dialogue = Dialogue(session, SamplingParams(max_tokens=5), system="Be brief.")
    said(dialogue, "Hello")
    assert [message["role"] for message in dialogue.messages] == ["system", "user", "assistant"]
    dialogue.forget()
    assert dialogue.messages == [{"role": "system", "content": "Be brief."}]
    dialogue.close()


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(dialogue):
    pieces = dialogue.say("Who are you?")
    heard = "".join(next(pieces).answer for _ in range(6))
    pieces.close()
    assert dialogue.messages[-1] == {"role": "assistant", "content": heard}
    assert said(dialogue, "Hello").startswith("Hello")


def test_a_turn_that_cannot_be_said_is_forgotten(dialogue):
    said(dialogue, "Hello")
    before = list(dialogue.messages)
    with pytest.raises(RequestError, match="leaves none"):
        said(dialogue, "word " * 3000)
    assert dialogue.messages == before
    assert said(dialogue, "Who are you?").startswith("I am glm4-tiny")


def test_a_turn_that_is_all_thought_stays_with_an_empty_answer(dialogue, monkeypatch):
    monkeypatch.setattr("glm4_runtime.dialogue.begins_inside", lambda _prompt: True)
    pieces = list(dialogue.say("Who are you?"))
    assert "".join(piece.thought for piece in pieces).startswith("I am glm4-tiny")
    assert dialogue.messages == [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": ""},
    ]
