"""Tasks by name: the shipped ones, a user's YAML file or folder, and the harness's own."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from glm4_deploy.evaluate.items import USUAL_SIZE
from glm4_runtime.errors import Glm4Error, RequestError, one_line

SHIPPED = "glm4"
FOLDER = Path(__file__).parent / "tasks"
POSITIONS = "glm4_positions"  # no task of the harness: see positions.py
NEEDLE = "glm4_needle"
GROUPS = (NEEDLE, POSITIONS)  # each has one row per length; a gate of the name judges all of them


@dataclass(frozen=True)
class Selection:
    """Which items of which tasks.

    Attributes:
        names: tasks, groups, ``*.yaml`` files, or folders of these.
        items: items per task at most.
        words: words in a text of the task glm4_needle. Several numbers make a task of each.
        people: people in a text of the task glm4_records at most.
        shots: solved examples in each prompt; None: what the task says.
        seed: of the generated items and of the choice of examples.
        chat: whether the chat template writes the prompts.
        text: file of the long documents of glm4_positions; None: an engine's own text.
        positions: tokens of a text of glm4_positions; None: the least room of the engines.
    """

    names: tuple[str, ...] = (SHIPPED,)
    items: int = 200
    words: tuple[int, ...] = (USUAL_SIZE["needle"],)
    people: int = USUAL_SIZE["records"]
    shots: int | None = None
    seed: int = 0
    chat: bool = False
    text: str | None = None
    positions: int | None = None

    @property
    def harness_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != POSITIONS)

    @property
    def has_positions(self) -> bool:
        return POSITIONS in self.names


def load_tasks(selection: Selection) -> dict[str, Any]:
    """The harness's task objects, by name.

    Raises:
        RequestError: a name is unknown, a file cannot be read as a task, or data is not on this machine.
    """
    names = selection.harness_names
    if not names:
        return {}
    files = [Path(name) for name in names if _is_path(name)]
    missing = next((path for path in files if not path.exists()), None)
    if missing is not None:
        raise RequestError(
            f"there is no file {missing}; give a task's name, a *.yaml file, or a folder of these"
        )
    with _one_line():
        manager = TaskManager(
            include_path=[str(FOLDER), *(str(path if path.is_dir() else path.parent) for path in files)],
            include_defaults=any(not name.startswith(SHIPPED) and not _is_path(name) for name in names),
            metadata=_metadata(selection, selection.words[0]),
        )
    wanted = [spec for name in names for spec in _specs(name)]
    unknown = sorted(spec for spec in wanted if not _is_path(spec) and spec not in manager.all_tasks)
    if unknown:
        raise RequestError(
            f"there is no task {unknown[0]}; `lm_eval ls tasks` lists the harness's, {SHIPPED} is ours"
        )
    if not wanted:
        raise RequestError(f"{', '.join(names)} has no *.yaml file; give a task's file or its name")
    with _one_line():
        tasks = _by_words(manager.load(wanted)["tasks"], selection)
        for task in tasks.values():
            _set_shots(task, selection)
    return tasks


def _metadata(selection: Selection, words: int) -> dict[str, int]:
    return {"items": selection.items, "words": words, "people": selection.people, "seed": selection.seed}


def _by_words(tasks: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """The tasks, with one glm4_needle per number of words if there are several."""
    if len(selection.words) == 1 or NEEDLE not in tasks:
        return tasks
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        found |= (
            {name: task}
            if name != NEEDLE
            else {f"{NEEDLE}_{n}": _needle(selection, n) for n in selection.words}
        )
    return found


def _needle(selection: Selection, words: int) -> Any:
    manager = TaskManager(
        include_path=str(FOLDER), include_defaults=False, metadata=_metadata(selection, words)
    )
    task = manager.load(NEEDLE)["tasks"][NEEDLE]
    task.set_config(key="task", value=f"{NEEDLE}_{words}")
    return task


def require_usable(tasks: Mapping[str, Any]) -> None:
    """Make the first prompts of each task, which finds most faults of a task's file before the work.

    Raises:
        RequestError: a task has no items, or no prompt can be made of an item.
    """
    with _one_line():
        for name, task in tasks.items():
            if not len(task.eval_docs):
                raise RequestError(f"the task {name} has no items; give it data")
            task.build_all_requests(limit=1)


@contextmanager
def _one_line() -> Iterator[None]:
    """Any error of the harness or of a task's own code as one line."""
    try:
        yield
    except Glm4Error:
        raise
    except (OSError, ConnectionError) as error:
        raise RequestError(
            f"the data of a task cannot be read ({type(error).__name__}); the harness's tasks need a network, "
            f"{SHIPPED} needs none"
        ) from error
    except Exception as error:
        raise RequestError(
            f"a task cannot be used: {type(error).__name__}: {one_line(str(error), 300)}; correct the task's file"
        ) from error


def _set_shots(task: Any, selection: Selection) -> None:
    if selection.shots is not None:
        task.set_config(key="num_fewshot", value=selection.shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=selection.seed)


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or os.sep in name


def _specs(name: str) -> list[str]:
    """What the harness loads: a name, or the files of a folder."""
    path = Path(name)
    return [str(each) for each in sorted(path.glob("*.y*ml"))] if _is_path(name) and path.is_dir() else [name]
