"""Target ``tensorrt`` by our plugin, up to its builder, which needs a GPU: graph, plan, manifest, refusals."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest
from checkpoints import tiny_config, write_checkpoint
from fake_driver import FakeGpu

from glm4_deploy import engine_bundle
from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_deploy.validate.run import ValidateOptions, validate
from glm4_exporters.engine import checks as engine_checks
from glm4_exporters.engine import gpu as engine_gpu
from glm4_exporters.engine.build import BuiltEngine
from glm4_exporters.engine.network import Network, float32_operators
from glm4_exporters.engine.options import EngineOptions
from glm4_plugins.launch import PHASES, PLUGIN_INPUTS, PLUGIN_SCALES, choices, counters_shape
from glm4_plugins.operator import OP_TYPE, PLUGIN_FP8, PLUGIN_INT8
from glm4_runtime import ExportError
from glm4_runtime.bundle import file_entry, read_manifest

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
LAYERS, KV_HEADS, BATCH, PROCESSORS = 2, 2, 3, 114
SIZES = dict(head_dim=64, max_position_embeddings=32768)


@pytest.fixture
def gpu(monkeypatch):
    """A host with TensorRT and a GPU of compute capability 9.0, whose builder keeps what it is given."""
    host = SimpleNamespace(capability="90", plan=None, plans=[], models={}, files=[])

    def build(folder, plan, _progress):
        host.plan = plan
        host.plans.append(plan)
        host.files.append({path.name for path in folder.iterdir()})
        models = {file: ir.load(folder / graph) for file, graph in plan.graphs.items()}
        for model in models.values():  # their data is in the folder, which will be gone
            ir.external_data.load_to_model(model)
        host.models |= models
        for name in plan.graphs:
            (folder / name).write_bytes(b"engine")
        entries = {name: file_entry(folder / name) for name in plan.graphs}
        return BuiltEngine(entries, {}, {}, (host.capability,), {}, 1, 1)

    monkeypatch.setattr(engine_checks, "find_spec", lambda _: True)
    monkeypatch.setattr(engine_checks, "_require_builder", lambda _: None)
    for module in ("glm4_exporters.engine.checks", "glm4_deploy.plan"):
        monkeypatch.setattr(f"{module}.gpu_capability", lambda: host.capability)
    monkeypatch.setattr("glm4_deploy.plan.gpu_processors", lambda: PROCESSORS)
    monkeypatch.setattr(engine_bundle, "engine_version", lambda _: "11.4.0.106")
    monkeypatch.setattr(engine_bundle, "build_engine", build)
    return host


def exported(
    tmp_path,
    precision="fp16",
    sizes=SIZES,
    task="causal-lm",
    calibration=None,
    kv_cache="auto",
    stages=(),
    **engine,
):
    source = write_checkpoint(tmp_path / "source", tiny_config(**sizes), task=task)
    options = ExportOptions(
        target="tensorrt",
        precision=precision,
        max_batch_size=BATCH,
        parity=False,
        calibration=calibration,
        kv_cache=kv_cache,
        stages=stages,
        engine=EngineOptions(**engine),
    )
    export(source, tmp_path / "bundle", options)
    return read_manifest(tmp_path / "bundle")


def plugins(model, name=OP_TYPE):
    return [node for node in model.graph if node.op_type == name]


def test_the_builder_gets_the_plugins_graph_and_the_manifest_says_so(tmp_path, gpu):
    manifest = exported(tmp_path)
    plan, (model,) = gpu.plan, gpu.models.values()
    assert (plan.kind, plan.plugin) == ("tensorrt", "glm4_plugins.tensorrt")
    assert plan.layers["PLUGIN_V3"] == len(plugins(model)) == LAYERS
    assert (
        plan.layers["ATTENTION_INPUT"]
        == plan.layers["KV_CACHE_UPDATE"]
        == plan.layers["ROTARY_EMBEDDING"]
        == 0
    )
    values = {
        name: plugins(model)[0].attributes[name].value
        for name in ("max_batch", "compute_capability", "processors", "tiles", "phase")
    }
    wanted = {"max_batch": BATCH, "compute_capability": 90, "processors": PROCESSORS, "tiles": 0}
    assert values == wanted | {"phase": PHASES["shared"]}
    counters = ("counters", "int32", counters_shape(choices(90, processors=PROCESSORS)[0]))
    assert dataclasses.astuple(plan.inputs[-1]) == dataclasses.astuple(manifest.inputs[-1]) == counters
    assert dataclasses.astuple(manifest.outputs[-1]) == ("present_counters", *counters[1:])
    assert {value.name for value in model.graph.inputs} == {spec.name for spec in plan.inputs}
    assert {value.name for value in model.graph.outputs} == {spec.name for spec in manifest.outputs}
    assert list(model.graph.inputs[-2].shape)[2] == 32768  # the capacity, fixed
    assert plan.profiles[1].axes["sequence"] == (1, 1, 1)  # at any capacity: the limit is TensorRT-RTX's own
    assert (manifest.engine.attention, manifest.engine.plugin_version) == ("plugin", "1")
    assert manifest.compute_capabilities == ("90",)


@pytest.mark.parametrize(
    ("layout", "cache", "element", "plugin"),
    [
        ("shared", "int8", ir.DataType.INT8, PLUGIN_INT8),
        ("split", "int8", ir.DataType.INT8, PLUGIN_INT8),
        ("shared", "fp8", ir.DataType.FLOAT8E4M3FN, PLUGIN_FP8),
    ],
)
def test_a_quantized_cache_is_the_plugins(tmp_path, gpu, layout, cache, element, plugin):
    """The graph that is proved has a cache of the activations' type, and rounds what it stores."""
    manifest = exported(tmp_path, kv_cache=cache, layout=layout, keep_onnx=True)
    assert gpu.plan.layers["PLUGIN_V3"] == LAYERS
    for model in gpu.models.values():
        assert plugins(model) == []
        nodes = plugins(model, plugin)
        assert len(nodes) == LAYERS
        for node in nodes:
            assert len(node.inputs) == len(PLUGIN_INPUTS) + len(PLUGIN_SCALES)
            assert node.inputs[9].dtype == ir.DataType.INT32  # the counters stand before the scales
            for i in (3, 4):
                assert (node.inputs[i].dtype, node.outputs[i - 2].dtype) == (element, element)
            for scale in node.inputs[10:]:
                array = scale.const_value.numpy()
                assert (array.shape, array.dtype) == ((KV_HEADS, SIZES["head_dim"]), "float32")
                assert (array > 0).all()
    caches = {
        s.dtype for s in (*gpu.plan.inputs, *manifest.inputs, *manifest.outputs) if "key_values" in s.name
    }
    assert caches == {manifest.kv_cache} == {element.name.lower()}
    kept = ir.load(tmp_path / "bundle" / "model.onnx").graph
    assert {v.dtype for v in kept.inputs if "key_values" in v.name} == {ir.DataType.FLOAT16}
    rounding = [node.inputs[2].dtype for node in kept if node.op_type == "QuantizeLinear"]
    assert rounding == [element] * 2 * LAYERS
    assert not [
        node for model in gpu.models.values() for node in model.graph if node.op_type == "QuantizeLinear"
    ]
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert report["calibration"]["kv_cache"]["scales"].startswith("per head and channel")


