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
    return of_size(chance, SIZE)


def of_size(chance: random.Random, size: int) -> Item:
    people = chance.sample(PERSONS, size)
    comparative, first, last = chance.choice(SCALES)
    told = [f"{a} is {comparative} than {b}." for a, b in itertools.pairwise(people)]
    chance.shuffle(told)
    superlative, answer = chance.choice(((first, people[0]), (last, people[-1])))
    choices = tuple(sorted(people))
    prompt = f"{' '.join(told)} Who is the {superlative}: {', '.join(choices[:-1])} or {choices[-1]}?"
    return Item(prompt, answer, choices)
