"""GLM-4-0414 in plain PyTorch. Every bundle is compared with this model, and the export traces it.

The first part is the architecture; only this part is traced. The second part adds the forward arguments, losses and
outputs that the family's public documentation describes. Parameter names are the
checkpoint's. Shapes: B sequences, S new positions, T keys, H hidden, Hq and Hkv heads of size D, R
rotated dims of D.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config

# ---------------------------------------------------------------------------- the architecture


class Attend(Protocol):
    """Attention between the projections. An object, so that it can have a cache or build a graph."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """query [B, S, Hq * D], key and value [B, S, Hkv * D], before RoPE -> [B, S, Hq * D]."""


class Glm4RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, rounded to the input's type, times the weight [H]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def inverse_frequencies(config: Glm4Config) -> tuple[Tensor, float]:
    """Frequencies [R / 2] in float32, and the factor on cos and sin.

    ``default``: theta^(-2i / R), factor 1. ``yarn``: section 3.2 and 3.4 of "YaRN: Efficient Context
    Window Extension of Large Language Models" (Peng et al., 2023): frequencies that turn less than
    beta_slow times in the original context are divided by ``factor``, those that turn more than
    beta_fast times are kept, a linear ramp between.
    """
    rope, dim = config.rope, config.rotary_dim
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "default":
        return 1.0 / wavelengths, 1.0

    original, factor = rope.original_max_position_embeddings, rope.factor
    assert original is not None
    assert factor is not None

    def dim_turning(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_turning(rope.beta_fast), dim_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0  # avoids a division by zero
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - interpolated
    frequencies = (1.0 / (factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return frequencies, mscale(1.0)


def rotary_tables(config: Glm4Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin in float32, [*positions.shape, R / 2], on the positions' device; YaRN's factor is in them."""
    frequencies, factor = inverse_frequencies(config)
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of the first R dims of x [B, heads, S, D]; the other dims pass through."""
    rotary_dim = 2 * cos.shape[-1]
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


class Glm4Attention(nn.Module):
    def __init__(self, config: Glm4Config, layer: int) -> None:
        super().__init__()
        hidden, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer = layer
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)  # never a bias

    def forward(self, x: Tensor, attend: Attend) -> Tensor:  # [B, S, H] -> [B, S, H]
        projected: Tensor = self.o_proj(self.attended(x, attend))
        return projected

    def attended(self, x: Tensor, attend: Attend) -> Tensor:  # [B, S, H] -> [B, S, Hq * D]
        return attend(self.layer, self.q_proj(x), self.k_proj(x), self.v_proj(x))


class Glm4MLP(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.width = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * self.width, bias=False)  # gate rows first
        self.down_proj = nn.Linear(self.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self.product(x))
        return down

    def product(self, x: Tensor) -> Tensor:  # silu(gate) * up
        gate, up = self.gate_up_proj(x).split([self.width, self.width], dim=-1)
        gated: Tensor = F.silu(gate) * up
        return gated


class Glm4DecoderLayer(nn.Module):
    """Sandwich norms: each half normalises its input, and its output before the residual is added."""

    def __init__(self, config: Glm4Config, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Glm4Attention(config, layer)
        self.mlp = Glm4MLP(config)
        self.input_layernorm = Glm4RMSNorm(hidden, eps)
        self.post_self_attn_layernorm = Glm4RMSNorm(hidden, eps)
        self.post_attention_layernorm = Glm4RMSNorm(hidden, eps)  # the MLP's input norm, despite its name
        self.post_mlp_layernorm = Glm4RMSNorm(hidden, eps)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.after_attention(x, self.self_attn(self.input_layernorm(x), attend))
        return self.after_mlp(x, self.mlp(self.post_attention_layernorm(x)))

    def after_attention(self, x: Tensor, projected: Tensor) -> Tensor:
        residual: Tensor = x + self.post_self_attn_layernorm(projected)
        return residual

    def after_mlp(self, x: Tensor, down: Tensor) -> Tensor:
        residual: Tensor = x + self.post_mlp_layernorm(down)
        return residual

    def sites(self, x: Tensor, attend: Attend) -> Generator[Tensor]:
        """:meth:`forward` in steps. Yields the input of each of ``architecture.LAYER_SITES``, in order, then the
        layer's output.

        The caller may change weights between two steps. Inputs that no later step reads are freed.
        """
        read = self.input_layernorm(x)
        yield read
        read = self.self_attn.attended(read, attend)
        yield read
        x = self.after_attention(x, self.self_attn.o_proj(read))
        read = self.post_attention_layernorm(x)
        yield read
        read = self.mlp.product(read)
        yield read
        yield self.after_mlp(x, self.mlp.down_proj(read))


class Glm4Backbone(nn.Module):
    """Embedding, layers and final norm; no head."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(Glm4DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Glm4RMSNorm(config.hidden_size, config.rms_norm_eps)

    def run(self, hidden: Tensor, attend: Attend) -> Tensor:
        """Embeddings [B, S, H] -> normed hidden states [B, S, H]."""
        for layer in self.layers:
            hidden = layer(hidden, attend)
        normed: Tensor = self.norm(hidden)
        return normed


