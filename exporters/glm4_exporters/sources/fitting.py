"""Chooses a target's format that stores the numbers of a quantized checkpoint unchanged. Needs no torch."""

from collections import Counter
from collections.abc import Iterable

from glm4_exporters.architecture import EMBEDDING, HEAD
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.form import Form
from glm4_exporters.formats.brought import Brought
from glm4_exporters.formats.brought_float4 import BroughtFloat4
from glm4_exporters.formats.float8 import FLOAT8
from glm4_exporters.formats.narrow import Narrow
from glm4_exporters.sources.base import QuantizedMatrix, Storage
from glm4_exporters.sources.view import View
from glm4_exporters.targets import ACTIVATIONS, TARGETS, Target, target_row
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import ExportError

# Sizes of the blocks that a target's product reads, by the name of its products. Longer blocks would round the inputs
# more coarsely.
BLOCKS = {"fused": (16, 32, 64, 128), "packed": range(8, 129, 8)}
ENGINE_BLOCKS = (16, 32, 64, 128)
PLAIN, AGAIN = "float32", "int8"
NARROW = ("bfloat16", "float16")
NVFP4_SCALES = "float32"  # a float8 scale times the matrix' float32 scale


def keep_form(source: Checkpoint, target_name: str, activations: str | None) -> Form:
    """The form in which a target stores a quantized checkpoint with unchanged numbers and scales.

    For ONNX Runtime, matrices that are not quantized are stored in the checkpoint's 16-bit type. A quantized embedding,
    norms and biases are stored as float32. All these values are unchanged. For TensorRT, tensors without numbers to
    keep are cast to the type of activations.

    Raises:
        ExportError: the target cannot store a matrix unchanged. The message names targets that can.
    """
    target, formats = target_row(target_name), dict[str, Brought]()
    for name, view in source.views.by_name.items():
        canonical = source.canonical(name)
        if canonical == EMBEDDING or len(view.header.shape) != 2 or not view.quantized:
            continue
        found = brought_format(view, target)
        if found is None or not _in_order(source, view):
            raise ExportError(_refusal(source, name, view, target))
        formats[canonical] = found
    words = Counter(_word(form) for form in formats.values())
    chosen = _activations(target, {form.scales for form in formats.values()}, activations)
    narrow = _narrow(source) if chosen == PLAIN else {}
    layers = ", ".join(word for word, _ in words.most_common()) or chosen
    head = EMBEDDING if source.config.tie_word_embeddings else HEAD
    kinds = {"embedding": narrow.get(EMBEDDING), "head": narrow.get(head)}
    groups = {group: chosen if form is None else form.dtype for group, form in kinds.items()}
    return Form(
        target,
        _precision(formats),
        chosen,
        groups | {"layers": layers},
        {**formats, **narrow},
        table=narrow.get(EMBEDDING),
        kept=True,
    )


def _narrow(source: Checkpoint) -> dict[str, Narrow]:
    """Formats of the matrices that are not quantized and have a 16-bit type, by canonical name."""
    types = {
        name: _stored_type(source, name) for name, header in source.tensors.items() if len(header.shape) == 2
    }
    return {source.canonical(name): Narrow(dtype) for name, dtype in types.items() if dtype in NARROW}


def _stored_type(source: Checkpoint, name: str) -> str | None:
    """The type of a matrix that is not quantized. None: it is quantized, or its parts have several types."""
    if name not in source.views.by_name:
        return source.dtype_of(name)
    stored = [piece.stored for piece in source.views.by_name[name].pieces]
    types = {piece.dtype if isinstance(piece, TensorHeader) else None for piece in stored}
    return types.pop() if len(types) == 1 else None


def _activations(target: Target, scales: set[str], asked: str | None) -> str:
    """The type of activations: float32, or for TensorRT the 16-bit type of the scales, because its products have one
    type. With float32 scales the user may choose."""
    narrow, free = scales & set(NARROW), "bfloat16" if asked == "bf16" else "float16"
    chosen = PLAIN if target.engine is None else next(iter(narrow), free)
    if len(narrow) > 1 and target.engine is not None:
        raise ExportError(
            f"target {target.name} needs scales of one type, and this checkpoint has {' and '.join(sorted(scales))}; "
            f"take --target cpu, ort or native, or say --precision {AGAIN} to quantize the values again"
        )
    if asked is not None and ACTIVATIONS.get(asked) != chosen:
        name = next(name for name, dtype in ACTIVATIONS.items() if dtype == chosen)
        raise ExportError(
            f"target {target.name} keeps the numbers of this checkpoint with {name} activations, not {asked}; "
            f"leave --activations out, or say --precision {AGAIN} to quantize the values again"
        )
    return chosen