@pytest.mark.parametrize(("cache", "least", "most"), [("int8", 4e-5, 2e-4), ("fp8", 4e-4, 2e-3)])
def test_what_the_demo_loses_by_a_quantized_cache(tmp_path, gpu, cache, least, most):
    """The figures of docs/tensorrt.md and thresholds.toml; without a quantized cache the mean KL is 8e-7."""
    options = ExportOptions(target="tensorrt", precision="fp16", kv_cache=cache)
    result = export(DEMO, tmp_path / "bundle", options)
    assert least < result.parity.mean_kl < most


def test_validate_runs_the_kept_graph_with_the_rounding(tmp_path, gpu):
    losses = {}
    for cache in ("auto", "int8"):
        exported(tmp_path / cache, kv_cache=cache, keep_onnx=True)
        folders = tmp_path / cache / "bundle", tmp_path / cache / "source"
        report = validate(*folders, ValidateOptions(layers=True, gate=None, greedy=False))
        assert report.out_of_band == []
        losses[cache] = report.comparisons[0].metrics["relative_error"]
    assert losses["int8"] > 2 * losses["auto"] > 0


@pytest.mark.parametrize("layout", ["shared", "split"])
def test_each_graph_has_the_parsers_form_of_4_bit_floats(tmp_path, gpu, layout):
    gpu.capability = "100"
    manifest = exported(tmp_path, precision="nvfp4", layout=layout, keep_onnx=True)
    for model in gpu.models.values():
        kinds = Counter(value.dtype for value in model.graph.initializers.values())
        assert kinds[ir.DataType.FLOAT4E2M1] == kinds[ir.DataType.FLOAT8E4M3FN] == 7 * LAYERS
        assert kinds[ir.DataType.INT8] == 1  # the head
    kept = ir.load(tmp_path / "bundle" / "model.onnx").graph
    assert not {v.dtype for v in kept.initializers.values()} & {ir.DataType.FLOAT4E2M1}
    assert "engine.weights" not in {path.name for path in (tmp_path / "bundle").iterdir()}
    assert manifest.precision == "nvfp4"


