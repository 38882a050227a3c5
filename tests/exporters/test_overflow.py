"""fp16's range: what leaves it is found, and what can be scaled is scaled without a change."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from tokenizers import Tokenizer

from benchmarks.make_hostile_checkpoints import write_overflow
from glm4_deploy.calibration import _input_scales
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.formats import FORMATS
from glm4_exporters.formats.float8 import FLOAT8_MAX
from glm4_exporters.quantize.calibrate import calibrate
from glm4_exporters.quantize.overflow import (
    LIMIT,
    SAFE,
    LayerBits,
    Remedy,
    audit,
    peaks,
    remedies,
    require_range,
)
from glm4_exporters.quantize.smooth import SmoothQuant
from glm4_exporters.streamed import reference_outputs
from glm4_exporters.task_models import Glm4ForCausalLM
from glm4_runtime.errors import GateError

DEMO = Path(__file__).parents[2] / "demo"
SEQUENCES = [list(range(5, 60)), list(range(300, 250, -1))]


def weight_losses(checkpoint, remedy):
    """By scaled tensor: the relative RMS error of rounding it to fp16, before and after the scaling."""
    losses = {}
    for name, multipliers in remedy.weights.rows.items():
        weights = checkpoint.read(checkpoint.name_of(name)).double()
        part = torch.from_numpy(multipliers).double().view(-1, *[1] * (weights.dim() - 1))
        plain, scaled = weights.half().double() - weights, (weights * part).half().double() / part - weights
        losses[name] = tuple(float(error.norm() / weights.norm()) for error in (plain, scaled))
    return losses


def remedied_model(checkpoint, remedy):
    """The whole model in float32, scaled, with the norms' eps as the remedy says."""
    with torch.device("meta"):
        model = Glm4ForCausalLM(checkpoint.config)
    state = {
        name: remedy.weights.apply(name, checkpoint.read(checkpoint.name_of(name)).float(), 0)
        for name in model.state_dict()
    }
    model.load_state_dict(state, assign=True)
    for norm, k in remedy.norm_bits.items():
        model.get_submodule(norm).eps *= 2.0 ** (-2 * k)
    return model.eval()


@torch.inference_mode()
def logits(model, sequences):
    return [model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy() for ids in sequences]


@pytest.fixture(scope="module")
def text():
    tokenizer = Tokenizer.from_file(str(DEMO / "glm4-tiny" / "tokenizer.json"))
    documents = (DEMO / "heldout.txt").read_text("utf-8").split("\n\f\n")
    return [tokenizer.encode(document, add_special_tokens=False).ids[:500] for document in documents[:3]]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, text):
    folder = write_overflow(DEMO / "glm4-tiny", tmp_path_factory.mktemp("hostile") / "overflow")
    checkpoint = Checkpoint.load(folder)
    return checkpoint, calibrate(checkpoint, text)


