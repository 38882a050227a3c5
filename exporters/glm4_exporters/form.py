"""How every tensor of a model is stored, in a target and a precision."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from glm4_exporters.architecture import EMBEDDING, HEAD, MATRICES, matrix_width
from glm4_exporters.config import Glm4Config
from glm4_exporters.formats import Format, InputRounding, StoredFormat, require_format
from glm4_exporters.formats.base import FittedFormat, scale_type
from glm4_exporters.quantize.recipe import Recipe
from glm4_exporters.targets import ACTIVATIONS, GROUPS, Precision, Target, require_target
from glm4_runtime.bundle.element_types import CALIBRATED_CACHES, bits
from glm4_runtime.errors import ExportError


@dataclass(frozen=True)
class Form:
    """A target in a precision, with every choice made.

    Attributes:
        precision: its name. For kept numbers: the precision whose limits of accuracy apply.
        activations: element type of activations and of weights that have no format.
        groups: the stored type or format of each group of tensors, for the manifest.
        formats: by canonical name of the matrix.
        table: how the embedding is looked up; None: the lookup table is not quantized. A tied head still may be.
        kv_cache: the cache's name in ``CACHE_TYPES``; None for a task without one.
        kept: whether the numbers of a quantized checkpoint are stored unchanged.
    """

    target: Target
    precision: str
    activations: str
    groups: Mapping[str, str]
    formats: Mapping[str, StoredFormat]
    table: Format | None = None
    kv_cache: str | None = None
    kept: bool = False

    def with_cache(self, kv_cache: str | None) -> "Form":
        """The same with a cache of this type."""
        return replace(self, kv_cache=kv_cache)

    @property
    def rounded_inputs(self) -> dict[str, InputRounding]:
        """By name of the matrix: how its product rounds the input. Other products do not round."""
        return {name: form.inputs for name, form in self.formats.items() if form.inputs is not None}

    @property
    def encodings(self) -> dict[str, Format]:
        """By name of the matrix: the formats that values are encoded in. Other formats keep another tool's numbers."""
        return {name: form for name, form in self.formats.items() if isinstance(form, Format)}

    def weight_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of the stored weights. ``shapes``: by canonical name, of all weights or of some."""
        plain = {name: prod(shape) * bits(self.activations) // 8 for name, shape in shapes.items()}
        stored = {
            name: form.nbytes(shapes[name][0], shapes[name][1], scale_type(self.activations))
            for name, form in self.formats.items()
            if name in shapes
        }
        twice = (
            plain[EMBEDDING] if EMBEDDING in stored and self.table is None else 0
        )  # stored twice: quantized for the head, unquantized for the lookup
        return sum((plain | stored).values()) + twice

    def parser_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of the weights that exist only for TensorRT's parser. ``shapes``: as of :meth:`weight_bytes`."""
        return sum(
            form.parser_nbytes(*shapes[name][:2]) for name, form in self.formats.items() if name in shapes
        )

    @property
    def uses_text(self) -> bool:
        """Whether calibration text changes the bundle: by GPTQ and AWQ, by scales of inputs or of a calibrated cache, or by
        fp16's powers of two."""
        fitted = any(form.bits < 8 and isinstance(form, FittedFormat) for form in self.encodings.values())
        return (
            fitted
            or bool(self.rounded_inputs)
            or self.activations == "float16"
            or self.kv_cache in CALIBRATED_CACHES
        )

    @property
    def needs_text(self) -> bool:
        """Whether a matrix requires calibration text."""
        return any(form.needs_text for form in self.formats.values())


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
        ExportError: a combination that cannot be exported. The message names combinations that can.
    """
    target, precision = require_target(target_name, precision_name)
    chosen = _activations(target, precision, precision_name, activations)
    if not precision.quantized:
        if recipe is not None:
            raise ExportError(f"precision {precision_name} quantizes nothing, so it takes no --recipe")
        return Form(target, precision_name, chosen, dict.fromkeys(GROUPS, chosen), {})
    tied = config.tie_word_embeddings and task == "causal-lm"
    found = _format_names(config, task, target, precision, recipe)
    table = _table(found, config.hidden_size, target)
    if table is None and not tied:
        found.pop(EMBEDDING, None)
    formats = {name: require_format(form) for name, form in found.items()}
    for name, form in formats.items():
        _require_width(name, matrix_width(config, name), form, target)
        _require_integer_product(name, form, target, chosen)
    groups = _groups(found, table, chosen, EMBEDDING if tied else HEAD)
    # The note is on products that read their input as it is: in an int8-sq model the others.
    if any(form.inputs is None for name, form in formats.items() if tied or name != EMBEDDING):
        groups |= target.says
    return Form(
        target, precision_name, chosen, groups, formats, None if table is None else require_format(table)
    )


def _format_names(
    config: Glm4Config, task: str, target: Target, precision: Precision, recipe: Recipe | None
) -> dict[str, str]:
    """Names of the formats by matrix: the precision's, then the recipe's, then the target's replacements."""
    layers = precision.formats["layers"]
    found = {
        f"model.layers.{layer}.{matrix}.weight": precision.matrices.get(matrix, layers)
        for layer in range(config.num_hidden_layers)
        for matrix in MATRICES
    }
    tied = config.tie_word_embeddings and task == "causal-lm"
    if target.products.lookups or tied:  # a tied matrix has the name of the embedding, and the head's format
        found[EMBEDDING] = precision.formats["head" if tied else "embedding"]
    if task == "causal-lm" and not tied:
        found[HEAD] = precision.formats["head"]
    if recipe is not None:
        # Some targets do not quantize the embedding; one recipe works for all targets.
        recipe.require_used({*found, EMBEDDING})
        found |= {name: own for name in found if (own := recipe.format_of(name)) is not None}
    return {name: target.formats.get(form, form) for name, form in found.items()}


def _table(found: Mapping[str, str], width: int, target: Target) -> str | None:
    """Name of the format in which the embedding is looked up; None: the lookup table is not quantized."""
    if EMBEDDING not in found or not target.products.lookups:
        return None
    whole_blocks = width % (require_format(found[EMBEDDING]).block or 1) == 0
    return found[EMBEDDING] if whole_blocks else None


def _groups(found: Mapping[str, str], table: str | None, activations: str, head: str) -> dict[str, str]:
    """The formats of each group, for the manifest; the most frequent format of the layers first."""
    layers = Counter(form for name, form in found.items() if name.startswith("model.layers."))
    return {
        "embedding": table or activations,
        "layers": ", ".join(form for form, _ in layers.most_common()),
        "head": found.get(head, activations),
    }


def _activations(target: Target, precision: Precision, precision_name: str, asked: str | None) -> str:
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
        raise ExportError(f"target {target.name} has no fp32 activations; take fp16 or bf16")
    if chosen not in target.providers:
        known = ", ".join(name for name, dtype in ACTIVATIONS.items() if dtype in target.providers)
        raise ExportError(f"target {target.name} has no {asked} activations; it has {known}")
    return chosen


def _require_width(name: str, width: int, form: StoredFormat, target: Target) -> None:
    if form.bits == 4 and target.products.even_rows and width % 2:
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


def _require_integer_product(name: str, form: StoredFormat, target: Target, activations: str) -> None:
    if form.inputs and not name.startswith("model.layers."):
        raise ExportError(f"{name} cannot be int8-sq, which is for the matrices of layers; take int8")
    given = target.products.integer_activations
    if form.inputs and given is not None and activations != given:
        raise ExportError(
            "ONNX Runtime's integer products give fp32, so int8-sq takes no other activations here; "
            "leave --activations out, or export with --precision int8"
        )
