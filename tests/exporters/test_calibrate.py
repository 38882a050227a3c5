"""The calibration walk, against the reference model run whole."""

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.eager_attention import KVCache
from glm4_exporters.quantize import calibrate as calibration_module
from glm4_exporters.quantize.calibrate import PEAKS, calibrate
from glm4_exporters.reference import rotary_tables, rotate
from glm4_exporters.task_models import Glm4ForCausalLM
from glm4_runtime.errors import ExportError

SEQUENCES = [list(range(5, 60)), list(range(300, 250, -1)), [7]]
SHAPES = {
    "bias, 2 kv heads": {},
    "no bias, tied, 1 kv head": dict(attention_bias=False, tie_word_embeddings=True, num_key_value_heads=1),
    "4 kv heads, wide heads": dict(num_key_value_heads=4, head_dim=24, partial_rotary_factor=1.0),
}


def whole_model(checkpoint):
    with torch.device("meta"):
        model = Glm4ForCausalLM(checkpoint.config)
    state = {name: checkpoint.read(checkpoint.name_of(name)).float() for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


@torch.inference_mode()
def observed(model):
    """Inputs and outputs of every linear by name, over all sequences, and the caches."""
    inputs, outputs, caches = {}, {}, []

    def listen(name):
        def hook(_module, arguments, output):
            inputs.setdefault(name, []).append(arguments[0][0])
            outputs.setdefault(name, []).append(output[0])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(listen(name))
    for ids in SEQUENCES:
        caches.append(KVCache())
        model(torch.tensor([ids]), past_key_values=caches[-1])
    return {k: torch.cat(v) for k, v in inputs.items()}, {k: torch.cat(v) for k, v in outputs.items()}, caches


@pytest.fixture(scope="module", params=SHAPES)
def walked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate") / "checkpoint"
    checkpoint = Checkpoint.load(write_checkpoint(folder, tiny_config(**SHAPES[request.param])))
    sites = []
    return checkpoint, calibrate(checkpoint, SEQUENCES, sites.append), sites


def test_statistics_are_those_of_the_whole_model(walked):
    checkpoint, calibration, _ = walked
    inputs, _, _ = observed(whole_model(checkpoint))
    assert calibration.tokens == sum(map(len, SEQUENCES))
    for name, x in inputs.items():
        found = calibration.input_of(f"{name}.weight")
        close = dict(rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.absmax, x.abs().amax(0), **close)
        np.testing.assert_allclose(found.mean_abs, x.abs().mean(0), **close)
        np.testing.assert_allclose(found.mean_square, x.square().mean(0), **close)


def test_cache_and_peaks_are_those_of_the_whole_model(walked):
    checkpoint, calibration, _ = walked
    config = checkpoint.config
    inputs, outputs, caches = observed(whole_model(checkpoint))
    for i, layer in enumerate(calibration.layers):
        keys, values = (torch.cat([cache.layers[i][part][0] for cache in caches], dim=1) for part in (0, 1))
        np.testing.assert_allclose(layer.key_absmax, keys.abs().amax(1), rtol=1e-4)
        np.testing.assert_allclose(layer.value_absmax, values.abs().amax(1), rtol=1e-4)
        even, odd = keys[..., : config.rotary_dim : 2], keys[..., 1 : config.rotary_dim : 2]
        lengths = (even**2 + odd**2).sqrt().amax(1).repeat_interleave(2, dim=-1)
        np.testing.assert_allclose(layer.key_radius[:, : config.rotary_dim], lengths, rtol=1e-4)
        np.testing.assert_array_equal(
            layer.key_radius[:, config.rotary_dim :], layer.key_absmax[:, config.rotary_dim :]
        )
        scope = f"model.layers.{i}"
        gate, up = outputs[f"{scope}.mlp.gate_up_proj"].chunk(2, dim=-1)
        scores, start = 0.0, 0
        for ids, cache in zip(SEQUENCES, caches, strict=True):
            q = outputs[f"{scope}.self_attn.q_proj"][start : start + len(ids)]
            q = q.unflatten(-1, (-1, config.head_dim)).transpose(0, 1)[None]
            q = rotate(q, *(t[None, None] for t in rotary_tables(config, torch.arange(len(ids)))))
            k = cache.layers[i][0].repeat_interleave(q.shape[1] // cache.layers[i][0].shape[1], dim=1)
            scores = max(scores, float((q @ k.mT * config.scale).tril().abs().max()))
            start += len(ids)
        expected = {
            "scores": scores, "gate": gate, "up": up, "value": values,
            "product": inputs[f"{scope}.mlp.down_proj"],
            "o_proj": outputs[f"{scope}.self_attn.o_proj"], "down_proj": outputs[f"{scope}.mlp.down_proj"],
            "attention_input": inputs[f"{scope}.self_attn.q_proj"], "mlp_input": inputs[f"{scope}.mlp.gate_up_proj"],
        }  # fmt: skip
        for name, value in expected.items():
            assert layer.peaks[name] == pytest.approx(float(torch.as_tensor(value).abs().max()), rel=1e-4), (
                name
            )
        assert set(layer.peaks) == set(PEAKS)


def test_residual_is_the_larger_of_both_sums(tiny_checkpoint):
    checkpoint = Checkpoint.load(tiny_checkpoint)
    model, seen = whole_model(checkpoint), []
    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    model.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.inference_mode():
        for ids in SEQUENCES:
            model(torch.tensor([ids]))
    found = calibrate(checkpoint, SEQUENCES).layers[1].peaks["residual"]
    assert found == pytest.approx(max(float(x.abs().max()) for x in seen), rel=1e-5)


def test_a_site_shows_its_matrices(walked):
    checkpoint, calibration, sites = walked
    assert [len(site.names) for site in sites] == [3, 1, 1, 1] * len(calibration.layers) + [1]
    inputs, _, _ = observed(whole_model(checkpoint))
    for site in sites:
        weights = torch.cat([checkpoint.read(checkpoint.name_of(name)) for name in site.names])
        torch.testing.assert_close(site.weight_absmax, weights.abs().amax(0))
        torch.testing.assert_close(site.weight_sample, weights)  # all rows of so small a matrix
        if site.names[0] != "lm_head.weight" or not checkpoint.config.tie_word_embeddings:
            torch.testing.assert_close(
                site.sample, inputs[site.names[0].removesuffix(".weight")], rtol=1e-4, atol=1e-5
            )


def test_samples_are_bounded_and_the_same_each_time(tiny_checkpoint, monkeypatch):
    checkpoint = Checkpoint.load(tiny_checkpoint)
    complete, first, second = [], [], []
    calibrate(checkpoint, SEQUENCES, complete.append)
    monkeypatch.setattr(calibration_module, "SAMPLED_TOKENS", 9)
    monkeypatch.setattr(calibration_module, "SAMPLED_WEIGHT_ROWS", 10)
    calibrate(checkpoint, SEQUENCES, first.append)
    calibrate(checkpoint, SEQUENCES, second.append)
    for whole, one, other in zip(complete, first, second, strict=True):
        assert len(one.sample) == 9
        assert len(one.weight_sample) == 10
        assert torch.equal(one.sample, other.sample)
        assert torch.equal(one.weight_sample[[0, -1]], whole.weight_sample[[0, -1]])
        assert torch.equal(one.weight_absmax, whole.weight_absmax)


def test_queries_in_blocks_change_nothing(tiny_checkpoint, monkeypatch):
    checkpoint = Checkpoint.load(tiny_checkpoint)
    at_once = calibrate(checkpoint, SEQUENCES)
    monkeypatch.setattr(calibration_module, "SCORES_BLOCK", 4 * 55 * 7)  # seven queries of the longest
    in_blocks = calibrate(checkpoint, SEQUENCES)
    for one, other in zip(at_once.layers, in_blocks.layers, strict=True):
        assert one.peaks == pytest.approx(other.peaks, rel=1e-5)
        np.testing.assert_allclose(one.sites["o_proj"].mean_abs, other.sites["o_proj"].mean_abs, rtol=1e-4)


def test_a_task_without_a_vocabulary_has_no_head(tmp_path):
    folder = write_checkpoint(tmp_path, tiny_config(), task="token-classification")
    sites = []
    assert calibrate(Checkpoint.load(folder), SEQUENCES, sites.append).head is None
    assert len(sites) == 8


def test_progress_ends_at_the_whole(tiny_checkpoint):
    seen = []
    calibrate(Checkpoint.load(tiny_checkpoint), SEQUENCES, progress=lambda *event: seen.append(event[1:]))
    assert seen[0] == (0, 212)
    assert seen[-1] == (212, 212)
    assert seen == sorted(seen)
    assert len(seen) == 7


@pytest.mark.parametrize(
    ("sequences", "reason"), [([], "at least one"), ([[1], []], "none of them empty"), ([[320]], "token 320")]
)
def test_text_that_cannot_be_used(tiny_checkpoint, sequences, reason):
    with pytest.raises(ExportError, match=reason):
        calibrate(Checkpoint.load(tiny_checkpoint), sequences)


@pytest.mark.parametrize(
    ("room", "reason"),
    [(4 * 64 * 105, "at most 105 tokens in all"), (4 * 5 * 96 * 54, "at most 54 tokens in one sequence")],
)
def test_text_that_does_not_fit_in_memory(tiny_checkpoint, monkeypatch, room, reason):
    monkeypatch.setattr(calibration_module, "MOST_STATE_BYTES", room)
    with pytest.raises(ExportError, match=reason):
        calibrate(Checkpoint.load(tiny_checkpoint), SEQUENCES)
