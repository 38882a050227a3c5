"""glm4-deploy triton: a model repository whose model answers as the bundle does."""

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import fake_triton
import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from google.protobuf import json_format, text_format

from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.triton_repository import write_repository
from glm4_runtime import BundleError, SamplingParams, Session
from glm4_runtime.tokenizer import Tokenizer
from glm4_runtime.triton_server.model import PARAMETERS

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
PROMPT = "And it came to pass"


def parsed(folder):
    """``config.pbtxt`` as Triton reads it: by the message of NVIDIA's client."""
    place = Path(importlib.util.find_spec("tritonclient").origin).parent / "grpc" / "model_config_pb2.py"
    name = "tritonclient_model_config"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, place)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), sys.modules[name].ModelConfig())
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


@pytest.fixture
def load(monkeypatch):
    """Load a model of a repository as Triton does: model.py and config.pbtxt."""
    fake_triton.install(monkeypatch)
    loaded = []

    def start(folder, kind="CPU"):
        spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(parsed(folder)),
                "model_repository": str(folder),
                "model_version": "1",
                "model_instance_kind": kind,
                "model_instance_device_id": "0",
            }
        )
        loaded.append(model)
        return model

    yield start
    for model in loaded:
        model.finalize()


@pytest.fixture(scope="module")
def repository(demo_bundle, tmp_path_factory):
    parameters = {"threads": "1", "max_batch_size": "4", "max_queue": "6"}
    return write_repository(demo_bundle, tmp_path_factory.mktemp("triton"), "demo", parameters)


@pytest.fixture
def model(repository, load):
    return load(repository)


@pytest.fixture(scope="module")
def expected(demo_bundle):
    with Session.open(demo_bundle, threads=1) as session:
        ids = session.tokenizer.encode(PROMPT)
        return "".join(token.text for token in session.generate(ids, SamplingParams(max_tokens=20)))


def asking(sampling=None, **inputs):
    values = {name: [value.encode() if isinstance(value, str) else value] for name, value in inputs.items()}
    if sampling is not None:
        values["sampling_parameters"] = [json.dumps(sampling).encode()]
    return fake_triton.Request(values)


GREEDY = {"max_tokens": 20, "temperature": 0}


def text_of(responses):
    return "".join(each.values["text_output"][0].decode() for each in responses)


def test_the_config_is_what_triton_reads(repository):
    config = parsed(repository)
    assert config["backend"] == "python"
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert [each["name"] for each in config["output"]] == [
        "text_output", "finish_reason", "num_input_tokens", "num_output_tokens",
    ]  # fmt: skip
    assert all(each["optional"] for each in config["input"])
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert config["parameters"]["threads"] == {"string_value": "1"}
    assert set(config["parameters"]) <= set(PARAMETERS)


def test_a_whole_answer_and_a_stream_are_the_sessions(model, expected):
    whole, stream = asking(GREEDY, text_input=PROMPT), asking(GREEDY, text_input=PROMPT, stream=True)
    assert model.execute([whole, stream]) is None
    (answer,), parts = whole.all_responses(), stream.all_responses()
    assert text_of([answer]) == text_of(parts) == expected
    assert len(parts) > 10
    assert answer.values["finish_reason"][0] == parts[-1].values["finish_reason"][0] == b"length"
    assert answer.values["num_output_tokens"][0] == parts[-1].values["num_output_tokens"][0] == 20
    assert answer.values["num_input_tokens"][0] == len(Tokenizer.from_folder(DEMO).encode(PROMPT))


def test_requests_of_the_vllm_backends_clients(model, expected):
    """Numbers as strings, parameters of the HTTP route, the prompt in the answer, chosen outputs."""
    request = asking(
        {"max_tokens": "20", "temperature": "0"}, text_input=PROMPT, exclude_input_in_output=False
    )
    route = fake_triton.Request({"text_input": [PROMPT.encode()]}, json.dumps(GREEDY), ["text_output"])
    model.execute([request, route])
    assert text_of(request.all_responses()) == PROMPT + expected
    (answer,) = route.all_responses()
    assert text_of([answer]) == expected
    assert list(answer.values) == ["text_output"]


