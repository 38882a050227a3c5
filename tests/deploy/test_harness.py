"""lm-evaluation-harness: in process and over the server the same scores, item by item, as its own ``hf`` model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness_tasks import TASKS, write_tasks

from glm4_runtime import Session
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
NAMES = [f"local_{name}" for name in TASKS]
# With add_bos_token, the harness's client puts the prefix behind the end token that it takes for an empty context; and
# it cuts long texts into windows of one token less.
OVER_HTTP = [name for name in NAMES if name not in ("local_empty", "local_long")]


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Data sets are local files; their cache is the test's."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def evaluate(tasks):
    """A function that runs tasks on a model: the answers of each request, and the scores."""
    from lm_eval.tasks import TaskManager

    def run(model, names=NAMES, **options):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            **options,
        )
        answers = {name: [sample["resps"] for sample in found["samples"][name]] for name in names}
        scores = {
            name: {key: value for key, value in found["results"][name].items() if "," in key}
            for name in names
        }
        return answers, scores

    return run


@pytest.fixture(scope="module")
def of_transformers(evaluate):
    return evaluate("hf", model_args=f"pretrained={DEMO},dtype=float32,device=cpu", batch_size=1)


def require_equal(found, expected):
    for name, answers in expected[0].items():
        for one, other in zip(found[0][name], answers, strict=True):
            for mine, theirs in zip(one, other, strict=True):
                require_same(mine[0], theirs[0])
    for name, scores in expected[1].items():
        for key, value in scores.items():
            if isinstance(value, float):
                assert found[1][name][key] == pytest.approx(value, rel=1e-5)


def require_same(mine, theirs):
    if isinstance(theirs, str):
        assert mine == theirs
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, abs=2e-3, rel=1e-5)
    else:
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3)
        assert mine[1] == theirs[1]


def test_in_process(evaluate, demo_bundle, of_transformers):
    from glm4_deploy.harness.model import BundleModel

    require_equal(evaluate(BundleModel(str(demo_bundle))), of_transformers)


def test_over_the_server(evaluate, demo_bundle, of_transformers):
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        arguments = {
            "base_url": f"{server.url}/v1/completions",
            "model": "glm4-tiny",
            "tokenizer": str(DEMO),
            "tokenizer_backend": "huggingface",
            "max_length": 1024,
            "add_bos_token": True,  # [gMASK]<sop>, as the hf model adds by itself
        }
        found = evaluate("local-completions", OVER_HTTP, model_args=arguments)
        require_equal(found, tuple({name: part[name] for name in OVER_HTTP} for part in of_transformers))
        texts = evaluate(
            "local-completions", ["local_answers"], model_args=arguments | {"tokenized_requests": False}
        )
    assert texts[0]["local_answers"] == found[0]["local_answers"]


def test_chat(evaluate, demo_bundle):
    """[gMASK]<sop> once: ``hf`` has to be told, since the template writes it."""
    from glm4_deploy.harness.model import BundleModel

    options = {"names": ["local_answers", "local_choices"], "apply_chat_template": True}
    expected = evaluate(
        "hf", model_args=f"pretrained={DEMO},dtype=float32,device=cpu,add_bos_token=False", **options
    )
    require_equal(evaluate(BundleModel(str(demo_bundle)), **options), expected)
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        arguments = {"base_url": f"{server.url}/v1/chat/completions", "model": "glm4-tiny"}
        found = evaluate(
            "local-chat-completions", ["local_answers"], model_args=arguments, apply_chat_template=True
        )
    for one, other in zip(found[0]["local_answers"], expected[0]["local_answers"], strict=True):
        assert one[0][0].strip() == other[0][0].strip()


def test_the_command_line(tmp_path, tasks, demo_bundle):
    command = [sys.executable, "-m", "glm4_deploy.harness", "run", "--model", "glm4-deploy", "--model_args"]
    done = subprocess.run(
        [*command, f"bundle={demo_bundle}", "--include_path", str(tasks), "--tasks", "local_choices"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "local_choices" in done.stdout


def test_what_is_refused(tmp_path, demo_bundle):
    from glm4_deploy.harness.model import BundleModel

    with pytest.raises(RequestError, match="name the bundle"):
        BundleModel()
    with pytest.raises(BundleError, match="is not a bundle"):
        BundleModel(str(tmp_path))
    with pytest.raises(RequestError, match="has no dtype"):
        BundleModel(str(demo_bundle), dtype="float16")
    model = BundleModel(str(demo_bundle))
    with pytest.raises(RequestError, match="asks for num_beams"):
        model._asked("x", {"num_beams": 4})
    with pytest.raises(RequestError, match="prompt and answer have"):
        model._asked("x", {"max_gen_toks": 10**6})


def test_a_thought_is_left_out(demo_bundle):
    from glm4_deploy.harness.model import BundleModel

    model = BundleModel(str(demo_bundle))
    request, answer = model._asked("[gMASK]<sop><|assistant|>\n<think>", {"until": ["\n"], "max_gen_toks": 9})
    assert request.params.stop == ()
    assert answer("one\ntwo</think>\n\nanswer\nmore") == "answer"
    assert answer("never closed") == ""
    request, answer = model._asked("plain", {"until": ["\n"], "max_gen_toks": 9})
    assert request.params.stop == ("\n",)
    assert answer("one") == "one"
