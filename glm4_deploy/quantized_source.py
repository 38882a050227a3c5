"""Describes another tool's quantization of a checkpoint, for ``inspect`` and for the report of an export."""

from collections import Counter
from typing import Any

from glm4_deploy.plan import Plan
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.formats.brought import Brought
from glm4_exporters.sources import QuantizedMatrix


def quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How another tool quantized the checkpoint. None: the checkpoint is not quantized.

    ``matrices`` counts the stored matrices by kind of storage. ``left`` names the matrices that are not quantized.
    ``input_scales`` counts the matrices with a scale for their input.
    """
    if checkpoint.source is None:
        return None
    pieces = [piece.stored for view in checkpoint.views.by_name.values() for piece in view.pieces]
    found = {stored.module: stored for stored in pieces if isinstance(stored, QuantizedMatrix)}
    plain = [
        name.removesuffix(".weight")
        for name, header in checkpoint.tensors.items()
        if len(header.shape) == 2 and name not in checkpoint.views.by_name
    ]
    return {
        "method": checkpoint.source.name,
        "matrices": dict(Counter(str(matrix.storage) for matrix in found.values())),
        "left": plain,
        "input_scales": sum(matrix.input_scale is not None for matrix in found.values()),
    }


def source_report(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any] | None:
    """:func:`quantization`, and how the export stores the numbers. None: the checkpoint is not quantized."""
    found = quantization(checkpoint)
    if found is None:
        return None
    again = f"requantized to {plan.form.precision} from the values that the numbers stand for"
    if plan.calibration is None and plan.form.rounded_inputs:
        again += ", with the checkpoint's scales for inputs"
    return found | {"stored": _kept(checkpoint, plan) if plan.form.kept else again}


def _kept(checkpoint: Checkpoint, plan: Plan) -> str:
    """Whether 4-bit numbers are stored in 8 bits, and how much larger their matrices are then."""
    brought = {name: form for name, form in plan.form.formats.items() if isinstance(form, Brought)}
    stored = {name: _matrices(checkpoint, name) for name in brought}
    wider = {
        name: form
        for name, form in brought.items()
        if any(matrix.storage.bits < form.bits for matrix in stored[name])
    }
    if not wider:
        return "kept bit for bit"
    shapes = {name: checkpoint.tensors[checkpoint.name_of(name)].shape for name in wider}
    nbytes = sum(form.nbytes(shapes[name][0], shapes[name][1], "") for name, form in wider.items())
    own = {matrix.module: matrix.nbytes for name in wider for matrix in stored[name]}
    how = (
        "zero points subtracted"
        if any(form.folded for form in wider.values())
        else "4-bit floats as integers"
    )
    growth = nbytes / sum(own.values())
    return f"kept, with {how} in 8 bits: {len(wider)} matrices take {growth:.2f} times their bytes"


def _matrices(checkpoint: Checkpoint, name: str) -> list[QuantizedMatrix]:
    """The stored matrices that a kept matrix, by canonical name, consists of."""
    pieces = checkpoint.views.by_name[checkpoint.name_of(name)].pieces
    return [piece.stored for piece in pieces if isinstance(piece.stored, QuantizedMatrix)]
