"""The tables of targets and precisions. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from glm4_exporters.formats import FORMATS
from glm4_runtime.bundle.manifest_checks import ONNX_RUNTIME
from glm4_runtime.errors import ExportError

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

ACTIVATIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GROUPS = ("embedding", "layers", "head")


@dataclass(frozen=True)
class Products:
    """How a graph multiplies by stored matrices and looks up rows of tables.

    Attributes:
        name: key of the tables ``PRODUCTS`` and ``STORED`` in ``passes``.
        lookups: whether a quantized table can be looked up directly.
        unsigned_inputs: whether inputs that are rounded to integers have an offset of 128.
        integer_activations: the output type of products of two integers; None if any type is possible.
        even_rows: whether two 4-bit codes of a row share a byte, so that a row needs an even number of codes.
    """

    name: str
    lookups: bool = False
    unsigned_inputs: bool = False
    integer_activations: str | None = None
    even_rows: bool = False


_STANDARD = Products("standard", even_rows=True)
_FUSED = Products("fused", lookups=True, unsigned_inputs=True, integer_activations="float32")
_PACKED = Products("packed", lookups=True, unsigned_inputs=True, integer_activations="float32")


@dataclass(frozen=True)
class OtherCache:
    """A KV cache that a target's attention takes, of another type than the activations'.

    Attributes:
        stored: its name in ``CACHE_TYPES``.
        head_multiple: the head size must be a multiple of this.
        providers: ONNX Runtime's providers on which it was compared with the reference.
    """

    stored: str
    head_multiple: int = 1
    providers: tuple[str, ...] = (_CPU,)


@dataclass(frozen=True)
class Precision:
    """How the tensors of a model are stored.

    Attributes:
        activations: if set, every tensor has this type. Otherwise ``formats`` names the format of each group.
        matrices: formats of single matrices of a layer that differ from the group's.
        capability: the oldest compute capability for which TensorRT-RTX 1.7 has kernels, such as 89 for 8.9, by
            NVIDIA's support matrix.
    """

    activations: str | None
    formats: Mapping[str, str] = field(default_factory=dict)
    matrices: Mapping[str, str] = field(default_factory=dict)
    capability: int = 80

    @property
    def quantized(self) -> bool:
        return bool(self.formats)


@dataclass(frozen=True)
class Target:
    """One row: the runtime of a bundle, and how the bundle is made for this runtime.

    Attributes:
        name: the name that a user types.
        dialect: name of the graph's set of operators, for the manifest.
        attention: lowerings of attention, keys of ``ATTENTION`` in ``passes``, tried in order. Empty if our operator
            stays in the graph.
        norms: ``standard``, or ``skip``: one operator for a residual sum and the norm after it.
        runtime: the runtime of the bundle: ONNX Runtime, or the TensorRT that builds an engine from the graph.
        precisions: the precisions that it supports.
        quantized_activations: default type of a quantized bundle's activations.
        providers: by activations' type: ONNX Runtime's providers that have every kernel of the graph.
        formats: replacements of a precision's formats, by name, for which this target has faster kernels.
        own: this target's overrides of PRECISIONS.
        says: additional entries of the manifest's ``tensor_precisions``.
        caches: the KV caches of other types than the activations' that attention takes, by the option's name.
        default_cache: the cache of ``auto``, a key of ``caches``; None: the activations' type.
        input_major: whether integer matrices are stored [in, out], as the products read them.
        own_operators: whether the graph has operators of ``glm4_plugins``, which ONNX Runtime must load.
    """

    name: str
    dialect: str
    attention: tuple[str, ...]
    products: Products
    norms: str
    runtime: str
    precisions: tuple[str, ...]
    quantized_activations: str
    providers: Mapping[str, tuple[str, ...]]
    formats: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Precision] = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)
    caches: Mapping[str, OtherCache] = field(default_factory=dict)
    default_cache: str | None = None
    input_major: bool = False
    own_operators: bool = False

    @property
    def engine(self) -> str | None:
        """The TensorRT that builds the engine; None if ONNX Runtime runs the graph."""
        return None if self.runtime == ONNX_RUNTIME else self.runtime


PRECISIONS = {
    "fp32": Precision("float32"),
    "fp16": Precision("float16", capability=75),
    "bf16": Precision("bfloat16"),
    "int8": Precision(None, {"embedding": "int8", "layers": "int8", "head": "int8"}),
    "int4": Precision(None, {"embedding": "int8", "layers": "int4", "head": "int8"}),
    "fp8": Precision(None, {"embedding": "int8", "layers": "fp8", "head": "int8"}, capability=89),
    "nvfp4": Precision(None, {"embedding": "int8", "layers": "nvfp4", "head": "int8"}, capability=100),
    "nvfp4-w4a4": Precision(
        None, {"embedding": "int8", "layers": "nvfp4-w4a4", "head": "int8"}, capability=100
    ),
    "mxfp8": Precision(None, {"embedding": "int8", "layers": "mxfp8", "head": "int8"}, capability=89),
    # down_proj's input is a product of two activations. With one scale, its few huge values leave too few steps for
    # the rest.
    "int8-sq": Precision(
        None, {"embedding": "int8", "layers": "int8-sq", "head": "int8"}, {"mlp.down_proj": "int8"}
    ),
}
_FLOATS, _INTEGERS = ("fp32", "fp16", "bf16"), ("int8", "int4", "int8-sq")

# TensorRT multiplies directly by int8 with a scale per output channel. It widens int8 in blocks before the product.
_PER_CHANNEL = {"int8": "int8-channel"}
_SIGNED = {name: f"{name}-signed" for name in ("int4", "int4-fine", "int4-wide")}
# After GPTQ most of the error comes from the head, and least from q, k and o_proj. The formats below take 5.01 bits a
# weight on the demo; llama.cpp's Q4_K_M takes 5.02 (benchmarks/accuracy.py).
_INT4_ON_CPU = {
    "int4": Precision(
        None,
        {"embedding": "int4", "layers": "int4", "head": "int8"},
        dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"), "int4-wide"),
    )
}
# Standard operators only, for any runtime of ONNX opset 24. Both TensorRTs build from this graph.
_NATIVE = Target(
    name="native",
    dialect="native",
    attention=("standard",),
    products=_STANDARD,
    norms="standard",
    runtime=ONNX_RUNTIME,
    precisions=(*_FLOATS, *_INTEGERS),
    quantized_activations="float32",
    providers={"float32": (_CPU,), "float16": (_CPU,), "bfloat16": ()},  # not tried on CUDA
    formats=_PER_CHANNEL,
)
_TENSORRT = replace(
    _NATIVE,
    precisions=("fp16", "bf16", *_INTEGERS, "fp8", "nvfp4", "nvfp4-w4a4", "mxfp8"),
    quantized_activations="float16",
)
_ROWS = (
    Target(
        name="ort",
        dialect="ort",
        attention=("group-query", "standard"),
        products=_FUSED,
        norms="skip",
        runtime=ONNX_RUNTIME,
        precisions=(*_FLOATS, *_INTEGERS),
        quantized_activations="float32",
        # ONNX Runtime's kernel list (docs/OperatorKernels.md): GroupQueryAttention on CUDA takes fp16 and bf16 only,
        # and the CPU has no bf16 kernels for attention.
        providers={"float32": (_CPU,), "float16": (_CUDA, _CPU), "bfloat16": (_CUDA,)},
        formats=_SIGNED,
        own=_INT4_ON_CPU,
        caches={
            "int8": OtherCache("int8", head_multiple=8)
        },  # the fallback for other head sizes has no int8 cache
    ),
    # Our own kernels for products and attention. They read the weights as the file holds them.
    Target(
        name="cpu",
        dialect="cpu",
        attention=(),
        products=_PACKED,
        norms="skip",
        runtime=ONNX_RUNTIME,
        precisions=_INTEGERS,
        quantized_activations="float32",
        providers={"float32": (_CPU,)},
        formats=_SIGNED,
        own=_INT4_ON_CPU,
        says={"inputs of products": "int8, a scale per row and block"},
        caches={
            "fp16": OtherCache("float16"),
            "bf16": OtherCache("bfloat16"),
            "int8": OtherCache("int8-rows"),
        },
        # Within the gate of each precision, the fastest and the smallest (docs/performance.md).
        default_cache="int8",
        own_operators=True,
    ),
    _NATIVE,
    replace(_TENSORRT, name="tensorrt-rtx", runtime="tensorrt-rtx", input_major=True),
    # A quantized cache is the plugin's: the graph that parity checks rounds keys and values. input_major was not
    # measured.
    replace(
        _TENSORRT,
        name="tensorrt",
        runtime="tensorrt",
        caches={
            "int8": OtherCache("int8", providers=()),
            "fp8": OtherCache("float8e4m3fn", providers=()),
        },
    ),
)
TARGETS = {row.name: row for row in _ROWS}

# Formats that a recipe may name: every target supports them. Replacements of single targets are left out.
RECIPE_FORMATS = tuple(
    name
    for name, form in FORMATS.items()
    if form.portable and not any(name in target.formats.values() for target in _ROWS)
)


def target_row(name: str) -> Target:
    """The target's row.

    Raises:
        ExportError: an unknown name. The message lists the targets.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; the targets are {', '.join(TARGETS)}")
    return TARGETS[name]


def require_target(target: str, precision: str) -> tuple[Target, Precision]:
    """The rows of both tables.

    Raises:
        ExportError: an unknown name, or a pair that cannot be exported. The message lists the possible ones.
    """
    row = target_row(target)
    if precision not in row.precisions:
        raise ExportError(
            f"target {target} has no precision {precision!r}; it has {', '.join(row.precisions)}"
        )
    return row, row.own.get(precision, PRECISIONS[precision])
