"""Exports to a TensorRT-RTX engine, which need no GPU: what is built, what it says of itself, what is refused."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_exporters.engine import build as engine_build
from glm4_exporters.engine import checks as engine_checks
from glm4_exporters.engine.build import EnginePlan, build_engine
from glm4_exporters.engine.network import (
    Network,
    check_compiled,
    check_inputs,
    check_layers,
    expected_layers,
    float32_operators,
)
from glm4_exporters.engine.options import EngineOptions, engine_capabilities
from glm4_exporters.engine.profiles import engine_capacity, engine_profiles
from glm4_exporters.passes.fix_capacity import FixCapacity
from glm4_runtime import BundleError, ExportError, Session
from glm4_runtime.bundle import ENGINE, GRAPH, WEIGHTS, Limits, read_manifest, verify_files

trt = pytest.importorskip("tensorrt_rtx")

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
LAYERS, MATRICES = 4, 4 * 7 + 1  # gate and up apart
TARGET = "tensorrt-rtx"


def options(precision="fp16", parity=False, **engine):
    return ExportOptions(
        target=TARGET,
        precision=precision,
        max_seq_len=1000,
        max_batch_size=4,
        parity=parity,
        engine=EngineOptions(**engine),
    )


def parse(path):
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, logger)
    assert parser.parse_from_file(str(path))
    return Network(trt, definition), (builder, parser)


@pytest.fixture(scope="module")
def engine_bundle(tmp_path_factory):
    """fp16, with its ONNX kept and its parity proved."""
    folder = tmp_path_factory.mktemp("engine") / "bundle"
    steps = []
    result = export(
        DEMO, folder, options(keep_onnx=True, parity=True), progress=lambda *step: steps.append(step)
    )
    return folder, result, steps


def test_the_manifest_says_what_was_built(engine_bundle):
    folder, _, _ = engine_bundle
    manifest = read_manifest(folder)
    verify_files(folder, manifest, hashes=True)
    engine = manifest.engine
    assert (manifest.target, manifest.dialect, manifest.providers) == (TARGET, TARGET, ())
    assert (engine.kind, engine.version, engine.layout) == (TARGET, trt.__version__, "shared")
    assert (manifest.compute_capabilities, engine.later_gpus) == (("80", "86", "89", "120"), True)
    assert engine.layers["KV_CACHE_UPDATE"] == engine.layers["ROTARY_EMBEDDING"] == 2 * LAYERS
    assert (engine.layers["ATTENTION_INPUT"], engine.layers["MATRIX_MULTIPLY"]) == (LAYERS, MATRICES)
    assert engine.float32 == {"Cast": 1, "RMSNormalization": 4 * LAYERS + 1}
    cache = [spec for spec in manifest.inputs if spec.name.startswith("past_key_values.")]
    assert {spec.shape for spec in cache} == {("batch", 2, 1024, 64)}  # 1000 positions, in steps of 64
    assert [(p.name, p.index, p.file) for p in engine.profiles] == [
        ("prefill", 0, ENGINE),
        ("decode", 1, ENGINE),
    ]
    assert engine.profiles[0].axes == {
        "batch": (1, 1, 1),
        "sequence": (1, 512, 512),
        "positions": (1, 1, 128),
    }
    assert engine.profiles[1].axes == {"batch": (1, 4, 4), "sequence": (1, 1, 1), "positions": (1, 1, 1)}
    assert engine.built_from == {name: manifest.files[name] for name in (GRAPH, WEIGHTS)}
    assert manifest.tools[TARGET] == trt.__version__


def test_the_engine_holds_the_layers_of_the_graph(engine_bundle):
    """Without a GPU no engine can be deserialized; its bytes name its tensors, both profiles' among them."""
    folder = engine_bundle[0]
    data = (folder / ENGINE).read_bytes()
    for layer in range(LAYERS):
        assert data.count(f"present_key_values.{layer}.key [profile 1]".encode())
        assert data.count(f"model.layers.{layer}.self_attn/Attention".encode())
    weights = (folder / WEIGHTS).read_bytes()
    tensors = ir.load(folder / GRAPH).graph.initializers
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        start = tensors[name].const_value.offset
        assert data.count(weights[start : start + 256]) == 1, f"{name} is stored once"
    assert len(data) < 2 * len(
        weights
    )  # 7.1 MB of weights, the rest is kernels; 16.0 MB with gate and up in one


