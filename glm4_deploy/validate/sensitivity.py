"""Measures which matrices lose most when quantized, and makes a recipe that keeps those in more bits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4_deploy.validate.text import choose_text
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.formats import Format, require_format
from glm4_exporters.quantize.recipe import Recipe, keep_sensitive, write_recipe
from glm4_exporters.quantize.sensitivity import TensorLoss, measure, require_distributions
from glm4_runtime.errors import RequestError
from glm4_runtime.progress import Progress, silent

LOW, HIGH = "int4", "int8"
EXTRA_BITS = 0.5  # default of the mean, in bits above the low format's own


@dataclass(frozen=True)
class Sensitivity:
    """The ranking (largest loss per element first), and its recipe.

    Attributes:
        mean_bits: the recipe's limit of mean bits per weight, scales included.
        text, tokens: the source and the size of the text.
    """

    losses: list[TensorLoss]
    recipe: Recipe
    mean_bits: float
    text: str
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "low": LOW,
            "high": HIGH,
            "mean_bits": self.mean_bits,
            "text": self.text,
            "tokens": self.tokens,
            "tensors": [
                {
                    "name": loss.name,
                    "mean_kl": loss.kl,
                    "elements": loss.elements,
                    "scheme": self.recipe.format_of(loss.name),
                }
                for loss in self.losses
            ],
        }


def rank_tensors(
    checkpoint: Checkpoint,
    text: Path | None = None,
    *,
    length: int = 512,
    max_tokens: int = 1024,
    mean_bits: float | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Quantize each matrix alone, in one walk over the layers, and measure the model's output.

    Args:
        mean_bits: of the recipe; default: half a bit above int4's own.

    Raises:
        ExportError: another task than causal-lm, or no room for the walk.
        RequestError: ``mean_bits`` that no mixture of the two formats has.
    """
    wanted, bits = mean_bits_of(mean_bits), _bits_per_weight()
    chosen = choose_text(checkpoint, text, length, max_tokens)
    losses = measure(checkpoint, chosen.sequences, _round_trip(require_format(LOW)), progress)
    recipe = keep_sensitive(losses, (LOW, bits[LOW]), (HIGH, bits[HIGH]), wanted)
    return Sensitivity(losses, recipe, wanted, chosen.source, chosen.tokens)


def mean_bits_of(asked: float | None) -> float:
    """Bits per weight of the recipe; default: half a bit above int4's own.

    Raises:
        RequestError: a number that no mixture of the two formats has.
    """
    bits = _bits_per_weight()
    wanted = bits[LOW] + EXTRA_BITS if asked is None else asked
    if not bits[LOW] <= wanted <= bits[HIGH]:
        raise RequestError(
            f"{wanted:g} bits per weight cannot be: {LOW} takes {bits[LOW]:g} and {HIGH} {bits[HIGH]:g}"
        )
    return wanted


def require_ranking(reference: Path) -> None:
    """Refuse a checkpoint whose matrices cannot be ranked.

    Raises:
        ExportError: another task than causal-lm.
    """
    with Checkpoint.load(reference) as checkpoint:
        require_distributions(checkpoint)


def _bits_per_weight() -> dict[str, float]:
    return {name: require_format(name).bits_per_weight() for name in (LOW, HIGH)}


def save_recipe(path: Path, found: Sensitivity) -> None:
    """Write the recipe for ``export --recipe``."""
    write_recipe(path, found.recipe, found.losses)


def _round_trip(form: Format) -> Any:
    import torch

    def values(_name: str, rows: torch.Tensor) -> torch.Tensor:
        return form.decode(form.encode(rows.float(), torch.bfloat16), rows.shape[1])

    return values
