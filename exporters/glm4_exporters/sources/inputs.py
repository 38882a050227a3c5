"""Scales for the inputs of products that a quantized checkpoint brings: static quantization of activations."""

import math
from collections.abc import Mapping

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.formats import InputRounding
from glm4_exporters.sources.base import QuantizedMatrix
from glm4_runtime.errors import CheckpointError

KINDS = {
    "int8": ("int", 8),
    "float8e4m3fn": ("float8", 8),
}  # kind and bits of the storage, by type of the inputs


def brought_scales(source: Checkpoint, rounded: Mapping[str, InputRounding]) -> dict[str, float] | None:
    """The checkpoint's scales for the inputs of some matrices.

    Args:
        rounded: how the product of each matrix rounds its input, by canonical name.

    Returns:
        The scales, by canonical name. None: the checkpoint lacks one of them, or an input has a zero point.

    Raises:
        CheckpointError: a scale is not a positive finite number.
    """
    if source.source is None or source.adapters:
        return None
    found = {name: _scale(source, name, rounding) for name, rounding in rounded.items()}
    known = {name: scale for name, scale in found.items() if scale is not None}
    return known if known and len(known) == len(found) else None


def _scale(source: Checkpoint, name: str, rounding: InputRounding) -> float | None:
    """The scale of a matrix's input. Of two halves, which read one input: the larger scale."""
    view = source.views.by_name.get(source.name_of(name))
    scales = [] if view is None else [_scale_of(source, piece.stored, rounding) for piece in view.pieces]
    return None if not scales or None in scales else max(scale for scale in scales if scale is not None)


def _scale_of(source: Checkpoint, stored: object, rounding: InputRounding) -> float | None:
    if not isinstance(stored, QuantizedMatrix) or stored.input_scale is None:
        return None
    if (stored.storage.kind, stored.storage.bits) != KINDS.get(rounding.dtype):
        return None
    zeros = stored.tensors.get("input_zero_point")
    if zeros is not None and bool(source.read_stored(zeros).float().any()):
        return None
    header = stored.input_scale
    if math.prod(header.shape) != 1:
        return None
    scale = float(source.read_stored(header).float().reshape(()))
    if not (math.isfinite(scale) and scale > 0):
        raise CheckpointError(
            f"{header.file}: {header.name} is {scale:g}, but must be a positive number; quantize the model again, "
            "or give --calibration FILE"
        )
    return scale
