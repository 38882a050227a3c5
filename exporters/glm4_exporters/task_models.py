"""The reference model for each task: forward arguments, heads, losses and outputs of the family's documentation.

Only the backbone of ``reference.py`` is traced. Shapes as there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.eager_attention import Attention, KVCache
from glm4_exporters.reference import Glm4Backbone, rotary_tables


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
        hidden = self._embedded(input_ids, inputs_embeds)
        kept = use_cache if use_cache is not None else self.config.use_cache
        cache = past_key_values if isinstance(past_key_values, KVCache) else KVCache(past_key_values or ())
        positions = _new_positions(cache, hidden, cache_position)
        if position_ids is None:
            position_ids = positions[None]
        total = cache.get_seq_length() + hidden.shape[1]
        mask = _visible(positions, total, hidden.shape[0], attention_mask)
        cos, sin = (t.to(hidden.dtype)[:, None] for t in rotary_tables(self.config, position_ids))
        extended = cache if kept or past_key_values is not None else None
        dropout = self.config.attention_dropout if self.training else 0.0
        maps: list[Tensor] | None = [] if output_attentions else None
        attend = Attention(self.config, cos, sin, mask, extended, dropout, maps)
        with _Recorder(self) as recorder:
            normed = self.run(hidden, attend)
        return ModelOutput(
            last_hidden_state=normed,
            past_key_values=extended,
            hidden_states=(hidden, *recorder.states[:-1], normed) if output_hidden_states else None,
            attentions=None if maps is None else tuple(maps),
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embedded: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return embedded


def _new_positions(cache: KVCache, hidden: Tensor, cache_position: Tensor | None) -> Tensor:
    """Where the new positions stand in the cache, int64 [S]."""
    past, sequence, device = cache.get_seq_length(), hidden.shape[1], hidden.device
    positions = torch.arange(past, past + sequence, device=device)
    if cache_position is not None and not torch.equal(cache_position.to(device), positions):
        raise ValueError(
            f"cache_position must be {past} ... {past + sequence - 1}, right after the {past} cached positions"
        )
    return positions


def _visible(positions: Tensor, total: int, batch: int, attention_mask: Tensor | None) -> Tensor:
    """The keys that each new position sees, bool [B or 1, 1, S, T]: up to its own, without padding."""
    device = positions.device
    causal = (torch.arange(total, device=device) <= positions[:, None])[None, None]
    if attention_mask is None:
        return causal
    if attention_mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must be [batch, past + new] = {(batch, total)}"
        )
    return causal & attention_mask.to(device).bool()[:, None, None]


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
        loss = None if labels is None else _next_token_loss(logits, labels)
        return self._answer(output, logits, loss)


class Glm4ForSequenceClassification(_Glm4ForTask):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self, input_ids: Tensor | None = None, *, labels: Tensor | None = None, **arguments: Any
    ) -> ModelOutput:
        """Label logits [B, labels] at the last token that is not padding; the others are :meth:`Glm4Model.forward`'s.

        ``problem_type`` of the configuration chooses the loss. Without it, the labels choose: regression for one label,
        cross entropy for integers, and binary cross entropy per label for floats.
        """
        output = self.model(input_ids, **arguments)
        every = self.score(output.last_hidden_state)
        last = _last_tokens(input_ids, self.config.pad_token_id, every)
        logits = every[torch.arange(len(every), device=every.device), last]
        loss = None if labels is None else _label_loss(logits, labels, self.config.problem_type)
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


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each position's logits [B, S, vocab] and the next label of labels [B, S]."""
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} need logits for every position: drop logits_to_keep")
    predicted, wanted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return F.cross_entropy(predicted, wanted, ignore_index=-100)


def _last_tokens(input_ids: Tensor | None, pad: int | None, every: Tensor) -> Tensor:
    """Position of each sequence's last token that is not padding, int64 [B]; ``every`` is [B, S, labels]."""
    batch, sequence, _ = every.shape
    if pad is None and batch > 1:
        raise ValueError(
            "a batch of more than one needs pad_token_id in config.json, to find each last token"
        )
    if pad is None or input_ids is None:
        return torch.full((batch,), sequence - 1, device=every.device)
    return (torch.arange(sequence, device=every.device) * (input_ids != pad)).argmax(-1)


def _label_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits [B, labels], by problem type, or by number and type of the labels."""
    one = logits.shape[-1] == 1
    several = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    kind = problem_type or ("regression" if one else several)
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


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
