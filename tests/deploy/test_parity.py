"""Parity: the numbers are those of the whole models, and a wrong weight does not pass."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from bundles import rehash
from checkpoints import random_tensors, tiny_config, write_checkpoint
from safetensors.torch import save_file

from glm4_deploy import pipeline
from glm4_deploy.parity import (
    GREEDY_TOKENS,
    LIMITS,
    Parity,
    check_parity,
    limits_of,
    measure_parity,
    sample_sequences,
)
from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters import streamed
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.streamed import reference_outputs
from glm4_runtime import Session
from glm4_runtime.bundle import file_entry, read_manifest
from glm4_runtime.errors import BundleError, GateError, UnavailableError


@pytest.fixture(scope="module")
def sure_checkpoint(tmp_path_factory):
    """A random model that is sure of its next token, as a trained one is: its head repeats the embedding."""
    folder = tmp_path_factory.mktemp("sure") / "checkpoint"
    config = tiny_config()
    write_checkpoint(folder, config)
    tensors = random_tensors(Glm4Config.from_dict(config), "causal-lm", torch.float32, seed=5)
    tensors["lm_head.weight"] = 0.1 * tensors["model.embed_tokens.weight"]
    for name in tensors:
        if "post_self_attn" in name or "post_mlp" in name:
            tensors[name] *= 0.3
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def sure_bundles(tmp_path_factory, sure_checkpoint):
    folder = tmp_path_factory.mktemp("sure bundles")
    return {
        precision: export(sure_checkpoint, folder / precision, ExportOptions("ort", precision)).bundle
        for precision in FLOATS
    }


def measured(bundle, checkpoint, **options):
    with Checkpoint.load(checkpoint, **options) as source:
        return measure_parity(bundle, read_manifest(bundle), source)


def corrupted(bundle, folder, name, index):
    """A copy of a bundle in which one weight's highest exponent bit is flipped."""
    shutil.copytree(bundle, folder)
    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        if tensor.name == name:
            place = {entry.key: entry.value for entry in tensor.external_data}
            size = {onnx.TensorProto.FLOAT: 4}.get(tensor.data_type, 2)
            with (folder / "model.onnx.data").open("r+b") as file:
                at = int(place["offset"]) + index * size + size - 1
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 0x40]))
            return rehash(folder)
    raise AssertionError(f"no weight {name}")


DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
FLOATS = ("fp32", "fp16", "bf16")


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 77),
        ("model.layers.1.mlp.down_proj.weight", 1000),
        ("model.layers.1.post_mlp_layernorm.weight", 5),
        ("model.norm.weight", 63),
        ("lm_head.weight", 300 * 64 + 1),
    ],
)
def test_one_wrong_byte_fails_the_gate(tmp_path, sure_checkpoint, sure_bundles, precision, name, index):
    bundle = corrupted(sure_bundles[precision], tmp_path / "bundle", name, index)
    manifest = read_manifest(bundle)
    with np.errstate(all="ignore"), pytest.raises(GateError, match=f"in {precision}: ") as caught:
        check_parity(measured(bundle, sure_checkpoint), manifest)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", FLOATS)
def test_the_right_bytes_pass_with_room(sure_checkpoint, sure_bundles, precision):
    bundle = sure_bundles[precision]
    result = measured(bundle, sure_checkpoint)
    check_parity(result, read_manifest(bundle))
    assert result.positions == 225
    assert result.top1_agreement == 1.0
    assert result.arithmetic == ("float32" if precision == "bf16" else "as exported")
    ceiling = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 0.2}[precision]
    assert 0 < result.max_abs_error < ceiling
    if precision != "bf16":  # no provider here runs it, so there is nothing to generate with
        assert result.greedy_agreement == result.greedy_tokens == GREEDY_TOKENS
    else:
        assert result.greedy_tokens is None


