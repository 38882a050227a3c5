"""Logits of one job's next positions, after a run of its last token and of a draft."""

from dataclasses import dataclass

from glm4_runtime.arrays import Logits
from glm4_runtime.scheduler.drafts import Draft


@dataclass(eq=False)
class Rows:
    """The job takes tokens from the rows in order, as long as its tokens are those of the draft. So the output equals
    the output of single steps.

    Attributes:
        logits: float32 [1 + drafted tokens, vocab].
        highest: the token with the highest logit of each row. Empty: not computed.
        draft: None: only one row.
        jobs: number of jobs in the run.
        at: the row from which the next token comes; the rows before were used.
    """

    logits: Logits
    highest: list[int]
    draft: Draft | None = None
    jobs: int = 1
    at: int = 0

    def kept(self) -> "Rows":
        """The rows that are left, in memory that the next run does not overwrite."""
        self.logits = self.logits.copy()
        return self

    def next(self, token: int) -> bool:
        """Go to the row after ``token``, which was taken from the last one. False: there is none, because the draft
        ended or was wrong."""
        if self.draft is None or self.at == len(self.draft.ids) or int(self.draft.ids[self.at]) != token:
            return False
        self.at += 1
        return True

    @property
    def wrong(self) -> bool:
        """After :meth:`next` returned False: whether the draft's next token was wrong."""
        return self.draft is not None and self.at < len(self.draft.ids)
