"""Cuts a graph into stages: parts with consecutive layers.

A stage reads token ids or the hidden states of the layer before, and gives hidden states or logits. The nodes of a
stage are those of the whole graph. Nodes that all layers read, such as those that count positions, are in each stage.
The counters of our attention plugin, which each layer leaves for the next, begin anew in each stage.
"""

import onnx_ir as ir

from glm4_exporters.element_types import ir_type
from glm4_plugins.launch import PLUGIN_INPUTS, PLUGIN_OUTPUTS
from glm4_plugins.operator import DOMAIN
from glm4_runtime.bundle import COUNTERS, PRESENT_COUNTERS
from glm4_runtime.bundle.graph_io import GraphIO, past_names

PAST, COUNTERS_IN = (list(PLUGIN_INPUTS).index(name) for name in ("past_key", "counters"))
COUNTERS_OUT = list(PLUGIN_OUTPUTS).index("present_counters")


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


def _begin_counters(graph: ir.Graph, io: GraphIO) -> bool:
    """Let the stage's first plugin read the graph's counters, and its last one give those of the graph.

    Returns:
        Whether the graph has counters.
    """
    counters = next((value for value in graph.inputs if value.name == COUNTERS), None)
    if counters is None:
        return False
    pasts = {spec.name for spec in io.inputs}
    plugins = [node for node in graph if _is_plugin(node) and _past_name(node) in pasts]
    plugins[0].replace_input_with(COUNTERS_IN, counters)
    whole = next(value for value in graph.outputs if value.name == PRESENT_COUNTERS)
    whole.name = "counters of all layers"
    plugins[-1].outputs[COUNTERS_OUT].name = PRESENT_COUNTERS
    return True


def _is_plugin(node: ir.Node) -> bool:
    return node.domain == DOMAIN and len(node.inputs) > COUNTERS_IN


def _past_name(node: ir.Node) -> str | None:
    past = node.inputs[PAST]
    return None if past is None else past.name


def cut(model: ir.Model, io: GraphIO) -> ir.Model:
    """The part of ``model`` that computes the outputs of ``io`` from its inputs. Its nodes and weights are copies, in
    the order of ``model``. A graph with our plugin also has its counters, behind the others."""
    whole = model.graph.clone()
    _measure_own_inputs(whole, io)
    more = [[COUNTERS], [PRESENT_COUNTERS]] if _begin_counters(whole, io) else [[], []]
    sides = (io.inputs, io.outputs)
    ends = [[*(spec.name for spec in specs), *names] for specs, names in zip(sides, more, strict=True)]
    graph = ir.convenience.extract(whole, *ends)
    for values, specs in zip((graph.inputs, graph.outputs), sides, strict=True):
        for value, spec in zip(values, specs, strict=False):  # counters, which come last, have theirs
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
