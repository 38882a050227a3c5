"""Arithmetic in two steps, generated with its working."""

import random

from glm4_deploy.evaluate.items.item import Item
from glm4_deploy.evaluate.items.order import PERSONS

COUNTED = ("coins", "books", "apples", "stamps", "shells", "cards")
GAINS, LOSSES = ("finds", "buys", "gets"), ("gives away", "loses", "sells")
LARGEST = 400


def item(chance: random.Random, _length: int) -> Item:
    return up_to(chance, LARGEST)


def up_to(chance: random.Random, largest: int) -> Item:
    name, things = chance.choice(PERSONS), chance.choice(COUNTED)
    have, gain = chance.randint(10, largest), chance.randint(10, largest)
    loss = chance.randint(1, have + gain - 1)
    both, left = have + gain, have + gain - loss
    prompt = (
        f"{name} has {have} {things}. {name} {chance.choice(GAINS)} {gain} more and then {chance.choice(LOSSES)} "
        f"{loss}. How many {things} does {name} have now? Write each step, then: The answer is N."
    )
    return Item(prompt, f"{have} + {gain} = {both}. {both} - {loss} = {left}. The answer is {left}.")