def test_the_report_says_what_it_took(engine_bundle):
    folder, result, steps = engine_bundle
    report = json.loads((folder / "report.json").read_text())
    size = (folder / ENGINE).stat().st_size
    assert size < report["engine"]["build_peak_rss_bytes"] < 2**30
    assert report["engine"]["build_peak_anonymous_bytes"] <= report["engine"]["build_peak_rss_bytes"]
    assert "ONNX graph that the engine was built from" in report["engine"]["parity"]
    assert report["parity"]["positions"] == result.parity.positions
    assert report["seconds"]["engine"] > 0
    kernels = report["engine"]["kernels"]
    assert kernels["prefill"]["gemm_mha_v2"] == kernels["decode"]["gemv_mha_v1"] == LAYERS
    assert kernels["decode"]["gemm"] == 4 * LAYERS + 1  # q, k and v in one, gate and up in one
    shares = [done / total for stage, done, total in steps if stage == "build the engine"]
    assert shares == sorted(shares)
    assert len(shares) > 5
    assert shares[-1] == 1


def test_without_a_gpu_the_session_says_so(engine_bundle):
    with pytest.raises(BundleError, match="CUDA finds no NVIDIA GPU here"):
        Session.open(engine_bundle[0])


def test_bf16_in_two_engines(tmp_path):
    result = export(DEMO, tmp_path / "bundle", options("bf16", layout="split", sm=("120", "89")))
    manifest = read_manifest(tmp_path / "bundle")
    assert [(p.file, p.index) for p in manifest.engine.profiles] == [
        ("prefill.engine", 0),
        ("decode.engine", 0),
    ]
    assert {"prefill.engine", "decode.engine"} < set(manifest.files)
    assert not {GRAPH, WEIGHTS} & set(manifest.files)
    assert not (tmp_path / "bundle" / WEIGHTS).exists()
    assert set(manifest.engine.built_from) == {GRAPH, WEIGHTS}
    assert (manifest.compute_capabilities, manifest.engine.later_gpus) == (("89", "120"), False)
    assert set(result.engine.built.kernels) == {"prefill", "decode"}
    assert (manifest.kv_cache, result.engine.built.float32["RMSNormalization"]) == (
        "bfloat16",
        4 * LAYERS + 1,
    )


def test_two_exports_differ_in_the_engines_bytes_alone(tmp_path, engine_bundle):
    """And there in an order only: the builder's, which follows addresses in memory."""
    again = export(DEMO, tmp_path / "again", options(keep_onnx=True)).manifest
    first = engine_bundle[1].manifest
    assert again.files[ENGINE].bytes == first.files[ENGINE].bytes
    same = {name: entry for name, entry in again.files.items() if name != ENGINE}
    assert same == {name: entry for name, entry in first.files.items() if name != ENGINE}
    assert dataclasses.replace(again, files={}) == dataclasses.replace(first, files={})


def test_a_classifier_has_no_cache(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config(), task="sequence-classification")
    export(source, tmp_path / "bundle", ExportOptions(target=TARGET, parity=False))
    engine = read_manifest(tmp_path / "bundle").engine
    assert engine.layers["KV_CACHE_UPDATE"] == 0
    assert (engine.layers["ATTENTION_INPUT"], engine.layers["ROTARY_EMBEDDING"]) == (2, 4)
    assert [p.name for p in engine.profiles] == ["encode"]


# The check of the network ---------------------------------------------------------------------------