def test_an_older_gpu_has_no_4_bit_floats(tmp_path, gpu):
    with pytest.raises(ExportError, match="nvfp4 needs compute capability 100 or newer, and this GPU has 90"):
        exported(tmp_path, precision="nvfp4")
    assert gpu.plan is None


def test_small_blocks_are_asked_for_by_the_attention_option(tmp_path, gpu):
    manifest = exported(tmp_path, attention="plugin-small")
    (model,) = gpu.models.values()
    assert {node.attributes["tiles"].value for node in plugins(model)} == {-1}
    assert manifest.engine.attention == "plugin"


def test_two_engines_have_a_kernel_each(tmp_path, gpu):
    exported(tmp_path, layout="split")
    phases = {
        file: {node.attributes["phase"].value for node in plugins(model)}
        for file, model in gpu.models.items()
    }
    assert phases == {"prefill.engine": {PHASES["prefill"]}, "decode.engine": {PHASES["decode"]}}
    assert not list((tmp_path / "bundle").glob("*.onnx"))


def test_both_graphs_read_the_same_weights(tmp_path, gpu):
    """The plugin's graph is traced anew, so its weights are found by name, not by place."""
    exported(tmp_path / "plugin")
    (ours,) = gpu.models.values()
    exported(tmp_path / "native", attention="native")
    (native,) = gpu.models.values()
    names = {name for name in native.graph.initializers if name.endswith(("weight", "weight.0", "bias"))}
    assert names
    assert len(names) > 8 * LAYERS
    for name in names:
        wanted = native.graph.initializers[name].const_value.numpy()
        assert (ours.graph.initializers[name].const_value.numpy() == wanted).all(), name


@pytest.mark.parametrize("precision", ["int4", "fp8"])
def test_quantized_weights_reach_the_plugins_graph(tmp_path, gpu, precision):
    text = tmp_path / "text.ids"
    text.write_text(" ".join(map(str, range(4, 60))))
    manifest = exported(tmp_path, precision, calibration=str(text))
    (model,) = gpu.models.values()
    assert gpu.plan.layers["DEQUANTIZE"] == {"fp8": 4 * LAYERS}.get(precision, 0) + 7 * LAYERS + 1
    assert gpu.plan.layers["QUANTIZE"] == {"fp8": 4 * LAYERS}.get(precision, 0)
    assert len(plugins(model)) == LAYERS
    assert manifest.precision == precision


