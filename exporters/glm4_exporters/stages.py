"""Stages: a model in several graphs, each with consecutive layers.

A stage reads token ids or the hidden states of the layer before, and gives hidden states or logits. The nodes of a
stage are those of the whole graph. Nodes that all layers read, such as those that count positions, are in each stage.
"""

from collections.abc import Sequence

import onnx_ir as ir

from glm4_exporters.architecture import EMBEDDING, expected_tensors
from glm4_exporters.config import Glm4Config
from glm4_exporters.element_types import ir_type
from glm4_runtime.bundle.file_names import STAGE_GRAPH, STAGE_WEIGHTS
from glm4_runtime.bundle.graph_io import GraphIO, past_names
from glm4_runtime.bundle.manifest import StageInfo
from glm4_runtime.errors import ExportError, shown


def stage_list(config: Glm4Config, task: str, asked: Sequence[int]) -> tuple[StageInfo, ...]:
    """The stages that a user asks for; empty for none.

    Args:
        asked: one number, the count of stages; or the count of layers of each stage.

    Raises:
        ExportError: the numbers do not fit the model.
    """
    if not asked:
        return ()
    layers, said = config.num_hidden_layers, ",".join(map(str, asked))
    if layers < 2:
        raise ExportError(
            "--stages needs a model of at least 2 layers, but this model has 1; leave --stages out"
        )
    if len(asked) > 1:
        if min(asked) < 1 or sum(asked) != layers:
            raise ExportError(
                f"--stages {shown(said)} has {sum(asked)} layers, but this model has {layers}; give counts of at least "
                f"1 with the sum {layers}"
            )
        return _stages(asked)
    if not 2 <= asked[0] <= layers:
        raise ExportError(
            f"--stages is {said}, but this model of {layers} layers has 2 ... {layers} stages; leave --stages out for one"
        )
    return _stages(_balanced(config, task, asked[0]))


def _balanced(config: Glm4Config, task: str, count: int) -> list[int]:
    """Counts of layers by which the stages have about the same number of weights. The first stage has the embedding
    too, and the last one the head."""
    shapes = expected_tensors(config, task)
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    layers, table = config.num_hidden_layers, sizes[EMBEDDING] / layer  # in layers
    share = (layers + 2 * table) / count
    ends = [0]
    for number in range(1, count):
        end = round(number * share - table)
        ends.append(min(max(end, ends[-1] + 1), layers - (count - number)))
    return [end - start for start, end in zip(ends, [*ends[1:], layers], strict=True)]


def _stages(counts: Sequence[int]) -> tuple[StageInfo, ...]:
    return tuple(
        StageInfo(sum(counts[:i]), count, STAGE_GRAPH.format(i + 1), STAGE_WEIGHTS.format(i + 1))
        for i, count in enumerate(counts)
    )


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