def test_a_network_that_lost_something_is_refused(engine_bundle):
    network, _keep = parse(_fixed(engine_bundle[0]))
    check_layers(network, {"KV_CACHE_UPDATE": 8})
    with pytest.raises(ExportError, match="8 KV_CACHE_UPDATE layers instead of 9"):
        check_layers(network, {"KV_CACHE_UPDATE": 9})
    check_inputs(network, ["input_ids", "query_lengths"])
    with pytest.raises(ExportError, match="does not use the inputs nonpad_kv_seqlen"):
        check_inputs(network, ["input_ids", "nonpad_kv_seqlen"])


def _fixed(bundle, change=None):
    """The graph as it is parsed: capacity fixed, weights where they lie."""
    model = ir.load(bundle / GRAPH)
    FixCapacity(1024)(model)
    if change is not None:
        change(model)
    path = bundle / "parsed.onnx"
    ir.save(model, path)
    return path


def test_an_input_that_nothing_reads_is_found(engine_bundle):
    """Without the mask, which the parser does not ask for, query_lengths reaches no output."""

    def drop_mask(model):
        for node in model.graph:
            if node.op_type == "Attention":
                node.resize_inputs(3)

    network, _keep = parse(_fixed(engine_bundle[0], drop_mask))
    with pytest.raises(ExportError, match="does not use the inputs query_lengths"):
        check_inputs(network, ["input_ids", "query_lengths"])


def test_a_node_that_falls_to_float32_is_found(engine_bundle):
    def widen(model):
        node = next(n for n in model.graph if n.name == "model.layers.2.mlp.down_proj/MatMul")
        wide = [ir.node("Cast", [value], {"to": ir.DataType.FLOAT}) for value in node.inputs]
        node.replace_input_with(0, wide[0].outputs[0])
        node.replace_input_with(1, wide[1].outputs[0])
        narrow = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.FLOAT16})
        ir.convenience.replace_all_uses_with(node.outputs[0], narrow.outputs[0])
        narrow.replace_input_with(0, node.outputs[0])
        model.graph.insert_before(node, wide)
        model.graph.insert_after(node, [narrow])

    path = _fixed(engine_bundle[0], widen)
    operators = {node.name: node.op_type for node in ir.load(path).graph}
    network, _keep = parse(path)
    with pytest.raises(ExportError, match=r"in float32, model\.layers\.2\.mlp\.down_proj/MatMul among them"):
        float32_operators(network, operators)


@pytest.mark.parametrize("narrowed", [True, False])
def test_a_weight_in_float32_must_be_narrowed(engine_bundle, narrowed):
    """A tool's scales of float32 make a weight float32. A Cast must follow, or the product is float32, too."""

    def cast(node, to, name):
        return ir.node("Cast", [node.outputs[0]], {"to": to}, name=name)

    def widen(model):
        product = next(n for n in model.graph if n.name == "model.layers.2.mlp.down_proj/MatMul")
        transpose = product.inputs[1].producer()
        arrays = {
            "codes": np.ones([int(axis) for axis in transpose.inputs[0].shape], np.int8),
            "scale": np.float32(0.01),
        }
        parts = [
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            for name, tensor in ((n, ir.tensor(np.asarray(array), name=n)) for n, array in arrays.items())
        ]
        for value in parts:
            model.graph.register_initializer(value)
        dequantize = ir.node("DequantizeLinear", parts, name="dequantize")
        if narrowed:
            new = [dequantize, cast(dequantize, ir.DataType.FLOAT16, "narrow")]
            transpose.replace_input_with(0, new[-1].outputs[0])
            model.graph.insert_before(transpose, new)
            return
        transpose.replace_input_with(0, dequantize.outputs[0])
        model.graph.insert_before(transpose, [dequantize])
        wide = ir.node("Cast", [product.inputs[0]], {"to": ir.DataType.FLOAT}, name="wide")
        narrow = cast(product, ir.DataType.FLOAT16, "narrow")
        ir.convenience.replace_all_uses_with(product.outputs[0], narrow.outputs[0])
        narrow.replace_input_with(0, product.outputs[0])
        product.replace_input_with(0, wide.outputs[0])
        model.graph.insert_before(product, [wide])
        model.graph.insert_after(product, [narrow])

    path = _fixed(engine_bundle[0], widen)
    operators = {node.name: node.op_type for node in ir.load(path).graph}
    network, _keep = parse(path)
    if narrowed:
        assert float32_operators(network, operators)["DequantizeLinear"] == 1
    else:
        with pytest.raises(
            ExportError, match="nodes of the network compute in float32, dequantize among them"
        ):
            float32_operators(network, operators)


