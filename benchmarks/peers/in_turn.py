"""Ours beside one peer on a busy machine: both are loaded, one thread each, and take turns of a few seconds.

    python -m benchmarks.peers.in_turn BUNDLE llama.cpp:q8_0 "decode 4" --cap avx2 --out out/in-turn.json

The ratios are of neighbouring turns, so a load that lasts longer than a turn falls on both. The rates themselves are
those of a busy machine. Prompts are short. OUT keeps the columns of earlier calls.
"""

import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.peers.__main__ import processor
from benchmarks.peers.contenders import OURS, Contender, Process, cap_of

CONTEXT, STEPS, POSITIONS, VOCABULARY = 32, 4, 512, 150000


def rate(process: Process, kind: str, size: int) -> float:
    """Tokens per second of a prompt of ``size`` tokens, or of STEPS steps of ``size`` sequences."""
    if kind == "prefill":
        return size / process.ask(do="prefill", tokens=size, vocabulary=VOCABULARY)
    return size * STEPS / process.ask(do="decode", steps=STEPS)


def take_turns(
    ours: Contender, peer: Contender, column: str, rounds: int, log: Path
) -> dict[str, list[float]]:
    kind, size = column.split()
    with ExitStack() as stack:
        pair = [stack.enter_context(Process(one, 1, POSITIONS, 8, log)) for one in (ours, peer)]
        for process in pair:
            process.loaded()
            if kind == "decode":
                process.ask(do="fill", tokens=CONTEXT, batch=int(size), vocabulary=VOCABULARY)
            rate(process, kind, int(size))
        turns: list[list[float]] = [[], []]
        for number in range(rounds):
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                turns[i].append(round(rate(pair[i], kind, int(size)), 2))
    return {"ours": turns[0], peer.name: turns[1]}


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("peer")
@click.argument("column")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--cap", type=click.Choice(sorted(OURS.caps)), help="Limit both to this instruction set.")
@click.option("--environments", type=click.Path(path_type=Path), default="out/peers", show_default=True)
@click.option(
    "--models", type=click.Path(path_type=Path), required=True, help="The peers' converted weights."
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    bundle: Path,
    peer: str,
    column: str,
    rounds: int,
    cap: str | None,
    environments: Path,
    models: Path,
    out: Path,
) -> None:
    """Measure one COLUMN, such as "prefill 96" or "decode 4", of BUNDLE and PEER."""
    limit = cap_of(OURS, cap or "", "ours").variables
    ours = Contender("ours", OURS, Path(sys.executable), bundle, variables=limit)
    other = Contender.from_name(peer, environments.absolute(), models, cap or "")
    turns = take_turns(ours, other, column, rounds, out.with_suffix(".log"))
    ratio = statistics.median(a / b for a, b in zip(turns["ours"], turns[peer], strict=True))
    row = {
        "bundle": bundle.name,
        "peer": peer,
        "column": column,
        "ours_over_it": round(ratio, 3),
        "turns": turns,
    }
    result = (
        json.loads(out.read_text()) if out.is_file() else {"machine": processor(), "threads": 1, "rows": []}
    )
    result |= {"cap": cap, "context": CONTEXT, "steps": STEPS}
    result["rows"].append(row)
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
