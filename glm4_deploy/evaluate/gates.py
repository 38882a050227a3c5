"""Gates for differences: ``int8: -0.5 points at p < 0.05``, or of one task ``int8/gsm8k: ...``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from glm4_deploy.evaluate.task_list import GROUPS
from glm4_runtime.errors import RequestError

FORM = re.compile(
    r"\s*(?P<engine>[^:/]+?)\s*(?:/\s*(?P<task>[^:/]+?)\s*)?:\s*-\s*(?P<loss>\d+(?:\.\d+)?)\s*(?P<unit>points|nats)\s+at\s+p\s*<\s*(?P<p>0?\.\d+)\s*"
)
ANY = "*"
EXAMPLE = "write for example 'int8: -0.5 points at p < 0.05', or * for every engine"


@dataclass(frozen=True)
class LossGate:
    """Fails if an engine is worse than the first by ``loss`` or more, and the p-value is below ``p``.

    Attributes:
        engine: a label, or ``*`` for every engine.
        task: the name of a task, or of a group with one task per length; None: all tasks together.
        loss: in ``unit``.
        unit: "points" (percent of the items) or "nats" (mean log-probability of the right answer).
    """

    text: str
    engine: str
    task: str | None
    loss: float
    unit: str
    p: float

    def applies_to(self, label: str) -> bool:
        return self.engine in (ANY, label)

    def judges(self, task: str, whole: str) -> bool:
        """Whether the gate judges the row of a task. ``whole``: the row of all tasks together."""
        if self.task is None:
            return task == whole
        return task == self.task or (self.task in GROUPS and task.startswith(f"{self.task}_"))


def parse_gate(text: str, labels: Sequence[str], tasks: Sequence[str]) -> LossGate:
    """Read one ``--gate``.

    Raises:
        RequestError: the text has another form, or no engine has the label, or no task the name.
    """
    found = FORM.fullmatch(text)
    if found is None:
        raise RequestError(f"--gate {text!r} has another form; {EXAMPLE}")
    if found["engine"] not in (ANY, *labels[1:]):
        raise RequestError(
            f"--gate names {found['engine']!r}, but the engines to compare with {labels[0]} are "
            f"{', '.join(labels[1:]) or 'none'}"
        )
    groups = [name for name in GROUPS if any(task.startswith(f"{name}_") for task in tasks)]
    if found["task"] not in (None, *tasks, *groups):
        raise RequestError(
            f"--gate names the task {found['task']!r}; the tasks are {', '.join([*tasks, *groups])}"
        )
    return LossGate(
        text.strip(), found["engine"], found["task"], float(found["loss"]), found["unit"], float(found["p"])
    )
