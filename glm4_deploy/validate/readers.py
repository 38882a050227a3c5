"""The matrices that read a sub-block's output, and the factors per channel that they undo.

The columns of a graph's matrix are its outputs for inputs with a single nonzero channel. So every format of weights,
operator and layout is read alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch

from glm4_deploy.validate.bands import BANDS, arithmetic_of
from glm4_deploy.validate.factors import Array, Undone, joined, undone_columns
from glm4_deploy.validate.memory import MOST_ROWS, VALUES_AT_ONCE, chunk_of_positions
from glm4_deploy.validate.taps import ATTENTION_TAP, HEAD_TAP, NORM_TAP, GraphTaps
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.pieces import GraphPieces, Piece
from glm4_exporters.streamed import head_name
from glm4_plugins.block_product import OPERATOR

# Keys: sub-blocks whose output channels an export may scale. Values: the matrices that read the output. The rows of
# v_proj and of up are scaled themselves, so they cannot be compared; of gate_up_proj, the rows of gate are.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj"),
    "v": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_up_proj",),
    "gate_up": ("mlp.down_proj",),
    NORM_TAP: ("lm_head",),
}
SCALED_TAPS = {"self_attn.o_proj": "o_proj", "mlp.down_proj": "down"}  # their outputs may have fewer bits
READ_BYTES = 16 << 20  # of a matrix at a time
LARGEST_CODE = 127  # of int8 inputs
INDICES = "logits_indices"  # input of graphs that compute the logits of some positions


class Readers:
    """The matrices of one graph, compared with the checkpoint's."""

    def __init__(self, pieces: GraphPieces, taps: GraphTaps, checkpoint: Checkpoint) -> None:
        self._pieces, self._taps, self._checkpoint = pieces, taps, checkpoint
        self._types = {tensor.name: tensor.data_type for tensor in pieces.graph.initializer}

    def undone(self, layer: int | None, tap: str, inputs: Sequence[Array]) -> list[Undone]:
        """What each reader of a sub-block undoes; empty without a reader that can be measured alone.

        Args:
            inputs: outputs of the sub-block in the graph. The probe has their type and half of their largest value.
        """
        if layer is None and self._checkpoint.task != "causal-lm":
            return []
        size = (
            max((float(np.abs(one[np.isfinite(one)]).max(initial=0)) for one in inputs), default=0) / 2 or 1.0
        )
        readers = [self._piece(layer, tap, module) for module in READERS[tap]]
        found = [self._compare(one, size, inputs[0].dtype) for one in readers if one is not None]
        config = self._checkpoint.config
        return [one.grouped(config) for one in found] if tap == "v" else found

    def _piece(self, layer: int | None, tap: str, module: str) -> "_Reader | None":
        """The matrix alone; None where the graph has no such value, or where more than the input is needed."""
        scope = "" if layer is None else f"model.layers.{layer}."
        taps = {one.tap: one for one in ([self._taps.norm] if layer is None else self._taps.layers[layer])}
        source = taps.get(ATTENTION_TAP if tap == "v" else tap)
        output = self._taps.output_of(f"{scope}{module}")
        has_gate = output is None and module == "mlp.gate_up_proj" and "gate_up" in taps
        output = taps["gate_up"].values[0] if has_gate else output
        if source is None or output is None:
            return None
        whole = self._pieces.slice(f"{scope}{module}" if scope else HEAD_TAP, [output], set(source.values))
        piece = _without_gate(whole) if has_gate else whole
        if piece is None or piece.reads - self._types.keys() - {source.values[0], INDICES}:
            return None
        bits = taps[SCALED_TAPS[module]].bits if module in SCALED_TAPS else 0
        name = f"{scope}{module}.weight" if scope else head_name(self._checkpoint)
        return _Reader(piece, source.values[0], output, bits, name)

    def _compare(self, reader: "_Reader", size: float, dtype: np.dtype[Any]) -> Undone:
        weight = self._rows(reader)
        rows, width = weight.shape
        size = self._on_grid(reader, size)
        types = self._types | {reader.source: onnx.helper.np_dtype_to_tensor_dtype(dtype)}
        limit = BANDS[arithmetic_of(reader.piece.nodes, types)].local
        step = self._columns_at_once(reader, width)
        parts = []
        for start in range(0, width, step):
            columns = np.arange(start, min(start + step, width))
            probe = np.zeros((1, len(columns) + 1, width), dtype)  # the last row gives the bias
            probe[0, np.arange(len(columns)), columns] = size
            values = {reader.source: probe, INDICES: np.arange(probe.shape[1])[None]}
            (found,) = self._pieces.run_piece(reader.piece, [values])
            given = found[reader.output].reshape(probe.shape[1], -1)[:, :rows].astype(np.float32)
            with np.errstate(all="ignore"):
                graph = (given[:-1] - given[-1]) * np.float32(2.0**reader.bits / float(probe[0, 0, start]))
            parts.append(undone_columns(graph, weight[:, columns].T, limit))
        return joined(parts)

    def _columns_at_once(self, reader: "_Reader", width: int) -> int:
        config = self._checkpoint.config
        if reader.piece.name == HEAD_TAP:
            return chunk_of_positions(config)
        return max(1, VALUES_AT_ONCE // (2 * config.intermediate_size + width))

    def _rows(self, reader: "_Reader") -> Array:
        """The checkpoint's rows that are compared, float32: at most ``MOST_ROWS``, and none of up."""
        source = self._checkpoint.name_of(reader.weight)
        most = min(MOST_ROWS, self._checkpoint.config.intermediate_size if reader.is_gate_up else MOST_ROWS)
        blocks, count = [], 0
        for _, block in self._checkpoint.row_blocks(source, torch.empty(READ_BYTES, dtype=torch.uint8)):
            blocks.append(block.to(torch.float32, copy=True)[: most - count].numpy())
            count += len(blocks[-1])
            if count == most:
                break
        return np.concatenate(blocks)

    def _on_grid(self, reader: "_Reader", size: float) -> float:
        """The multiple of the input's quantization step nearest to ``size``, so that the probe is not rounded."""
        for node in reader.piece.nodes:
            if node.op_type == "QuantizeLinear" and node.input[1] in self._types:
                step = float(np.asarray(self._pieces.read(node.input[1]), np.float32).reshape(-1)[0])
                return step * min(max(round(size / step), 1), LARGEST_CODE)
        return size


def _without_gate(piece: Piece) -> Piece | None:
    """The product alone of a node that has gate and up in one; None for a piece with other nodes too."""
    if [node.op_type for node in piece.nodes] != [OPERATOR]:
        return None
    node = onnx.NodeProto.FromString(piece.nodes[0].SerializeToString())
    for attribute in node.attribute:
        if attribute.name == "gated":
            attribute.i = 0
    return replace(piece, nodes=(node,))


@dataclass(frozen=True)
class _Reader:
    """One matrix of the graph: its nodes, its input and output, the bits that the output lacks, the checkpoint's name."""

    piece: Piece
    source: str
    output: str
    bits: int
    weight: str

    @property
    def is_gate_up(self) -> bool:
        return self.weight.endswith("gate_up_proj.weight")
