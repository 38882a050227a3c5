"""Retrieval: one of many codes in a long text, at any depth."""

import random

from glm4_deploy.evaluate.items.item import Item

ADJECTIVES = (
    "amber", "black", "blue", "brown", "gold", "green", "grey", "ivory", "olive", "orange", "pink", "purple", "red",
    "ruby", "silver", "teal", "violet", "white", "yellow", "copper",
)  # fmt: skip
NOUNS = (
    "anchor", "arrow", "barrel", "basket", "bell", "boat", "bridge", "candle", "castle", "chair", "clock", "crown",
    "door", "drum", "feather", "flag", "gate", "hammer", "harbour", "house", "kettle", "key", "lamp", "letter",
    "mill", "mirror", "pearl", "river", "rope", "ship", "stone", "sword", "table", "tower", "wagon", "wheel",
)  # fmt: skip
WORDS_PER_LINE = 8


def item(chance: random.Random, length: int) -> Item:
    """The text has one line per code, and about ``length`` words. Names get a number if there are too few."""
    names = [f"{colour} {thing}" for colour in ADJECTIVES for thing in NOUNS]
    lines = max(2, length // WORDS_PER_LINE)
    if lines > len(names):
        lines = length // (WORDS_PER_LINE + 1)
        rounds = -(-lines // len(names))
        names = [f"{name} {number}" for name in names for number in range(1, rounds + 1)]
    told = [(name, chance.randint(100, 999)) for name in chance.sample(names, lines)]
    at = chance.randrange(lines)
    name, code = told[at]
    text = "\n".join(f"The code of the {name} is {code}." for name, code in told)
    prompt = f"{text}\nWhat is the code of the {name}? Answer with its whole sentence."
    return Item(prompt, f"The code of the {name} is {code}.", place=at / (lines - 1))
