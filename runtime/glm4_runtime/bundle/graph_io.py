"""The inputs and outputs of every graph we export and open: names, element types and axes, stated once."""

from dataclasses import dataclass

from glm4_runtime.bundle.manifest import ModelInfo, TensorSpec

CAPACITY = "capacity"


@dataclass(frozen=True)
class GraphIO:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present_key_values.{layer}.key", f"present_key_values.{layer}.value"


def graph_io(task: str, model: ModelInfo, kv_dtype: str, capacity: int | str = CAPACITY) -> GraphIO:
    """Inputs and outputs of the graph for ``task``.

    Args:
        kv_dtype: element type of the cache, if the task has one.
        capacity: positions of a cache; a fixed number for an engine.
    """
    input_ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    query_lengths = TensorSpec("query_lengths", "int32", ("batch",))
    if task == "causal-lm":
        cache = ("batch", model.num_kv_heads, capacity, model.head_dim)
        layers = range(model.num_layers)
        return GraphIO(
            inputs=(
                input_ids,
                TensorSpec("past_lengths", "int32", ("batch",)),
                query_lengths,
                TensorSpec("logits_indices", "int64", ("batch", "positions")),
                *(TensorSpec(name, kv_dtype, cache) for i in layers for name in past_names(i)),
            ),
            outputs=(
                TensorSpec("logits", "float32", ("batch", "positions", model.vocab_size)),
                *(TensorSpec(name, kv_dtype, cache) for i in layers for name in present_names(i)),
            ),
        )
    labels = len(model.labels)
    output = {
        "sequence-classification": TensorSpec("logits", "float32", ("batch", labels)),
        "token-classification": TensorSpec("logits", "float32", ("batch", "sequence", labels)),
        "encoder": TensorSpec("last_hidden_state", "float32", ("batch", "sequence", model.hidden_size)),
    }[task]
    return GraphIO(inputs=(input_ids, query_lengths), outputs=(output,))
