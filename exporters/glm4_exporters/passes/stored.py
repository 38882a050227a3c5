"""The parts of a stored matrix as initializers of a graph. ``weights`` writes their data later."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from glm4_exporters.element_types import ir_type, type_name
from glm4_exporters.formats.arrangements import Arrangement
from glm4_exporters.formats.base import CODES, Part, StoredFormat, scale_type
from glm4_exporters.formats.brought import ZEROS
from glm4_exporters.passes.builder import Builder, fixed


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, width] as the data file holds it.

    Attributes:
        name: its canonical name.
        scale_type: element type of 16-bit scales.
    """

    name: str
    rows: int
    width: int
    format: StoredFormat
    arrangement: Arrangement
    scale_type: str

    @property
    def parts(self) -> dict[str, Part]:
        """The format's parts, by name."""
        return self.format.parts(self.rows, self.width, self.scale_type)

    def stored(self, part: str) -> Part:
        """A part as the arrangement stores it."""
        return self.arrangement.part(part, self.parts[part], self.format)


@dataclass(frozen=True)
class Source:
    """The matrix and part that an initializer holds; kept in ``value.meta["source"]``."""

    matrix: Matrix
    part: str


def source_of(value: ir.Value | None) -> Source | None:
    """The source of an initializer; None if it is no part of a stored matrix."""
    found = None if value is None else value.meta.get("source")
    return found if isinstance(found, Source) else None


def store(
    graph: ir.Graph, weight: ir.Value, form: StoredFormat, arrangement: Arrangement, *, as_table: bool = False
) -> dict[str, ir.Value]:
    """The initializers of a weight's parts. A second call returns the same ones.

    Args:
        as_table: give codes the shape [rows, bytes].
    """
    assert weight.shape is not None
    assert weight.dtype is not None
    rows, width = (fixed(axis) for axis in weight.shape)
    matrix = Matrix(str(weight.name), rows, width, form, arrangement, scale_type(type_name(weight.dtype)))
    values = {}
    for name in matrix.parts:
        part, flat = matrix.stored(name), as_table and name == CODES
        shape = (rows, part.nbytes // rows) if flat else part.shape
        values[name] = _initializer(graph, f"{matrix.name}.{name}" + ".table" * flat, part.dtype, shape)
        values[name].meta["source"] = Source(matrix, name)
    return values


def _initializer(graph: ir.Graph, name: str, dtype: str, shape: tuple[int, ...]) -> ir.Value:
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(ir_type(dtype)), shape=ir.Shape(shape)
        )
    return graph.initializers[name]


def add_dequantize(b: Builder, weight: ir.Value, form: StoredFormat, parts: dict[str, ir.Value]) -> ir.Value:
    """``codes`` [rows, width] by DequantizeLinear, in the weight's type."""
    assert weight.dtype is not None
    source = source_of(parts[CODES])
    assert source is not None
    plain, dtype = source.matrix.parts, _product_type(parts, weight.dtype)

    def values(name: str) -> ir.Value:
        """A part times its scales. The scales may have scales too."""
        scaled_by, value = plain[name].scaled_by, parts[name]
        if scaled_by is None:
            return value if value.dtype == dtype else b.op("Cast", value, to=int(dtype))
        scales = values(scaled_by)
        zeros = [parts[ZEROS]] if name == CODES and ZEROS in parts else []
        return b.op("DequantizeLinear", value, scales, *zeros, **_axis(form, plain[scaled_by]))

    wide = values(CODES)
    if dtype != weight.dtype:
        wide = b.op("Cast", wide, to=int(weight.dtype))
    wide.dtype, wide.shape = weight.dtype, weight.shape
    return wide


def _product_type(parts: dict[str, ir.Value], weight: ir.DataType) -> ir.DataType:
    """The type in which numbers are multiplied by scales: the weight's, or float32 for scales of float32."""
    types = {value.dtype for value in parts.values()}
    return ir.DataType.FLOAT if ir.DataType.FLOAT in types else weight


def _axis(form: StoredFormat, scales: Part) -> dict[str, Any]:
    """DequantizeLinear's attributes: for one scale, one scale per row, or one per block."""
    forms: tuple[dict[str, Any], ...] = (
        {},
        {"axis": 0, "block_size": 0},
        {"axis": 1, "block_size": form.block or 0},
    )
    return forms[len(scales.shape)]