def test_a_node_that_no_built_layer_was_made_from_is_found():
    log = """Layers:
Name: a+b_myl0_0, LayerType: gemm, TacticName: t, Metadata: [ONNX Layer: a][ONNX Layer: b]
Name: _gemm_mha_v2_myl0_1, LayerType: kgen, TacticName: _gemm_mha_v2_0x1f, Metadata: [ONNX Layer: c]
Name: a [profile 1]_myl1_0, LayerType: gemm, TacticName: t, Metadata: [ONNX Layer: a]"""
    operators = {"a": "MatMul", "b": "MatMul", "c": "Attention", "d": "Add"}
    assert check_compiled(log, ["prefill"], operators) == {"prefill": {"gemm": 1, "gemm_mha_v2": 1}}
    with pytest.raises(
        ExportError, match="decode profile has no layer of 2 nodes of the graph, b among them"
    ):
        check_compiled(log, ["prefill", "decode"], operators)
    assert check_compiled("", ["prefill"], operators) == {}


def test_a_graph_without_what_the_model_has_is_refused():
    operators = {"a": "Attention", "b": "RotaryEmbedding", "c": "RotaryEmbedding"}
    assert expected_layers(operators, 1, False, "native")["ROTARY_EMBEDDING"] == 2
    with pytest.raises(ExportError, match="has 1 Attention where the model has 2"):
        expected_layers(operators, 2, False, "native")
    with pytest.raises(ExportError, match="has 0 TensorScatter where the model has 2"):
        expected_layers(operators, 1, True, "native")


# What the builder refuses ---------------------------------------------------------------------------


def plan_of(folder, name):
    manifest = read_manifest(folder)
    return EnginePlan(
        kind=TARGET,
        graphs={"other.engine": name},
        capabilities=(),
        profiles=tuple(dataclasses.replace(p, file="other.engine") for p in manifest.engine.profiles),
        inputs=manifest.inputs,
        operators={},
        layers={},
        timing_cache=None,
        plugin=None,
    )


def test_what_the_parser_says_is_one_line(engine_bundle):
    folder = engine_bundle[0]
    (folder / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match="tensorrt-rtx does not take the graph: ") as caught:
        build_engine(folder, plan_of(folder, "broken.onnx"))
    assert "\n" not in str(caught.value)


def test_a_symbolic_capacity_is_refused_by_the_builder(engine_bundle):
    folder = engine_bundle[0]
    with pytest.raises(
        ExportError, match=r"model\.layers\.0\.self_attn/TensorScatter.*must have a static"
    ) as caught:
        build_engine(folder, plan_of(folder, GRAPH))
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_a_builder_that_dies_is_said_and_leaves_no_process(engine_bundle, monkeypatch):
    """The parser ends its process on an operator that it does not know; here something else does."""
    started = []
    real = subprocess.Popen

    def dying(command, **others):
        started.append(real([sys.executable, "-c", "import os; os.abort()"], **others))
        return started[-1]

    monkeypatch.setattr(engine_build.subprocess, "Popen", dying)
    with pytest.raises(ExportError, match=r"builder died \(signal 6"):
        build_engine(engine_bundle[0], plan_of(engine_bundle[0], GRAPH))
    assert started[0].poll() is not None


