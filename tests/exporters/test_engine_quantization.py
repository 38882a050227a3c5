"""Which quantized products TensorRT-RTX parses and builds, and how often an engine stores their weights.

Each form is a strongly typed network of one product with 16-bit activations, built for a prefill and a decode
profile. The passes that write these forms rest on what is held here.
"""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from glm4_exporters.engine.network import Network, check_compiled, compiled_weights, fold_weight_transposes

trt = pytest.importorskip("tensorrt_rtx")

OUT, IN = 1024, 2048
PROFILES = (((1, 1), (1, 512), (1, 512)), ((1, 1), (8, 1), (8, 1)))
INT8, INT4, UINT4, UINT8 = TensorProto.INT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.UINT8
FP4, E8M0 = TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E8M0
FP8, FP16, BF16 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16, TensorProto.BFLOAT16
RAW = {
    FP8: ml_dtypes.float8_e4m3fn,
    BF16: ml_dtypes.bfloat16,
    INT8: np.int8,
    UINT8: np.uint8,
    FP16: np.float16,
}


def tensor(name, values, element):
    values = np.asarray(values)
    if element in (INT4, UINT4):
        return helper.make_tensor(name, element, values.shape, values.reshape(-1))
    raw = values.astype(RAW[element]).tobytes()
    return onnx.TensorProto(name=name, data_type=element, dims=values.shape, raw_data=raw)


def product(
    element, scale_shape, axis, block, zero=None, quantized_input=False, activations=FP16, input_major=False
):
    """x [B, S, in] times the transpose of a dequantized weight [out, in], as our graphs write it; or times [in, out]."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 8, (OUT, IN)) if element in (UINT4, UINT8) else rng.integers(-7, 8, (OUT, IN))
    scales = rng.random(scale_shape) * 0.01 + 0.001
    constants = [
        tensor("w", weights.T if input_major else weights, element),
        tensor("s", scales, activations),
    ]
    inputs, attributes = ["w", "s"], {}
    if zero is not None:
        constants.append(tensor("z", np.full(scale_shape, zero), element))
        inputs.append("z")
    if axis is not None:
        attributes["axis"] = axis
    if block:
        attributes["block_size"] = block
    nodes = [helper.make_node("DequantizeLinear", inputs, ["wd"], **attributes)]
    if not input_major:
        nodes.append(helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]))
    x = "x"
    if quantized_input:
        constants += [tensor("xs", 0.02, activations), tensor("xz", 0, element)]
        nodes.append(helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]))
        x = "xd"
    nodes.append(helper.make_node("MatMul", [x, "wd" if input_major else "wt"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", activations, ["batch", "sequence", IN])],
        [helper.make_tensor_value_info("y", activations, ["batch", "sequence", OUT])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


class Layers(trt.ILogger):
    """Keeps the message that lists a built engine's layers."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.text = ""

    def log(self, severity, message):
        if severity == trt.ILogger.VERBOSE and message.startswith("Layers:"):
            self.text = message


class Built:
    """The outcome of a parse and a build: bytes per weight and layers per profile, or what was said."""

    def __init__(self, model, fold=True):
        logger = Layers()
        builder = trt.Builder(logger)
        definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(definition, logger)
        self.refusal, self.folded, self.bytes_per_weight = None, 0, 0.0
        if not parser.parse(model.SerializeToString()):
            self.refusal = parser.get_error(0).desc()
            return
        self.network = Network(trt, definition)
        if fold:
            self.folded = fold_weight_transposes(self.network)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for low, best, high in PROFILES:
            profile = builder.create_optimization_profile()
            profile.set_shape("x", (*low, IN), (*best, IN), (*high, IN))
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(definition, config)
        assert engine is not None
        self.bytes_per_weight = engine.nbytes / (OUT * IN)
        self.weights = compiled_weights(logger.text, ["prefill", "decode"])
        self.log = logger.text
        self.kernels = check_compiled(logger.text, ["prefill", "decode"], {})


