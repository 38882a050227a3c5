"""What can be exported: targets and precisions, as rows of two tables. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from glm4_exporters.formats import FORMATS
from glm4_runtime.errors import ExportError

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

ACTIVATIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GROUPS = ("embedding", "layers", "head")
ONNX_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Products:
    """How a graph multiplies by stored matrices, and looks up rows.

    Attributes:
        name: of the lowering in ``passes``.
        lookups: a table can be looked up in its stored form.
        unsigned_inputs: inputs that are rounded to integers are stored around 128.
        integer_activations: the type that products of two integers give; None where they give any.
        even_rows: 4-bit codes lie two in a byte along a row, so a row needs an even number of them.
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
class Int8Cache:
    """That a target's attention takes an int8 KV cache.

    Attributes:
        head_multiple: dims that a head must have a multiple of.
        providers: those on which it was compared with the reference.
    """

    head_multiple: int = 1
    providers: tuple[str, ...] = (_CPU,)


@dataclass(frozen=True)
class Precision:
    """How the tensors of a model are stored.

    Attributes:
        activations: the type of every tensor; None where ``formats`` names the format of each group of matrices.
        matrices: formats of matrices that have another one than the rest of their layer.
    """

    activations: str | None
    formats: Mapping[str, str] = field(default_factory=dict)
    matrices: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        return bool(self.formats)


@dataclass(frozen=True)
class Target:
    """A form of bundle.

    Attributes:
        name: as a user types it.
        dialect: what the manifest calls the operators of the ONNX graph.
        attention: lowerings of attention in ``passes``, tried in order; none where our operator runs as it stands.
        norms: ``standard``, or ``skip``: a residual sum and its norm are one operator.
        runtime: what runs the bundle: ONNX Runtime, or the TensorRT that builds an engine from the graph.
        precisions: that it can have.
        quantized_activations: the activations' type of a quantized bundle, unless told otherwise.
        providers: by activations' type, those of ONNX Runtime that have every kernel the graph needs.
        formats: other formats than the precision's own, by name, where this target has faster kernels.
        own: this target's overrides of PRECISIONS.
        says: what the manifest adds to the groups' precisions.
        int8_cache: None where attention takes no int8 cache.
        input_major: products read integers [in, out], so they are stored so.
        own_operators: the graph has operators of ``glm4_plugins``, which ONNX Runtime must load.
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
    int8_cache: Int8Cache | None = None
    input_major: bool = False
    own_operators: bool = False

    @property
    def engine(self) -> str | None:
        """The TensorRT that builds its engine; None where ONNX Runtime runs the graph."""
        return None if self.runtime == ONNX_RUNTIME else self.runtime


PRECISIONS = {
    "fp32": Precision("float32"),
    "fp16": Precision("float16"),
    "bf16": Precision("bfloat16"),
    "int8": Precision(None, {"embedding": "int8", "layers": "int8", "head": "int8"}),
    "int4": Precision(None, {"embedding": "int8", "layers": "int4", "head": "int8"}),
    "fp8": Precision(None, {"embedding": "int8", "layers": "fp8", "head": "int8"}),
    # What down_proj reads is a product of two activations: its few huge values leave one scale no room for the rest.
    "int8-sq": Precision(
        None, {"embedding": "int8", "layers": "int8-sq", "head": "int8"}, {"mlp.down_proj": "int8"}
    ),
}
_FLOATS, _INTEGERS = ("fp32", "fp16", "bf16"), ("int8", "int4", "int8-sq")

# ONNX Runtime's kernel list (docs/OperatorKernels.md): GroupQueryAttention on CUDA takes fp16 and bf16 only,
# and nothing that attention needs takes bf16 on the CPU. The native dialect was not tried on CUDA.
_NATIVE = {"float32": (_CPU,), "float16": (_CPU,), "bfloat16": ()}
# TensorRT multiplies by int8 per output channel without widening the weight first; by int8 in blocks it does not.
_PER_CHANNEL = {"int8": "int8-channel"}
_SIGNED = {name: f"{name}-signed" for name in ("int4", "int4-fine", "int4-wide")}
# What GPTQ leaves is the head's error above all, and least of it that of q, k and o_proj. Below, 5.01 bits a
# weight on the demo, where Q4_K_M has 5.02 (benchmarks/accuracy.py).
_INT4_ON_CPU = {
    "int4": Precision(
        None,
        {"embedding": "int4", "layers": "int4", "head": "int8"},
        dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"), "int4-wide"),
    )
}
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
        providers={"float32": (_CPU,), "float16": (_CUDA, _CPU), "bfloat16": (_CUDA,)},
        formats=_SIGNED,
        own=_INT4_ON_CPU,
        int8_cache=Int8Cache(head_multiple=8),  # the fallback, which takes any head, has no int8 cache
    ),
    # Products and attention by our own kernels, which read the stored form as it lies in the file.
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
        int8_cache=Int8Cache(),
        own_operators=True,
    ),
    Target(
        name="native",
        dialect="native",
        attention=("standard",),
        products=_STANDARD,
        norms="standard",
        runtime=ONNX_RUNTIME,
        precisions=(*_FLOATS, *_INTEGERS),
        quantized_activations="float32",
        providers=_NATIVE,
        formats=_PER_CHANNEL,
    ),
    Target(
        name="tensorrt-rtx",
        dialect="native",
        attention=("standard",),
        products=_STANDARD,
        norms="standard",
        runtime="tensorrt-rtx",
        precisions=("fp16", "bf16", *_INTEGERS, "fp8"),
        quantized_activations="float16",
        providers=_NATIVE,
        formats=_PER_CHANNEL,
        input_major=True,
    ),
    Target(
        name="tensorrt",
        dialect="native",
        attention=("standard",),
        products=_STANDARD,
        norms="standard",
        runtime="tensorrt",
        precisions=("fp16", "bf16", *_INTEGERS, "fp8"),
        quantized_activations="float16",
        providers=_NATIVE,
        formats=_PER_CHANNEL,
        int8_cache=Int8Cache(providers=()),  # of our plugin; the graph that is proved has another cache
        input_major=False,  # not measured
    ),
)
TARGETS = {row.name: row for row in _ROWS}

# What a recipe may name: formats that every target stores, without a target's own way to store one of them.
RECIPE_FORMATS = tuple(
    name
    for name, form in FORMATS.items()
    if form.portable and not any(name in target.formats.values() for target in _ROWS)
)


def require_target(target: str, precision: str) -> tuple[Target, Precision]:
    """The rows of both tables.

    Raises:
        ExportError: an unknown name, or a pair that cannot be exported; lists what can.
    """
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r}; the targets are {', '.join(TARGETS)}")
    if precision not in TARGETS[target].precisions:
        raise ExportError(
            f"target {target} has no precision {precision!r}; it has {', '.join(TARGETS[target].precisions)}"
        )
    return TARGETS[target], TARGETS[target].own.get(precision, PRECISIONS[precision])
