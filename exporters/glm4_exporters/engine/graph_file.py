"""Saves the graphs that TensorRT's parser reads, with the weights that exist only for the parser."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from glm4_exporters.aligned_file import ALIGNMENT


def save_graphs(models: Mapping[str, ir.Model], folder: Path, data: str) -> None:
    """Save each graph in ``folder`` under its file name, and all derived weights in the file ``data``.

    One weight is in memory at a time. Graphs share the weights of one name. The file exists only if there are derived
    weights.
    """
    places: dict[str, ir.ExternalTensor] = {}
    for name, model in models.items():
        for weight, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.LazyTensor):
                if weight not in places:
                    places[weight] = _append(value.const_value, folder, data)
                value.const_value = places[weight]
        ir.save(model, folder / name)


def _append(tensor: ir.LazyTensor, folder: Path, data: str) -> ir.ExternalTensor:
    """Write a tensor at the end of the data file, at a multiple of the page size."""
    content = tensor.tobytes()
    with (folder / data).open("ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        offset = file.tell()
        file.write(content)
    place = data, offset, len(content), tensor.dtype
    return ir.ExternalTensor(*place, shape=tensor.shape, name=str(tensor.name), base_dir=folder)
