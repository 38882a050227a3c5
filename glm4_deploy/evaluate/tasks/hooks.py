"""What the YAML files beside this one call: where their items come from, and how an answer is scored."""

import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from datasets import Dataset

from glm4_deploy.evaluate import answers
from glm4_deploy.evaluate.items import ITEM_KINDS, items
from glm4_deploy.evaluate.task_list import Selection

SIZES = {"needle": "words", "records": "people"}  # which of a Selection's numbers is the size of an item
EXAMPLES = 64  # items to take solved examples from


def _splits(kind: str, **metadata: Any) -> dict[str, Dataset]:
    """The items of one kind. ``metadata`` may have seed, words, people and items of a Selection; other keys are not read."""
    usual = Selection()
    given = {"seed": usual.seed, "items": usual.items} | metadata
    seed, count, size = int(given["seed"]), int(given["items"]), given.get(SIZES.get(kind))
    asked, examples = (items(kind, seed, size, held_out) for held_out in (True, False))
    return {
        "test": Dataset.from_list([vars(item) for item in islice(asked, count)]),
        "train": Dataset.from_list([vars(item) for item in islice(examples, EXAMPLES)]),
    }


order, sums, needle, calls, records = (partial(_splits, kind) for kind in ITEM_KINDS)


def _scored(
    is_right: Callable[[str, str], bool], doc: dict[str, Any], results: list[str]
) -> dict[str, float]:
    return {"right": float(is_right(results[0], doc["answer"]))}


score_number = partial(_scored, answers.same_number)
score_record = partial(_scored, answers.same_record)


def score_call(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"right": float(answers.is_call(results[0], doc["answer"], json.loads(doc["schemas"])))}