def in_blocks(element, block, activations=FP16):
    return dict(element=element, scale_shape=(OUT, IN // block), axis=1, block=block, activations=activations)


def fp8(scale_shape, axis, activations=FP16):
    return dict(
        element=FP8,
        scale_shape=scale_shape,
        axis=axis,
        block=0,
        quantized_input=True,
        activations=activations,
    )


INT8_CHANNELS = dict(element=INT8, scale_shape=(OUT,), axis=0, block=0)

# name: arguments of product, the most bytes per weight that an engine of both profiles may take, and the prefill's
# layers. "runtime_fusion" reads the quantized weight and multiplies; "kgen" and "gemm" are a pass over memory each.
FORMS = {
    "int8 per channel": (INT8_CHANNELS, 1.1, {"runtime_fusion": 1}),
    "int8 per channel in bf16": (INT8_CHANNELS | {"activations": BF16}, 1.1, {"runtime_fusion": 1}),
    "int8 per channel, zero points": (INT8_CHANNELS | {"zero": 0}, 1.1, {"runtime_fusion": 1}),
    # the whole weight is written as fp16 before each product
    "int8 in blocks of 128": (in_blocks(INT8, 128), 1.2, {"kgen": 1, "gemm": 1}),
    "int8 in blocks of 32": (in_blocks(INT8, 32), 1.3, {"kgen": 1, "gemm": 1}),
    "int4 in blocks of 128": (in_blocks(INT4, 128), 0.65, {"runtime_fusion": 1}),
    "int4 in blocks of 32": (in_blocks(INT4, 32), 0.7, {"runtime_fusion": 1}),
    "int4 in bf16": (in_blocks(INT4, 32, BF16), 0.7, {"runtime_fusion": 1}),
    # the input is quantized, then the product
    "fp8 per tensor": (fp8((), None), 1.2, {"kgen": 1, "gemm": 1}),
    "fp8 per tensor in bf16": (fp8((), None, BF16), 1.2, {"kgen": 1, "gemm": 1}),
    # and the rounded product scaled once more
    "fp8 per channel": (fp8((OUT,), 0), 1.3, {"kgen": 2, "gemm": 1}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_build_and_store_each_weight_once(name):
    arguments, limit, layers = FORMS[name]
    built = Built(product(**arguments))
    assert built.refusal is None
    assert built.folded == 1
    counts = built.network.count()
    assert (counts["DEQUANTIZE"], counts["QUANTIZE"]) == (
        (2, 1) if arguments.get("quantized_input") else (1, 0)
    )
    assert built.bytes_per_weight <= limit
    assert {kind: n for kind, n in built.kernels["prefill"].items() if kind != "shape_call"} == layers


@pytest.mark.parametrize(
    ("as_written", "input_major"),
    [
        (INT8_CHANNELS, dict(scale_shape=(OUT,), axis=1)),
        (in_blocks(INT4, 32), dict(scale_shape=(IN // 32, OUT), axis=0)),
    ],
    ids=["int8", "int4"],
)
def test_input_major_weights_are_read_by_the_same_kernels(as_written, input_major):
    written = Built(product(**as_written))
    turned = Built(product(**as_written | input_major, input_major=True))
    assert (turned.refusal, turned.folded) == (None, 0)
    assert turned.kernels == written.kernels
    assert turned.bytes_per_weight == pytest.approx(written.bytes_per_weight, abs=0.01)


def test_why_transposes_are_folded():
    """Left alone, the transposed int8 weight is stored once per profile."""
    built = Built(product(element=INT8, scale_shape=(OUT,), axis=0, block=0), fold=False)
    assert built.bytes_per_weight > 2


def by_weight(constants, dequantize, x="x"):
    """x times the transpose of a weight that the given nodes dequantize to "wd"; ``x``: their rounded input."""
    nodes = [
        *dequantize,
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", [x, "wt"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, FP16, ["batch", "sequence", w]) for n, w in (("x", IN), ("y", OUT))
    ]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def raw(name, element, shape, size=1):
    values = np.random.default_rng(0).integers(1, 120, size=int(np.prod(shape) * size), dtype=np.uint8)
    return onnx.TensorProto(name=name, data_type=element, dims=shape, raw_data=values.tobytes())


def test_nvfp4_weights_are_stored_in_4_bits():
    dequantize = [
        helper.make_node("DequantizeLinear", ["s", "t"], ["sd"]),
        helper.make_node("DequantizeLinear", ["w", "sd"], ["wd"], axis=1, block_size=16),
    ]
    constants = [
        raw("w", FP4, (OUT, IN), 0.5),
        raw("s", FP8, (OUT, IN // 16)),
        tensor("t", np.float16(0.25), FP16),
    ]
    built = Built(by_weight(constants, dequantize))
    assert (built.refusal, built.folded, built.network.count()["DEQUANTIZE"]) == (None, 1, 2)
    assert built.bytes_per_weight < 0.75
    assert built.weights == {name: {"FP4E2M1": 1, "FP8": 1} for name in ("prefill", "decode")}
    # as int8 in blocks: the whole weight is written as fp16 before the product
    assert {kind for kind in built.kernels["prefill"] if kind != "shape_call"} == {"kgen", "gemm"}


def test_4_bit_floats_are_multiplied_by_4_bit_floats():
    """With rounded inputs the product itself reads them; nothing is widened."""
    blocks = dict(axis=-1, block_size=16)
    nodes = [
        helper.make_node(
            "TRT_FP4DynamicQuantize", ["x", "xt"], ["xq", "xs"], domain="trt", scale_type=FP8, **blocks
        ),
        helper.make_node("DequantizeLinear", ["xs", "xt"], ["xsd"]),
        helper.make_node("DequantizeLinear", ["xq", "xsd"], ["xd"], **blocks),
        helper.make_node("DequantizeLinear", ["s", "t"], ["sd"]),
        helper.make_node("DequantizeLinear", ["w", "sd"], ["wd"], axis=1, block_size=16),
    ]
    totals = [tensor(name, np.float16(0.25), FP16) for name in ("t", "xt")]
    built = Built(
        by_weight([raw("w", FP4, (OUT, IN), 0.5), raw("s", FP8, (OUT, IN // 16)), *totals], nodes, "xd")
    )
    assert (built.refusal, built.network.count()["DYNAMIC_QUANTIZE"]) == (None, 1)
    products = [line for line in built.log.splitlines() if "LayerType: gemm," in line]
    assert len(products) == 2  # one per profile
    for line in products:
        inputs, _, constants = line.partition("Constants: [")
        assert "Datatype: FP4E2M1" in inputs
        assert "Datatype: FP4E2M1" in constants.partition("Outputs: [")[0]
    assert "runtime_fusion" not in built.kernels["decode"]


def test_mxfp8_weights_need_the_parsers_own_operator():
    weights, attributes = raw("w", FP8, (OUT, IN)), dict(axis=-1, block_size=32, output_dtype=FP16)
    scales = (OUT, IN // 32)
    operator = helper.make_node("TRT_MXFP8DequantizeLinear", ["w", "s"], ["wd"], domain="trt", **attributes)
    built = Built(by_weight([weights, raw("s", UINT8, scales)], [operator]))
    assert (built.refusal, built.folded, built.network.count()["DEQUANTIZE"]) == (None, 1, 1)
    assert built.bytes_per_weight < 1.25
    assert built.weights == {name: {"FP8": 1} for name in ("prefill", "decode")}
    standard = helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=1, block_size=32)
    assert Built(by_weight([weights, raw("s", E8M0, scales)], [standard])).refusal


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(element=UINT8, scale_shape=(OUT, IN // 32), axis=1, block=32, zero=128), "UINT8"),
        (dict(element=UINT4, scale_shape=(OUT, IN // 32), axis=1, block=32, zero=8), "import initializer"),
        (dict(element=INT4, scale_shape=(OUT, IN // 32), axis=1, block=32, zero=3), "Non-zero zero point"),
    ],
    ids=["uint8", "uint4", "asymmetric"],
)
def test_forms_that_are_refused(arguments, reason):
    """Only symmetric signed weights: what ONNX Runtime's passes write as unsigned must be written otherwise."""
    built = Built(product(**arguments))
    assert reason in built.refusal
