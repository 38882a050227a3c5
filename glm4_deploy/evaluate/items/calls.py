"""Tool calls: choose a function and its arguments. The answer has the family's form: the name, then JSON."""

import json
import random
from collections.abc import Callable
from typing import Any

from glm4_deploy.evaluate.items.item import Item
from glm4_deploy.evaluate.items.order import PERSONS

CITIES = (
    "London", "Paris", "Berlin", "Rome", "Boston", "Tokyo", "Madrid", "Oslo", "Cairo", "Athens", "Vienna", "Lima",
    "Delhi", "Dublin", "Geneva", "Prague",
)  # fmt: skip
UNITS = ("celsius", "fahrenheit")

Value = Callable[[random.Random], Any]
STRING, INTEGER = {"type": "string"}, {"type": "integer"}
# name, purpose, parameters (name, schema, values), how a user asks
FUNCTIONS: tuple[tuple[str, str, tuple[tuple[str, dict[str, Any], Value], ...], tuple[str, ...]], ...] = (
    (
        "get_weather",
        "Weather of a city.",
        (
            ("city", STRING, lambda chance: chance.choice(CITIES)),
            ("unit", {"type": "string", "enum": list(UNITS)}, lambda chance: chance.choice(UNITS)),
        ),
        ("What is the weather in {city} in {unit}?", "Tell me the weather in {city}, in {unit}."),
    ),
    (
        "get_time",
        "Local time of a city.",
        (("city", STRING, lambda chance: chance.choice(CITIES)),),
        ("What time is it in {city}?", "Tell me the time in {city}."),
    ),
    (
        "send_money",
        "Send money to a person.",
        (
            ("to", STRING, lambda chance: chance.choice(PERSONS)),
            ("amount", INTEGER, lambda chance: chance.randint(100, 99_999)),
        ),
        ("Send {amount} to {to}.", "Please pay {to} {amount}."),
    ),
    (
        "book_table",
        "Book a table.",
        (
            ("city", STRING, lambda chance: chance.choice(CITIES)),
            ("people", INTEGER, lambda chance: chance.randint(2, 30)),
            ("hour", INTEGER, lambda chance: chance.randint(9, 23)),
        ),
        (
            "Book a table for {people} in {city} at {hour}.",
            "We are {people} in {city}. Get us a table at {hour}.",
        ),
    ),
    (
        "set_alarm",
        "Set an alarm.",
        (
            ("hour", INTEGER, lambda chance: chance.randint(0, 23)),
            ("minute", INTEGER, lambda chance: chance.randint(0, 59)),
        ),
        ("Wake me at {hour} {minute}.", "Set an alarm at {hour} {minute}."),
    ),
    (
        "call_person",
        "Call a person.",
        (("name", STRING, lambda chance: chance.choice(PERSONS)),),
        ("Call {name}.", "I must speak to {name}."),
    ),
)
OFFERED = 4


def item(chance: random.Random, _length: int) -> Item:
    offered = chance.sample(FUNCTIONS, OFFERED)
    name, _, parameters, questions = chance.choice(offered)
    arguments = {key: value(chance) for key, _, value in parameters}
    question = chance.choice(questions).format(**arguments)
    schemas = {each[0]: _schema(each[2]) for each in offered}
    told = "\n".join(f"{each[0]}: {each[1]} {json.dumps(dict(_shown(each[2])))}" for each in offered)
    prompt = (
        f"Functions:\n{told}\nTask: {question}\nCall one function: write its name, and in the next line "
        "its arguments as JSON."
    )
    return Item(prompt, f"{name}\n{json.dumps(arguments)}", schemas=json.dumps(schemas))


def _shown(parameters: tuple[tuple[str, dict[str, Any], Value], ...]) -> list[tuple[str, Any]]:
    return [(key, schema.get("enum", schema["type"])) for key, schema, _ in parameters]


def _schema(parameters: tuple[tuple[str, dict[str, Any], Value], ...]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key: schema for key, schema, _ in parameters},
        "required": [key for key, _, _ in parameters],
        "additionalProperties": False,
    }
