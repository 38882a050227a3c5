"""A manifest that anybody wrote: known words, numbers in range, inputs and outputs that follow from them."""

import dataclasses
import json

import pytest

from glm4_runtime import BundleError
from glm4_runtime.bundle import (
    COUNTERS,
    PRESENT_COUNTERS,
    EngineInfo,
    EngineProfile,
    FileEntry,
    Limits,
    Manifest,
    ModelInfo,
    TensorSpec,
    read_manifest,
    write_manifest,
)
from glm4_runtime.bundle.graph_io import graph_io

MODEL = ModelInfo(
    vocab_size=320, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=256,
    eos_token_ids=(1, 2), pad_token_id=0,
)  # fmt: skip
IO = graph_io("causal-lm", MODEL, "float32")
ONNX = Manifest(
    task="causal-lm", target="ort", dialect="ort", precision="int8", activations="float32", kv_cache="float32",
    model=MODEL, limits=Limits(256, 4), opsets={"": 24}, inputs=IO.inputs, outputs=IO.outputs,
    providers=("CPUExecutionProvider",), tensor_precisions={"head": "int8"}, tools={"torch": "2.13.0"},
    config={"vocab_size": 320, "num_hidden_layers": 2}, source_sha256="0" * 64,
    files={"model.onnx": FileEntry("1" * 64, 7)},
)  # fmt: skip
ENGINE_IO = graph_io("causal-lm", MODEL, "float16", 256)
AXES = {"batch": (1, 4, 4), "sequence": (1, 1, 1), "positions": (1, 1, 1)}
ENGINE = dataclasses.replace(
    ONNX, target="tensorrt-rtx", dialect="tensorrt-rtx", activations="float16", kv_cache="float16",
    inputs=ENGINE_IO.inputs, outputs=ENGINE_IO.outputs, providers=(), compute_capabilities=("89",),
    files={"model.engine": FileEntry("1" * 64, 7)},
    engine=EngineInfo(
        "tensorrt-rtx", "1.7", "shared", False, "native", None,
        (EngineProfile("prefill", "model.engine", 0, AXES), EngineProfile("decode", "model.engine", 1, AXES)),
        {}, {}, {},
    ),
)  # fmt: skip


def put(data, path, value):
    for step in path[:-1]:
        data = data[step]
    if value is None:
        del data[path[-1]]
    else:
        data[path[-1]] = value


def refusal(tmp_path, manifest, changes):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    data = json.loads((tmp_path / "manifest.json").read_text())
    for path, value in changes.items():
        put(data, path, value)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 500
    assert message.endswith("export the bundle again")
    return message


NUMBERS = [("model", n) for n in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                                  "max_positions")] + [("limits", "max_seq_len"), ("limits", "max_batch_size")]  # fmt: skip


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**63, -(2**63), 10**4000])
@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_a_number_out_of_range(tmp_path, path, value):
    assert f"{'.'.join(path)} is {str(value)[:60]}" in refusal(tmp_path, ONNX, {path: value})


@pytest.mark.parametrize("path", [p for p in NUMBERS if p[1] not in ("max_positions", "max_seq_len", "max_batch_size")], ids=".".join)  # fmt: skip
def test_a_number_that_disagrees_with_the_inputs_the_outputs_or_the_configuration(tmp_path, path):
    """Each number that shapes a tensor, two times what it is; ``num_heads`` and ``hidden_size`` shape none here."""
    value = 2 * getattr(MODEL, path[1])
    config = {"num_heads": "num_attention_heads", "hidden_size": "hidden_size"}.get(path[1])
    changes = {path: value} | ({("config", config): value // 2} if config else {})
    message = refusal(tmp_path, ONNX, changes)
    assert path[1] in message or "do not follow from task, model" in message


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("task",), "chat", 'task is "chat", but must be one of causal-lm'),
        (("task",), "encoder", 'kv_cache is "float32", but task encoder has no cache'),
        (("activations",), "float8", 'activations is "float8", but must be one of float32'),
        (("kv_cache",), "uint4", 'kv_cache is "uint4", but must be one of float32'),
        (("kv_cache",), "float8e4m3fn", 'kv_cache is "float8e4m3fn", but must be one of float32'),  # an engine's only
        (("kv_cache",), "int8", 'past_key_values.0.key is "float32" ["batch", 2, "capacity", 16] instead of "int8"'),
        (("precision",), "x" * 1000, "is longer than 255 characters"),
        (("model", "num_kv_heads"), 3, "num_heads 4 is not a multiple of model.num_kv_heads 3"),
        (("model", "labels"), ["a"], "model.labels has 1 labels, but task causal-lm has none"),
        (("model", "eos_token_ids"), [], "the count of model.eos_token_ids is 0"),
        (("model", "eos_token_ids"), [-1], "model.eos_token_ids is -1"),
        (("model", "eos_token_ids"), [10**4000], "model.eos_token_ids is 1000"),
        (("model", "eos_token_ids"), [1] * 5000, "the count of model.eos_token_ids is 5000"),
        (("model", "pad_token_id"), 320, "model.pad_token_id is 320, but must be 0 ... 319"),
        (("limits", "max_seq_len"), 257, "limits.max_seq_len is 257, but the model has 256 positions"),
        (("config", "vocab_size"), 321, "model.vocab_size is 320, but config.vocab_size is 321"),
        (("config", "num_hidden_layers"), "2", 'model.num_layers is 2, but config.num_hidden_layers is "2"'),
        (("opsets", ""), 0, "opsets.ai.onnx is 0"),
        (("source_sha256",), "0" * 63, "must be 64 hexadecimal digits"),
        (("files",), {}, "files does not list model.onnx"),
        (("files", "model.onnx", "sha256"), "Z" * 64, "files.model.onnx.sha256"),
        (("files", "model.onnx", "sample"), "1", "files.model.onnx.sample"),
        (("files", "model.onnx", "bytes"), -1, "files.model.onnx.bytes is -1"),
        (("files", "x" * 300), {"sha256": "1" * 64, "bytes": 1}, "which is not a plain file name"),
        (("inputs",), [], "8 missing (input_ids"),
        (("inputs", 0, "name"), "input", "1 missing (input_ids)"),
        (("inputs", 0, "dtype"), "int32", 'input_ids is "int32"'),
        (("inputs", 0, "shape"), ["batch"], 'input_ids is "int64" ["batch"] instead of'),
        (("inputs", 0, "shape"), ["batch"] * 100_000, 'input_ids is "int64" ["batch", "batch"'),
        (("inputs", 1), {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}, "1 missing (past_lengths)"),
        (("outputs", 0, "shape", 2), 321, "instead of"),
        (("inputs", 0, "name"), "x" * 1_000_000, "missing (input_ids)"),
    ],
    ids=lambda v: ".".join(map(str, v))[:40] if isinstance(v, tuple) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tmp_path, path, value, reason):
    assert reason in refusal(tmp_path, ONNX, {path: value})


def test_more_inputs_and_names_twice(tmp_path):
    more = dataclasses.asdict(IO.inputs[0]) | {"name": "adapter_ids"}
    inputs = [dataclasses.asdict(spec) for spec in IO.inputs]
    assert "1 too many (adapter_ids)" in refusal(tmp_path, ONNX, {("inputs",): [*inputs, more]})
    assert "1 of 9 names are there twice" in refusal(tmp_path, ONNX, {("inputs",): [*inputs, inputs[0]]})


@pytest.mark.parametrize("field", ["config", "tensor_precisions", "tools"])
def test_deep_nesting(tmp_path, field):
    write_manifest(tmp_path, ONNX)
    path = tmp_path / "manifest.json"
    for levels in (200, 900, 100_000):
        data = json.loads(path.read_text()) | {field: "HERE"}
        deep = '{"a": ' * levels + "1" + "}" * levels
        (tmp_path / "manifest.json").write_text(json.dumps(data).replace('"HERE"', deep))
        with pytest.raises(BundleError, match=r"levels deep|is no JSON") as caught:
            read_manifest(tmp_path)
        assert len(str(caught.value)) <= 500
        write_manifest(tmp_path, ONNX)