def test_the_raised_down_proj_computes_the_same_function(hostile, text):
    """But for eps, which was 1e-5 beside a mean square of at least 0.05."""
    for one, other in zip(
        reference_outputs(Checkpoint.load(DEMO / "glm4-tiny"), text),
        reference_outputs(hostile[0], text),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_the_audit_names_the_layer(hostile):
    rows = audit(hostile[1])
    assert [row["layer"] for row in rows if row["of_limit"] > 1] == [0]
    assert rows[0]["worst"] == "down_proj"
    assert rows[0]["down_proj"] > LIMIT
    require_range(hostile[1])  # nothing that no remedy reaches


def test_the_remedy_saves_fp16(hostile, text):
    checkpoint, calibration = hostile
    remedy = remedies(calibration, checkpoint.config)
    assert remedy.layers == {0: LayerBits(down_proj=4)}
    assert remedy.norm_bits == {"model.layers.0.post_mlp_layernorm": 4}
    expected = np.concatenate(reference_outputs(checkpoint, text))
    plain = np.concatenate(logits(remedied_model(checkpoint, Remedy()).half(), text))
    saved = np.concatenate(logits(remedied_model(checkpoint, remedy).half(), text))
    assert not np.isfinite(plain).all()
    assert np.abs(saved - expected).max() < 0.03  # the demo itself in fp16: 0.018
    (before, after) = weight_losses(checkpoint, remedy)["model.layers.0.mlp.down_proj.weight"]
    assert before == after == 0  # bfloat16 weights, in fp16's normal range


@pytest.mark.parametrize("bias", [True, False])
def test_remedies_of_every_kind_leave_the_function_to_the_bit(tmp_path, bias):
    """Every scalable value raised beyond the range, in one layer or the other."""
    folder = write_checkpoint(tmp_path, tiny_config(attention_bias=bias))
    checkpoint = Checkpoint.load(folder)
    calibration = calibrate(checkpoint, SEQUENCES)
    first, second = calibration.layers
    sites = dict(first.sites)
    sites["down_proj"] = replace(sites["down_proj"], absmax=sites["down_proj"].absmax * 1e6)
    raised = replace(
        calibration,
        layers=(
            replace(first, sites=sites, peaks=first.peaks | {"down_proj": 1e9}),
            replace(second, value_absmax=second.value_absmax * 1e6, peaks=second.peaks | {"o_proj": 1e8}),
        ),
    )
    remedy = remedies(raised, checkpoint.config)
    assert all(bits > 0 for bits in (remedy.layers[0].up, remedy.layers[0].down_proj))
    assert all(bits > 0 for bits in (remedy.layers[1].value, remedy.layers[1].o_proj))
    assert set(remedy.norm_bits) == {
        "model.layers.0.post_mlp_layernorm", "model.layers.1.post_self_attn_layernorm",
    }  # fmt: skip
    largest = peaks(raised)
    assert (
        SAFE / 2
        < largest[0]["down_proj"] / 2 ** remedy.norm_bits["model.layers.0.post_mlp_layernorm"]
        <= SAFE
    )
    assert SAFE / 2 < largest[0]["product"] / 2 ** remedy.layers[0].up <= SAFE
    # an fp8 product's input is scaled by what the scaled model gives it
    down = "model.layers.0.mlp.down_proj.weight"
    scales = _input_scales(
        SimpleNamespace(rounded_inputs={down: FORMATS["fp8"].inputs}), raised, remedy.weights, None, remedy
    )
    assert scales[down] * FLOAT8_MAX == pytest.approx(largest[0]["product"] / 2 ** remedy.layers[0].up)
    for one, other in zip(
        logits(remedied_model(checkpoint, Remedy()), SEQUENCES),
        logits(remedied_model(checkpoint, remedy), SEQUENCES),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_an_ordinary_model_needs_nothing(tiny_checkpoint):
    checkpoint = Checkpoint.load(tiny_checkpoint)
    remedy = remedies(calibrate(checkpoint, SEQUENCES), checkpoint.config)
    assert remedy == Remedy()


def test_what_no_remedy_reaches_is_refused(tiny_checkpoint):
    calibration = calibrate(Checkpoint.load(tiny_checkpoint), SEQUENCES)
    first, second = calibration.layers
    bad = replace(second, peaks=second.peaks | {"scores": 7e4, "residual": 1e5})
    with pytest.raises(
        GateError, match=r"scores of layer 1 \(7e\+04\), residual of layer 1 \(1e\+05\); no scaling"
    ):
        require_range(replace(calibration, layers=(first, bad)))


def test_small_rows_that_become_subnormal_are_told(tmp_path):
    folder = write_checkpoint(tmp_path, tiny_config())
    checkpoint = Checkpoint.load(folder)
    calibration = calibrate(checkpoint, SEQUENCES)
    first, second = calibration.layers
    far = replace(calibration, layers=(replace(first, peaks=first.peaks | {"o_proj": 2.0**31}), second))
    losses = weight_losses(checkpoint, remedies(far, checkpoint.config))
    ((before, after),) = losses.values()
    assert before < 3e-4
    assert after > 0.05


def test_peaks_of_a_smoothed_model(tiny_checkpoint):
    checkpoint = Checkpoint.load(tiny_checkpoint)
    search = SmoothQuant(checkpoint.config)
    calibration = calibrate(checkpoint, SEQUENCES, search)
    after = logits_peaks(checkpoint, search.smoothing)
    for found, (product, up) in zip(peaks(calibration, search.smoothing), after, strict=True):
        assert found["product"] == pytest.approx(product, rel=1e-3)
        assert found["up"] >= up * 0.999


@torch.inference_mode()
def logits_peaks(checkpoint, smoothing):
    """The largest product and up of every layer, from the smoothed model itself."""
    model = remedied_model(checkpoint, Remedy(weights=smoothing))
    found = [[0.0, 0.0] for _ in model.model.layers]

    def listen(index):
        def product(_module, arguments):
            found[index][0] = max(found[index][0], float(arguments[0].abs().max()))

        def up(_module, _arguments, output):
            found[index][1] = max(found[index][1], float(output.chunk(2, -1)[1].abs().max()))

        return product, up

    for index, layer in enumerate(model.model.layers):
        product, up = listen(index)
        layer.mlp.down_proj.register_forward_pre_hook(product)
        layer.mlp.gate_up_proj.register_forward_hook(up)
    logits(model, SEQUENCES)
    return found