@pytest.mark.parametrize(
    ("layout", "cache"),
    [
        ("split", "auto"),
        ("shared", "int8"),
        pytest.param("shared", "auto", marks=pytest.mark.more),
        pytest.param("split", "int8", marks=pytest.mark.more),
    ],
)
def test_each_stage_has_engines_and_counters_of_its_own(tmp_path, gpu, layout, cache):
    manifest = exported(tmp_path, stages=(2,), layout=layout, kv_cache=cache)
    suffixes = ("engine",) if layout == "shared" else ("prefill.engine", "decode.engine")
    plugin = PLUGIN_INT8 if cache == "int8" else OP_TYPE
    for number, (plan, stage) in enumerate(zip(gpu.plans, manifest.stages, strict=True), 1):
        assert (stage.first_layer, stage.layers) == (number - 1, 1)
        assert stage.data_files == tuple(f"stage-{number}.{suffix}" for suffix in suffixes)
        assert plan.profiles == stage.profiles
        assert (plan.layers["PLUGIN_V3"], plan.plugin) == (1, "glm4_plugins.tensorrt")
        for file in stage.data_files:
            model = gpu.models[file]
            (node,) = plugins(model, plugin)
            assert node.inputs[9] is next(value for value in model.graph.inputs if value.name == "counters")
            assert node.outputs[3] is model.graph.outputs[-1]
            assert node.outputs[3].name == "present_counters"
            assert {value.name for value in model.graph.inputs} == {spec.name for spec in plan.inputs}
    names = [
        {value.name for value in gpu.models[stage.data_files[0]].graph.inputs} for stage in manifest.stages
    ]
    assert names[0] - names[1] == {"input_ids", "past_key_values.0.key", "past_key_values.0.value"}
    assert names[1] - names[0] >= {"logits_indices", "past_key_values.1.key", "past_key_values.1.value"}
    assert manifest.engine_files == tuple(file for stage in manifest.stages for file in stage.data_files)


def test_a_stages_onnx_files_are_deleted_before_the_next_build(tmp_path, gpu):
    exported(tmp_path, stages=(2,))
    first, second = ({name for name in names if name.startswith("stage-")} for names in gpu.files)
    both = {f"stage-{number}.onnx{data}" for number in (1, 2) for data in ("", ".data")}
    assert first == both
    assert second == {"stage-1.engine", "stage-2.onnx", "stage-2.onnx.data"}
    assert {path.name for path in (tmp_path / "bundle").glob("stage-*")} == {
        "stage-1.engine",
        "stage-2.engine",
    }


def test_all_stages_together_read_the_weights_of_the_whole_graph(tmp_path, gpu):
    exported(tmp_path / "whole", "int4")
    exported(tmp_path / "staged", "int4", stages=(2,))
    whole, *stages = gpu.models.values()
    found = {}
    for model in stages:
        found |= {name: value for name, value in model.graph.initializers.items() if "weight" in name}
    wanted = {name: value for name, value in whole.graph.initializers.items() if "weight" in name}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].const_value.numpy() == value.const_value.numpy()).all(), name


def test_a_classifier_has_no_cache_and_attends_natively(tmp_path, gpu):
    manifest = exported(
        tmp_path, task="sequence-classification", sizes=SIZES | {"max_position_embeddings": 256}
    )
    assert (gpu.plan.plugin, manifest.engine.attention) == (None, "native")
    assert gpu.plan.layers["ATTENTION_INPUT"] == LAYERS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(sizes=SIZES | {"head_dim": 16}), "no attention plugin .*head_dim is 16; .*--attention native"),
        (dict(task="encoder", attention="plugin-small"), "needs a KV cache, but task encoder has none"),
        (dict(task="encoder", attention="plugin"), "needs a KV cache, but task encoder has none"),
        (
            dict(kv_cache="int8", attention="native"),
            "cannot be int8: TensorRT's own attention takes no int8 cache",
        ),
        (dict(kv_cache="int8", precision="bf16"), "cannot be int8: .* fp32 and fp16 activations only"),
        (dict(kv_cache="fp8", attention="native"), "TensorRT's own attention takes no fp8 cache"),
        (
            dict(kv_cache="fp8", capability="86"),
            "cannot be fp8: .*capability 89 or newer, and this GPU has 86; use --kv-cache int8",
        ),
        (
            dict(capability="75"),
            "no attention plugin .*capability 75 has no block sizes; .*--attention native",
        ),
        (dict(capability="86", precision="fp8", calibration="text.ids"), "89 or newer, and this GPU has 86"),
    ],
)
def test_refusals_come_first(tmp_path, gpu, monkeypatch, given, message):
    monkeypatch.setattr("glm4_deploy.pipeline._trace", lambda *_: pytest.fail("work began"))
    gpu.capability = given.pop("capability", gpu.capability)
    with pytest.raises(ExportError, match=message):
        exported(tmp_path, **given)


