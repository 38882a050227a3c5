"""The inputs and outputs of every graph we export and open: names, element types and axes, stated once."""

from dataclasses import dataclass

from glm4_runtime.bundle.element_types import CACHE_TYPES
from glm4_runtime.bundle.manifest import ModelInfo, StageInfo, TensorSpec

CAPACITY = "capacity"


@dataclass(frozen=True)
class GraphIO:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present_key_values.{layer}.key", f"present_key_values.{layer}.value"


def graph_io(task: str, model: ModelInfo, kv_cache: str, capacity: int | str = CAPACITY) -> GraphIO:
    """Inputs and outputs of the graph for ``task``.

    Args:
        kv_cache: name of the cache's type (``CACHE_TYPES``), if the task has one.
        capacity: positions of a cache; a fixed number for an engine.
    """
    input_ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    query_lengths = TensorSpec("query_lengths", "int32", ("batch",))
    if task == "causal-lm":
        stored = CACHE_TYPES[kv_cache]
        cache = ("batch", model.num_kv_heads, capacity, stored.row(model.head_dim))
        layers = range(model.num_layers)
        return GraphIO(
            inputs=(
                input_ids,
                TensorSpec("past_lengths", "int32", ("batch",)),
                query_lengths,
                TensorSpec("logits_indices", "int64", ("batch", "positions")),
                *(TensorSpec(name, stored.element, cache) for i in layers for name in past_names(i)),
            ),
            outputs=(
                TensorSpec("logits", "float32", ("batch", "positions", model.vocab_size)),
                *(TensorSpec(name, stored.element, cache) for i in layers for name in present_names(i)),
            ),
        )
    labels = len(model.labels)
    output = {
        "sequence-classification": TensorSpec("logits", "float32", ("batch", labels)),
        "token-classification": TensorSpec("logits", "float32", ("batch", "sequence", labels)),
        "encoder": TensorSpec("last_hidden_state", "float32", ("batch", "sequence", model.hidden_size)),
    }[task]
    return GraphIO(inputs=(input_ids, query_lengths), outputs=(output,))


def hidden_name(layer: int) -> str:
    """The hidden states that leave a layer: its second residual sum. The exporter's trace gives this name."""
    return f"model.layers.{layer}/Add_2:0"


def stage_io(
    model: ModelInfo, kv_cache: str, activations: str, stage: StageInfo, capacity: int | str = CAPACITY
) -> GraphIO:
    """Inputs and outputs of one stage of a causal LM.

    The first input is ``input_ids`` in the first stage, and the hidden states of the layer before in the others. The
    first output is ``logits`` in the last stage, and the hidden states of the last layer in the others. Only the last
    stage has ``logits_indices``.

    Args:
        activations: element type of hidden states [batch, sequence, hidden].
        capacity: positions of a cache; a fixed number for an engine.
    """
    whole = graph_io("causal-lm", model, kv_cache, capacity)
    first, end = stage.first_layer, stage.first_layer + stage.layers
    pasts = {name for i in range(first, end) for name in past_names(i)}
    presents = {name for i in range(first, end) for name in present_names(i)}
    shape = ("batch", "sequence", model.hidden_size)
    entry, *lengths, indices = whole.inputs[:4]
    result = whole.outputs[0]
    if first > 0:
        entry = TensorSpec(hidden_name(first - 1), activations, shape)
    if end < model.num_layers:
        result = TensorSpec(hidden_name(end - 1), activations, shape)
    else:
        lengths.append(indices)
    return GraphIO(
        inputs=(entry, *lengths, *(spec for spec in whole.inputs if spec.name in pasts)),
        outputs=(result, *(spec for spec in whole.outputs if spec.name in presents)),
    )
