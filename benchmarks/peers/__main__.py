"""Ours beside the peers, in rounds that take turns; the ratio to ours is taken within each round.

    benchmarks/peers/setup.sh out/peers
    python benchmarks/make_checkpoint.py out/9b4 --size 9b-4layers
    glm4-deploy export out/9b4 out/9b4-int8 --target cpu --max-seq-len 4096 --no-parity
    python -m benchmarks.peers out/9b4 out/9b4-int8 --peers llama.cpp:q8_0,openvino:int8 --out out/peers-int8

With ``--contexts 4096,16384`` the columns are prompts of these lengths, each read once, and decoding behind them.

A peer is PEER:FORMAT, or PEER:FORMAT+SETTING (openvino:int8+f32). In every round each contender starts anew in
a process of its own and does all columns, once untimed and once timed, so that one at a time is in memory.
"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.ceilings import Ceilings
from benchmarks.peers.contenders import OURS, Contender, ContenderError, Process, cap_of
from benchmarks.peers.report import write_report
from glm4_runtime.bundle import read_manifest

PROMPTS, BATCHES, CONTEXT, STEPS = (512, 2048), (1, 4, 8), 512, 32
LONG_BATCHES, LONG_STEPS, UNTIMED = (1, 4), 16, 256  # with --contexts; a prompt that is not timed
MARGIN = 16  # positions for the untimed steps, and what a fill may take


def take_turn(
    contender: Contender,
    ceilings: Ceilings,
    threads: int,
    vocabulary: int,
    log: Path,
    contexts: tuple[int, ...] = (),
) -> dict[str, float]:
    """One contender's figures of one round: tokens/s by column, and what surrounded them."""
    contender.warm()
    figures = {"load_average": os.getloadavg()[0], "bandwidth": ceilings.bandwidth()}
    positions, slots = room(contexts)
    with Process(contender, threads, positions, slots, log) as process:
        figures["load_s"] = process.loaded()
        if contexts:
            figures |= long_columns(process, contexts, vocabulary)
        else:
            figures |= short_columns(process, vocabulary)
        figures["peak_gb"] = process.peak_bytes() / 1e9
        figures["cores_of_others"] = process.cores_of_others()
    figures["bandwidth"] = (figures["bandwidth"] + ceilings.bandwidth()) / 2
    return figures


def room(contexts: tuple[int, ...]) -> tuple[int, int]:
    """The longest sequence, and the most that decode together."""
    if contexts:
        return max(contexts) + len(LONG_BATCHES) * (LONG_STEPS + MARGIN), max(LONG_BATCHES)
    return max(*PROMPTS, CONTEXT + STEPS + MARGIN), max(BATCHES)


def short_columns(process: Process, vocabulary: int) -> dict[str, float]:
    """Each prompt and each batch untimed and timed."""
    figures = {}
    for length in PROMPTS:
        prompt = {"do": "prefill", "tokens": length, "vocabulary": vocabulary}
        process.ask(**prompt)
        figures[f"prefill {length}"] = length / process.ask(**prompt)
    for batch in BATCHES:
        process.ask(do="fill", tokens=CONTEXT, batch=batch, vocabulary=vocabulary)
        process.ask(do="decode", steps=2)
        figures[f"decode {batch}"] = batch * STEPS / process.ask(do="decode", steps=STEPS)
    return figures


def long_columns(process: Process, contexts: tuple[int, ...], vocabulary: int) -> dict[str, float]:
    """Each long prompt once. It then becomes the sequences that decode."""
    figures = {}
    process.ask(do="fill", tokens=UNTIMED, batch=1, vocabulary=vocabulary)
    for length in contexts:
        seconds = process.ask(do="fill", tokens=length, batch=1, vocabulary=vocabulary)
        figures[f"prefill {length}"] = length / seconds
        for batch in LONG_BATCHES:
            process.ask(do="spread", batch=batch)
            process.ask(do="decode", steps=2)
            rate = batch * LONG_STEPS / process.ask(do="decode", steps=LONG_STEPS)
            figures[f"decode {batch} at {length}"] = rate
    return figures


def columns_of(contexts: tuple[int, ...]) -> list[str]:
    return [
        column
        for length in contexts
        for column in (f"prefill {length}", *(f"decode {batch} at {length}" for batch in LONG_BATCHES))
    ]


