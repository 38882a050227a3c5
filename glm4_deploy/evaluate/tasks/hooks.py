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

EXAMPLES = 64  # items to take solved examples from


def _splits(kind: str, **metadata: Any) -> dict[str, Dataset]:
    """The items of one kind. ``metadata`` may have seed, words and items of a Selection; other keys are not read."""
    usual = Selection()
    given = {"seed": usual.seed, "words": usual.words[0], "items": usual.items} | metadata
    seed, words, count = (int(given[name]) for name in ("seed", "words", "items"))
    asked, examples = (items(kind, seed, words, held_out) for held_out in (True, False))
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