def test_a_manifest_of_more_than_16_mib(tmp_path):
    write_manifest(tmp_path, ONNX)
    with (tmp_path / "manifest.json").open("a") as file:
        file.write(" " * (16 << 20))
    with pytest.raises(BundleError, match="but at most 16777216 are read; export the bundle again"):
        read_manifest(tmp_path)


def test_a_long_name_of_an_axis_costs_no_time(tmp_path):
    """The place of each element began with the whole name of the place around it."""
    message = refusal(tmp_path, ENGINE, {("engine", "profiles", 0, "axes", "x" * 2_000_000): [1] * 500_000})
    assert "minimum, optimum and maximum" in message


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("engine",), None, "dialect is tensorrt-rtx, but there is no engine"),
        (("engine", "kind"), "tensorrt", "engine.kind is"),
        (("engine", "attention"), "plugin", "1 missing (counters)"),
        (("engine", "attention"), "none", "engine.attention is"),
        (("engine", "profiles"), [], "task causal-lm needs decode, prefill"),
        (("engine", "profiles", 0, "name"), "decode", "task causal-lm needs decode, prefill"),
        (("engine", "profiles", 0, "file"), "other.engine", "does not list the engine"),
        (("engine", "profiles", 0, "index"), -1, "engine.profiles.prefill.index is -1"),
        (("engine", "profiles", 0, "axes", "sequence"), [1, 2], "minimum, optimum and maximum"),
        (("engine", "profiles", 0, "axes", "sequence"), [3, 2, 1], "minimum, optimum and maximum"),
        (("engine", "profiles", 0, "axes", "sequence"), [1, 1, 2**31], "minimum, optimum and maximum"),
        (("engine", "profiles", 0, "axes", "sequence"), None, "axes lacks sequence"),
        (("compute_capabilities",), [], "must be GPUs as 89 for 8.9"),
        (("compute_capabilities",), ["8.9"], "must be GPUs as 89 for 8.9"),
        (("inputs", 4, "shape", 2), 320, "instead of"),
        (("inputs", 4, "shape", 2), "capacity", "axes lacks capacity"),
    ],
    ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else "",
)  # fmt: skip
def test_an_engine_that_cannot_be(tmp_path, path, value, reason):
    assert reason in refusal(tmp_path, ENGINE, {path: value})


def with_counters(count):
    """An engine by our plugin, which has ``count`` counters, going in and coming out."""
    return dataclasses.replace(
        ENGINE,
        inputs=(*ENGINE.inputs, TensorSpec(COUNTERS, "int32", (count,))),
        outputs=(*ENGINE.outputs, TensorSpec(PRESENT_COUNTERS, "int32", (count,))),
        engine=dataclasses.replace(ENGINE.engine, attention="plugin"),
    )


@pytest.mark.parametrize("count", [0, -1, 2**20 + 1])
def test_counters_that_cannot_be(tmp_path, count):
    assert "counters is" in refusal(tmp_path, with_counters(528), {("inputs", -1, "shape", 0): count})


def test_counters_of_one_number_in_and_another_out(tmp_path):
    changes = {("outputs", -1, "shape", 0): 527}
    assert "present_counters is" in refusal(tmp_path, with_counters(528), changes)


def test_an_engine_may_have_a_cache_of_8_bit_floats(tmp_path):
    io = graph_io("causal-lm", MODEL, "float8e4m3fn", 256)
    engine = dataclasses.replace(ENGINE, kv_cache="float8e4m3fn", inputs=io.inputs, outputs=io.outputs)
    write_manifest(tmp_path, engine)
    assert read_manifest(tmp_path).kv_cache == "float8e4m3fn"