def describe(
    contenders: list[Contender], checkpoint: Path, threads: int, contexts: tuple[int, ...]
) -> dict[str, Any]:
    about: dict[str, Any] = {"columns": columns_of(contexts)} if contexts else {}
    return about | {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "threads": threads,
        "checkpoint": checkpoint.name,
        "context": CONTEXT,
        "steps": LONG_STEPS if contexts else STEPS,
        "command": f"python -m benchmarks.peers {' '.join(Path(a).name if '/' in a else a for a in sys.argv[1:])}",
        "ours": contenders[0].name,
        "contenders": {
            one.name: {
                "versions": one.versions(),
                "note": one.peer.note,
                "convert_s": one.conversion_seconds(),
            }
            for one in contenders
        },
        "rounds": [],
        "failures": [],
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def run_rounds(
    result: dict[str, Any],
    contenders: list[Contender],
    rounds: int,
    threads: int,
    out: Path,
    contexts: tuple[int, ...],
) -> None:
    ceilings = Ceilings(threads)
    vocabulary = read_manifest(contenders[0].folder).model.vocab_size
    for number in range(len(result["rounds"]), rounds):
        figures: dict[str, Any] = {"integer_gemm": ceilings.integer_gemm(), "contenders": {}}
        # the other way round every other time, so that a drift of the machine favours nobody
        for contender in contenders[:: -1 if number % 2 else 1]:
            try:
                log = out.with_suffix(".log")
                turn = take_turn(contender, ceilings, threads, vocabulary, log, contexts)
            except (ContenderError, OSError) as error:
                result["failures"].append(f"{contender.name}, round {number + 1}: {error}")
                click.echo(result["failures"][-1], err=True)
                continue
            figures["contenders"][contender.name] = {key: round(value, 3) for key, value in turn.items()}
            click.echo(f"round {number + 1} {contender.name}: {json.dumps(turn)}", err=True)
        result["rounds"].append(figures)
        write_report(result, out)


def continue_from(file: Path, result: dict[str, Any]) -> None:
    """Take over the rounds of an earlier run, of the same contenders under the same conditions."""
    if not file.is_file():
        return
    earlier = json.loads(file.read_text())
    for key in ("machine", "threads", "checkpoint", "context", "steps", "cap", "contenders"):
        if earlier.get(key) != result[key]:
            raise click.ClickException(
                f"{file} has another {key}; leave out --resume, or choose another --out"
            )
    result["rounds"], result["failures"] = earlier["rounds"], earlier["failures"]


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument(
    "bundles", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--peers", default="", help="PEER:FORMAT[+SETTING], separated by commas.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--resume", is_flag=True, help="Continue the rounds in OUT.json, up to --rounds.")
@click.option("--cap", type=click.Choice(sorted(OURS.caps)), help="Limit all to this instruction set.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--contexts",
    default="",
    metavar="N,...",
    help="Long prompts, and decoding 1 and 4 behind them, in place of the usual columns.",
)
@click.option("--environments", type=click.Path(path_type=Path), default="out/peers", show_default=True)
@click.option(
    "--models", type=click.Path(path_type=Path), help="Converted weights; CHECKPOINT-peers if absent."
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Writes OUT.json, .md, .svg and .log."
)
def main(
    checkpoint: Path,
    bundles: tuple[Path, ...],
    peers: str,
    rounds: int,
    resume: bool,
    cap: str | None,
    threads: int,
    contexts: str,
    environments: Path,
    models: Path | None,
    out: Path,
) -> None:
    """Measure BUNDLES and the peers on CHECKPOINT's weights; ratios are of the first bundle.

    A contender that fails is recorded, and the others go on.
    """
    models = models or checkpoint.with_name(f"{checkpoint.name}-peers")
    limit = cap_of(OURS, cap or "", "ours").variables
    contenders = [
        Contender(f"ours:{one.name}", OURS, Path(sys.executable), one, variables=limit) for one in bundles
    ]
    try:
        names = filter(None, peers.split(","))
        asked = [Contender.from_name(name, environments.absolute(), models, cap or "") for name in names]
    except ContenderError as error:
        raise click.ClickException(str(error)) from error
    failures = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for one in asked:
        try:
            click.echo(f"{one.name}: weights", err=True)
            one.convert(checkpoint, out.with_suffix(".log"))
            contenders.append(one)
        except ContenderError as error:
            failures.append(f"{one.name}: {error}")
            click.echo(failures[-1], err=True)
    lengths = tuple(int(part) for part in contexts.split(",") if part)
    result = describe(contenders, checkpoint, threads, lengths) | {"cap": cap}
    result["failures"] += failures
    if resume:
        continue_from(out.with_suffix(".json"), result)
    run_rounds(result, contenders, rounds, threads, out, lengths)
    click.echo(out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
