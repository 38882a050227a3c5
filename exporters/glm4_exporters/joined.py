"""Joins the graphs of a bundle's stages to one graph, which computes the same."""

from pathlib import Path

import onnx

from glm4_runtime.bundle import GRAPH, read_manifest


def load_graph(folder: Path, name: str = GRAPH) -> onnx.ModelProto:
    """The graph ``name`` of a bundle, or its stages joined, without the data of weights; each weight says its file."""
    if (folder / name).is_file():
        return onnx.load(folder / name, load_external_data=False)
    stages = read_manifest(folder).stages
    return join([onnx.load(folder / stage.graph, load_external_data=False) for stage in stages])


def join(models: list[onnx.ModelProto]) -> onnx.ModelProto:
    """One graph of stages in their order: the hidden states that one gives are what the next reads.

    Nodes and weights that several stages have stay apart, under other names, so that every stage's own copy is used.
    """
    whole = models[0]
    for number, model in enumerate(models[1:], 2):
        _rename(model.graph, _made(whole.graph), f".stage-{number}")
        _append(whole.graph, model.graph)
    return whole


def _made(graph: onnx.GraphProto) -> set[str]:
    """Names of a graph's weights and of the values of its nodes, except its outputs."""
    names = {tensor.name for tensor in graph.initializer}
    names.update(name for node in graph.node for name in node.output if name)
    return names - {value.name for value in graph.output}


def _rename(graph: onnx.GraphProto, taken: set[str], ending: str) -> None:
    for node in graph.node:
        node.name += ending if taken.intersection(node.output) else ""
        for names in (node.input, node.output):
            names[:] = [name + ending if name in taken else name for name in names]
    for values in (graph.initializer, graph.value_info):
        for value in values:
            value.name += ending if value.name in taken else ""


def _append(whole: onnx.GraphProto, graph: onnx.GraphProto) -> None:
    """Append a stage's graph. Its first input is the first output of ``whole``, whose place its own first output takes."""
    known = {value.name for value in (*whole.input, *whole.output)}
    outputs = [*graph.output[:1], *whole.output[1:], *graph.output[1:]]
    whole.input.extend(value for value in graph.input if value.name not in known)
    del whole.output[:]
    whole.output.extend(outputs)
    whole.node.extend(graph.node)
    whole.initializer.extend(graph.initializer)
    whole.value_info.extend(graph.value_info)
