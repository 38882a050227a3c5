"""``config.json`` of a GLM-4-0414 checkpoint, translated once into a frozen :class:`Glm4Config`.

A field that affects the computation has no default. transformers has defaults, but its norm epsilon, number of positions
and bias are not those of the released checkpoints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from glm4_exporters.config_values import LARGEST_SIZE, ConfigValues, listed, require_value, section_of
from glm4_exporters.rope import RopeParameters, rope_parameters
from glm4_runtime.bundle.file_names import GENERATION_CONFIG
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.bundle.manifest_checks import MOST_END_TOKENS, MOST_LAYERS
from glm4_runtime.bundle.manifest_checks import TASKS as TASKS
from glm4_runtime.errors import ConfigError, shown

# The architectures that config.json may name, and the task of each.
TASK_OF_ARCHITECTURE = {
    "Glm4ForCausalLM": "causal-lm",
    "Glm4ForSequenceClassification": "sequence-classification",
    "Glm4ForTokenClassification": "token-classification",
    "Glm4Model": "encoder",
}

OTHER_MODEL_TYPES = {
    "chatglm": "the ChatGLM and first GLM-4 releases",
    "glm": "GLM-4-9B-Chat and GLM-Edge",
    "glm4v": "GLM-4.1V",
    "glm4_moe": "GLM-4.5 and later, a mixture of experts",
}
HIDDEN_ACTS = ("silu", "swish")  # two names of one function
DTYPES = ("bfloat16", "float16", "float32")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "eos_token_id",
)
DEFAULT_LABELS = 2
MOST_LABELS = 1_000_000


@dataclass(frozen=True)
class Glm4Config:
    """The configuration of a GLM-4-0414 model, checked at creation.

    Raises:
        ConfigError: a value is impossible or not supported.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    eos_token_id: tuple[int, ...]
    rope: RopeParameters = field(default_factory=RopeParameters)
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # the i-th label's name
    problem_type: str | None = None
    architectures: tuple[str, ...] = ()
    dtype: str | None = None  # from config.json; each tensor's stored type is in its header

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_numbers()
        self._check_tokens()
        for name in self.architectures:
            require_value(
                name in TASK_OF_ARCHITECTURE,
                f"the architecture {name!r} is not supported; those of GLM-4-0414 are {listed(TASK_OF_ARCHITECTURE)}",
            )
        require_value(
            len(self.architectures) <= 1,
            f"architectures is {list(self.architectures)}; leave one of them",
        )
        require_value(
            self.problem_type is None or self.problem_type in PROBLEM_TYPES,
            f"problem_type is {self.problem_type!r}, but must be null or one of {listed(PROBLEM_TYPES)}",
        )
        require_value(
            self.dtype is None or self.dtype in DTYPES,
            f"dtype is {self.dtype!r}; supported are {listed(DTYPES)}",
        )
        require_value(len(self.id2label) > 0, "id2label names no label; give at least one")

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions of each head."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def positions(self) -> int:
        """The longest sequence, in tokens. With YaRN at least factor * original positions.

        The released README adds ``rope_scaling`` and does not change ``max_position_embeddings``.
        """
        return max(self.max_position_embeddings, math.floor(self.rope.positions))

    @property
    def scale(self) -> float:
        """The factor of attention scores, 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    def with_labels(self, count: int) -> "Glm4Config":
        """A copy with ``count`` labels, with transformers' default names ``LABEL_0``, ``LABEL_1``, ..."""
        return replace(self, id2label=_default_labels(count))

    @property
    def task(self) -> str | None:
        """The task of the architecture in ``architectures``. None: no architecture is named."""
        return TASK_OF_ARCHITECTURE[self.architectures[0]] if self.architectures else None

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of one token in the KV cache, over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_element

    @classmethod
    def from_file(cls, path: str | Path) -> "Glm4Config":
        """Read a ``config.json``. ``eos_token_id`` of a ``generation_config.json`` beside it has priority.

        Raises:
            ConfigError: the file is missing, damaged, of another architecture, or describes an impossible model.
        """
        path = Path(path)
        values = read_object(path, ConfigError)
        generation = path.with_name(GENERATION_CONFIG)
        if generation.is_file():
            eos = read_object(generation, ConfigError).get("eos_token_id")
            if eos is not None:
                values = values | {"eos_token_id": eos}
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Glm4Config":
        """Translate the contents of ``config.json``, as any transformers release writes the file.

        Raises:
            ConfigError: the mapping is not a GLM-4-0414 configuration, or has an impossible value.
        """
        _check_model_type(mapping.get("model_type"))
        missing = [key for key in REQUIRED if mapping.get(key) is None]
        if missing:
            raise ConfigError(f"{listed(missing)} missing; copy them from the model's original config.json")
        values = ConfigValues(mapping)
        hidden, heads = values.integer("hidden_size"), values.integer("num_attention_heads")
        positions = values.integer("max_position_embeddings")
        head_dim = values.integer("head_dim", None)
        if head_dim is None:
            require_value(
                heads > 0 and hidden % heads == 0,
                f"head_dim is missing, and hidden_size {hidden} / num_attention_heads {heads} is no integer; say head_dim",
            )
            head_dim = hidden // heads
        return cls(
            vocab_size=values.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=values.integer("intermediate_size"),
            num_hidden_layers=values.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=values.integer("num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=values.number("rms_norm_eps"),
            attention_bias=values.boolean("attention_bias"),
            eos_token_id=_token_ids(mapping["eos_token_id"]),
            rope=rope_parameters(mapping, positions),
            hidden_act=values.text("hidden_act"),
            attention_dropout=values.number("attention_dropout", 0.0),
            initializer_range=values.number("initializer_range", 0.02),
            use_cache=values.boolean("use_cache", True),
            tie_word_embeddings=values.boolean("tie_word_embeddings", False),
            pad_token_id=values.integer("pad_token_id", None),
            bos_token_id=values.integer("bos_token_id", None),
            id2label=_labels(mapping),
            problem_type=values.text("problem_type", None),
            architectures=_architectures(mapping.get("architectures")),
            dtype=_dtype(mapping),
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a sorted ``config.json`` in the newest form, with every value explicit.

        ``Glm4Config.from_dict`` returns an equal configuration.
        """
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("rope", "id2label")
        }
        values |= {
            "model_type": "glm4",
            "architectures": list(self.architectures),
            "eos_token_id": list(self.eos_token_id),
            "rope_parameters": self.rope.to_dict(),
        }
        if self.id2label != _default_labels(DEFAULT_LABELS):
            values["id2label"] = {str(i): label for i, label in enumerate(self.id2label)}
        return dict(sorted(values.items()))

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            size = getattr(self, name)
            most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
            require_value(1 <= size <= most, f"{name} is {size}, but must be 1 ... {most}")
        require_value(
            self.rope.positions <= LARGEST_SIZE,
            f"yarn's factor {self.rope.factor} makes {self.rope.positions:g} positions, more than {LARGEST_SIZE}",
        )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require_value(
            heads % kv_heads == 0,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
        )
        require_value(
            self.rotary_dim >= 2 and self.rotary_dim % 2 == 0,
            f"head_dim {self.head_dim} * partial_rotary_factor {self.rope.partial_rotary_factor} rotates "
            f"{self.rotary_dim} dims, but pairs are rotated: it must be even and at least 2",
        )

    def _check_numbers(self) -> None:
        require_value(
            self.hidden_act in HIDDEN_ACTS,
            f"hidden_act is {self.hidden_act!r}; the MLP of GLM-4-0414 is gated by 'silu'",
        )
        # NaN is refused too, because every comparison with NaN is false.
        require_value(
            0 < self.rms_norm_eps < 1,
            f"rms_norm_eps is {self.rms_norm_eps}, but must be small and positive (1e-05)",
        )
        require_value(
            0 <= self.attention_dropout < 1,
            f"attention_dropout is {self.attention_dropout}, but must be at least 0 and below 1",
        )
        require_value(
            self.initializer_range >= 0,
            f"initializer_range is {self.initializer_range}, but must not be negative",
        )

    def _check_tokens(self) -> None:
        require_value(
            0 < len(self.eos_token_id) <= MOST_END_TOKENS,
            f"eos_token_id names {len(self.eos_token_id)} tokens that end a sequence, but must name 1 ... {MOST_END_TOKENS}",
        )
        # An id outside the vocabulary is allowed and has no effect: small models keep the ids of the released ones.
        for name, token in [("eos_token_id", t) for t in self.eos_token_id] + [
            ("bos_token_id", self.bos_token_id)
        ]:
            require_value(
                token is None or 0 <= token <= LARGEST_SIZE,
                f"{name} is {shown(token)}, but token ids are 0 ... {LARGEST_SIZE}",
            )
        pad = self.pad_token_id
        require_value(
            pad is None or 0 <= pad < self.vocab_size,
            f"pad_token_id {pad} is outside the vocabulary of {self.vocab_size} (0 ... {self.vocab_size - 1})",
        )


def _check_model_type(model_type: object) -> None:
    if model_type == "glm4":
        return
    if model_type is None:
        raise ConfigError("model_type is missing; a GLM-4-0414 checkpoint says 'glm4'")
    known = OTHER_MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    what = f" ({known}, another architecture)" if known else ""
    raise ConfigError(
        f"model_type is {shown(model_type)}{what}; supported is 'glm4', "
        "the GLM-4-0414 family: 'glm4_moe', 'chatglm' and 'glm' are other architectures"
    )


def _token_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list | tuple) else [value]
    for token in ids:
        require_value(
            isinstance(token, int) and not isinstance(token, bool),
            f"eos_token_id is {shown(value)}, but must be a token id or a list of them",
        )
    return tuple(ids)


def _labels(mapping: Mapping[str, Any]) -> tuple[str, ...]:
    count = ConfigValues(mapping).integer("num_labels", None)
    require_value(
        count is None or 1 <= count <= MOST_LABELS, f"num_labels is {count}, but must be 1 ... {MOST_LABELS}"
    )
    named = section_of(mapping, "id2label")
    if not named:
        return _default_labels(DEFAULT_LABELS if count is None else count)
    by_number = {str(number): label for number, label in named.items()}
    labels = tuple(by_number.get(str(i)) for i in range(len(named)))
    require_value(
        all(isinstance(label, str) for label in labels),
        f"id2label must name the labels 0 ... {len(named) - 1}, each by a string; it is {shown(dict(named))}",
    )
    require_value(
        count in (None, len(labels)),
        f"num_labels is {count}, but id2label names {len(labels)}; keep id2label alone",
    )
    return cast(tuple[str, ...], labels)


def _default_labels(count: int) -> tuple[str, ...]:
    """transformers' default names of labels."""
    return tuple(f"LABEL_{i}" for i in range(count))


def _architectures(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    fits = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    require_value(fits, f"architectures is {shown(value)}, but must be a list of names")
    return tuple(cast(list[str], value))


def _dtype(mapping: Mapping[str, Any]) -> str | None:
    values = ConfigValues(mapping)
    said = values.text("dtype", values.text("torch_dtype", None))
    return said.removeprefix("torch.") if said else None
