"""Long texts by position: how well an engine predicts tokens near the start of a text, and far from the start.

A text is read once, from its first token to the limit. The log-probabilities of its tokens are averaged over blocks,
and each block is one item of the bucket of positions that it lies in. The buckets double: 0-1k, 1k-2k, 2k-4k.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm4_deploy.evaluate.comparison import Answers
from glm4_deploy.evaluate.engines import Engine
from glm4_deploy.evaluate.scored import ScoredItem
from glm4_deploy.evaluate.statistics import ROUNDING
from glm4_deploy.evaluate.task_list import POSITIONS, Selection
from glm4_deploy.metrics import Vector
from glm4_deploy.own_text import own_text
from glm4_deploy.texts import prefix_of, read_sequences
from glm4_runtime.errors import Glm4Error, RequestError
from glm4_runtime.tokenizer import Tokenizer

BLOCK = 64  # tokens of one item
FIRST_END = 1024  # end of the first bucket, if the limit has at least eight times as many tokens
LAST_SHARE = 0.8  # of the limit: no bucket but the last begins later
SEQUENCES_READ = 1024  # of a file at most
SHOWN = 48  # tokens before a block, to be shown


@dataclass(frozen=True)
class Bucket:
    """Positions ``start`` to ``end`` of a text."""

    start: int
    end: int

    @property
    def task(self) -> str:
        return f"{POSITIONS}_{_short(self.start)}-{_short(self.end)}"


@dataclass(frozen=True)
class LongTexts:
    """What all engines read.

    Attributes:
        sequences: token ids. The first ones reach the limit; the others end at a bucket that still needs blocks.
        prefix: number of tokens at the start of each sequence that the tokenizer added; they are not predicted.
    """

    buckets: tuple[Bucket, ...]
    sequences: tuple[tuple[int, ...], ...]
    prefix: int
    tokenizer: Tokenizer

    def count(self, bucket: Bucket) -> int:
        return sum(len(_block_starts(bucket, len(ids))) for ids in self.sequences)

    def blocks(self, bucket: Bucket) -> Iterator[tuple[int, int, int]]:
        """Sequence, first and last position + 1 of each block of a bucket."""
        for number, ids in enumerate(self.sequences):
            for start in _block_starts(bucket, len(ids)):
                yield number, max(start, self.prefix, 1), start + BLOCK


def long_texts(engines: Sequence[Engine], selection: Selection) -> LongTexts | None:
    """The texts for all engines; None if the selection has no such task.

    Raises:
        RequestError: an engine has less room, or there is no text that is long enough.
        TextError: the file cannot be read.
    """
    if not selection.has_positions:
        return None
    limit = _limit(engines, selection.positions)
    folders = [Path(each.where) for each in engines if each.is_folder]
    path = own_text(*folders) if selection.text is None else Path(selection.text)
    if path is None:
        raise RequestError(
            f"{POSITIONS} needs long documents, and no engine's folder has a heldout.txt; give --text FILE"
        )
    if not folders:
        raise RequestError(
            f"{POSITIONS} needs a tokenizer to cut the text; add a bundle or --reference CHECKPOINT"
        )
    tokenizer = Tokenizer.from_folder(folders[0])
    found = read_sequences(path, tokenizer, limit, SEQUENCES_READ)
    buckets = tuple(buckets_of(limit))
    prefix = prefix_of(tokenizer)
    begins = all(list(ids[: len(prefix)]) == prefix for ids in found)
    texts = LongTexts(
        buckets, tuple(enough(found, buckets, selection.items)), len(prefix) if begins else 0, tokenizer
    )
    if not texts.count(buckets[-1]):
        raise RequestError(
            f"the longest document of {path} has {max(map(len, found))} tokens, and the bucket "
            f"{buckets[-1].start} to {limit} needs {buckets[-1].start + BLOCK}; give longer documents (--text FILE) "
            "or a lower limit (--positions N)"
        )
    return texts


def ask_positions(
    texts: LongTexts,
    token_logprobs: Callable[[Sequence[int]], Vector],
    kept: MutableMapping[str, Any],
    report: Callable[[int, int], None],
) -> dict[str, Answers]:
    """One engine's answers, by bucket.

    Args:
        token_logprobs: gives the log-probability of each token after the first, in nats.
        kept: answers of an earlier run, by a hash of the ids; new answers are added.

    Raises:
        Glm4Error: a log-probability is not a number.
    """
    scored = []
    for number, ids in enumerate(texts.sequences):
        report(number, len(texts.sequences))
        key = f"positions {_hash(ids)}"
        if key not in kept:
            found = np.asarray(token_logprobs(ids), np.float64)
            if found.shape != (len(ids) - 1,) or not np.isfinite(found).all():
                raise Glm4Error(
                    f"the engine gives log-probabilities of {len(ids)} tokens that are missing or no numbers; find the "
                    "cause with validate --layers"
                )
            kept[key] = found.tolist()
        scored.append(np.asarray(kept[key]))
    report(len(scored), len(scored))
    return {bucket.task: _answers(texts, bucket, scored) for bucket in texts.buckets}


def perplexity_of(nats: float) -> float:
    """``nats``: mean log-probability of a token."""
    return float(np.exp(-nats))


def _answers(texts: LongTexts, bucket: Bucket, scored: Sequence[Vector]) -> Answers:
    items = []
    for number, start, end in texts.blocks(bucket):
        ids = texts.sequences[number]
        items.append(
            ScoredItem(
                item=_hash(ids[:end]),
                score=None,
                nats=float(scored[number][start - 1 : end - 1].mean()),
                prompt=f"text {number}, position {start}: …{_text(texts, ids[max(0, start - SHOWN) : start])}",
                expected=_text(texts, ids[start:end]),
                answer="",
            )
        )
    return Answers(tuple(items), None, rounding=ROUNDING / BLOCK)


def _text(texts: LongTexts, ids: Sequence[int]) -> str:
    return texts.tokenizer.decode(list(ids), skip_special_tokens=False)


def _limit(engines: Sequence[Engine], longest: int | None) -> int:
    least = min(engines, key=lambda each: each.room)
    limit = least.room if longest is None else longest
    if limit > least.room:
        raise RequestError(f"--positions is {limit}, but {least.label} has room for {least.room} tokens")
    if limit < 2 * BLOCK:
        raise RequestError(f"{POSITIONS} needs room for {2 * BLOCK} tokens, but has {limit}")
    return limit


def buckets_of(limit: int) -> list[Bucket]:
    end = FIRST_END
    while end > BLOCK and end > limit // 8:
        end //= 2
    ends = []
    while end <= LAST_SHARE * limit:
        ends.append(end)
        end *= 2
    ends.append(limit)
    return [Bucket(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def enough(
    found: Sequence[Sequence[int]], buckets: Sequence[Bucket], items: int
) -> Iterator[tuple[int, ...]]:
    """Sequences for ``items`` blocks per bucket. Each is cut behind the last bucket that needs more blocks."""
    counts = dict.fromkeys(buckets, 0)
    for ids in sorted(found, key=len, reverse=True):
        end = max((bucket.end for bucket, count in counts.items() if count < items), default=0)
        if not end or len(ids) < BLOCK:
            break
        yield tuple(ids[:end])
        for bucket in counts:
            counts[bucket] += len(_block_starts(bucket, min(end, len(ids))))


def _block_starts(bucket: Bucket, length: int) -> range:
    """Where the whole blocks of a bucket begin, in a text of ``length`` tokens."""
    return range(bucket.start, min(bucket.end, length) - BLOCK + 1, BLOCK)


def _hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def _short(position: int) -> str:
    return f"{position // 1024}k" if position and position % 1024 == 0 else str(position)
