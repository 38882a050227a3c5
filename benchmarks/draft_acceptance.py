"""How often a draft model's next token is the one that the model takes: greedy and sampled, with the same random numbers.

    python benchmarks/draft_acceptance.py TARGET DRAFT --text demo/heldout.txt --out benchmarks/results/draft-acceptance

Prompts are the first 60 tokens of the text's documents. Every step drafts two tokens, whatever they cost. The share of
right ones counts tokens until the first wrong one in each draft.
"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from glm4_runtime import SamplingParams, Session
from glm4_runtime.draft_model import open_draft
from glm4_runtime.scheduler import Failed, Request, Scheduler
from glm4_runtime.scheduler.drafts import Draft
from glm4_runtime.scheduler.drafts.drafting import Drafting, Plan
from glm4_runtime.scheduler.job import Job

WIDTH, PROMPT, TOKENS = 2, 60, 100
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8, top_k 40": {"temperature": 0.8, "top_k": 40, "seed": 1},
    "temperature 1": {"temperature": 1.0, "seed": 1},
}


class Always(Drafting):
    """Drafts in every step, and counts the tokens that were judged."""

    right = judged_tokens = 0

    def _best(self, offers: dict, most: int) -> Plan:
        firsts = {job: (some[0], min(WIDTH, some[0].most, most)) for job, some in offers.items() if some}
        return Plan(firsts, rate=2.0)

    def judged(self, job: Job, draft: Draft, right: int, wrong: bool, jobs: int) -> None:
        Always.right += right
        Always.judged_tokens += right + wrong
        super().judged(job, draft, right, wrong, jobs)


def share(target: Session, draft: Path, prompts: list[tuple[int, ...]], params: SamplingParams) -> float:
    Always.right = Always.judged_tokens = 0
    errors: list[object] = []
    with patch("glm4_runtime.scheduler.batch.Drafting", Always):
        scheduler = Scheduler(target, speculation=False, draft=open_draft(target, draft))
    for prompt in prompts:
        scheduler.submit(
            Request(prompt, params), lambda e: errors.append(e.error) if isinstance(e, Failed) else None
        )
    while scheduler.stats().active or scheduler.stats().queued:
        scheduler.step()
    scheduler.stop()
    if errors:
        raise SystemExit(str(errors[0]))
    return Always.right / Always.judged_tokens


@click.command(help=__doc__.partition("\n")[0])
@click.argument("target", type=click.Path(exists=True, path_type=Path))
@click.argument("draft", type=click.Path(exists=True, path_type=Path))
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json.")
def main(target: Path, draft: Path, text: Path, out: Path | None) -> None:
    with Session.open(target) as session:
        tokenizer = session.tokenizer
        assert tokenizer is not None
        documents = text.read_text("utf-8").split("\n\f\n")
        prompts = [tuple(tokenizer.encode(document)[:PROMPT]) for document in documents]
        found = {
            kind: round(
                share(session, draft, prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True, **options)),
                3,
            )
            for kind, options in KINDS.items()
        }
    click.echo(json.dumps(found, indent=2))
    if out is not None:
        command = "python benchmarks/draft_acceptance.py TARGET DRAFT --text demo/heldout.txt"
        out.with_suffix(".json").write_text(
            json.dumps(
                {"command": command, "prompts": len(prompts), "share of right tokens": found}, indent=2
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
