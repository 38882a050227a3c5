"""Cuts a bundle's graph into pieces and runs them one by one on ONNX Runtime.

One piece is in memory at a time. Its weights are slices of the bundle's data file. Of the embedding, only the rows in
use are read; the head runs in blocks of rows. The nodes are the bundle's own, and the runtime optimises them as in
the whole graph.
"""

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from glm4_exporters.architecture import EMBEDDING
from glm4_exporters.joined import load_graph
from glm4_plugins.block_product import OPERATOR, PANEL, library
from glm4_plugins.operator import DOMAIN
from glm4_runtime.bundle import GRAPH
from glm4_runtime.bundle.ascii_path import ascii_path
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

Array = npt.NDArray[Any]
Values = dict[str, Array]

HEAD_ROWS = 8192


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes of the graph under one name: ``embedding``, ``layer 3 gate_up``, ``norm`` or ``head``.

    ``gives`` names the wanted outputs. If empty, they are the values that later pieces read.
    """

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    gives: tuple[str, ...] = ()

    @property
    def reads(self) -> set[str]:
        made = {name for node in self.nodes for name in node.output}
        return {name for node in self.nodes for name in node.input if name} - made


class GraphPieces:
    """The pieces of one graph, with their weights.

    The CPU provider has no bfloat16 kernels, so a bfloat16 graph is computed in float32 from its stored weights.
    :attr:`arithmetic` says so.
    """

    def __init__(self, folder: Path, graph: str = GRAPH) -> None:
        """``graph``: the file of the graph."""
        self._folder = folder
        self._model = load_graph(folder, graph)
        self._widen = _computes_in_bfloat16(self._model.graph)
        self.arithmetic = "float32" if self._widen else "as exported"
        if self._widen:
            _widen_casts(self._model.graph)
            _widen_constants(self._model.graph)
        self._initializers = {tensor.name: tensor for tensor in self._model.graph.initializer}
        # ONNX Runtime gives no bfloat16 to Python, so a bfloat16 cache is not among the results.
        self._outputs = [
            value.name
            for value in self._model.graph.output
            if self._widen or value.type.tensor_type.elem_type != onnx.TensorProto.BFLOAT16
        ]
        self.pieces = _cut(self._model.graph)

    def run(self, batches: Sequence[Mapping[str, Array]], progress: Progress = silent) -> list[Values]:
        """Run every batch of graph inputs through every piece; returns the graph's outputs per batch."""
        values: list[Values] = [dict(batch) for batch in batches]
        readers = Counter(name for piece in self.pieces for name in piece.reads)
        for done, piece in enumerate(self.pieces):
            progress("run the bundle's layers", done, len(self.pieces))
            produced = self.run_piece(piece, values)
            for batch, new in zip(values, produced, strict=True):
                batch.update(new)
            for name in piece.reads:
                readers[name] -= 1
                if not readers[name]:
                    for batch in values:
                        batch.pop(name, None)
        progress("run the bundle's layers", len(self.pieces), len(self.pieces))
        return [{name: batch[name] for name in self._outputs if name in batch} for batch in values]

    @property
    def graph(self) -> onnx.GraphProto:
        """The whole graph, without the data of its weights."""
        return self._model.graph

    def read(self, name: str) -> Array:
        """Read a whole weight of the graph."""
        return self._read(name).data

    def slice(self, name: str, gives: Sequence[str], known: Collection[str]) -> Piece:
        """The nodes that compute ``gives`` from known values, graph inputs and weights."""
        wanted, nodes = set(gives), []
        for node in reversed(self._model.graph.node):  # in topological order
            if wanted.intersection(node.output):
                nodes.append(node)
                wanted.difference_update(node.output)
                wanted.update(name for name in node.input if name and name not in known)
        return Piece(name, tuple(reversed(nodes)), tuple(gives))

    def run_piece(self, piece: Piece, values: list[Values]) -> list[Values]:
        """Run a piece for each batch of its input values; returns its outputs per batch."""
        weights = [name for name in piece.reads if name in self._initializers]
        if piece.name == "embedding" and any(_is_table(name) for name in weights):
            return self._run_embedding(piece, weights, values)
        axis = _output_axis(piece)
        sizes = {self._size(name, axis) for name in weights}
        if piece.name == "head" and len(sizes) == 1 and max(sizes) > 1:
            return self._run_head(piece, weights, axis, values)
        return self._execute(piece, {name: self._read(name) for name in weights}, values)

    def _run_embedding(self, piece: Piece, weights: list[str], values: list[Values]) -> list[Values]:
        """Run with only the table's rows that the batches use, and with renumbered ids."""
        used = np.unique(np.concatenate([batch["input_ids"].reshape(-1) for batch in values]))
        arrays = {name: self._read(name, used if _is_table(name) else None) for name in weights}
        renumbered = [batch | {"input_ids": np.searchsorted(used, batch["input_ids"])} for batch in values]
        return self._execute(piece, arrays, renumbered)

    def _run_head(self, piece: Piece, weights: list[str], axis: int, values: list[Values]) -> list[Values]:
        """Run in blocks of the vocabulary (the weights' axis ``axis``), and join the outputs along the last axis."""
        rows, parts = self._size(weights[0], axis), []
        step = HEAD_ROWS // max(_COUNTED.get(node.op_type, ("", 1))[1] for node in piece.nodes)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            block = range(start, end)
            if axis == 0:
                arrays = {name: self._read(name, np.array(block)) for name in weights}
            else:
                arrays = {name: self._read_columns(name, block) for name in weights}
            parts.append(self._execute(_of_rows(piece, start, end - start), arrays, values))
        return [
            {name: np.concatenate([part[i][name] for part in parts], axis=-1) for name in parts[0][i]}
            for i in range(len(values))
        ]

    def _execute(
        self, piece: Piece, weights: Mapping[str, "_PieceWeight"], values: list[Values]
    ) -> list[Values]:
        inputs = [name for name in sorted(piece.reads) if name in values[0]]
        outputs = list(piece.gives) or self._read_later(piece)
        session = self._session(piece, weights, {name: values[0][name] for name in inputs}, outputs)
        results = []
        for batch in values:
            found = session.run(outputs, {name: _fed(batch[name]) for name in inputs})
            results.append(dict(zip(outputs, found, strict=True)))
        return results

    def _read_later(self, piece: Piece) -> list[str]:
        later = {name for other in self.pieces if other.name != piece.name for name in other.reads}
        later.update(self._outputs)
        return [name for node in piece.nodes for name in node.output if name in later]

    def _session(
        self, piece: Piece, weights: Mapping[str, "_PieceWeight"], inputs: Values, outputs: list[str]
    ) -> Any:
        graph = onnx.helper.make_graph(
            piece.nodes,
            piece.name,
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
                )
                for name, array in inputs.items()
            ],
            # ONNX Runtime computes a node in float32 that alone has float16 inputs, unless it gives an output of the graph.
            # Then attention would not round to a float16 cache. So caches are outputs, also where nobody asks for them.
            [onnx.ValueInfoProto(name=name) for name in dict.fromkeys((*outputs, *_caches_of(piece)))],
        )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if any(node.domain == DOMAIN for node in piece.nodes):
            operators = library()
            if operators is None:
                raise ExportError(
                    "the CPU operators were not built when glm4-deploy was installed; install a C++ compiler and "
                    "glm4-deploy again"
                )
            with ascii_path(operators) as path:
                options.register_custom_ops_library(path)
        names, arrays = [], []
        for name, weight in weights.items():
            tensor = graph.initializer.add()
            if self._initializers[name].data_location != onnx.TensorProto.EXTERNAL:
                tensor.CopyFrom(self._initializers[name])
                continue
            tensor.name, tensor.data_type = name, weight.type
            tensor.dims.extend(weight.dims)
            if weight.type in _WITHOUT_NUMPY_TYPE:
                tensor.raw_data = weight.data.tobytes()
                continue
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="given in memory")
            names.append(name)
            arrays.append(ort.OrtValue.ortvalue_from_numpy(weight.data))
        if names:
            options.add_external_initializers(names, arrays)
        model = onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _size(self, name: str, axis: int) -> int:
        """Length of one axis of a weight; 0 for a scalar."""
        dims = self._initializers[name].dims
        return int(dims[axis]) if dims else 0

    def _read(self, name: str, rows: Array | None = None) -> "_PieceWeight":
        """A weight from the data file, or some of its rows (ascending)."""
        tensor = self._initializers[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return _PieceWeight(tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor))
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype, width = _stored_rows(tensor)
        with (self._folder / place["location"]).open("rb") as file:
            offset = int(place.get("offset", 0))
            if (
                rows is None and tensor.data_type in _PACKED
            ):  # two numbers in a byte, across rows of an odd width
                file.seek(offset)
                count = -(-int(np.prod(tensor.dims)) // 2)
                return _PieceWeight(tensor.data_type, tuple(tensor.dims), np.fromfile(file, np.uint8, count))
            if rows is None:
                rows = np.arange(tensor.dims[0] if tensor.dims else 1)
            data = np.concatenate(list(_row_runs(file, offset, dtype, width, rows)))
        return self._weight(tensor, (len(rows), *tensor.dims[1:]) if tensor.dims else (), data)

    def _weight(self, tensor: onnx.TensorProto, dims: tuple[int, ...], data: Array) -> "_PieceWeight":
        if self._widen and tensor.data_type == onnx.TensorProto.BFLOAT16:
            return _PieceWeight(onnx.TensorProto.FLOAT, dims, data.astype(np.float32).reshape(dims))
        return _PieceWeight(
            tensor.data_type, dims, data if tensor.data_type in _PACKED else data.reshape(dims)
        )

    def _read_columns(self, name: str, columns: range) -> "_PieceWeight":
        """Read a range of a weight's last axis; its ends are even for 4-bit numbers."""
        tensor = self._initializers[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        *rows, width = tensor.dims
        packed = tensor.data_type in _PACKED
        dtype = np.uint8 if packed else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape, offset = (*rows, width // (1 + packed)), int(place.get("offset", 0))
        stored = np.memmap(self._folder / place["location"], dtype, "r", offset, shape)
        part = stored[..., columns.start // (1 + packed) : columns.stop // (1 + packed)]
        return self._weight(tensor, (*rows, len(columns)), np.ascontiguousarray(part))


@dataclass(frozen=True)
class _PieceWeight:
    """A weight in memory; two 4-bit numbers share a byte."""

    type: int
    dims: tuple[int, ...]
    data: Array


def _caches_of(piece: Piece) -> list[str]:
    made = (name for node in piece.nodes for name in node.output)
    return [name for name in made if name.startswith("present_key_values.")]


def _fed(array: Array) -> Any:
    """An input as ONNX Runtime takes it from Python."""
    if array.dtype != onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16):
        return array
    bits = array.view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)


_COUNTED = {"MatMulNBits": ("N", 1), OPERATOR: ("columns", PANEL)}
_PACKED = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
_WITHOUT_NUMPY_TYPE = (*_PACKED, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT8E4M3FN)


def _output_axis(piece: Piece) -> int:
    """The axis of a piece's matrix that holds the outputs: the last one if the matrix is stored [in, out]."""
    made = {name: node for node in piece.nodes for name in node.output}
    products = [made.get(node.input[1]) for node in piece.nodes if node.op_type == "MatMul"]
    return -1 if any(node is not None and node.op_type == "DequantizeLinear" for node in products) else 0


def _stored_rows(tensor: onnx.TensorProto) -> tuple[Any, int]:
    """Element type and number of elements of a stored row of a weight."""
    width = int(np.prod(tensor.dims[1:]))
    if tensor.data_type in _PACKED:
        return np.dtype(np.uint8), width // 2
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), width


def _row_runs(file: Any, offset: int, dtype: Any, width: int, rows: Array) -> Iterator[Array]:
    """Read rows in ascending order; consecutive rows in one read."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        file.seek(offset + int(run[0]) * width * np.dtype(dtype).itemsize)
        yield np.fromfile(file, dtype, len(run) * width).reshape(len(run), width)


def _cut(graph: onnx.GraphProto) -> list[Piece]:
    """Group nodes by the module in their names, in the order of the model.

    A residual sum or a cast, whose name does not tell its place, goes to the last piece it reads from.
    """
    outputs = {value.name for value in graph.output if value.name in ("logits", "last_hidden_state")}
    groups: dict[tuple[int, int], list[onnx.NodeProto]] = {}
    place: dict[str, tuple[int, int]] = {}
    for node in graph.node:  # in topological order
        own = HEAD_PLACE if outputs.intersection(node.output) else _place(node.name)
        group = max([own, *(place[name] for name in node.input if name in place)])
        place.update(dict.fromkeys(node.output, group))
        groups.setdefault(group, []).append(node)
    return [Piece(_name(group), tuple(groups[group])) for group in sorted(groups)]


# The place of a node: layer, and stage in the layer. Each of the largest matrices is a separate piece. While the runtime
# widens and packs a float16 weight, it needs five times the weight's size.
EMBEDDING_PLACE, NORM_PLACE, HEAD_PLACE = (-1, 0), (sys.maxsize, 0), (sys.maxsize, 1)
STAGES = ("attention", "gate_up", "down")


def _place(node_name: str) -> tuple[int, int]:
    layer = re.match(r"model\.layers\.(\d+)(?:\.(mlp)(\.down_proj)?)?[./]", node_name)
    if layer:
        return int(layer[1]), 0 if not layer[2] else 2 if layer[3] else 1
    if node_name.startswith(("model.embed_tokens/", "attention/")):
        return EMBEDDING_PLACE
    return HEAD_PLACE if node_name.startswith(("lm_head/", "score/")) else NORM_PLACE


def _name(place: tuple[int, int]) -> str:
    fixed = {EMBEDDING_PLACE: "embedding", NORM_PLACE: "norm", HEAD_PLACE: "head"}
    return fixed.get(place) or f"layer {place[0]} {STAGES[place[1]]}"


def _is_table(name: str) -> bool:
    """Whether a weight is the embedding or a part of it; each part has the embedding's rows."""
    return name == EMBEDDING or name.startswith(f"{EMBEDDING}.")


def _of_rows(piece: Piece, start: int, rows: int) -> Piece:
    """The head node with its attribute for the number of rows set; our own product counts panels."""
    nodes = []
    for node in piece.nodes:
        if node.op_type in _COUNTED:
            name, together = _COUNTED[node.op_type]
            node = onnx.NodeProto.FromString(node.SerializeToString())
            count = next(attribute for attribute in node.attribute if attribute.name == name)
            count.i = min(count.i - start * together, rows * together)
        nodes.append(node)
    return Piece(piece.name, tuple(nodes), piece.gives)


def _computes_in_bfloat16(graph: onnx.GraphProto) -> bool:
    """Whether the graph computes in bfloat16: casts, lookups, and scales of our own product, do not count."""
    narrow = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16}
    return any(
        narrow.intersection(node.input)
        for node in graph.node
        if node.op_type not in ("Cast", "Gather", OPERATOR)
    )


def _widen_casts(graph: onnx.GraphProto) -> None:
    """Change casts to bfloat16 into casts to float32; initializers are widened when read."""
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT


def _widen_constants(graph: onnx.GraphProto) -> None:
    """Widen the bfloat16 constants inside the graph."""
    for tensor in graph.initializer:
        if (
            tensor.data_type == onnx.TensorProto.BFLOAT16
            and tensor.data_location != onnx.TensorProto.EXTERNAL
        ):
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))


__all__ = ["GraphPieces", "Piece"]
