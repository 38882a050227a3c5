"""Initializers that are computed from other initializers, when the graph's data are written."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]


def derived(
    graph: ir.Graph, value: ir.Value, suffix: str, dtype: ir.DataType, compute: Callable[[Array], Array]
) -> ir.Value:
    """An initializer of the shape of another one; a second call returns the same.

    Args:
        compute: from the other's numbers to the new ones; numbers of 4 bits lie two in a byte, the first in the low half.
    """
    name = f"{value.name}.{suffix}"
    if name in graph.initializers:
        return graph.initializers[name]
    whole, shape = value.const_value, value.shape
    assert whole is not None
    assert shape is not None

    def tensor() -> ir.TensorProtocol:
        numbers = compute(whole.numpy())
        if dtype.itemsize < 1:
            return ir.PackedTensor(numbers, dtype, shape=shape, name=name)
        return ir.Tensor(numbers, dtype, shape=shape, name=name)

    lazy = ir.LazyTensor(tensor, dtype, shape, name=name)
    made = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy)
    graph.register_initializer(made)
    return made


def drop_unused(graph: ir.Graph) -> None:
    """Remove initializers that no node reads."""
    for name in [n for n, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