def test_other_weights_fail_the_gate_and_leave_no_bundle(tmp_path, sure_checkpoint, monkeypatch):
    """The export itself stops: what it wrote is not published."""
    real = pipeline._write_model

    def damage(plan, source, model, prepared, folder, progress):
        written, parts = real(plan, source, model, prepared, folder, progress)
        data = folder / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:-4096] + bytes(4096))
        with data.open("r+b") as file:
            file.seek(40 * 64 * 4)
            file.write(np.full(64 * 200, 3, np.float32).tobytes())
        return replace(written, files=(file_entry(data),)), parts

    monkeypatch.setattr(pipeline, "_write_model", damage)
    with pytest.raises(GateError, match="max abs error"):
        export(sure_checkpoint, tmp_path / "bundle", ExportOptions("ort", "fp32"))
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_are_those_of_the_whole_models(sure_checkpoint, sure_bundles):
    """transformers on one side, a session on the other, nothing of the parity module between them."""
    bundle = sure_bundles["fp16"]
    result = measured(bundle, sure_checkpoint)
    sequences = sample_sequences(bundle, read_manifest(bundle))
    model = transformers.AutoModelForCausalLM.from_pretrained(sure_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = np.concatenate([model(torch.tensor([ids])).logits[0].numpy() for ids in sequences])
    with Session.open(bundle) as session:
        ours = np.concatenate([np.concatenate(list(session.score(ids))) for ids in sequences])
    theirs, ours = theirs.astype(np.float64), ours.astype(np.float64)
    errors = np.abs(theirs - ours)
    log_p, log_q = (torch.tensor(x).log_softmax(-1) for x in (theirs, ours))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean().item()
    assert result.positions == len(theirs)
    assert result.max_abs_error == pytest.approx(errors.max(), rel=0.3)
    assert result.mean_abs_error == pytest.approx(errors.mean(), rel=0.1)
    relative = np.sqrt((errors**2).sum() / (theirs**2).sum())
    assert result.relative_error == pytest.approx(relative, rel=0.1)
    assert result.mean_kl == pytest.approx(kl, rel=0.2)
    assert result.top1_agreement == pytest.approx((theirs.argmax(-1) == ours.argmax(-1)).mean(), abs=0.01)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("causal-lm", transformers.AutoModelForCausalLM),
        ("sequence-classification", transformers.AutoModelForSequenceClassification),
        ("token-classification", transformers.AutoModelForTokenClassification),
        ("encoder", transformers.AutoModel),
    ],
)
def test_the_streamed_reference_is_transformers(tmp_path, task, kind, monkeypatch):
    monkeypatch.setattr(streamed, "LAYER_READ_BYTES", 7 * 64 * 4)  # seven rows at a time
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(), task=task, dtype="bfloat16")
    sequences = [[5, 6, 7, 300, 5], [9], list(range(10, 50))]
    with Checkpoint.load(folder) as checkpoint:
        outputs = reference_outputs(checkpoint, sequences)
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, output in zip(sequences, outputs, strict=True):
        with torch.inference_mode():
            found = model(torch.tensor([ids]))
        wanted = (found.last_hidden_state if task == "encoder" else found.logits)[0].numpy()
        np.testing.assert_allclose(output, wanted.reshape(output.shape), atol=2e-5)


def test_one_layer_of_the_reference_is_in_memory_at_a_time(tiny_checkpoint, monkeypatch):
    reads, real = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: reads.append(name) or real(self, name))
    with Checkpoint.load(tiny_checkpoint) as checkpoint:
        reference_outputs(checkpoint, [[5, 6]])
        layers = [int(name.split(".")[2]) for name in reads if ".layers." in name]
        assert layers == sorted(layers) == [0] * 13 + [1] * 13
        assert sorted(reads) == sorted(
            set(checkpoint.tensors) - {"model.embed_tokens.weight", "lm_head.weight"}
        )


GOOD = Parity(
    positions=225, max_abs_error=1e-5, mean_abs_error=1e-6, relative_error=1e-6, mean_kl=1e-9, top1_agreement=1.0,
    greedy_tokens=32, greedy_agreement=32, greedy_gap=None, arithmetic="as exported",
)  # fmt: skip
NAN = float("nan")


class _Made:
    def __init__(self, precision):
        self.precision, self.kv_cache = precision, "float32"


@pytest.mark.parametrize(
    ("precision", "changes", "message"),
    [
        ("fp32", dict(max_abs_error=2.1e-4), "max abs error is 0.00021, limit 0.0002"),
        ("fp32", dict(max_abs_error=NAN), "max abs error is nan"),
        ("fp32", dict(top1_agreement=0.99), "top-1 agreement is 0.99, limit 1"),
        ("fp32", dict(greedy_agreement=5, greedy_gap=0.01), "logit gap at the first differing token is 0.01"),
        ("fp16", dict(mean_kl=1.1e-4), "mean KL is 0.00011, limit 0.0001"),
        ("fp16", dict(mean_kl=NAN), "mean KL is nan"),
        ("fp16", dict(top1_agreement=0.99), "top-1 agreement is 0.99, limit 0.995"),
        ("bf16", dict(mean_kl=1.1e-3), "mean KL"),
        ("bf16", dict(mean_kl=float("inf"), top1_agreement=0.5), "mean KL is inf.*; top-1 agreement is 0.5"),
        ("fp16", dict(mean_kl=None, top1_agreement=None, relative_error=0.011), "relative error is 0.011"),
        ("fp32", dict(mean_kl=None, top1_agreement=None, relative_error=NAN), "relative error is nan"),
    ],
)
def test_limits(precision, changes, message):
    check_parity(GOOD, _Made(precision))
    with pytest.raises(GateError, match=message):
        check_parity(Parity(**GOOD.as_dict() | changes), _Made(precision))


def test_a_near_tie_may_change_places():
    check_parity(Parity(**GOOD.as_dict() | dict(greedy_agreement=5, greedy_gap=3e-4)), _Made("fp32"))


