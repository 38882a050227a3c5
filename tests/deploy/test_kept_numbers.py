"""Numbers and scales of quantized checkpoints go into a bundle bit for bit."""

import dataclasses
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checkpoints import ARCHITECTURE_OF_TASK, LABELS
from cpu_operators import needs_cpu_operators
from matmul_nbits import matmul_nbits
from quantized_folders import write_quantized
from safetensors.torch import load_file, save_file

from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_exporters.architecture import MATRICES
from glm4_exporters.checkpoint import Checkpoint
from glm4_plugins.block_product import OPERATOR, block_product, library, unpack_codes
from glm4_runtime import Session
from glm4_runtime.errors import CheckpointError, ExportError

DATA = Path(__file__).parents[1] / "data" / "quantized"
OF_INTEGERS = sorted(
    path.name
    for path in DATA.iterdir()
    if path.is_dir() and path.name not in ("original", "gptq-4-act-order") and "fp8" not in path.name
)
IDS = [5, 17, 30, 2, 2, 9, 25, 1]
NAME = "model.layers.0.mlp.down_proj.weight"  # 128 rows, 256 inputs


def stored(bundle, name=NAME):
    """The bytes of each part of a matrix in the bundle's file."""
    parts = {}
    for tensor in onnx.load(bundle / "model.onnx", load_external_data=False).graph.initializer:
        if tensor.name.startswith(f"{name}."):
            place = {entry.key: entry.value for entry in tensor.external_data}
            with (bundle / place["location"]).open("rb") as file:
                file.seek(int(place["offset"]))
                parts[tensor.name.removeprefix(f"{name}.")] = tensor, file.read(int(place["length"]))
    return parts


def rows_of(folder):
    with Checkpoint.load(DATA / folder) as checkpoint:
        matrix = checkpoint.views.by_name[NAME].pieces[0].stored
        return matrix.load(checkpoint.read_stored)(0, matrix.rows)


def fours(data, columns):
    """Unsigned 4-bit numbers, the first of two in the low half of a byte."""
    data = np.frombuffer(data, np.uint8)
    return np.stack([data & 15, data >> 4], -1).reshape(-1, columns)


def array(part):
    tensor, data = part
    return np.frombuffer(data, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)


def by_column(values, shape=None):
    """[panels, blocks, 64] -> [panels * 64, blocks]."""
    panels = values.reshape(shape or values.shape)
    return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])


@pytest.mark.parametrize("folder", ["awq-4", "gptq-4-asym", "compressed-tensors-w4a16-asym"])
@pytest.mark.parametrize("target", ["native", "ort", "cpu"])
def test_numbers_scales_and_zero_points(tmp_path, folder, target):
    result = export(DATA / folder, tmp_path / "b", ExportOptions(target=target))
    assert result.source["stored"] == "kept bit for bit"
    if target == "native":
        assert result.parity.max_abs_error < 1e-5
    else:  # inputs are rounded to 8 bits
        assert result.parity.mean_kl < 2e-3
    rows, parts = rows_of(folder), stored(tmp_path / "b")
    scales = rows.scales.contiguous().view(torch.int16).numpy()
    if target == "cpu":
        assert (unpack_codes(array(parts["codes"]), 4) == rows.numbers.numpy()).all()
        assert parts["zeros"][0].data_type == onnx.TensorProto.INT8
        assert (by_column(array(parts["zeros"])) == rows.zeros.numpy()).all()
        assert (
            by_column(np.frombuffer(parts["scales"][1], np.int16), parts["scales"][0].dims) == scales
        ).all()
        return
    shift = 0 if target == "native" else 8  # native stores them signed
    groups = rows.scales.shape[1]
    assert (fours(parts["codes"][1], 256) == ((rows.numbers.numpy() + shift) & 15)).all()
    assert (fours(parts["zeros"][1], groups) == ((rows.zeros.numpy() + shift) & 15)).all()
    assert parts["scales"][1] == scales.tobytes()


