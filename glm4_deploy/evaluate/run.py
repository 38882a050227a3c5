"""Asks every engine every item, and compares the answers with the first engine's."""

import contextlib
import gc
import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook, CachingLM
from lm_eval.evaluator import evaluate as ask_harness
from tqdm import tqdm

from glm4_deploy.evaluate.comparison import ALL, Answers, TaskRow, compare_answers, pooled
from glm4_deploy.evaluate.engines import Engine
from glm4_deploy.evaluate.gates import LossGate
from glm4_deploy.evaluate.positions import LongTexts, ask_positions, perplexity_of
from glm4_deploy.evaluate.scored import metric_of, scored_items
from glm4_deploy.evaluate.statistics import detectable
from glm4_deploy.evaluate.task_list import POSITIONS, Selection, load_tasks, require_usable
from glm4_runtime.progress import Progress, silent

ASSUMED = 0.05  # share of the items that two engines answer differently, before they are asked
KEPT = "answers"  # folder of the answers that were given
CUTS = ("generate_until", "multiple_choice", "loglikelihood")  # the harness cuts long prompts of these
NAMED_TOOLS = ("glm4-deploy", "lm_eval", "numpy", "scipy")


@dataclass(frozen=True)
class Verdict:
    """One gate and the row that it judges."""

    gate: LossGate
    row: TaskRow
    failed: bool

    @property
    def line(self) -> str:
        change = self.row.score_change if self.gate.unit == "points" else self.row.nats_change
        if change is None:
            return f"{self.row.engine}, {self.row.task}: {self.gate.unit} are not measured by these tasks ({self.gate.text})"
        value = (
            f"{100 * change.estimate.value:+.2f} points"
            if self.gate.unit == "points"
            else f"{change.estimate.value:+.4f} nats"
        )
        return f"{self.row.engine}, {self.row.task}: {value}, p = {change.p:.2g} ({self.gate.text})"


@dataclass
class Evaluation:
    """The result.

    Attributes:
        answers: engine's label to task to its answers.
        rows: one per task and engine, and one per engine for all tasks together.
        seconds: engine's label to the time in which it was opened and answered what had not been kept.
        kept: engine's label to the number of requests whose answers were kept from an earlier run.
        warnings: one line each.
    """

    engines: list[Engine]
    selection: Selection
    answers: dict[str, dict[str, Answers]]
    rows: list[TaskRow]
    verdicts: list[Verdict]
    seconds: dict[str, float]
    kept: dict[str, int]
    warnings: list[str]
    tools: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Verdict]:
        return [each for each in self.verdicts if each.failed]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def buckets(self) -> list[str]:
        """The tasks of glm4_positions, from the start of a text to the limit."""
        return [task for task in self.tasks if task.startswith(f"{POSITIONS}_")]

    def row(self, task: str, engine: str) -> TaskRow:
        return next(row for row in self.rows if (row.task, row.engine) == (task, engine))

    def perplexity(self, bucket: str, engine: str) -> float:
        nats = self.row(bucket, engine).nats
        assert nats is not None
        return perplexity_of(nats)

    def as_dict(self) -> dict[str, Any]:
        """Everything needed to repeat the run, as JSON values. Items have their prompts, with the examples in them."""
        first = self.engines[0].label
        return {
            "engines": [
                {
                    "label": each.label,
                    "where": each.where,
                    "sha256": each.identity,
                    "seconds": round(self.seconds[each.label], 2),
                    "kept_requests": self.kept[each.label],
                }
                for each in self.engines
            ],
            "selection": asdict(self.selection),
            "rows": [asdict(row) | {"detectable": row.detectable} for row in self.rows],
            "perplexity_by_position": {
                bucket: {each.label: self.perplexity(bucket, each.label) for each in self.engines}
                for bucket in self.buckets
            },
            "gates": [
                {"gate": each.gate.text, "line": each.line, "failed": each.failed} for each in self.verdicts
            ],
            "items": {
                task: [
                    {
                        "sha256": item.item,
                        "prompt": item.prompt,
                        "expected": item.expected,
                        "answers": {
                            label: {
                                "answer": tasks[task].items[place].answer,
                                "score": tasks[task].items[place].score,
                                "nats": tasks[task].items[place].nats,
                            }
                            for label, tasks in self.answers.items()
                        },
                    }
                    for place, item in enumerate(answers.items)
                ]
                for task, answers in self.answers[first].items()
            },
            "warnings": self.warnings,
            "tools": self.tools,
        }


