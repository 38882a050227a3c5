"""What can be exported: targets, precisions, and which ONNX Runtime providers run the result."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from glm4_exporters.checkpoint import EMBEDDING, HEAD
from glm4_exporters.config import Glm4Config
from glm4_exporters.formats import FORMATS, Format, InputRounding, require_format
from glm4_exporters.quantize.recipe import Recipe
from glm4_runtime.errors import ExportError

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

ACTIVATIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GROUPS = ("embedding", "layers", "head")


@dataclass(frozen=True)
class Target:
    """A form of bundle.

    Attributes:
        precisions: that it can have.
        quantized_activations: the activations' type of a quantized bundle, unless told otherwise.
        providers: by activations' type, those of ONNX Runtime that have every kernel the graph needs.
        formats: other formats than the precision's own, by name, where this target has faster kernels.
        own: precisions that are stored otherwise here than elsewhere.
        lookups: whether a table can be looked up in its quantized form.
        says: what the manifest adds to the groups' precisions.
        engine: names the TensorRT that builds an engine from the graph; ``providers`` then run only the graph.
    """

    dialect: str
    precisions: tuple[str, ...]
    quantized_activations: str
    providers: Mapping[str, tuple[str, ...]]
    formats: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, "Precision"] = field(default_factory=dict)
    lookups: bool = False
    says: Mapping[str, str] = field(default_factory=dict)
    engine: str | None = None


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
class Form:
    """A target in a precision, with every choice made.

    Attributes:
        activations: element type of activations and of weights that have no format.
        groups: what each group of tensors is stored as, for the manifest.
        formats: by canonical name of the matrix.
        table: how the embedding is looked up; None: the lookup table is not quantized. A tied head still may be.
        kv_cache: element type of the cache; None for a task without one.
    """

    target: Target
    activations: str
    groups: Mapping[str, str]
    formats: Mapping[str, Format]
    table: Format | None = None
    kv_cache: str | None = None

    @property
    def rounded_inputs(self) -> dict[str, InputRounding]:
        """What the inputs of products are rounded to, by name of the matrix; the others read them as they are."""
        return {name: form.inputs for name, form in self.formats.items() if form.inputs is not None}

    @property
    def needs_text(self) -> bool:
        """Whether a matrix cannot be stored without calibration text."""
        return any(form.needs_text for form in self.formats.values())


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
TARGETS = {
    "ort": Target(
        "ort",
        (*_FLOATS, *_INTEGERS),
        "float32",
        {"float32": (_CPU,), "float16": (_CUDA, _CPU), "bfloat16": (_CUDA,)},
        _SIGNED,
        _INT4_ON_CPU,
        lookups=True,
    ),
    # Products in integers by our own kernels, which read the stored form as it lies in the file.
    "cpu": Target(
        "cpu",
        _INTEGERS,
        "float32",
        {"float32": (_CPU,)},
        _SIGNED,
        _INT4_ON_CPU,
        lookups=True,
        says={"inputs of products": "int8, a scale per row and block"},
    ),
    "native": Target("native", (*_FLOATS, *_INTEGERS), "float32", _NATIVE, _PER_CHANNEL),
    "tensorrt-rtx": Target(
        "native", ("fp16", "bf16", *_INTEGERS, "fp8"), "float16", _NATIVE, _PER_CHANNEL, engine="tensorrt-rtx"
    ),
    "tensorrt": Target(
        "native", ("fp16", "bf16", *_INTEGERS, "fp8"), "float16", _NATIVE, _PER_CHANNEL, engine="tensorrt"
    ),
}


# What a recipe may name: formats that every target stores, without a target's own way to store one of them.
RECIPE_FORMATS = tuple(
    name
    for name, form in FORMATS.items()
    if form.portable and not any(name in target.formats.values() for target in TARGETS.values())
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


def choose_form(
    config: Glm4Config,
    task: str,
    target_name: str,
    precision_name: str,
    activations: str | None = None,
    recipe: Recipe | None = None,
) -> Form:
    """Decide how every tensor of a model is stored.

    Args:
        activations: ``fp32``, ``fp16`` or ``bf16``, for a quantized precision; the target's choice where None.
        recipe: formats of single matrices, in place of the precision's own.

    Raises:
        ExportError: a combination that cannot be exported; says what can.
    """
    target, precision = require_target(target_name, precision_name)
    chosen = _activations(target, precision, target_name, precision_name, activations)
    if not precision.quantized:
        if recipe is not None:
            raise ExportError(f"precision {precision_name} quantizes nothing, so it takes no --recipe")
        return Form(target, chosen, dict.fromkeys(GROUPS, chosen), {})
    layers = precision.formats["layers"]
    found = {
        f"model.layers.{layer}.{matrix}.weight": precision.matrices.get(matrix, layers)
        for layer in range(config.num_hidden_layers)
        for matrix in MATRICES
    }
    tied = config.tie_word_embeddings and task == "causal-lm"
    if target.lookups or tied:  # a tied matrix, under its first name, is the head's
        found[EMBEDDING] = precision.formats["head" if tied else "embedding"]
    if task == "causal-lm" and not tied:
        found[HEAD] = precision.formats["head"]
    if recipe is not None:
        recipe.require_used({*found, EMBEDDING})  # which some targets look up as it is: one recipe serves all
        found |= {name: own for name in found if (own := recipe.format_of(name)) is not None}
    found = {name: target.formats.get(form, form) for name, form in found.items()}
    whole_blocks = EMBEDDING in found and not config.hidden_size % (
        require_format(found[EMBEDDING]).block or 1
    )
    table = found[EMBEDDING] if target.lookups and whole_blocks else None
    if table is None and not tied:
        found.pop(EMBEDDING, None)
    formats = {name: require_format(form) for name, form in found.items()}
    for name, form in formats.items():
        _require_width(name, matrix_width(config, name), form, target)
        _require_integer_product(name, form, target, chosen)
    fixed = any(form.inputs for form in formats.values())  # int8-sq's products are not those it speaks of
    return Form(
        target,
        chosen,
        {**_groups(found, table, chosen, EMBEDDING if tied else HEAD), **({} if fixed else target.says)},
        formats,
        None if table is None else require_format(table),
    )


def _groups(found: Mapping[str, str], table: str | None, activations: str, head: str) -> dict[str, str]:
    """What each group is stored as; the layers' formats with the most matrices first."""
    layers = Counter(form for name, form in found.items() if name.startswith("model.layers."))
    return {
        "embedding": table or activations,
        "layers": ", ".join(form for form, _ in layers.most_common()),
        "head": found.get(head, activations),
    }


MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)


def matrix_width(config: Glm4Config, name: str) -> int:
    """How many inputs the matrix of this canonical name has."""
    widths = {
        "o_proj": config.num_attention_heads * config.head_dim,
        "down_proj": config.intermediate_size,
    }
    return widths.get(name.split(".")[-2], config.hidden_size)


def _activations(
    target: Target, precision: Precision, target_name: str, precision_name: str, asked: str | None
) -> str:
    if asked is not None and asked not in ACTIVATIONS:
        raise ExportError(f"unknown activations {asked!r}; they are {', '.join(ACTIVATIONS)}")
    if precision.activations is not None:
        if asked is not None and ACTIVATIONS[asked] != precision.activations:
            raise ExportError(
                f"activations of precision {precision_name} are {precision_name}, not {asked}; "
                f"leave --activations out, or take --precision {asked}"
            )
        return precision.activations
    chosen = target.quantized_activations if asked is None else ACTIVATIONS[asked]
    if target.engine is not None and chosen == "float32":
        raise ExportError(f"target {target_name} has no fp32 activations; take fp16 or bf16")
    if chosen not in target.providers:
        known = ", ".join(name for name, dtype in ACTIVATIONS.items() if dtype in target.providers)
        raise ExportError(f"target {target_name} has no {asked} activations; it has {known}")
    return chosen


def _require_width(name: str, width: int, form: Format, target: Target) -> None:
    if form.bits == 4 and target.dialect == "native" and width % 2:
        raise ExportError(
            f"{name} has {width} inputs per row, an odd number, which 4-bit numbers two to a byte "
            "do not fit in the native dialect; export with --precision int8, or --target ort"
        )
    if form.block is not None and target.engine is not None and width % form.block:
        # TensorRT divides the width by the number of scales, and would take other blocks than were written.
        raise ExportError(
            f"{name} has {width} inputs per row, which is no multiple of the {form.block} numbers under one scale "
            f"that {target.engine} needs; export with --precision int8, or --target ort"
        )


def _require_integer_product(name: str, form: Format, target: Target, activations: str) -> None:
    if form.inputs and not name.startswith("model.layers."):
        raise ExportError(f"{name} cannot be int8-sq, which is for the matrices of layers; take int8")
    if form.inputs and target.dialect in ("ort", "cpu") and activations != "float32":
        raise ExportError(
            "ONNX Runtime's integer products give fp32, so int8-sq takes no other activations here; "
            "leave --activations out, or export with --precision int8"
        )
