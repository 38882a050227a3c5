"""GPTQ: errors are made up for, in the same numbers and scales."""

import itertools

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint

from glm4_exporters.architecture import EMBEDDING, HEAD
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.form import choose_form
from glm4_exporters.formats import CODES, FORMATS, SCALES
from glm4_exporters.quantize import gptq
from glm4_exporters.quantize.gptq import Rounded, _Moments, round_matrices
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.task_models import load_model

SHAPES = {
    "biased": {},
    "unbiased, 8 KV heads": {"attention_bias": False, "num_attention_heads": 8, "num_key_value_heads": 8},
    "no multiple of a block": {"hidden_size": 72, "intermediate_size": 100},
    "tied": {"tie_word_embeddings": True},
}
FORMAT = FORMATS["int4-signed"]
SCALED = {"self_attn.o_proj": "post_self_attn_layernorm", "mlp.down_proj": "post_mlp_layernorm"}


def correlated(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(tokens, width, generator=generator) @ (mixed + 0.3)


def room(rows, width):
    return Rounded(torch.zeros(rows, FORMAT.stored_width(width), dtype=torch.int8),
                   torch.zeros(rows, FORMAT.blocks(width)), torch.bfloat16)  # fmt: skip


def product_error(x, found, wanted):
    return float((x @ found.T - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("window", [2048, 64])
@pytest.mark.parametrize("width", [256, 100])
def test_products_are_nearer_than_by_rounding_alone(width, window, monkeypatch):
    monkeypatch.setattr(gptq, "WINDOW", window)
    x = correlated(512, width)
    w = torch.randn(40, width, generator=torch.Generator().manual_seed(1))
    result = room(40, width)
    values = torch.cat([rows for _, rows in _Moments([x], [x]).rounded(w, FORMAT, torch.bfloat16, result)])
    torch.testing.assert_close(values, FORMAT.decode({CODES: result.codes, SCALES: result.scales}, width))
    plain = FORMAT.decode(FORMAT.encode(w, torch.bfloat16), width)
    assert product_error(x, values, x @ w.T) < 0.7 * product_error(x, plain, x @ w.T)


def test_4_bit_floats_are_chosen_too():
    form, x = FORMATS["nvfp4"], correlated(512, 256)
    w = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    result = Rounded(torch.zeros(40, 256, dtype=torch.int8), torch.zeros(40, 16), torch.float8_e4m3fn)
    values = torch.cat([rows for _, rows in _Moments([x], [x]).rounded(w, form, torch.float16, result)])
    kept = result.rows(0, 40)
    assert kept[SCALES].dtype == torch.float8_e4m3fn
    assert set(kept[CODES].unique().abs().tolist()) == {0, 1, 2, 3, 4, 6, 8, 12}
    assert torch.equal(form.decode(kept, 256), values)
    plain = form.decode(form.encode(w, torch.float16, largest=float(w.abs().max())), 256)
    assert product_error(x, values, x @ w.T) < 0.8 * product_error(x, plain, x @ w.T)


def test_what_was_lost_before_a_matrix_is_made_up_for():
    exact = correlated(512, 64)
    seen = exact * 0.8  # as if everything before had shrunk it
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    moments = _Moments([exact], [seen])
    values = torch.cat([rows for _, rows in moments.rounded(w, FORMATS["int8"], torch.float32, _int8_room())])
    assert product_error(seen, values, exact @ w.T) < 0.01 < product_error(seen, w, exact @ w.T)


def _int8_room():
    return Rounded(torch.zeros(40, 128, dtype=torch.int8), torch.zeros(40, 1), torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_of_any_shape_is_nearer_than_by_rounding_alone(tmp_path, shape):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(**SHAPES[shape]))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 320, length).tolist() for length in (48, 48, 31, 48)]
    with Checkpoint.load(folder) as checkpoint:
        form = choose_form(checkpoint.config, "causal-lm", "native", "int4")
        found = round_matrices(checkpoint, sequences, form, Smoothing(), {})
        assert found.keys() == form.formats.keys() - {EMBEDDING}
        assert (HEAD in found) == (not checkpoint.config.tie_word_embeddings)
        ids = torch.tensor([sequences[0]])
        with torch.inference_mode():
            truth = load_model(checkpoint)(ids).logits
            errors = [
                (_with(checkpoint, form.formats, rounded)(ids).logits - truth).square().mean().item()
                for rounded in (found, {})
            ]
    assert errors[0] < 0.9 * errors[1]


def _with(checkpoint, formats, found):
    """The reference with rounded matrices: those of ``found``, or else each rounded by itself."""
    model = load_model(checkpoint)
    for name, parameter in model.named_parameters():
        if name in formats and name != EMBEDDING:
            form, (rows, width) = formats[name], parameter.shape
            own = form.encode(parameter.detach(), torch.bfloat16)
            parameter.copy_(form.decode(found[name].rows(0, rows) if name in found else own, width))
    return model


def test_the_walk_goes_through_the_model_as_the_remedy_scales_it(tmp_path):
    """Powers of two change no code: o_proj and down_proj are scaled by 2^-12, and so is the norms' eps."""
    checkpoint = Checkpoint.load(write_checkpoint(tmp_path, tiny_config()))
    form = choose_form(checkpoint.config, "causal-lm", "ort", "int4")
    rows, bits = {}, {}
    for layer, (matrix, norm) in itertools.product(range(2), SCALED.items()):
        rows[f"model.layers.{layer}.{matrix}.weight"] = np.full(64, 2.0**-12, np.float32)
        bits[f"model.layers.{layer}.{norm}"] = 12
    sequences = [list(range(5, 60))]
    plain = round_matrices(checkpoint, sequences, form, Smoothing(), {})
    scaled = round_matrices(checkpoint, sequences, form, Smoothing(rows), bits)
    for name, one in plain.items():
        factor = 2.0**-12 if name in rows else 1.0
        assert (one.codes == scaled[name].codes).float().mean() > 0.999, name
        torch.testing.assert_close(scaled[name].scales, one.scales * factor, rtol=1e-2, atol=0)