def _precision(formats: dict[str, Brought]) -> str:
    """The precision whose accuracy limits apply to the bundle: the one with the fewest bits."""
    if any(isinstance(form, BroughtFloat4) for form in formats.values()):
        return "nvfp4"
    if any(form.codes for form in formats.values()):
        return "fp8"
    return f"int{min((form.bits for form in formats.values()), default=8)}"


def _word(form: Brought) -> str:
    zeros = " with zero points" if form.zeros else ", zero points subtracted" if form.folded else ""
    scales = ", a scale per row" if form.block is None else f" in blocks of {form.block}"
    numbers = "nvfp4" if isinstance(form, BroughtFloat4) else "fp8" if form.codes else f"int{form.bits}"
    return f"{numbers}{scales}{zeros}"


def _refusal(source: Checkpoint, name: str, view: View, target: Target) -> str:
    again = f"say --precision {AGAIN} to quantize the values again"
    if not _in_order(source, view):
        return (
            f"{name} has groups in the order of act-order (g_idx), which no target stores as it is; {again}"
        )
    stored = view.pieces[0].stored
    how = "in parts of two kinds" if isinstance(stored, TensorHeader) else str(stored.storage)
    able = keeping_targets(view)
    other = f"take --target {' or '.join(able)}, or " if able else ""
    return f"target {target.name} cannot store {name} as it is ({how}); {other}{again}"


def _in_order(source: Checkpoint, view: View) -> bool:
    """Whether the groups of all matrices of a view are contiguous."""
    matrices = (piece.stored for piece in view.pieces if isinstance(piece.stored, QuantizedMatrix))
    return all(matrix.in_order(source.read_stored) for matrix in matrices)


def brought_format(view: View, target: Target) -> Brought | None:
    """The target's format that stores a tensor's numbers and scales bit for bit. None: there is none."""
    stored = [piece.stored for piece in view.pieces]
    storages = {matrix.storage for matrix in stored if isinstance(matrix, QuantizedMatrix)}
    plain = [matrix for matrix in stored if not isinstance(matrix, QuantizedMatrix)]
    if len(storages) != 1 or plain:
        return None
    storage = storages.pop()
    if target.engine is not None:
        whole = len({matrix.module for matrix in stored if isinstance(matrix, QuantizedMatrix)}) == 1
        return _for_engine(storage, view.header.shape[1], whole)
    if target.products.name == "standard":
        return _standard(storage, view.header.shape[1])
    return _in_blocks(storage, BLOCKS[target.products.name])


def keeping_targets(view: View) -> list[str]:
    """Names of the targets that can store a tensor's numbers unchanged."""
    return [name for name, target in TARGETS.items() if brought_format(view, target) is not None]


def _standard(storage: Storage, width: int) -> Brought | None:
    """A format for DequantizeLinear, which takes integers of any group size, and float8."""
    if storage.kind == "float4":
        return Brought(8, storage.group, scales=NVFP4_SCALES)
    codes = FLOAT8 if storage.kind == "float8" else ""
    group = storage.group or width  # a block, because ONNX Runtime quantizes inputs if scales are per row
    if width % group or (storage.bits == 4 and width % 2):
        return None  # ONNX Runtime takes whole blocks only, and a byte holds two 4-bit codes
    return Brought(storage.bits, group, scales=storage.scales, zeros=storage.zeros, codes=codes)


def _for_engine(storage: Storage, width: int, whole: bool) -> Brought | None:
    """A format for TensorRT: no zero points, and whole blocks. 4-bit q - z fits 8 bits.

    Args:
        whole: whether one stored matrix holds all rows, so that they have one scale of their blocks' scales.
    """
    if storage.kind == "float4":
        return BroughtFloat4() if whole else Brought(8, storage.group, scales=NVFP4_SCALES)
    if storage.kind == "float8":
        fits = width % (storage.group or width) == 0
        return Brought(8, storage.group, scales=storage.scales, codes=FLOAT8) if fits else None
    if storage.zeros and storage.bits == 8:
        return None
    bits = 8 if storage.zeros else storage.bits
    if storage.group is None and bits == 8:
        return Brought(bits, None, scales=storage.scales, folded=storage.zeros)
    block = max((size for size in ENGINE_BLOCKS if (storage.group or width) % size == 0), default=0)
    if not block or width % block:
        return None
    return Brought(bits, block, scales=storage.scales, folded=storage.zeros)


def _in_blocks(storage: Storage, sizes: Iterable[int]) -> Brought | None:
    """A format in blocks of one of some sizes. The scale of a larger group is repeated for each block."""
    if storage.kind == "float8":
        return None
    block = max((size for size in sizes if (storage.group or size) % size == 0), default=0)
    if not block:
        return None
    if storage.kind == "float4":
        return Brought(8, block, scales=NVFP4_SCALES)
    return Brought(storage.bits, block, scales=storage.scales, zeros=storage.zeros)
