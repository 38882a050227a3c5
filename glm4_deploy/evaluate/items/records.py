"""Structured output: facts of a sentence as a JSON object with the wanted fields."""

import json
import random
from collections.abc import Iterator

from glm4_deploy.evaluate.items.calls import CITIES
from glm4_deploy.evaluate.items.item import Item
from glm4_deploy.evaluate.items.order import PERSONS

TRADES = ("baker", "farmer", "sailor", "nurse", "teacher", "painter", "miller", "lawyer", "cook", "judge")
SENTENCES = (
    "{name} is a {trade} of {age} years and lives in {city}.",
    "In {city} lives {name}, a {trade}, who is {age} years old.",
    "At {age}, {name} moved to {city} and became a {trade}.",
)


PEOPLE = 3


def item(chance: random.Random, most: int) -> Item:
    """A text of 1 to ``most`` people."""
    return next(of_people(chance, chance.randint(1, most)))


def of_people(chance: random.Random, people: int) -> Iterator[Item]:
    """Questions about one text, without end."""
    records = [_record(name, chance) for name in chance.sample(PERSONS, people)]
    text = " ".join(chance.choice(SENTENCES).format(**record) for record in records)
    while True:
        wanted = chance.choice(records)
        fields = chance.sample(list(wanted), chance.randint(2, len(wanted)))
        prompt = f"{text} Write {', '.join(fields)} of {wanted['name']} as a JSON object."
        yield Item(prompt, json.dumps({field: wanted[field] for field in fields}))


def _record(name: str, chance: random.Random) -> dict[str, str | int]:
    return {
        "name": name,
        "age": chance.randint(18, 99),
        "city": chance.choice(CITIES),
        "trade": chance.choice(TRADES),
    }