# Timings, kept for the next build: those of TensorRT-RTX, which are empty but have the same calls ---------


def timed_plan(folder, timing_cache):
    """A plan whose engine has a file name of its own, since an engine is never overwritten."""
    name = f"{timing_cache.name}.engine"
    graph = _fixed(folder)
    plan = plan_of(folder, graph.name)
    operators = {node.name: node.op_type for node in ir.load(graph).graph}
    profiles = tuple(dataclasses.replace(p, file=name) for p in plan.profiles)
    return dataclasses.replace(
        plan,
        graphs={name: graph.name},
        profiles=profiles,
        operators=operators,
        timing_cache=str(timing_cache),
    )


def test_timings_are_written_and_read_again(engine_bundle, tmp_path):
    folder, path = engine_bundle[0], tmp_path / "first"
    assert build_engine(folder, timed_plan(folder, path)).warnings == ()
    written = path.read_bytes()
    assert written
    assert [entry.name for entry in tmp_path.iterdir()] == ["first"]  # nothing aside is left
    path.rename(tmp_path / "second")
    assert build_engine(folder, timed_plan(folder, tmp_path / "second")).warnings == ()
    assert (tmp_path / "second").read_bytes() == written


@pytest.mark.parametrize("state", ["a folder", "a damaged cache", "no folder"])
def test_a_timing_cache_costs_no_finished_engine(engine_bundle, tmp_path, state):
    folder, path = engine_bundle[0], tmp_path / state
    if state == "a folder":
        path.mkdir()
    elif state == "a damaged cache":
        path.write_bytes(b"no timings at all")
    else:
        path = tmp_path / "missing" / state
    built = build_engine(folder, timed_plan(folder, path))
    assert (folder / f"{state}.engine").stat().st_size == built.files[f"{state}.engine"].bytes > 0
    if state == "a damaged cache":  # left aside, and written anew
        assert built.warnings == ()
        assert path.read_bytes() != b"no timings at all"
    else:
        assert built.warnings[0].startswith(f"the timing cache {path} was not written: ")


