"""The inputs by which a graph takes LoRA adapters at run time: names, element types and axes, stated once.

Each sequence of a batch names its adapter in ``adapter_rows``. The matrices of adapters have two forms:

- packed, for target ``cpu``: one tensor for each adapter, and ``adapter_places`` with the positions of its matrices;
  :mod:`glm4_plugins.lora_product` describes both. A sequence without an adapter has -1.
- stacked, for the other targets: two tensors for each matrix of the model, A [adapters, inputs, rank] and B [adapters,
  rank, outputs]. Adapter 0 holds zeros, for sequences without an adapter.
"""

from glm4_runtime.bundle.manifest import AdapterSlots, TensorSpec

ROWS, PLACES = "adapter_rows", "adapter_places"
PACKED_DIALECT = "cpu"
PARTS, ENTRY = 2, 5  # of a matrix in ``adapter_places``: its parts, and the numbers of each
FORM = "float16"


def packed_name(slot: int) -> str:
    """The input with the elements of an adapter."""
    return f"adapter.{slot}"


def stacked_names(matrix: str) -> tuple[str, str]:
    """The inputs with A and B of a matrix for all adapters."""
    return f"{matrix}.lora_A", f"{matrix}.lora_B"


def adapter_specs(slots: AdapterSlots, dialect: str) -> tuple[TensorSpec, ...]:
    """The inputs that the graph with adapters has beside those of the graph without."""
    rows = TensorSpec(ROWS, "int64", ("batch",))
    if dialect == PACKED_DIALECT:
        places = (slots.count, len(slots.matrices), PARTS, ENTRY)
        names = [packed_name(slot) for slot in range(slots.count)]
        elements = [TensorSpec(name, FORM, (f"{name}.elements",)) for name in names]
        return (rows, TensorSpec(PLACES, "int64", places), *elements)
    specs = [rows]
    for matrix, (outputs, inputs) in sorted(slots.matrices.items()):
        right, left = stacked_names(matrix)
        rank = f"{matrix}.rank"
        specs.append(TensorSpec(right, FORM, ("adapters", inputs, rank)))
        specs.append(TensorSpec(left, FORM, ("adapters", rank, outputs)))
    return tuple(specs)
