"""glm4::PartialRopeGqaAttention -> RotaryEmbedding, TensorScatter and Attention of opset 24."""

import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, fixed, graph_input, scope_of
from glm4_plugins.operator import DOMAIN, OP_TYPE


class NativeAttention(ir.passes.InPlacePass):
    """Lower attention to standard operators under one explicit mask, which all layers share.

    The mask is explicit because implementations of ``Attention`` disagree about the causal mask when there are
    more keys than queries. Its cost grows with the cache's capacity, not with the sequence's length.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP_TYPE)]
        if nodes:
            shared = _SharedTables(graph, nodes[0])
            for node in nodes:
                _lower(graph, node, shared)
            model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, bool(nodes))


class _SharedTables:
    """Values that all layers read: positions [B, S], the mask [B, 1, S, C], and write positions in the cache [B]."""

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        b = Builder(graph, "attention")
        input_ids, query_lengths = (graph_input(graph, n) for n in ("input_ids", "query_lengths"))
        past_lengths, past_key, cos = first.inputs[7], first.inputs[3], first.inputs[5]
        assert cos is not None
        assert cos.shape is not None
        zero, one, axes = (
            b.constant(0),
            b.constant(1),
            [b.constant([0]), b.constant([1]), b.constant([1, 2, 3])],
        )
        ids_shape = b.op("Shape", input_ids)
        sequence = b.op("Squeeze", b.op("Shape", input_ids, start=1, end=2), axes[0])
        steps = b.op("Range", zero, sequence, one)  # [S]
        lengths = b.op("Cast", query_lengths, to=ir.DataType.INT64)
        if past_lengths is None:
            self.write_at = None
            positions = b.op("Expand", steps, ids_shape)  # [B, S]
            keys, ends = steps, lengths
        else:
            self.write_at = b.op("Cast", past_lengths, to=ir.DataType.INT64)  # [B]
            positions = b.op("Add", b.op("Unsqueeze", self.write_at, axes[1]), steps)  # [B, S]
            capacity = b.op("Squeeze", b.op("Shape", past_key, start=2, end=3), axes[0])
            keys = b.op("Range", zero, capacity, one)  # [C]
            ends = b.op("Add", self.write_at, lengths)
        causal = b.op("LessOrEqual", keys, b.op("Unsqueeze", positions, b.constant([1, 3])))  # [B, 1, S, C]
        valid = b.op("Less", keys, b.op("Unsqueeze", ends, axes[2]))  # [B, 1, 1, C]
        self.mask = b.op("And", causal, valid)
        # Padding may lie beyond the last row of the tables; its rotation is never read.
        self.positions = b.op("Min", positions, b.constant(fixed(cos.shape[0]) - 1))
        graph.insert_before(graph[0], b.nodes)


def _lower(graph: ir.Graph, node: ir.Node, shared: _SharedTables) -> None:
    query, key, value, past_key, past_value, cos, sin, *_ = node.inputs
    attributes = node.attributes
    b = Builder(graph, scope_of(node))
    assert query is not None

    def heads(x: ir.Value | None, count: str) -> ir.Value:  # [B, S, N * D] -> [B, N, S, D]
        split = b.op("Reshape", x, b.constant([0, 0, attributes[count].as_int(), -1]))
        return b.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotated(x: ir.Value) -> ir.Value:
        rotary_dim = attributes["rotary_embedding_dim"].as_int()
        return b.op(
            "RotaryEmbedding", x, cos, sin, shared.positions, interleaved=1, rotary_embedding_dim=rotary_dim
        )

    q = rotated(heads(query, "num_heads"))
    k = rotated(heads(key, "kv_num_heads"))
    v = heads(value, "kv_num_heads")
    if past_key is not None:
        k = b.op("TensorScatter", past_key, k, shared.write_at, axis=-2)
        v = b.op("TensorScatter", past_value, v, shared.write_at, axis=-2)
    attended = b.op("Attention", q, k, v, shared.mask, scale=attributes["scale"].as_float())
    joined = b.op("Transpose", attended, perm=[0, 2, 1, 3])
    output = b.op("Reshape", joined, b.constant([0, 0, -1]))
    replaced = (output, k, v) if past_key is not None else (output,)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], b.nodes, node.outputs[: len(replaced)], replaced
    )
