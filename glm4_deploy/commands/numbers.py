"""Lists of numbers as an option's value."""

from typing import Any

import click


def numbers(option: str, text: str, kind: type) -> list[Any]:
    """Parse ``"1,4,8"`` as numbers of type ``kind``, each above 0."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers", param_hint=option) from error
    if not all(0 < value < float("inf") for value in values):
        raise click.BadParameter("the numbers must be above 0", param_hint=option)
    return values