# ------------------------------------------------------- forward arguments, losses and outputs


class KVCache:
    """Rotated keys, and values, of every layer, each [B, Hkv, T, D]. Each call of a model extends it."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.layers = list(layers)

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            past_key, past_value = self.layers[layer]
            self.layers[layer] = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        return self.layers[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@dataclass
class Attention:
    """Eager attention with an explicit mask. The softmax is float32, and is rounded before the product with the
    values."""

    config: Glm4Config
    cos: Tensor  # [B or 1, 1, S, R / 2]
    sin: Tensor
    mask: Tensor  # bool [B or 1, 1, S, T], True where a key is seen
    cache: KVCache | None
    dropout: float = 0.0
    maps: list[Tensor] | None = None  # if not None: receives [B, Hq, S, T] per layer

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size = self.config.head_dim
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (query, key, value))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)) * self.config.scale
        # The finite minimum instead of -inf: a row of padding without visible keys stays finite.
        scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        if self.maps is not None:
            self.maps.append(weights)
        weights = F.dropout(weights, self.dropout, training=self.dropout > 0)
        return (weights @ v).transpose(1, 2).flatten(-2)


@dataclass
class ModelOutput:
    """Outputs with their documented names; None if not requested."""

    last_hidden_state: Tensor | None = None  # [B, S, H]
    logits: Tensor | None = None  # [B, S or kept, vocab], [B, labels] or [B, S, labels]
    loss: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, then one per layer, the last one normed
    attentions: tuple[Tensor, ...] | None = None  # per layer [B, Hq, S, T]


@dataclass
class _Recorder:
    """Collects the layers' outputs with hooks, so that the architecture needs no code for it."""

    backbone: Glm4Backbone
    states: list[Tensor] = field(default_factory=list)

    def __enter__(self) -> "_Recorder":
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self.states.append(output)

        self.handles = [layer.register_forward_hook(keep) for layer in self.backbone.layers]
        return self

    def __exit__(self, *_exc: object) -> None:
        for handle in self.handles:
            handle.remove()


