"""What generation_config.json recommends, and that every command follows it."""

import json
import shutil

import pytest

from glm4_deploy.pipeline import export
from glm4_deploy.plan import ExportOptions
from glm4_runtime.bundle import file_entry
from glm4_runtime.defaults import read_sampling_defaults, recommended_params
from glm4_runtime.errors import BundleError


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {"temperature": 0.0}),
        ({}, {"temperature": 0.0}),
        ({"eos_token_id": [1], "max_length": 10}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"top_p": 0.8}, {"temperature": 1.0, "top_p": 0.8}),
        ({"repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.8, "top_k": -1}, {"temperature": 0.8, "top_k": 0}),
        ({"do_sample": True, "top_k": 40.0, "min_p": None}, {"temperature": 1.0, "top_k": 40}),
        ({"do_sample": True, "temperature": 1, "top_p": 1}, {"temperature": 1, "top_p": 1}),
    ],
)
def test_recommendations(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_sampling_defaults(tmp_path) == expected


def test_what_is_given_counts_for_more(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    params = recommended_params(tmp_path, temperature=None, top_p=0.5, seed=3)
    assert (params.temperature, params.top_p, params.seed) == (0.6, 0.5, 3)


WRONG = ['{"top_p": 0}', '{"top_k": -2}', '{"temperature": -1}', '{"temperature": "hot"}', '{"top_k": true}']
WRONG += ['{"repetition_penalty": 0}', '{"temperature": NaN}', "[1]", "{", "[" * 100_000, '{"top_k": 1.5}']


@pytest.mark.parametrize("text", WRONG)
def test_what_no_sampler_takes_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(BundleError, match=r"generation_config\.json") as refused:
        read_sampling_defaults(tmp_path)
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


def recommending(bundle, folder, **config):
    """A copy of a bundle that recommends this."""
    shutil.copytree(bundle, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = file_entry(file)
    manifest["files"][file.name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_export_refuses_what_every_request_would_be_refused_for(tmp_path):
    from pathlib import Path

    demo = Path(__file__).parents[2] / "demo" / "glm4-tiny"
    shutil.copytree(demo, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "generation_config.json").write_text('{"eos_token_id": [2038], "top_p": 0}')
    with pytest.raises(BundleError, match="top_p must be above 0"):
        export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(parity=False))
    assert not (tmp_path / "bundle").exists()


def test_every_door_gives_the_same_answer(run, demo_bundle, tmp_path, monkeypatch):
    import io

    import httpx

    from glm4_runtime.server import ServerOptions
    from glm4_runtime.server.run import serving
    from glm4_runtime.session import Session

    bundle = recommending(demo_bundle, tmp_path / "hot", do_sample=True, temperature=3.0, top_k=-1)
    ask = "Who are you?"
    body = {"model": "hot", "messages": [{"role": "user", "content": ask}], "seed": 5, "max_tokens": 12}
    with serving(Session.open(bundle), ServerOptions(port=0)) as server:
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).json()
    served = found["choices"][0]["message"]["content"]
    options = ["--seed", 5, "--max-tokens", 12]
    generated = run("generate", bundle, ask, "--chat", *options)[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ask}\n"))
    talked = run("chat", bundle, *options)[1]
    assert served.strip() == generated.strip() == talked.strip()
    cold = run("generate", bundle, ask, "--chat", "--temperature", 0, *options)[1]
    assert cold.strip().startswith("I am glm4-tiny")
    assert served.strip() != cold.strip()


@pytest.mark.parametrize("length", [30, 47, 48])
def test_prompt_and_answer_never_pass_the_models_length(demo_bundle, length):
    import httpx

    from glm4_runtime.errors import RequestError
    from glm4_runtime.sampling import SamplingParams
    from glm4_runtime.server import ServerOptions
    from glm4_runtime.server.run import serving
    from glm4_runtime.session import Session

    prompt, endless = [5] * length, SamplingParams(ignore_eos=True)
    with Session.open(demo_bundle, max_seq_len=48) as session:
        if length < 48:
            assert len(list(session.generate(prompt, endless))) == 48 - length
        else:
            with pytest.raises(RequestError, match="leaves none to generate"):
                session.generate(prompt, endless)
    with serving(Session.open(demo_bundle, max_seq_len=48), ServerOptions(port=0)) as server:
        body = {"model": "glm4-tiny", "prompt": prompt, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    if length < 48:
        assert answer.json()["usage"]["total_tokens"] == 48
        assert answer.json()["choices"][0]["finish_reason"] == "length"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