def test_a_conversation_is_rendered_and_ends_at_the_turn(model):
    request = asking({"temperature": 0}, messages=json.dumps([{"role": "user", "content": "Who are you?"}]))
    model.execute([request])
    (answer,) = request.all_responses()
    assert answer.values["finish_reason"][0] == b"stop"
    assert "GLM" in text_of([answer]) or len(text_of([answer])) > 10


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (asking(), "either text_input or messages"),
        (asking(text_input="a", messages="[]"), "either text_input or messages"),
        (asking(messages="[]"), "messages must be a list such as"),
        (asking(messages='[{"role": "tool", "content": "a"}]'), r"messages\[0\] must have a role"),
        (asking(messages="[" * 100_000), "messages is not JSON"),
        (asking(text_input="a", stream=True, exclude_input_in_output=False), "true in a stream"),
        (asking({"best_of": 2}, text_input="a"), '"best_of" is no sampling parameter; known are temperature'),
        (asking({"temperature": "hot"}, text_input="a"), "temperature must be a finite number"),
        (asking([1], text_input="a"), "sampling_parameters must be a JSON object"),
        (fake_triton.Request({"text_input": [b"\xff"]}), "text_input is not UTF-8"),
        (fake_triton.Request({"text_input": [b"a", b"b"]}), "text_input holds 2 values"),
        (asking(text_input="word " * 20_000), "there is room for"),
    ],
)  # fmt: skip
def test_a_bad_request_is_an_error_of_its_own(model, request_, words):
    good = asking(GREEDY, text_input=PROMPT)
    model.execute([request_, good])
    (answer,) = request_.all_responses()
    assert answer.error.code == fake_triton.TritonError.INVALID_ARG
    assert len(str(answer.error)) <= 500
    with pytest.raises(fake_triton.TritonError, match=words):
        raise answer.error
    assert good.all_responses()[0].error is None


