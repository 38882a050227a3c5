"""The model's facts in a manifest (:class:`ModelInfo`), and the graph's inputs and outputs."""

from glm4_exporters.config import Glm4Config
from glm4_runtime.bundle import ModelInfo
from glm4_runtime.bundle.graph_io import GraphIO, graph_io


def model_info(config: Glm4Config, task: str) -> ModelInfo:
    """The facts about a model that serving needs."""
    return ModelInfo(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_positions=config.positions,
        eos_token_ids=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        labels=config.id2label if task.endswith("classification") else (),
    )


def model_io(config: Glm4Config, task: str, kv_cache: str) -> GraphIO:
    """Inputs and outputs of the graph for ``task``, with a cache of this type."""
    return graph_io(task, model_info(config, task), kv_cache)
