"""The table of the model's weights: names, shapes, and which matrices share an input.

Needs no torch. All code that counts, names or sizes weights uses this table.
"""

from dataclasses import dataclass
from math import prod

from glm4_exporters.config import Glm4Config
from glm4_runtime.adapters.modules import EMBEDDING as EMBEDDING
from glm4_runtime.adapters.modules import FUSED as FUSED
from glm4_runtime.adapters.modules import HALVES as HALVES
from glm4_runtime.adapters.modules import HEAD as HEAD

FINAL_NORM = "model.norm.weight"
BACKBONE = "model."  # prefix of the decoder's weights in a model with a head
SCORES = frozenset({"score.weight", "score.bias"})  # a classification head


@dataclass(frozen=True)
class Norm:
    """A norm of a layer; its weight is [hidden]."""

    name: str


@dataclass(frozen=True)
class Linear:
    """A matrix [gives, reads] of a layer.

    Attributes:
        reads, gives: names of its input and output sizes, see :func:`sizes`.
        site: the input that it reads; matrices of one site read the same values.
        biased: whether it has a bias where the configuration says ``attention_bias``.
    """

    name: str
    reads: str
    gives: str
    site: str
    biased: bool = False


# A layer's weights in the order of a checkpoint. post_attention_layernorm is the MLP's input norm.
LAYER: tuple[Norm | Linear, ...] = (
    Norm("input_layernorm"),
    Linear("self_attn.q_proj", "hidden", "queries", "qkv", biased=True),
    Linear("self_attn.k_proj", "hidden", "keys", "qkv", biased=True),
    Linear("self_attn.v_proj", "hidden", "keys", "qkv", biased=True),
    Linear("self_attn.o_proj", "queries", "hidden", "o_proj"),
    Norm("post_self_attn_layernorm"),
    Norm("post_attention_layernorm"),
    Linear("mlp.gate_up_proj", "hidden", "gate_and_up", "gate_up"),
    Linear("mlp.down_proj", "mlp", "hidden", "down_proj"),
    Norm("post_mlp_layernorm"),
)
MATRICES: dict[str, Linear] = {row.name: row for row in LAYER if isinstance(row, Linear)}

# Per site: the matrices that read one input, in the order in which a layer computes them.
LAYER_SITES: dict[str, tuple[str, ...]] = {
    site: tuple(name for name, row in MATRICES.items() if row.site == site)
    for site in dict.fromkeys(row.site for row in MATRICES.values())
}


def sizes(config: Glm4Config) -> dict[str, int]:
    """Lengths of the axes of a layer's weights, by name."""
    return {
        "hidden": config.hidden_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "mlp": config.intermediate_size,
        "gate_and_up": 2 * config.intermediate_size,
    }


def matrix_width(config: Glm4Config, name: str) -> int:
    """Number of inputs of the matrix with this canonical name."""
    row = MATRICES.get(".".join(name.split(".")[3:-1]))
    return config.hidden_size if row is None else sizes(config)[row.reads]


def site_width(config: Glm4Config, site: str) -> int:
    """Number of channels of the input of a layer's site."""
    return sizes(config)[MATRICES[LAYER_SITES[site][0]].reads]


def expected_tensors(config: Glm4Config, task: str) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every weight that ``task`` reads, in the model's order.

    A tied head is not among them: it is the embedding.
    """
    hidden, size = config.hidden_size, sizes(config)
    layer: dict[str, tuple[int, ...]] = {}
    for row in LAYER:
        if isinstance(row, Norm):
            layer[f"{row.name}.weight"] = (hidden,)
            continue
        layer[f"{row.name}.weight"] = (size[row.gives], size[row.reads])
        if row.biased and config.attention_bias:
            layer[f"{row.name}.bias"] = (size[row.gives],)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors[FINAL_NORM] = (hidden,)
    if task == "causal-lm" and not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, hidden)
    if task.endswith("classification"):
        tensors["score.weight"] = (config.num_labels, hidden)
    if task == "token-classification":
        tensors["score.bias"] = (config.num_labels,)
    return tensors


def parameter_count(config: Glm4Config, task: str | None = None) -> int:
    """Number of weights for ``task``. If None: the configuration's task, or else causal LM."""
    shapes = expected_tensors(config, task or config.task or "causal-lm")
    return sum(prod(shape) for shape in shapes.values())
