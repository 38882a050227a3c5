"""glm4::PartialRopeGqaAttention -> com.microsoft.GroupQueryAttention, one past/present buffer per layer."""

import numpy as np
import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, fixed, graph_input, scope_of
from glm4_plugins.operator import DOMAIN, OP_TYPE
from glm4_runtime.bundle.graph_checks import MICROSOFT


class GroupQueryAttention(ir.passes.InPlacePass):
    """Lower attention to ONNX Runtime's own operator, RoPE included.

    The kernel derives the past from its input ``seqlens_k`` = past + S - 1. S must be the padded width: with
    only the valid tokens counted, a padded chunk would overwrite keys in use. With a past and more than one new
    token, the kernel computes one sequence per call.

    The kernel rotates multiples of 16 dims, in heads whose size is a multiple of 16. For other sizes, which no
    released checkpoint has, the standard RotaryEmbedding rotates before the kernel. The kernel takes heads
    whose size is a multiple of 8. Other nodes are left for the native lowering.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP_TYPE) and _head_size(n) % 8 == 0]
        if nodes:
            shared = _SharedInputs(graph, nodes[0])
            for node in nodes:
                _lower(graph, node, shared)
            model.opset_imports.pop(DOMAIN, None)
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, bool(nodes))


def _head_size(node: ir.Node) -> int:
    query = node.inputs[0]
    assert query is not None
    assert query.shape is not None
    return fixed(query.shape[2]) // node.attributes["num_heads"].as_int()


class _SharedInputs:
    """Values that all layers read: ``seqlens_k`` [B] and ``total_sequence_length``, a scalar, both int32.

    ``positions`` [B, S] int64 exists only if the kernel does not rotate.
    """

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        b = Builder(graph, "attention")
        input_ids, past_lengths = graph_input(graph, "input_ids"), first.inputs[7]
        one = b.constant(1, np.int32)
        sequence = b.op("Cast", b.op("Shape", input_ids, start=1, end=2), to=ir.DataType.INT32)  # [1]
        if past_lengths is None:
            batch = b.op("Shape", input_ids, start=0, end=1)
            past_lengths = b.op("Expand", b.constant([0], np.int32), batch)
            self.total = b.op("Squeeze", sequence)
        else:
            self.total = b.op("Squeeze", b.op("Add", b.op("ReduceMax", past_lengths), sequence))
        self.last_keys = b.op("Add", past_lengths, b.op("Sub", sequence, one))
        self.positions = None
        if first.attributes["rotary_embedding_dim"].as_int() % 16 or _head_size(first) % 16:
            steps = b.op("Range", b.constant(0, np.int32), b.op("Squeeze", sequence), one)
            positions = b.op("Add", b.op("Unsqueeze", past_lengths, b.constant([1])), steps)
            self.positions = b.op("Cast", positions, to=ir.DataType.INT64)
        graph.insert_before(graph[0], b.nodes)


def _lower(graph: ir.Graph, node: ir.Node, shared: _SharedInputs) -> None:
    query, key, value, past_key, past_value, cos, sin, *_ = node.inputs
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    b = Builder(graph, scope_of(node))
    tables: tuple[ir.Value | None, ...] = (cos, sin)
    if shared.positions is not None:
        rotary_dim = node.attributes["rotary_embedding_dim"].as_int()
        query, key = (
            b.op(
                "RotaryEmbedding",
                *(x, cos, sin, shared.positions),
                interleaved=1,
                rotary_embedding_dim=rotary_dim,
                num_heads=count,
            )
            for x, count in ((query, heads), (key, kv_heads))
        )
        tables = ()
    b.op(
        "GroupQueryAttention",
        *(query, key, value, past_key, past_value, shared.last_keys, shared.total, *tables),
        outputs=3,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=node.attributes["scale"].as_float(),
        do_rotary=int(bool(tables)),
        rotary_interleaved=int(bool(tables)),
    )
    outputs = b.nodes[-1].outputs
    ir.convenience.replace_nodes_and_values(graph, node, [node], b.nodes, node.outputs, outputs)
