"""PEFT's ``adapter_config.json``: the modules that an adapter changes, their ranks and their factors.

The fields, and the rules of ``target_modules``, ``rank_pattern`` and ``alpha_pattern``, are those of PEFT 0.21. An
unknown option is refused, because it may change the formula.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import CheckpointError, shown

ALL_LINEAR = "all-linear"
MERGE = "merge it with PEFT's merge_and_unload, save the model, and export that"
LONGEST_PATTERN, PATTERN_SECONDS = 1000, 1.0
LARGEST_RANK = 1 << 16

# Options without effect on the merged weights.
NO_MATTER = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "velora_config",
}  # fmt: skip
# Options that this module reads.
READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
}  # fmt: skip
# Values of init_lora_weights that leave the base model's weights unchanged. PiSSA, OLoRA and CorDA change them.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "loftq")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of ``adapter_config.json``.

    Attributes:
        base: name or folder of the base model. None: not named.
        task: PEFT's name of the task, such as ``SEQ_CLS``. None: not named.
        rank, alpha: defaults for modules that match no pattern. Rank None: not named.
        ranks, alphas: values by module pattern.
        rslora: the factor is alpha / sqrt(rank) instead of alpha / rank.
        dora: each row has a trained magnitude (DoRA).
        biased: B has a bias, which is added to the module's bias.
        targets: names of the adapted modules, or one pattern, or ``all-linear``.
        excluded: names or one pattern of modules that are not adapted.
        layers: indices of the adapted layers. None: all layers.
        saved: names of modules that the adapter replaces (``modules_to_save``).
    """

    base: str | None
    task: str | None
    rank: int | None
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    biased: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    saved: tuple[str, ...]

    @classmethod
    def from_file(cls, path: Path) -> "AdapterConfig":
        """Read and check the file.

        Raises:
            CheckpointError: the file is damaged, or the adapter cannot be merged.
        """
        values = read_object(path, CheckpointError)
        return _ConfigReader(path, values).config()

    def rank_of(self, module: str) -> int | None:
        """The rank of a module, given by its name in the base model. None: the file names no rank."""
        pattern = _first(self.ranks, module)
        return self.rank if pattern is None else self.ranks[pattern]

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B·A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        pattern = _first(self.alphas, module)
        alpha = self.alpha if pattern is None else self.alphas[pattern]
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def names(self, module: str) -> bool:
        """Whether the configuration adapts this module of the base model."""
        if _listed(self.excluded, module) or self.saves(module):
            return False
        if self.targets == ALL_LINEAR:
            return module.split(".")[-1] not in ("embed_tokens", "lm_head", "score")
        if isinstance(self.targets, str):
            return _matches(self.targets, module)
        index = next((int(part) for part in module.split(".") if part.isdecimal()), None)
        return _listed(self.targets, module) and (self.layers is None or index in self.layers)

    def saves(self, module: str) -> bool:
        """Whether the adapter replaces this module (``modules_to_save``)."""
        return any(f".{name}." in f".{module}." for name in self.saved)


class _ConfigReader:
    """Reads the values of one file and checks the type of each."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._values = path, values

    def config(self) -> AdapterConfig:
        kind = self._values.get("peft_type")
        if kind != "LORA":
            self._refuse("peft_type", f"only LORA can be merged; {MERGE}")
        unknown = [name for name in self._values.keys() - NO_MATTER - READ if self._values[name]]
        for name in sorted(unknown):
            self._refuse(name, f"such an adapter cannot be merged here; {MERGE}")
        beginning = self._values.get("init_lora_weights", True)
        if not any(beginning is plain or beginning == plain for plain in PLAIN_BEGINNINGS):
            self._refuse(
                "init_lora_weights",
                "such an adapter belongs to changed base weights; save it with path_initial_model_for_weight_conversion",
            )
        if self._values.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
            self._refuse("layers_pattern", f"the layers of this model are called layers; {MERGE}")
        layers = self._values.get("layers_to_transform")
        return AdapterConfig(
            base=self._text("base_model_name_or_path"),
            task=self._text("task_type"),
            rank=self._rank("r", self._values.get("r")),
            alpha=self._number("lora_alpha", self._values.get("lora_alpha", 8)),
            ranks={
                key: self._rank("rank_pattern", value) or 0 for key, value in self._patterns("rank_pattern")
            },
            alphas={
                key: self._number("alpha_pattern", value) for key, value in self._patterns("alpha_pattern")
            },
            rslora=bool(self._values.get("use_rslora")),
            dora=bool(self._values.get("use_dora")),
            biased=bool(self._values.get("lora_bias")),
            targets=self._modules("target_modules"),
            excluded=self._modules("exclude_modules"),
            layers=None
            if layers in (None, [])
            else self._layers([layers] if isinstance(layers, int) else layers),
            saved=self._names("modules_to_save"),
        )

    def _text(self, name: str) -> str | None:
        value = self._values.get(name)
        if not (value is None or isinstance(value, str)):
            self._refuse(name, "it must be a text")
        return value or None

    def _rank(self, name: str, value: Any) -> int | None:
        if value is None:
            return None
        if type(value) is not int or not 0 < value <= LARGEST_RANK:
            self._refuse(name, f"a rank is 1 ... {LARGEST_RANK}")
        return int(value)

    def _number(self, name: str, value: Any) -> float:
        if not (isinstance(value, int | float) and abs(value) < 1e9):
            self._refuse(name, "it must be a number")
        return float(value)

    def _patterns(self, name: str) -> list[tuple[str, Any]]:
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            self._refuse(name, "it must name values by patterns of modules")
        for pattern in value:
            self._require_short(name, pattern)
        return list(value.items())

    def _modules(self, name: str) -> str | tuple[str, ...]:
        value = self._values.get(name)
        if isinstance(value, str):
            self._require_short(name, value)
            return value
        return self._names(name)

    def _names(self, name: str) -> tuple[str, ...]:
        value = self._values.get(name) or []
        if not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            self._refuse(name, "it must be a list of names")
        return tuple(value)

    def _layers(self, value: Any) -> tuple[int, ...]:
        if not (isinstance(value, list) and all(type(each) is int for each in value)):
            self._refuse("layers_to_transform", "it must be a list of layers' numbers")
        return tuple(value)

    def _require_short(self, name: str, pattern: str) -> None:
        if len(pattern) > LONGEST_PATTERN:
            self._refuse(name, f"a pattern has at most {LONGEST_PATTERN} characters")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path} says {name} {shown(self._values.get(name))}; {reason}")


def _first(patterns: Mapping[str, object], module: str) -> str | None:
    return next((pattern for pattern in patterns if _matches(rf"(.*\.)?({pattern})", module)), None)


def _listed(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return _matches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matches(pattern: str, text: str) -> bool:
    """Whether an untrusted pattern matches the whole text.

    Raises:
        CheckpointError: the pattern is invalid or takes longer than ``PATTERN_SECONDS``.
    """
    import regex  # re has no time limit

    try:
        return regex.fullmatch(pattern, text, timeout=PATTERN_SECONDS) is not None
    except (regex.error, RecursionError) as error:
        raise CheckpointError(f"the adapter's pattern {shown(pattern)} cannot be read: {error}") from error
    except TimeoutError as error:
        raise CheckpointError(
            f"the adapter's pattern {shown(pattern)} takes too long; list the modules"
        ) from error