@pytest.mark.parametrize("target", ["native", "ort", "cpu"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_matrices_that_are_not_quantized_keep_their_16_bits(tmp_path, target, name):
    result = export(DATA / "awq-4", tmp_path / "b", ExportOptions(target=target, parity=False))
    assert result.manifest.tensor_precisions["embedding"] == "float16"
    assert result.manifest.tensor_precisions["head"] == "float16"
    (tensor, data), own = (
        stored(tmp_path / "b", name)["codes"],
        load_file(DATA / "awq-4" / "model.safetensors"),
    )
    assert tensor.data_type == onnx.TensorProto.FLOAT16
    assert data == own[name].numpy().tobytes()


def edited(source, folder, change, **config):
    """A copy of a folder with other tensors: ``change`` edits them in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("target", ["native", "cpu"])
def test_a_tied_head_of_a_quantized_checkpoint(tmp_path, target):
    tied = {"tie_word_embeddings": True}
    folder = edited(DATA / "awq-4", tmp_path / "c", lambda tensors: tensors.pop("lm_head.weight"), **tied)
    result = export(folder, tmp_path / "b", ExportOptions(target=target))
    assert result.parity.relative_error < (1e-6 if target == "native" else 2e-2)
    assert list(stored(tmp_path / "b", "model.embed_tokens.weight")) == ["codes"]  # once
    assert not stored(tmp_path / "b", "lm_head.weight")


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize("target", ["native", "cpu"])
def test_a_classification_head_of_a_quantized_checkpoint(tmp_path, target, task):
    def classify(tensors):
        tensors["score.weight"] = tensors.pop("lm_head.weight")[:3].clone()
        if task == "token-classification":
            tensors["score.bias"] = tensors["score.weight"][:, 0].clone()

    config = {"architectures": [ARCHITECTURE_OF_TASK[task]], "id2label": LABELS}
    folder = edited(DATA / "compressed-tensors-w4a16-asym", tmp_path / "c", classify, **config)
    result = export(folder, tmp_path / "b", ExportOptions(target=target))
    assert result.source["stored"] == "kept bit for bit"
    assert result.parity.relative_error < (1e-6 if target == "native" else 5e-2)


@pytest.mark.parametrize("target", ["native", "ort", "cpu"])
def test_a_folder_of_quantized_and_plain_matrices(tmp_path, target):
    """A layer that the tool left as it was, with gate and up stored apart."""

    def unquantize(tensors):
        with Checkpoint.load(DATA / "original") as original:
            for module in MATRICES:
                name = f"model.layers.1.{module}"
                for suffix in ("qweight", "qzeros", "scales"):
                    del tensors[f"{name}.{suffix}"]
                tensors[f"{name}.weight"] = original.read(f"{name}.weight").half()
        gate, up = tensors.pop("model.layers.1.mlp.gate_up_proj.weight").chunk(2)
        tensors["model.layers.1.mlp.gate_proj.weight"] = gate.clone()
        tensors["model.layers.1.mlp.up_proj.weight"] = up.clone()

    settings = json.loads((DATA / "awq-4" / "config.json").read_text())["quantization_config"]
    settings["modules_to_not_convert"] = ["lm_head", "model.layers.1"]
    folder = edited(DATA / "awq-4", tmp_path / "c", unquantize, quantization_config=settings)
    result = export(folder, tmp_path / "b", ExportOptions(target=target))
    assert result.parity.relative_error < (1e-6 if target == "native" else 2e-2)
    whole = stored(tmp_path / "b", "model.layers.1.mlp.gate_up_proj.weight")["codes"]
    assert whole[0].data_type == onnx.TensorProto.FLOAT16
    assert "scales" in stored(tmp_path / "b", "model.layers.0.mlp.gate_up_proj.weight")


@pytest.mark.parametrize(
    "folder", ["compressed-tensors-w8a8", "compressed-tensors-fp8-block", "compressed-tensors-nvfp4a16"]
)
def test_other_numbers_on_native(tmp_path, folder):
    result = export(DATA / folder, tmp_path / "b", ExportOptions(target="native"))
    assert result.parity.max_abs_error < 1e-5
    kept = "kept, with 4-bit floats as integers in 8 bits: 12 matrices take 2.22 times their bytes"
    assert result.source["stored"] == (kept if "nvfp4" in folder else "kept bit for bit")
    rows, parts = rows_of(folder), stored(tmp_path / "b")
    assert parts["codes"][1] == rows.numbers.view(torch.uint8).numpy().tobytes()


def in_float32(tensors):
    """Scales of float32, as most tools write them for float8."""
    tensors.update({name: x.float() for name, x in tensors.items() if name.endswith("weight_scale")})


# What the layers of a built engine read: each matrix of the layers in its own type.
@pytest.mark.parametrize(
    ("folder", "edit", "activations", "weights"),
    [
        ("compressed-tensors-nvfp4a16", None, "fp16", {"FP4E2M1": 14, "FP8": 14}),
        ("compressed-tensors-nvfp4a16", None, "bf16", {"FP4E2M1": 14, "FP8": 14}),
        ("compressed-tensors-fp8", None, "bf16", {"FP8": 14}),
        ("compressed-tensors-fp8", in_float32, "fp16", {"FP8": 14}),
        ("compressed-tensors-fp8-dynamic", in_float32, "fp16", {"FP8": 14}),
        ("compressed-tensors-fp8-block", in_float32, "fp16", {"FP8": 14}),
        ("compressed-tensors-w8a16", in_float32, "fp16", {"Int8": 14}),
    ],
)
def test_scales_of_every_type_reach_an_engine(tmp_path, folder, edit, activations, weights):
    pytest.importorskip("tensorrt_rtx")
    source = DATA / folder if edit is None else edited(DATA / folder, tmp_path / "c", edit)
    options = ExportOptions(target="tensorrt-rtx", activations=activations, max_seq_len=64, max_batch_size=2)
    result = export(source, tmp_path / "b", options)
    assert result.parity.relative_error < (2e-2 if "w8a16" in folder else 2e-3)
    assert result.source["stored"] == "kept bit for bit"
    assert list(result.engine.built.weights.values()) == [weights] * 2


@needs_cpu_operators
@pytest.mark.parametrize("folder", OF_INTEGERS)
def test_products_have_their_meaning_on_target_cpu(tmp_path, folder):
    """Every product of the bundle, on the inputs that it had, against the operator's meaning in NumPy."""
    export(DATA / folder, tmp_path / "b", ExportOptions(target="cpu", kv_cache="fp32", parity=False))
    model = onnx.load(tmp_path / "b" / "model.onnx")
    products = [node for node in model.graph.node if node.op_type == OPERATOR]
    with Checkpoint.load(DATA / folder) as checkpoint:
        assert len(products) == sum(view.quantized for view in checkpoint.views.by_name.values())
    wanted = [(node.input[0], node.output[0]) for node in products]
    values = run_with_outputs(model, tmp_path / "b", sorted({name for pair in wanted for name in pair}))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node, (x, y) in zip(products, wanted, strict=True):
        of = {each.name: each.i for each in node.attribute}
        parts = [arrays[name] if name else None for name in node.input[1:]]
        optional = dict(zip(("bias", "zeros"), parts[2:], strict=False))
        sizes = {"columns": of["columns"], "bits": of["bits"], "block_size": of["block_size"]}
        expected = block_product(values[x], parts[0], parts[1], gated=bool(of["gated"]), **optional, **sizes)
        np.testing.assert_allclose(values[y], expected, rtol=1e-5, atol=1e-5, err_msg=node.name)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other processors round differently"
)
@pytest.mark.parametrize("folder", OF_INTEGERS)
def test_products_have_their_meaning_on_target_ort(tmp_path, folder):
    """Every product of the bundle, on the inputs that it had, against the operator's meaning in NumPy."""
    export(DATA / folder, tmp_path / "b", ExportOptions(parity=False))
    model = onnx.load(tmp_path / "b" / "model.onnx")
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    with Checkpoint.load(DATA / folder) as checkpoint:
        assert len(products) == sum(view.quantized for view in checkpoint.views.by_name.values())
    wanted = {name for node in products for name in (node.input[0], node.output[0])}
    values = run_with_outputs(model, tmp_path / "b", sorted(wanted))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    arrays |= {
        each.output[0]: arrays[each.input[0]]
        for each in model.graph.node
        if each.op_type == "Cast" and each.input[0] in arrays
    }
    for node in products:
        of = {each.name: each.i for each in node.attribute}
        codes, scales, zeros, *rest = [arrays.get(name) for name in [*node.input[1:], "", ""]][:5]
        assert of["accuracy_level"] == 4
        assert not any(part is not None for part in rest)
        sizes = {"bits": of["bits"], "block_size": of["block_size"]}
        x, scales = values[node.input[0]], scales.reshape(codes.shape[:2])
        expected = matmul_nbits(x, codes, scales, zeros, **sizes)
        np.testing.assert_allclose(values[node.output[0]], expected, atol=1e-5 * np.abs(expected).max())


def run_with_outputs(model, folder, names):
    """Values of a causal LM's graph on 8 tokens, by name."""
    for name in names:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    # without constant folding MatMulNBits takes 16-bit scales behind a Cast for zeros
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.register_custom_ops_library(str(library()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    sizes = {"batch": 1, "sequence": 8, "positions": 1, "capacity": 16}
    feeds = {}
    for each in session.get_inputs():
        shape = [sizes.get(axis, axis) for axis in each.shape]
        feeds[each.name] = np.zeros(shape, np.float32 if "float" in each.type else np.int64)
        if "int32" in each.type:
            feeds[each.name] = feeds[each.name].astype(np.int32)
    feeds["input_ids"] += np.arange(4, 12)
    feeds["query_lengths"] += 8
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize(
    ("folder", "target", "said"),
    [
        (
            "compressed-tensors-fp8",
            "ort",
            "take --target native or tensorrt-rtx or tensorrt, or say --precision int8",
        ),
        (
            "gptq-4-act-order",
            "ort",
            "act-order (g_idx), which no target stores as it is; say --precision int8",
        ),
    ],
)
def test_what_a_target_cannot_say(tmp_path, folder, target, said):
    with pytest.raises(ExportError) as caught:
        export(DATA / folder, tmp_path / "b", ExportOptions(target=target))
    assert said in str(caught.value)


def test_an_explicit_precision_quantizes_again(tmp_path):
    again = ExportOptions(target="ort", precision="int4")
    assert export(DATA / "gptq-4", tmp_path / "b", again).source["stored"].startswith("requantized to int4")
    assert cache_key(DATA / "gptq-4", again) != cache_key(DATA / "gptq-4", ExportOptions(target="ort"))


def not_a_number(tensors, name):
    tensors[f"{name}.weight"].view(torch.uint8)[3, 5] = 0x7F


def large_scales(tensors, name):
    tensors[f"{name}.weight_scale"].fill_(3e38)


def a_scale_to_divide_by(tensors, name):
    tensors[f"{name}.weight_global_scale"].fill_(1e-45)


@pytest.mark.parametrize(
    ("folder", "change", "target"),
    [
        ("compressed-tensors-fp8-block", not_a_number, "native"),
        ("compressed-tensors-w8a8", large_scales, "native"),
        ("compressed-tensors-w8a8", large_scales, "cpu"),
        ("compressed-tensors-nvfp4a16", a_scale_to_divide_by, "cpu"),
    ],
)
def test_numbers_that_stand_for_no_finite_value_are_refused_without_parity_too(
    tmp_path, folder, change, target
):
    name = NAME.removesuffix(".weight")
    damaged = edited(DATA / folder, tmp_path / "c", lambda tensors: change(tensors, name))
    with pytest.raises(CheckpointError, match=f"{name} stands for NaN or infinity in rows 0"):
        export(damaged, tmp_path / "b", ExportOptions(target=target, parity=False))
    assert not (tmp_path / "b").exists()


def test_calibration_text_is_for_the_int8_cache_alone(tmp_path):
    """Kept numbers are fitted to no text, but the fixed scales of an int8 cache are found on it."""
    (tmp_path / "t.ids").write_text("\n".join(" ".join(str(i + j) for i in range(24)) for j in range(4)))
    asked = ExportOptions(target="ort", kv_cache="int8", calibration=str(tmp_path / "t.ids"), parity=False)
    assert export(DATA / "awq-4", tmp_path / "b", asked).source["stored"] == "kept bit for bit"
    assert json.loads((tmp_path / "b" / "report.json").read_text())["calibration"]["text"] == "t.ids"
    # The rows of target cpu's int8 cache have scales of their own.
    for change in ({"kv_cache": "auto"}, {"target": "cpu"}):
        plain = dataclasses.replace(asked, **change)
        with pytest.raises(ExportError, match="--calibration changes nothing in a bundle of kept numbers"):
            export(DATA / "awq-4", tmp_path / "c", plain)


def logits_of_transformers(folder, values):
    """Logits on IDS of transformers' own model, with the values of a quantized folder."""
    from transformers import Glm4ForCausalLM

    plain = folder.with_name("plain")
    plain.mkdir()
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    (plain / "config.json").write_text(json.dumps(settings | {"torch_dtype": "float32"}))
    save_file({name: value.contiguous() for name, value in values.items()}, plain / "model.safetensors")
    model = Glm4ForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].numpy()


def compare_with_transformers(tmp_path, seed, target):
    values = write_quantized(tmp_path / "q", seed)
    export(tmp_path / "q", tmp_path / "b", ExportOptions(target=target, parity=False))
    expected = logits_of_transformers(tmp_path / "q", values)
    with Session.open(tmp_path / "b") as session:
        found = np.concatenate(list(session.score(IDS)))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if target == "native" else 0.05), error  # cpu rounds inputs to 8 bits


def test_a_random_folder_gives_the_logits_of_transformers(tmp_path):
    compare_with_transformers(tmp_path, 3, "native")


@pytest.mark.more
@pytest.mark.parametrize("seed", range(3000, 3030))
def test_random_folders_give_the_logits_of_transformers(tmp_path, seed):
    compare_with_transformers(tmp_path, seed, "cpu" if seed % 2 else "native")