def test_a_crowd_is_served_and_more_than_the_queue_holds_is_refused(model, expected):
    """4 slots and a queue of 6: of 40 requests at once at least 6 are answered, and each has an end."""
    requests = [asking(GREEDY, text_input=PROMPT, stream=bool(number % 2)) for number in range(40)]
    threads = [threading.Thread(target=model.execute, args=(requests[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [request.all_responses() for request in requests]
    served = [answer for answer in answers if answer[0].error is None]
    assert len(served) >= 6
    assert all(text_of(answer) == expected for answer in served)
    codes = {answer[0].error.code for answer in answers if answer[0].error is not None}
    assert codes <= {fake_triton.TritonError.UNAVAILABLE}


def test_a_client_that_leaves_frees_its_slot(model, expected):
    leaving = [asking({"ignore_eos": True}, text_input=PROMPT, stream=True) for _ in range(4)]
    model.execute(leaving)
    for request in leaving:
        request.sender.responses.get(timeout=60)
        request.sender.cancelled = True
    after = asking(GREEDY, text_input=PROMPT)
    began = time.monotonic()
    model.execute([after])
    assert text_of(after.all_responses()) == expected
    assert time.monotonic() - began < 30
    assert all(request.all_responses() is not None for request in leaving)


def exported(folder, task):
    """A bundle of a random model for ``task``, with the demo's tokenizer."""
    checkpoint = write_checkpoint(folder / task, tiny_config(vocab_size=2048), task=task)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((DEMO / name).read_bytes())
    export(checkpoint, folder / f"{task}-bundle", ExportOptions(task=task, precision="fp32", parity=False))
    return folder / f"{task}-bundle"


def test_a_client_that_leaves_the_queue_is_dropped_while_others_are_answered(model, expected):
    """4 slots are taken, and answers go on all the time."""
    busy = [asking({"ignore_eos": True}, text_input=PROMPT, stream=True) for _ in range(4)]
    waiting = asking(GREEDY, text_input=PROMPT)
    model.execute([*busy, waiting])
    busy[0].sender.responses.get(timeout=60)
    waiting.sender.cancelled = True
    assert waiting.sender.responses.get(timeout=10) == (None, fake_triton.FINAL)
    assert not any(request.sender.closed for request in busy)
    for request in busy:
        request.sender.cancelled = True
    assert all(request.all_responses() is not None for request in busy)


def test_a_model_without_a_queue_takes_no_length_of_it(tmp_path, load, run):
    bundle = exported(tmp_path, "encoder")
    code, _, error = run("triton", bundle, tmp_path / "repository", "--max-queue", 5)
    assert code == 1
    assert "a model for encoder has no queue; leave out --max-queue" in error
    folder = write_repository(bundle, tmp_path / "repository", "encoder")
    with (folder / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "max_queue" value { string_value: "5" } }\n')
    with pytest.raises(BundleError, match="a model for encoder has no queue"):
        load(folder)


@pytest.mark.parametrize(
    ("task", "output", "sizes"),
    [("encoder", "embedding", (2, 64)), ("sequence-classification", "logits", (2, 3))],
)
def test_classifiers_and_encoders_answer_at_once(tmp_path, load, task, output, sizes):
    model = load(write_repository(exported(tmp_path, task), tmp_path / "repository"))
    (answer,) = model.execute([fake_triton.Request({"text_input": [b"a", b"b"]})])
    assert answer.values[output].shape == sizes
    (empty,) = model.execute([fake_triton.Request({})])
    assert "send at least one string" in str(empty.error)


def test_the_command_and_its_refusals(demo_bundle, tmp_path, run):
    code, out, _ = run("triton", demo_bundle, tmp_path / "models", "--name", "glm", "--threads", 2)
    assert code == 0
    assert f"tritonserver --model-repository {tmp_path / 'models'}" in out
    folder = tmp_path / "models" / "glm"
    assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt"]
    weights = Path("1", "bundle", "model.onnx.data")
    assert (folder / weights).stat().st_ino == (demo_bundle / weights.name).stat().st_ino  # no second copy
    assert parsed(folder)["parameters"] == {"threads": {"string_value": "2"}}
    for arguments, words in (
        ((demo_bundle, tmp_path / "models", "--name", "glm"), "exists; remove it"),
        ((demo_bundle, tmp_path / "models", "--name", "a/b"), "cannot be the name of a model"),
        ((demo_bundle, tmp_path / "models", "--max-batch-size", 99), "max_batch_size is 99"),
        ((DEMO, tmp_path / "models"), "is a checkpoint"),
        ((demo_bundle, demo_bundle), "choose another place"),
        ((demo_bundle, demo_bundle / "models"), "choose another place"),
        ((demo_bundle, DEMO), "choose another place"),
        ((demo_bundle, "x" * 300), "cannot be used: File name too long"),
    ):
        code, _, error = run("triton", *arguments)
        assert code == 1
        assert words in error
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["glm"]


def test_a_wrong_parameter_stops_the_load(repository, load, tmp_path):
    with pytest.raises(Exception, match="known are threads, max_seq_len"):
        load(_with_parameter(repository, tmp_path / "a", "speed", "1"))
    with pytest.raises(Exception, match=r"threads of config\.pbtxt must be a whole number, not 'many'"):
        load(_with_parameter(repository, tmp_path / "b", "threads", "many"))


def _with_parameter(repository, folder, key, value):
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_bytes((repository / "1" / "model.py").read_bytes())
    lines = [
        line for line in (repository / "config.pbtxt").read_text().splitlines() if "parameters" not in line
    ]
    lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    (folder / "config.pbtxt").write_text("\n".join(lines))
    return folder


def test_token_classification_answers_for_one_text(tmp_path, load):
    bundle = exported(tmp_path, "token-classification")
    model = load(write_repository(bundle, tmp_path / "repository"))
    (answer,) = model.execute([fake_triton.Request({"text_input": [b"a b"]})])
    with Session.open(bundle) as session:
        wanted = session.classify(session.tokenizer.encode("a b"))
    np.testing.assert_allclose(answer.values["logits"], wanted, atol=1e-6)
    (two,) = model.execute([fake_triton.Request({"text_input": [b"a", b"b"]})])
    assert "send one, since each has its own length" in str(two.error)