# Refusals before any work ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(options=options(sm=("90",))),
            r"no compute capability '90'; it builds for 75, 80, 86, 89, 120, 121 .* --target ort --precision fp16",
        ),
        (dict(options=options("bf16", sm=("75",))), "bf16 needs compute capability 80 or newer"),
        (dict(options=options(layout="both")), "unknown engine layout 'both'; the layouts are shared, split"),
        (dict(options=options(timing_cache="f")), "times no kernels while it builds"),
        (dict(options=options(attention="plugin")), "has no attention 'plugin'; it has native"),
        (dict(options=ExportOptions(engine=EngineOptions(sm=("89",)))), "target ort builds no engine, so sm"),
        (
            dict(options=ExportOptions(target="native", engine=EngineOptions(keep_onnx=True))),
            "so keep_onnx cannot",
        ),
        (dict(options=options("fp32")), "has no precision 'fp32'; it has fp16, bf16"),
        (dict(options=options("fp8")), r"fp8 needs --calibration FILE \(\.txt, \.jsonl or \.ids\)"),
        (
            dict(options=dataclasses.replace(options("fp8", sm=("89", "86")), calibration="text.ids")),
            "fp8 needs compute capability 89 or newer .*, not 86",
        ),
        (
            dict(options=dataclasses.replace(options("int8"), activations="fp32")),
            "has no fp32 activations; take fp16 or bf16",
        ),
    ],
)
def test_refusals_come_first(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr("glm4_deploy.pipeline._trace", lambda *_: pytest.fail("work began"))
    with pytest.raises(ExportError, match=message):
        export(DEMO, tmp_path / "bundle", given["options"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["tensorrt_rtx", "polygraphy"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module):
    real = importlib.util.find_spec
    monkeypatch.setattr(engine_checks, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(ExportError, match=r"not installed.*pip install .*\[tensorrt-rtx\]"):
        export(DEMO, tmp_path / "bundle", options())


def test_full_tensorrt_needs_a_gpu(tmp_path, monkeypatch):
    wanted = ExportOptions(target="tensorrt", parity=False)
    monkeypatch.setattr(engine_checks, "find_spec", lambda _: None)
    with pytest.raises(
        ExportError, match=r"triton is not installed.*pip install .*\[tensorrt\]' with NVIDIA's"
    ):
        export(DEMO, tmp_path / "bundle", wanted)  # our plugin's compiler comes first
    native = dataclasses.replace(wanted, engine=EngineOptions(attention="native"))
    with pytest.raises(
        ExportError, match=r"tensorrt is not installed.*pip install .*\[tensorrt\]' with NVIDIA's"
    ):
        export(DEMO, tmp_path / "bundle", native)
    monkeypatch.setattr(engine_checks, "find_spec", lambda _: True)
    with pytest.raises(ExportError, match="no builder that starts here"):  # as on a host with the stub alone
        export(DEMO, tmp_path / "bundle", wanted)
    monkeypatch.setattr(engine_checks, "_require_builder", lambda _: None)
    with pytest.raises(ExportError, match="times kernels on a GPU while it builds, and there is none here"):
        export(DEMO, tmp_path / "bundle", wanted)
    with pytest.raises(ExportError, match="builds for the GPU of this machine; leave --sm out"):
        export(DEMO, tmp_path / "bundle", dataclasses.replace(wanted, engine=EngineOptions(sm=("89",))))


# Tables ---------------------------------------------------------------------------------------------


def test_the_key_follows_what_shapes_an_engine(monkeypatch):
    base = cache_key(DEMO, options())
    assert cache_key(DEMO, options()) == base
    for other in (
        options("bf16"),
        options(sm=("89",)),
        options(layout="split"),
        options(keep_onnx=True),
        dataclasses.replace(options(), max_seq_len=999),
    ):
        assert cache_key(DEMO, other) != base
    monkeypatch.setattr("glm4_deploy.cache_key.engine_version", lambda _: "9.9")
    assert cache_key(DEMO, options()) != base


def test_capacity_and_profiles():
    assert [engine_capacity(n) for n in (1, 64, 65, 32768)] == [64, 64, 128, 32768]
    short, long = (engine_profiles("causal-lm", Limits(n, 8), "shared") for n in (16384, 16385))
    assert short[1].axes["sequence"] == (1, 1, 1)
    assert long[1].axes["sequence"] == (1, 1, 2)  # no kernel for exactly one query of so many keys
    assert engine_profiles("causal-lm", Limits(5, 1), "shared")[0].axes["sequence"] == (1, 5, 5)


def test_fp8_is_kept_to_gpus_that_have_it():
    assert engine_capabilities(TARGET, "fp8", EngineOptions()) == (("89", "120"), ("89", "120"), False)
    assert engine_capabilities(TARGET, "fp16", EngineOptions()) == ((), ("80", "86", "89", "120"), True)


def test_a_long_cache_builds(tmp_path):
    """32768 positions, the checkpoints' own: the decode profile alone has no kernel for it at one query."""
    sizes = dict(max_position_embeddings=32768, head_dim=64, hidden_size=128, num_hidden_layers=1)
    source = write_checkpoint(tmp_path / "source", tiny_config(**sizes))
    export(source, tmp_path / "bundle", ExportOptions(target=TARGET, parity=False, max_batch_size=2))
    assert read_manifest(tmp_path / "bundle").engine.profiles[1].axes["sequence"] == (1, 1, 2)
    kernels = json.loads((tmp_path / "bundle" / "report.json").read_text())["engine"]["kernels"]
    assert kernels["decode"]["gemm_mha_v2"] == 1  # the prefill's
