"""Cuts a graph into stages: parts with consecutive layers.

A stage reads token ids or the hidden states of the layer before, and gives hidden states or logits. The nodes of a
stage are those of the whole graph. Nodes that all layers read, such as those that count positions, are in each stage.
"""

import onnx_ir as ir

from glm4_exporters.element_types import ir_type
from glm4_runtime.bundle.graph_io import GraphIO, past_names


def _measure_own_inputs(graph: ir.Graph, io: GraphIO) -> None:
    """Let nodes that read a shape from an input of the first stage read it from this stage's inputs.

    Hidden states have the batch and the sequence of token ids, and all layers' caches have the same shape.
    """
    values = ir.convenience.create_value_mapping(graph)
    entry, past = (
        next(spec.name for spec in io.inputs if spec.name.startswith(start))
        for start in ("", "past_key_values.")
    )
    instead = {"input_ids": values[entry], past_names(0)[0]: values[past]}
    for node in graph:
        name = node.inputs[0].name if node.op_type == "Shape" and node.inputs[0] is not None else None
        if name in instead:
            node.replace_input_with(0, instead[name])


def cut(model: ir.Model, io: GraphIO) -> ir.Model:
    """The part of ``model`` that computes the outputs of ``io`` from its inputs. Its nodes and weights are copies, in
    the order of ``model``."""
    whole = model.graph.clone()
    _measure_own_inputs(whole, io)
    ends = ([spec.name for spec in specs] for specs in (io.inputs, io.outputs))
    graph = ir.convenience.extract(whole, *ends)
    for values, specs in ((graph.inputs, io.inputs), (graph.outputs, io.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.type, value.shape = ir.TensorType(ir_type(spec.dtype)), ir.Shape(spec.shape)
    weights = dict(graph.initializers)
    graph.initializers.clear()  # extract has collected them in a set
    for name in model.graph.initializers:
        if name in weights:
            graph.initializers[name] = weights[name]
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )
