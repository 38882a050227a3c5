"""glm4::PartialRopeGqaAttention -> the TensorRT plugin of that name, with its counters and scratch."""

import numpy as np
import onnx_ir as ir

from glm4_exporters.passes.builder import fixed
from glm4_plugins.launch import (
    PHASES,
    PLUGIN_INPUTS,
    PLUGIN_OUTPUTS,
    KernelShape,
    choices,
    counters_shape,
    unsupported,
)
from glm4_plugins.operator import DOMAIN, OP_TYPE
from glm4_runtime.bundle import COUNTERS, PRESENT_COUNTERS
from glm4_runtime.errors import ExportError

_DTYPES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


class PluginAttention(ir.passes.InPlacePass):
    """Give attention nodes the inputs, outputs and attributes of our TensorRT plugin.

    The graph gets an int32 input ``counters`` and an output ``present_counters``. The session binds both to one
    buffer, which it zeroes once. Each layer uses the buffer and leaves it zero for the next.

    Classifiers and encoders have nodes without a past. These nodes are left for the native lowering.

    ``processors`` are the GPU's streaming multiprocessors; ``small_tiles`` keeps a block's shared memory below 48 KiB.

    Raises:
        ExportError: the kernel does not take these heads or this type.
    """

    def __init__(
        self,
        max_batch: int,
        compute_capability: int,
        phase: str = "shared",
        processors: int | None = None,
        small_tiles: bool = False,
    ) -> None:
        super().__init__()
        self.max_batch, self.compute_capability, self.phase = max_batch, compute_capability, phase
        self.tile_choice = -1 if small_tiles else 0
        self.tiles = choices(compute_capability, processors=processors)[self.tile_choice]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP_TYPE) and _canonical(n)]
        if nodes:
            counters = _value(COUNTERS, ir.DataType.INT32, list(counters_shape(self.tiles)))
            graph.inputs.append(counters)
            for node in nodes:
                counters = self._complete(graph, node, counters)
            counters.name = PRESENT_COUNTERS
            graph.outputs.append(counters)
        return ir.passes.PassResult(model, bool(nodes))

    def _complete(self, graph: ir.Graph, node: ir.Node, counters: ir.Value) -> ir.Value:
        """Replace the node by the plugin; return its counters, for the next layer."""
        shape = self._kernel_shape(node)
        attributes: dict[str, int | str] = {
            name: node.attributes[name].as_int()
            for name in ("num_heads", "kv_num_heads", "rotary_embedding_dim")
        }
        attributes |= dict(
            head_dim=shape.head_dim,
            # the shortest digits that give the float32 back
            scale=str(np.float32(shape.scale)),
            max_batch=self.max_batch,
            compute_capability=self.compute_capability,
            processors=self.tiles.blocks,
            tiles=self.tile_choice,
            phase=PHASES[self.phase],
            # TensorRT's parser looks for the plugin's full name, and for its ahead-of-time form
            plugin_namespace=DOMAIN,
            plugin_version="1",
            aot=1,
        )
        plugin = ir.node(
            OP_TYPE,
            [*node.inputs, counters],
            attributes,
            domain=DOMAIN,
            num_outputs=len(PLUGIN_OUTPUTS),
            name=node.name,
        )
        assert len(plugin.inputs) == len(PLUGIN_INPUTS)
        for new, old in zip(plugin.outputs, node.outputs, strict=False):
            new.type, new.shape = old.type, old.shape
        *_, left, scratch = plugin.outputs
        left.name, left.type, left.shape = f"{node.name}:counters", counters.type, counters.shape
        scratch.name, scratch.type = f"{node.name}:partials", ir.TensorType(ir.DataType.FLOAT)
        scratch.shape = ir.Shape([None])  # the plugin says it
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [plugin], node.outputs, plugin.outputs[: len(node.outputs)]
        )
        return left

    def _kernel_shape(self, node: ir.Node) -> KernelShape:
        query, cache = node.inputs[0], node.inputs[3]
        assert query is not None
        assert query.dtype is not None
        assert cache is not None
        assert cache.shape is not None
        shape = KernelShape(
            node.attributes["num_heads"].as_int(),
            node.attributes["kv_num_heads"].as_int(),
            fixed(cache.shape[3]),
            node.attributes["scale"].as_float(),
            self.max_batch,
            _DTYPES.get(query.dtype, query.dtype.name.lower()),
            phase=self.phase,
        )
        refusal = unsupported(shape, node.attributes["rotary_embedding_dim"].as_int())
        if refusal:
            raise ExportError(
                f"there is no attention plugin for this model: {refusal}; use --attention native"
            )
        return shape


def _canonical(node: ir.Node) -> bool:
    return "aot" not in node.attributes and node.inputs[3] is not None


def _value(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