def ask_engines(
    engines: Sequence[Engine],
    selection: Selection,
    gates: Sequence[LossGate],
    output: Path,
    progress: Progress = silent,
    texts: LongTexts | None = None,
) -> Evaluation:
    """Ask every engine, one after another, so that only one is in memory.

    Args:
        texts: what glm4_positions reads.
        output: a folder. Answers are kept there, so that an interrupted run continues where it stopped.

    Raises:
        Glm4Error: a task is unknown, an engine cannot be opened, or an engine fails.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    answers: dict[str, dict[str, Answers]] = {}
    seconds: dict[str, float] = {}
    kept: dict[str, int] = {}
    for engine in engines:
        start = time.monotonic()
        with _without_bars():
            answers[engine.label], kept[engine.label] = _ask(
                engine, selection, texts, output / KEPT, progress
            )
        seconds[engine.label] = time.monotonic() - start
    rows = _rows(answers)
    return Evaluation(
        engines=list(engines),
        selection=selection,
        answers=answers,
        rows=rows,
        verdicts=_judge(gates, rows, list(answers)[1:]),
        seconds=seconds,
        kept=kept,
        warnings=_warnings(answers),
        tools={name: version(name) for name in NAMED_TOOLS},
    )


def _warnings(answers: dict[str, dict[str, Answers]]) -> list[str]:
    return [
        f"{found.cut} of {len(found.items)} prompts of {task} do not fit into {label} and lost their beginning"
        for label, tasks in answers.items()
        for task, found in tasks.items()
        if found.cut
    ]


def foreseen(selection: Selection) -> dict[str, tuple[int, float]]:
    """For each task: its number of items, and the smallest difference of the score that they are likely to show.

    Raises:
        RequestError: a task is unknown or cannot be used.
    """
    tasks = load_tasks(selection)
    require_usable(tasks)
    counts = {name: _count(task, selection.items) for name, task in tasks.items()}
    return {name: (count, detectable(ASSUMED, count)) for name, count in counts.items()}


def _count(task: Any, most: int) -> int:
    return min(len(task.eval_docs), most)


class _Counting(CacheHook):  # type: ignore[misc]  # the harness has no types
    """Keeps each answer, and reports how many there are."""

    def __init__(self, caching: CachingLM, report: Callable[[int], None]) -> None:
        super().__init__(caching)
        self._report, self.count = report, 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        super().add_partial(attr, req, res)
        self.count += 1
        self._report(self.count)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the harness's own progress bars: it passes ``disable=False``, so no setting of tqdm's does."""
    plain = tqdm.__init__

    def hidden(self: tqdm, *values: Any, **options: Any) -> None:
        plain(self, *values, **options | {"disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = plain


def _requests(task: Any, most: int) -> int:
    """About how many requests a task needs: one per choice; for generated answers one more for the right answer."""
    each = 1
    if task.OUTPUT_TYPE == "multiple_choice":
        each = len(task.doc_to_choice(task.eval_docs[0]))
    elif task.OUTPUT_TYPE == "generate_until":
        each = 2
    return each * _count(task, most)


def _ask(
    engine: Engine, selection: Selection, texts: LongTexts | None, folder: Path, progress: Progress
) -> tuple[dict[str, Answers], int]:
    """One engine's answers by task, and how many requests were answered in an earlier run."""
    stage = f"ask {engine.label}"
    progress(stage, 0, 0)
    model = engine.open()
    caching = CachingLM(model, str(_kept_file(folder, engine, selection)))
    try:
        found, kept = _ask_tasks(selection, caching, model, partial(progress, stage))
        if texts is not None:
            before = len(caching.dbdict)
            found |= ask_positions(
                texts,
                partial(engine.token_logprobs, model),
                caching.dbdict,
                partial(progress, f"read by {engine.label}"),
            )
            kept += len(texts.sequences) - (len(caching.dbdict) - before)
        return found, kept
    finally:
        caching.dbdict.close()
        del caching, model
        gc.collect()


def _ask_tasks(
    selection: Selection, caching: CachingLM, model: LM, report: Callable[[int, int], None]
) -> tuple[dict[str, Answers], int]:
    """The harness's tasks: answers, and the number of requests that were answered in an earlier run."""
    tasks = load_tasks(selection)
    if not tasks:
        return {}, 0
    total = sum(_requests(task, selection.items) for task in tasks.values())
    hook = _Counting(caching, lambda count: report(min(count, total), total))
    model.set_cache_hook(hook)
    samples = ask_harness(
        lm=caching,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=selection.items,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=selection.chat,
        fewshot_as_multiturn=selection.chat,
    )["samples"]
    found = {task: _answers(samples[task], tasks[task], caching, model) for task in tasks}
    report(total, total)
    return found, sum(_requested(tasks[name], found[name]) for name in tasks) - hook.count


def _requested(task: Any, answers: Answers) -> int:
    """How many requests a task made: the harness's, and ours for the right answers of generated ones."""
    return len(task.instances) + (len(answers.nats) if task.OUTPUT_TYPE == "generate_until" else 0)


def _kept_file(folder: Path, engine: Engine, selection: Selection) -> Path:
    """The file of an engine's answers. Answers of another template or version are not used; a damaged file is removed."""
    told = f"{engine.identity} {selection.chat} {[version(name) for name in NAMED_TOOLS]}"
    file = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.db"
    if file.exists():
        try:
            with contextlib.closing(sqlite3.connect(file)) as kept:
                kept.execute("PRAGMA quick_check")
        except sqlite3.DatabaseError:
            file.unlink()
    return file


def _answers(samples: list[dict[str, Any]], task: Any, caching: CachingLM, model: LM) -> Answers:
    def log_likelihoods(pairs: Sequence[tuple[str, str]]) -> list[float]:
        asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
        return [float(total) for total, _ in caching.loglikelihood(asked)] if asked else []

    def tokens_of(text: str) -> int:
        return len(model.tok_encode(text, add_special_tokens=False))

    items = scored_items(samples, task.OUTPUT_TYPE, log_likelihoods)
    generates = task.OUTPUT_TYPE == "generate_until"
    room = model.max_length - (task.config.generation_kwargs.get("max_gen_toks", 0) if generates else 0)
    return Answers(
        tuple(items),
        metric_of(samples),
        fmean(tokens_of(each.answer) for each in items) if generates else None,
        sum(tokens_of(each.prompt) > room for each in items) if task.OUTPUT_TYPE in CUTS else 0,
    )


def _rows(answers: dict[str, dict[str, Answers]]) -> list[TaskRow]:
    first = next(iter(answers))
    tasks = list(answers[first])
    rows = [
        compare_answers(task, label, answers[first][task], answers[label][task], label == first)
        for task in tasks
        for label in answers
    ]
    if len(tasks) > 1:
        # Blocks of long texts count only if there is nothing else: their log-probabilities are means of a token.
        whole_tasks = [task for task in tasks if not task.startswith(f"{POSITIONS}_")] or tasks
        whole = {label: pooled([answers[label][task] for task in whole_tasks]) for label in answers}
        rows += [compare_answers(ALL, label, whole[first], whole[label], label == first) for label in answers]
    return rows


def _judge(gates: Sequence[LossGate], rows: Sequence[TaskRow], labels: Sequence[str]) -> list[Verdict]:
    """A gate judges all tasks together, or the one task that there is, or each task that it names."""
    whole = rows[-1].task
    return [
        Verdict(gate, row, _fails(gate, row))
        for gate in gates
        for row in rows
        if row.engine in labels and gate.applies_to(row.engine) and gate.judges(row.task, whole)
    ]


def _fails(gate: LossGate, row: TaskRow) -> bool:
    """Whether the loss exceeds the gate's. A gate whose unit these tasks do not measure fails, too."""
    change = row.score_change if gate.unit == "points" else row.nats_change
    if change is None:
        return True
    loss = -change.estimate.value * (100 if gate.unit == "points" else 1)
    return loss >= gate.loss and loss > 0 and change.p < gate.p