def test_aliases_are_asked_for_only_with_the_plugin(monkeypatch):
    """By the configuration that TensorRT-RTX's bindings make, which have the same setting."""
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    from glm4_exporters.engine.worker import _config

    feature = trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03
    for plugin, wanted in (("glm4_plugins.tensorrt", True), (None, False)):
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(0)
        plan = {"timing_cache": None, "plugin": plugin, "inputs": [], "capabilities": []}
        config = _config(trt, plan, builder, network, [], None)
        assert config.get_preview_feature(feature) is wanted


def test_the_cache_key_has_the_gpu_that_kernels_are_timed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_checks, "find_spec", lambda _: True)
    monkeypatch.setattr(engine_checks, "_require_builder", lambda _: None)
    monkeypatch.setattr("glm4_deploy.cache_key.engine_version", lambda _: "11.4.0.106")
    source = write_checkpoint(tmp_path / "source", tiny_config(**SIZES))
    drivers = {"h100": FakeGpu(), "again": FakeGpu(), "h200": FakeGpu(), "l4": FakeGpu(), "slice": FakeGpu()}
    drivers["h200"].model = b"NVIDIA H200"
    drivers["l4"].attributes = FakeGpu.attributes | {75: 8, 76: 9}
    drivers["slice"].attributes = FakeGpu.attributes | {16: 16}
    keys = {"tensorrt": {}, "tensorrt-rtx": {}}
    for target, found in keys.items():
        for name, driver in drivers.items():
            monkeypatch.setattr(engine_gpu.ctypes, "CDLL", lambda _, driver=driver: driver)
            found[name] = cache_key(source, ExportOptions(target=target, precision="fp16", parity=False))
    assert keys["tensorrt"]["h100"] == keys["tensorrt"]["again"]
    assert len({*keys["tensorrt"].values()}) == 4
    assert len({*keys["tensorrt-rtx"].values()}) == 1  # its engines are built without a GPU, for GPUs by name


class Layer:
    """One layer of a stand-in network: its type, its node, and the tensors that it reads and makes."""

    def __init__(self, kind, node, reads, makes):
        self.type, self.metadata, self._reads, self._makes = (
            f"LayerType.{kind}",
            f"[ONNX Layer: {node}]",
            reads,
            makes,
        )
        self.num_inputs, self.num_outputs = len(reads), len(makes)

    def get_input(self, i):
        return self._reads[i]

    def get_output(self, i):
        return self._makes[i]


@pytest.mark.parametrize("scratch_is_read", [False, True])
def test_a_plugins_scratch_is_no_fall_to_float32(scratch_is_read):
    half, scratch, logits = (
        SimpleNamespace(name=name, dtype=dtype)
        for name, dtype in (("half", 16), ("scratch", 32), ("logits", 32))
    )
    last = Layer("CAST", "cast", [half, scratch] if scratch_is_read else [half], [logits])
    layers = [Layer("PLUGIN_V3", "attention", [], [half, scratch]), last]
    definition = SimpleNamespace(
        num_layers=2,
        num_inputs=0,
        num_outputs=1,
        get_layer=lambda i: layers[i],
        get_output=lambda _: logits,
    )
    network = Network(SimpleNamespace(float32=32), definition)
    operators = {"attention": OP_TYPE, "cast": "Cast"}
    if scratch_is_read:
        with pytest.raises(ExportError, match="attention among them"):
            float32_operators(network, operators)
    else:
        assert float32_operators(network, operators) == {"Cast": 1}