class Glm4Model(Glm4Backbone):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """The decoder without a head.

        Args:
            input_ids: int64 [B, S]; or ``inputs_embeds`` [B, S, H], exactly one of the two.
            attention_mask: [B, T] of the past and the new positions, 0 where padding stands, left or right.
            position_ids: int64 [B or 1, S]. By default they continue after the past; padding counts too.
            past_key_values: the cache of earlier calls; extended in place.
            use_cache: whether to return a cache; default: the configuration's ``use_cache``.
            cache_position: int64 [S], where the new positions stand in the cache: right after the past.

        Raises:
            ValueError: arguments that exclude each other or have wrong shapes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, sequence, _ = inputs_embeds.shape
        device = inputs_embeds.device
        if use_cache is None:
            use_cache = self.config.use_cache
        cache = past_key_values if isinstance(past_key_values, KVCache) else KVCache(past_key_values or ())
        past = cache.get_seq_length()
        kv_positions = torch.arange(past, past + sequence, device=device)
        if cache_position is not None and not torch.equal(cache_position.to(device), kv_positions):
            raise ValueError(
                f"cache_position must be {past} ... {past + sequence - 1}, right after the {past} cached positions"
            )
        if position_ids is None:
            position_ids = kv_positions[None]
        mask = (torch.arange(past + sequence, device=device) <= kv_positions[:, None])[None, None]
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + sequence):
                raise ValueError(
                    f"attention_mask {tuple(attention_mask.shape)} must be [batch, past + new] = {(batch, past + sequence)}"
                )
            mask = mask & attention_mask.to(device).bool()[:, None, None]
        cos, sin = (t.to(inputs_embeds.dtype)[:, None] for t in rotary_tables(self.config, position_ids))
        keep_cache = cache if use_cache or past_key_values is not None else None
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = Attention(
            self.config, cos, sin, mask, keep_cache, dropout, [] if output_attentions else None
        )
        with _Recorder(self) as recorder:
            hidden = self.run(inputs_embeds, attend)
        return ModelOutput(
            last_hidden_state=hidden,
            past_key_values=keep_cache,
            hidden_states=(inputs_embeds, *recorder.states[:-1], hidden) if output_hidden_states else None,
            attentions=None if attend.maps is None else tuple(attend.maps),
        )


class _Glm4ForTask(nn.Module):
    """A backbone under the name that checkpoints use; subclasses add their head."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.config = config
        self.model = Glm4Model(config)

    def _answer(self, output: ModelOutput, logits: Tensor, loss: Tensor | None) -> ModelOutput:
        return ModelOutput(
            logits=logits,
            loss=loss,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class Glm4ForCausalLM(_Glm4ForTask):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **arguments: Any,
    ) -> ModelOutput:
        """Next-token logits; the other arguments are :meth:`Glm4Model.forward`'s.

        Args:
            labels: int64 [B, S], shifted here; -100 is left out of the mean. Needs all logits.
            logits_to_keep: 0 for all positions, k for the last k, or int64 [n] positions.
        """
        output = self.model(input_ids, **arguments)
        hidden = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            if logits.shape[:2] != labels.shape:
                raise ValueError(
                    f"labels {tuple(labels.shape)} need logits for every position: drop logits_to_keep"
                )
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return self._answer(output, logits, loss)


class Glm4ForSequenceClassification(_Glm4ForTask):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self, input_ids: Tensor | None = None, *, labels: Tensor | None = None, **arguments: Any
    ) -> ModelOutput:
        """Label logits [B, labels] at the last token that is not padding; the others are :meth:`Glm4Model.forward`'s.

        The loss is the configuration's ``problem_type``, or follows from the labels: regression for one
        label, cross entropy for integers, binary cross entropy per label for floats.
        """
        output = self.model(input_ids, **arguments)
        every = self.score(output.last_hidden_state)
        batch, sequence, count = every.shape
        pad = self.config.pad_token_id
        if pad is None and batch > 1:
            raise ValueError(
                "a batch of more than one needs pad_token_id in config.json, to find each last token"
            )
        last = torch.full((batch,), sequence - 1, device=every.device)
        if pad is not None and input_ids is not None:
            last = (torch.arange(sequence, device=every.device) * (input_ids != pad)).argmax(-1)
        logits = every[torch.arange(batch, device=every.device), last]
        loss = None
        if labels is not None:
            by_labels = (
                "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            )
            kind = self.config.problem_type or ("regression" if count == 1 else by_labels)
            if kind == "regression":
                loss = F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
            elif kind == "single_label_classification":
                loss = F.cross_entropy(logits, labels.view(-1))
            else:
                loss = F.binary_cross_entropy_with_logits(logits, labels)
        return self._answer(output, logits, loss)


class Glm4ForTokenClassification(_Glm4ForTask):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self, input_ids: Tensor | None = None, *, labels: Tensor | None = None, **arguments: Any
    ) -> ModelOutput:
        """Label logits [B, S, labels] at every token; no cache comes back."""
        output = self.model(input_ids, **arguments)
        logits = self.score(output.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        answer = self._answer(output, logits, loss)
        answer.past_key_values = None
        return answer


MODELS: dict[str, Callable[[Glm4Config], nn.Module]] = {
    "causal-lm": Glm4ForCausalLM,
    "sequence-classification": Glm4ForSequenceClassification,
    "token-classification": Glm4ForTokenClassification,
    "encoder": Glm4Model,
}


def load_model(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The checkpoint's model in evaluation mode, one tensor at a time onto ``device`` as ``dtype``."""
    with torch.device("meta"):
        model = MODELS[checkpoint.task](checkpoint.config)
    for name in dict(model.named_parameters()):  # a tied head is listed once, under its first name
        owner, _, leaf = name.rpartition(".")
        canonical = f"model.{name}" if checkpoint.task == "encoder" else name
        tensor = checkpoint.read(checkpoint.name_of(canonical)).to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    if checkpoint.task == "causal-lm" and checkpoint.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    return model.eval()
