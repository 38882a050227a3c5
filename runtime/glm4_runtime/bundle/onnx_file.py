"""Reads an ONNX graph without the package onnx and without weights: operators, tensors' names, types and shapes.

ONNX Runtime trusts a graph: while it opens the file, it allocates shapes, computes constants and runs loops. So this
reader checks the file first. It parses the protobuf wire format (protobuf.dev/programming-guides/encoding) for the
fields of ``onnx.proto`` that our exporter writes. It refuses all other fields that change what a graph computes:
subgraphs, functions, sparse and typed tensors. It never recurses, and its work is bounded by the number of fields.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glm4_runtime.bundle import element_types
from glm4_runtime.bundle.json_file import read_small
from glm4_runtime.bundle.manifest import EXPORT_AGAIN, TensorSpec
from glm4_runtime.errors import BundleError, shown

MOST_GRAPH_BYTES = 16 << 20  # bytes of a graph; 61 layers of the native dialect take 1 MB
MOST_FIELDS = 1_000_000
LONGEST_NAME, LONGEST_INLINE, MOST_AXES = 512, 1 << 20, 8

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
EXTERNAL = 1  # TensorProto.DataLocation
# Fields that our exporter does not write, and that change what a graph computes or where its data is.
OF_A_MODEL = {20: "training information", 25: "functions", 26: "device configurations"}
OF_A_GRAPH = {15: "sparse tensors"}
TYPED_DATA = dict.fromkeys((3, 4, 5, 6, 7, 10, 11), "the data of a tensor in another form than bytes")
# AttributeProto.AttributeType: the field that holds the value, and what it is.
FLOAT, INT, STRING, TENSOR, INTS = 1, 2, 3, 4, 7
ATTRIBUTES = {FLOAT: 2, INT: 3, STRING: 4, TENSOR: 5, INTS: 8}
GRAPHS = {6, 11}  # fields of an attribute that hold graphs

Span = tuple[int, int]
Fields = dict[int, list[tuple[int, int, int]]]  # by number: wire type, then value and 0, or start and end


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant. Its data is in the file ``location`` (``offset``, ``nbytes``), or inline in ``data``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    location: str | None = None
    offset: int = 0
    data: bytes = b""

    def integer(self) -> int | None:
        """The value of an inline integer; None for other constants."""
        integers = {"int64": "<q", "int32": "<i"}.get(self.dtype)
        if integers is None or len(self.data) != struct.calcsize(integers):
            return None
        return int(struct.unpack(integers, self.data)[0])


Attribute = int | float | str | tuple[int, ...] | Tensor


@dataclass(frozen=True, slots=True)
class Node:
    domain: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def __str__(self) -> str:
        return f"{self.domain or 'ai.onnx'}.{self.operator}"


@dataclass(frozen=True)
class OnnxGraph:
    opsets: Mapping[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    initializers: Mapping[str, Tensor]
    nodes: tuple[Node, ...]


def read_graph(path: Path) -> OnnxGraph:
    """Read ``model.onnx``.

    Raises:
        BundleError: it is no ONNX file, has fields that our graphs do not have, or is too large.
    """
    return _ModelReader(path, read_small(path, BundleError, EXPORT_AGAIN, MOST_GRAPH_BYTES)).model()


class _ModelReader:
    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._left = path, data, MOST_FIELDS

    # The wire format --------------------------------------------------------------------------

    def _refuse(self, complaint: str) -> BundleError:
        return BundleError(f"{self._path} {complaint}; {EXPORT_AGAIN}")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 64:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
        raise self._refuse("is no ONNX graph: a number does not end")

    def _fields(self, span: Span) -> Fields:
        """The fields of one message."""
        found: Fields = {}
        at, end = span
        data, count = self._data, 0
        while at < end:
            count += 1
            # Nearly all keys, numbers and lengths are one byte; these are read here, without a call.
            key, at = (data[at], at + 1) if data[at] < 0x80 else self._varint(at, end)
            wire = key & 7
            if wire in (VARINT, BYTES):
                if at < end and data[at] < 0x80:
                    value, at = data[at], at + 1
                else:
                    value, at = self._varint(at, end)
            else:
                value = {FIXED64: 8, FIXED32: 4}.get(wire, end)
            if wire == VARINT:
                entry = (wire, value, 0)
            else:
                entry = (wire, at, at + value)
                at += value
            number = key >> 3
            if at > end or number == 0:
                raise self._refuse("is no ONNX graph: a field does not end where its message does")
            if count > self._left:
                raise self._refuse(f"has more than {MOST_FIELDS} fields")
            if number in found:
                found[number].append(entry)
            else:
                found[number] = [entry]
        self._left -= count
        return found

    def _one(self, fields: Fields, number: int, wire: int, what: str) -> tuple[int, int] | None:
        """A field that may occur once."""
        entries = fields.get(number, ())
        if not entries:
            return None
        if len(entries) > 1 or entries[0][0] != wire:
            raise self._refuse(f"is no ONNX graph: {what} is there twice or of another kind")
        return entries[0][1:]

    def _spans(self, fields: Fields, number: int, what: str) -> list[Span]:
        """Messages, texts or bytes that may occur any number of times."""
        entries = fields.get(number, ())
        if any(wire != BYTES for wire, _, _ in entries):
            raise self._refuse(f"is no ONNX graph: {what} is of another kind")
        return [(start, end) for _, start, end in entries]

    def _number(self, fields: Fields, number: int, what: str) -> int:
        """A signed integer; 0 if it is absent."""
        found = self._one(fields, number, VARINT, what)
        value = found[0] if found else 0
        return value - 2**64 if value >= 2**63 else value

    def _numbers(self, fields: Fields, number: int, what: str, most: int) -> tuple[int, ...]:
        """Signed integers, packed or not."""
        values: list[int] = []
        for wire, at, end in fields.get(number, ()):
            if wire == VARINT:
                values.append(at)
                continue
            if wire != BYTES:
                raise self._refuse(f"is no ONNX graph: {what} is of another kind")
            while at < end and len(values) <= most:
                value, at = self._varint(at, end)
                values.append(value)
        if len(values) > most:
            raise self._refuse(f"has more than {most} numbers in {what}")
        return tuple(v - 2**64 if v >= 2**63 else v for v in values)

    def _decoded(self, span: Span, what: str) -> str:
        start, end = span
        if end - start > LONGEST_NAME:
            raise self._refuse(f"has {what} of {end - start} bytes, but at most {LONGEST_NAME} are read")
        try:
            return str(self._data[start:end], "utf-8")
        except UnicodeDecodeError as error:
            raise self._refuse(f"has {what} that is no UTF-8 text") from error

    def _text(self, fields: Fields, number: int, what: str) -> str:
        span = self._one(fields, number, BYTES, what)
        return "" if span is None else self._decoded(span, what)

    def _texts(self, fields: Fields, number: int, what: str) -> tuple[str, ...]:
        return tuple(self._decoded(span, what) for span in self._spans(fields, number, what))

    def _message(self, fields: Fields, number: int, what: str) -> Fields:
        """A message that must occur."""
        span = self._one(fields, number, BYTES, what)
        if span is None:
            raise self._refuse(f"is no ONNX graph: {what} is missing")
        return self._fields(span)

    def _absent(self, fields: Fields, refused: Mapping[int, str]) -> None:
        for number, what in refused.items():
            if number in fields:
                raise self._refuse(f"holds {what}, which no graph of ours has")

    # onnx.proto -------------------------------------------------------------------------------

    def model(self) -> OnnxGraph:
        fields = self._fields((0, len(self._data)))
        self._absent(fields, OF_A_MODEL)
        opsets = {}
        for span in self._spans(fields, 8, "opset_import"):
            entry = self._fields(span)
            opsets[self._text(entry, 1, "a domain")] = self._number(entry, 2, "a version")
        graph = self._message(fields, 7, "the graph")
        self._absent(graph, OF_A_GRAPH)
        tensors = [self._tensor(span) for span in self._spans(graph, 5, "initializer")]
        initializers = {tensor.name: tensor for tensor in tensors}
        if len(initializers) != len(tensors):
            raise self._refuse("holds two initializers of one name")
        return OnnxGraph(
            opsets=opsets,
            inputs=tuple(self._input_or_output(span) for span in self._spans(graph, 11, "input")),
            outputs=tuple(self._input_or_output(span) for span in self._spans(graph, 12, "output")),
            initializers=initializers,
            nodes=tuple(self._node(span) for span in self._spans(graph, 1, "node")),
        )

    def _input_or_output(self, span: Span) -> TensorSpec:
        fields = self._fields(span)
        kind = self._message(fields, 2, "an input's or output's type")
        tensor = self._message(kind, 1, "a tensor's type")
        self._absent(kind, dict.fromkeys((4, 5, 7, 8, 9), "an input or output that is no tensor"))
        axes: list[int | str] = []
        for axis in self._spans(self._message(tensor, 2, "a shape"), 1, "an axis"):
            dim = self._fields(axis)
            axes.append(self._text(dim, 2, "an axis' name") or self._number(dim, 1, "an axis"))
        name = self._text(fields, 1, "a tensor's name")
        return TensorSpec(name, self._element_type(tensor, 1, name), tuple(axes))

    def _element_type(self, fields: Fields, number: int, name: str) -> str:
        code = self._number(fields, number, "an element type")
        if code not in element_types.TYPE_NAMES:
            raise self._refuse(f"gives {shown(name)} the element type {code}, which no graph of ours has")
        return element_types.TYPE_NAMES[code]

    def _tensor(self, span: Span) -> Tensor:
        """A TensorProto with raw or external data, of the size that its shape requires."""
        fields = self._fields(span)
        name = self._text(fields, 8, "a tensor's name")
        self._absent(fields, TYPED_DATA)
        dtype = self._element_type(fields, 2, name)
        shape = self._numbers(fields, 1, "a shape", MOST_AXES)
        wanted = element_types.bits(dtype)
        for size in shape:
            if not 0 <= size < 2**63:
                raise self._refuse(f"gives {shown(name)} the shape {shown(list(shape))}")
            wanted *= size
        nbytes = -(-wanted // 8)
        if self._number(fields, 14, "a place of data") == EXTERNAL:
            location, offset, stored = self._external(fields, name)
            data = b""
        else:
            start, end = self._one(fields, 9, BYTES, "the data of a tensor") or (0, 0)
            location, offset, stored = None, 0, end - start
            data = self._data[start:end] if stored <= LONGEST_INLINE else b""
        if stored != nbytes:
            raise self._refuse(
                f"gives {shown(name)} {stored} bytes of data, but {dtype} {shown(list(shape))} takes {nbytes}"
            )
        return Tensor(name, dtype, shape, nbytes, location, offset, data)

    def _external(self, fields: Fields, name: str) -> tuple[str, int, int]:
        """Name of the file, offset and length of external data."""
        said = {}
        for span in self._spans(fields, 13, "a place of data"):
            entry = self._fields(span)
            said[self._text(entry, 1, "a key")] = self._text(entry, 2, "a value")
        numbers = [said.get(key, "") for key in ("offset", "length")]
        plain = all(text.isascii() and text.isdecimal() and len(text) <= 19 for text in numbers)
        if said.keys() != {"location", "offset", "length"} or not plain:
            raise self._refuse(f"does not say where the data of {shown(name)} is, but {shown(said)}")
        return said["location"], int(numbers[0]), int(numbers[1])

    def _node(self, span: Span) -> Node:
        fields = self._fields(span)
        self._text(fields, 3, "a node's name")
        return Node(
            domain=self._text(fields, 7, "a domain"),
            operator=self._text(fields, 4, "an operator"),
            inputs=self._texts(fields, 1, "a tensor's name"),
            outputs=self._texts(fields, 2, "a tensor's name"),
            attributes=dict(self._attribute(entry) for entry in self._spans(fields, 5, "an attribute")),
        )

    def _attribute(self, span: Span) -> tuple[str, Attribute]:
        fields = self._fields(span)
        name = self._text(fields, 1, "an attribute's name")
        kind = self._number(fields, 20, "an attribute's type")
        number = ATTRIBUTES.get(kind, 0)
        others = fields.keys() - {1, 20, 13, number}  # besides its name, type and description
        if number == 0 or others:
            held = "a graph" if others & GRAPHS else "a value of another kind"
            raise self._refuse(f"holds {held} in the attribute {shown(name)}, which no graph of ours has")
        return name, self._value_of(kind, fields, number)

    def _value_of(self, kind: int, fields: Fields, number: int) -> Attribute:
        what = "an attribute's value"
        if kind == INT:
            return self._number(fields, number, what)
        if kind == STRING:
            return self._text(fields, number, what)
        if kind == INTS:
            return self._numbers(fields, number, what, MOST_AXES)
        span = self._one(fields, number, BYTES if kind == TENSOR else FIXED32, what)
        if span is None:
            raise self._refuse("is no ONNX graph: an attribute has no value")
        return (
            self._tensor(span) if kind == TENSOR else float(struct.unpack_from("<f", self._data, span[0])[0])
        )
