"""The option --draft: the same tokens as without, and a refusal of models whose tokens differ."""

import json
import shutil

import httpx
import pytest
from bundles import rehash
from cpu_operators import needs_cpu_operators

from glm4_runtime import SamplingParams, Session
from glm4_runtime.dialogue import Dialogue
from glm4_runtime.draft_model import open_draft
from glm4_runtime.drafted import DraftedGeneration
from glm4_runtime.errors import BundleError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving

pytestmark = needs_cpu_operators
PROMPT = "And it came to pass, that the king"


@pytest.mark.parametrize(
    "options", [(), ("--temperature", "0.9", "--seed", "3", "--frequency-penalty", "0.2")]
)
def test_generate_gives_the_tokens_that_it_gives_without(run, demo_cpu, demo_draft, options):
    command = ["generate", demo_cpu, PROMPT, "--max-tokens", "60", "--threads", "1", "--json", *options]
    _, plain, _ = run(*command)
    code, out, _ = run(*command, "--draft", demo_draft)
    assert code == 0
    plain, drafted = json.loads(plain), json.loads(out)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["text"] == plain["text"]
    assert drafted["drafted_tokens"] >= drafted["accepted_tokens"]
    assert "drafted_tokens" not in plain


def test_turns_of_a_chat_are_those_without_and_keep_their_prefix(demo_cpu, demo_draft):
    params = SamplingParams(max_tokens=30)

    def talk(session, drafted):
        dialogue = Dialogue(session, params, drafted=drafted)
        return [
            ("".join(piece.answer for piece in dialogue.say(text)), dialogue.cached_tokens > 0)
            for text in ("Who are you?", "What is the weather in Paris?")
        ]

    with Session.open(demo_cpu, threads=1, max_batch_size=1) as session:
        expected = talk(session, None)
    with (
        Session.open(demo_cpu, threads=1, max_batch_size=1) as session,
        DraftedGeneration(session, open_draft(session, demo_draft)) as drafted,
    ):
        assert talk(session, drafted) == expected
    assert expected[1][1]


def test_an_answer_that_is_left_frees_its_slot(demo_cpu, demo_draft):
    with (
        Session.open(demo_cpu, threads=1, max_batch_size=1) as session,
        DraftedGeneration(session, open_draft(session, demo_draft)) as drafted,
    ):
        ids = session.tokenizer.encode(PROMPT)
        first = drafted.generate(ids, SamplingParams(max_tokens=500, ignore_eos=True))
        next(first)
        first.close()
        tokens = list(drafted.generate(ids, SamplingParams(max_tokens=5, ignore_eos=True)))
        assert len(tokens) == 5


def test_serve_gives_the_answers_that_it_gives_without(demo_cpu, demo_draft):
    def answers(draft):
        options = ServerOptions(port=0, draft=draft)
        with serving(Session.open(demo_cpu, threads=1), options) as server:
            body = {
                "model": demo_cpu.name,
                "prompt": PROMPT,
                "max_tokens": 40,
                "n": 3,
                "temperature": 0.8,
                "seed": 4,
                "logprobs": 2,
            }
            reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
        assert reply.status_code == 200, reply.text
        return [(one["text"], one["logprobs"]) for one in reply.json()["choices"]], metrics

    plain, _ = answers(None)
    drafted, metrics = answers(demo_draft)
    assert drafted == plain
    assert "glm4_drafted_tokens_total" in metrics


def edited_tokenizer(folder, source, edit):
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    edit(tokenizer)
    path.write_text(json.dumps(tokenizer), "utf-8")
    return rehash(folder)


def test_tokens_may_be_proved_id_for_id(tmp_path, demo_cpu, demo_draft):
    """A file with other bytes, here without its indentation and with another pre-tokenizer."""
    folder = edited_tokenizer(tmp_path / "draft", demo_draft, lambda found: found.update(normalizer=None))
    with Session.open(demo_cpu, threads=1) as session, open_draft(session, folder) as draft:
        assert draft.max_batch_size == session.max_batch_size
        assert draft.threads == 1


def test_other_tokens_are_refused_with_the_first_difference(tmp_path, run, demo_cpu, demo_draft):
    def swap(found):
        vocab = found["model"]["vocab"]
        one, other = (next(token for token, place in vocab.items() if place == i) for i in (300, 301))
        vocab[one], vocab[other] = 301, 300

    folder = edited_tokenizer(tmp_path / "draft", demo_draft, swap)
    code, _, said = run("generate", demo_cpu, PROMPT, "--draft", folder)
    assert code != 0
    assert "their tokens differ: token 300 is" in said
    assert said.count("\n") == 1


def test_another_size_of_the_vocabulary_is_refused(tiny_bundles, demo_draft):
    with (
        Session.open(tiny_bundles["ort"], threads=1) as session,
        pytest.raises(BundleError, match="logits of a position"),
    ):
        open_draft(session, demo_draft)


def test_a_bundle_without_a_tokenizer_is_refused(tmp_path, demo_cpu, demo_draft):
    folder = tmp_path / "draft"
    shutil.copytree(demo_draft, folder)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    del manifest["files"]["tokenizer.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    (folder / "tokenizer.json").unlink()
    with (
        Session.open(demo_cpu, threads=1) as session,
        pytest.raises(BundleError, match=r"no tokenizer\.json"),
    ):
        open_draft(session, folder)


@pytest.mark.parametrize("more", [("--replicas", "2"), ("--stages-on", "ray")])
def test_serve_refuses_a_draft_model_beside_replicas(run, demo_cpu, demo_draft, more):
    code, _, said = run("serve", demo_cpu, "--draft", demo_draft, *more)
    assert code == 2
    assert "--draft serves from one process" in said


def test_a_draft_that_is_no_bundle_is_refused(run, tmp_path, demo_cpu):
    code, _, said = run("generate", demo_cpu, PROMPT, "--draft", tmp_path)
    assert code != 0
    assert str(tmp_path) in said