def test_ties_count_as_agreement():
    two_others = dict(top1_agreement=223 / 225)
    with pytest.raises(GateError, match=r"top-1 agreement is 0\.991"):
        check_parity(Parity(**GOOD.as_dict() | two_others), _Made("fp16"))
    check_parity(Parity(**GOOD.as_dict() | two_others | dict(near_ties=1)), _Made("fp16"))


def test_the_report_says_what_was_measured_or_that_nothing_was(tmp_path, sure_checkpoint, sure_bundles):
    report = json.loads((sure_bundles["fp32"] / "report.json").read_text())
    assert report["parity"] == measured(sure_bundles["fp32"], sure_checkpoint).as_dict()
    assert set(report["seconds"]) == {"trace", "weights", "parity"}
    assert report["peak_rss_bytes"] > 10**8
    export(sure_checkpoint, tmp_path / "bundle", ExportOptions("ort", "fp32", parity=False))
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert report["parity"] == "not measured (--no-parity)"
    assert set(report["seconds"]) == {"trace", "weights"}


def test_a_short_limit_shortens_the_sequences(tmp_path, sure_checkpoint):
    options = ExportOptions("ort", "fp32", max_seq_len=1)
    result = export(sure_checkpoint, tmp_path / "bundle", options).parity
    assert result.positions == 5
    assert result.greedy_tokens is None


@pytest.mark.parametrize(
    ("activations", "step"), [("float16", 2.0**-10), ("bfloat16", 2.0**-7), ("float32", 2.0**-23)]
)
def test_a_tie_is_what_the_type_cannot_tell_apart(activations, step):
    from glm4_deploy.metrics import near_ties

    reference = np.array(
        [[4.0, 4.0 - 8.0 * step, 0.0], [4.0, 4.0 - 12.0 * step, 0.0], [4.0, 0.0, 0.0]], np.float32
    )
    bundle = np.array([[0.0, 1.0, 0.0]] * 3, np.float32)  # prefers the second token at every position
    assert near_ties(reference, bundle, activations).tolist() == [True, False, False]
    assert not near_ties(reference, reference, activations).any()


def test_an_int8_cache_has_limits_of_its_own(tmp_path, sure_checkpoint):
    """It passes as exported; with steps so small that most values saturate, it does not."""
    bundle = export(sure_checkpoint, tmp_path / "b", ExportOptions("ort", "fp32", kv_cache="int8")).bundle
    manifest = read_manifest(bundle)
    assert limits_of(manifest).max_abs is None
    assert limits_of(manifest).mean_kl < LIMITS["int8"].mean_kl
    assert limits_of(replace(manifest, kv_cache="float32")) == LIMITS["fp32"]
    assert 1e-7 < measured(bundle, sure_checkpoint).mean_kl < 1e-4
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    scales = [t for t in model.graph.initializer if t.name.endswith(("key_scale", "value_scale"))]
    assert len(scales) == 4
    for tensor in scales:
        tensor.raw_data = (onnx.numpy_helper.to_array(tensor) / 16).tobytes()
    onnx.save(model, bundle / "model.onnx")
    rehash(bundle)
    with pytest.raises(GateError, match="in fp32 with a KV cache in int8: mean KL is"):
        check_parity(measured(bundle, sure_checkpoint), manifest)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_wrong_matrix_fails_the_gate_of_a_quantized_bundle(tmp_path, precision):
    """Parity of the demo passes; with one matrix's rows in another order it does not."""
    export(DEMO, tmp_path / "right", ExportOptions("ort", precision))
    bundle = shutil.copytree(tmp_path / "right", tmp_path / "bundle")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "model.layers.1.mlp.down_proj.weight.codes")
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(place["offset"])
        rows = np.frombuffer(file.read(place["length"]), np.uint8).reshape(tensor.dims[0], -1)
        file.seek(place["offset"])
        file.write(np.roll(rows, 1, axis=0).tobytes())
    manifest = read_manifest(rehash(bundle))
    with Checkpoint.load(DEMO) as checkpoint, pytest.raises(GateError, match=f"in {precision}: mean KL"):
        check_parity(measure_parity(bundle, manifest, checkpoint), manifest)


def test_only_a_bundle_that_nothing_here_runs_is_left_out_of_greedy(
    sure_bundles, sure_checkpoint, monkeypatch
):
    """A bundle that cannot be opened for another reason is not proved."""

    def raising(error):
        def opened(*_arguments, **_options):
            raise error

        return staticmethod(opened)

    monkeypatch.setattr(Session, "open", raising(UnavailableError("no GPU here")))
    assert measured(sure_bundles["fp32"], sure_checkpoint).greedy_agreement is None
    monkeypatch.setattr(Session, "open", raising(BundleError("the graph cannot be loaded")))
    with pytest.raises(BundleError, match="cannot be loaded"):
        measured(sure_bundles["fp32"], sure_checkpoint)
