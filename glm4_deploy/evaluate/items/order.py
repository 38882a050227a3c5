"""Multiple choice: who is first in an order that is told in pairs."""

import itertools
import random

from glm4_deploy.evaluate.items.item import Item

PERSONS = (
    "Ada", "Ben", "Carl", "Dora", "Emil", "Fay", "Greta", "Hugo", "Ida", "Jon", "Karin", "Leo", "Mona", "Nils",
    "Olga", "Paul", "Rosa", "Sven", "Tom", "Una", "Vera", "Will",
)  # fmt: skip
# comparative, the superlative of the first in the order, and that of the last
SCALES = (
    ("older", "oldest", "youngest"),
    ("taller", "tallest", "shortest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
)
SIZE = 5


def item(chance: random.Random, _length: int) -> Item:
    return chance.choice(of_size(chance, SIZE))


def of_size(chance: random.Random, size: int) -> tuple[Item, Item]:
    """Who is first, and who is last, of ``size`` people."""
    people = chance.sample(PERSONS, size)
    comparative, first, last = chance.choice(SCALES)
    told = [f"{a} is {comparative} than {b}." for a, b in itertools.pairwise(people)]
    chance.shuffle(told)
    choices = tuple(sorted(people))
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return (
        Item(f"{' '.join(told)} Who is the {first}: {listed}?", people[0], choices),
        Item(f"{' '.join(told)} Who is the {last}: {listed}?", people[-1], choices),
    )
