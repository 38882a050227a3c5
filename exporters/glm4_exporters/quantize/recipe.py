"""Which format each tensor gets, as a TOML file that people may write and edit.

    [tensors]
    "model.layers.3.mlp.down_proj.weight" = "int8"
    "model.layers.*.self_attn.v_proj.weight" = "int8"

Each line is a name, or a pattern in which ``*`` matches any text. The first line that matches a tensor gives its
format. ``--precision`` decides for all other tensors.
"""

import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from glm4_runtime.errors import ExportError

if TYPE_CHECKING:  # it needs torch, which reading a recipe does not
    from glm4_exporters.quantize.sensitivity import TensorLoss

TABLE = "tensors"


@dataclass(frozen=True)
class Recipe:
    """Formats by name or pattern, in the order of the file."""

    formats: Mapping[str, str]

    def format_of(self, name: str) -> str | None:
        """The format of the first line that matches, or None."""
        return next((form for pattern, form in self.formats.items() if fnmatchcase(name, pattern)), None)

    def require_used(self, names: Iterable[str]) -> None:
        """Refuse lines that match no tensor: otherwise a misspelt name would be ignored silently.

        Raises:
            ExportError: naming them.
        """
        known = list(names)
        idle = [pattern for pattern in self.formats if not any(fnmatchcase(name, pattern) for name in known)]
        if idle:
            raise ExportError(
                f"the recipe's {_listed(idle)} fits no tensor that can be quantized; "
                f"the names are those of the checkpoint, as {known[0]}"
            )


def read_recipe(path: Path, formats: Collection[str]) -> Recipe:
    """Read a recipe whose formats are among ``formats``.

    Raises:
        ExportError: the file cannot be read or is no recipe.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ExportError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"the recipe {path} is no TOML: {error}") from error
    surplus = content.keys() - {TABLE}
    if surplus:
        raise ExportError(f"the recipe {path} holds {_listed(sorted(surplus))}; it has one table, [{TABLE}]")
    table = content.get(TABLE)
    if not isinstance(table, dict) or not table:
        raise ExportError(f'the recipe {path} needs a table [{TABLE}] with lines such as "NAME" = "int8"')
    for name, form in table.items():
        if isinstance(form, dict):
            raise ExportError(f'the recipe {path} has {name} without quotes; write "{name}..." = "int8"')
        if form not in formats:
            raise ExportError(
                f"the recipe {path} gives {name} the format {form!r}; there are {', '.join(formats)}"
            )
    return Recipe(table)


def write_recipe(path: Path, recipe: Recipe, losses: Sequence["TensorLoss"] = ()) -> None:
    """Write a recipe; each line carries its measured loss, if there is one."""
    kl = {loss.name: f"  # mean KL {loss.kl:.3g} when the low format quantizes it" for loss in losses}
    lines = [f'"{name}" = "{form}"{kl.get(name, "")}' for name, form in recipe.formats.items()]
    path.write_text("\n".join([f"[{TABLE}]", *lines, ""]), "utf-8")


def keep_sensitive(
    losses: Sequence["TensorLoss"], low: tuple[str, float], high: tuple[str, float], mean_bits: float
) -> Recipe:
    """A recipe that gives ``high`` to the matrices with the largest loss per bit, up to ``mean_bits`` on average.

    Args:
        losses: measured with the low format.
        low: name and bits per weight of the format that most matrices get.
        high: the same of the one that is kept for the sensitive ones.
        mean_bits: bits per weight over all matrices, scales counted.

    Raises:
        ExportError: not even ``low`` alone is that small.
    """
    total = sum(loss.elements for loss in losses)
    if mean_bits < low[1]:
        raise ExportError(f"{mean_bits:g} bits per weight cannot be: {low[0]} alone takes {low[1]:g}")
    left = (mean_bits - low[1]) * total
    formats = {}
    for loss in sorted(losses, key=lambda loss: -loss.kl_per_element):
        extra = loss.elements * (high[1] - low[1])
        formats[loss.name] = high[0] if extra <= left else low[0]
        left -= extra if extra <= left else 0
    return Recipe(formats)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
