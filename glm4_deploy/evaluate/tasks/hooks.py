"""What the YAML files beside this one call: where their items come from, and how an answer is scored."""

import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from datasets import Dataset

from glm4_deploy.evaluate import answers
from glm4_deploy.evaluate.items import ITEM_KINDS, items

SHOTS = 64  # training items to take examples from
ITEM_DEFAULTS = {"items": 200, "seed": 0, "words": 200}


def _splits(kind: str, **metadata: Any) -> dict[str, Dataset]:
    """The items of one kind. ``metadata``: the keys of ITEM_DEFAULTS, and others that are not read."""
    wanted = ITEM_DEFAULTS | {name: int(metadata[name]) for name in ITEM_DEFAULTS if name in metadata}
    held_out = items(kind, wanted["seed"], wanted["words"])
    trained = items(kind, wanted["seed"], wanted["words"], held_out=False)
    return {
        "test": Dataset.from_list([vars(item) for item in islice(held_out, wanted["items"])]),
        "train": Dataset.from_list([vars(item) for item in islice(trained, SHOTS)]),
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
