"""Which operators a step's time goes to: ONNX Runtime's own profile of a prompt and of decoding steps.

    python benchmarks/step_profile.py out/9b4-int8 --out benchmarks/results/profile-int8

Medians over the runs of a kind, in milliseconds, by operator; products by the module they belong to (``mlp`` is gate and
up, where they are one product with their gate). The weights that a step reads are the bundle's, less the embeddings, of
which it reads a row.
"""

import json
import os
import platform
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import onnx
import onnxruntime

from glm4_deploy.bench import Runner
from glm4_runtime import Session
from glm4_runtime.bundle import GRAPH
from glm4_runtime.session.ort import OrtSession

CONTEXT = 512
PRODUCTS = {"BlockQuantizedMatMul", "MatMulNBits", "MatMul", "FusedMatMul"}


@contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Sessions that are opened within write a profile into ``folder``."""
    real = onnxruntime.SessionOptions

    def options() -> Any:
        made = real()
        made.enable_profiling = True
        made.profile_file_prefix = str(folder / "profile")
        return made

    onnxruntime.SessionOptions = options
    try:
        yield
    finally:
        onnxruntime.SessionOptions = real


def module_of(node: str) -> str:
    """``mlp.gate_up_proj`` of ``model.layers.3.mlp.gate_up_proj/BlockQuantizedMatMul``."""
    scope = node.rpartition("/")[0].split(".")
    return ".".join(scope[3:]) if scope[:2] == ["model", "layers"] else scope[-1]


def kind_of(event: dict[str, Any]) -> str:
    operator = event["args"]["op_name"]
    return f"{operator} {module_of(event['name'])}" if operator in PRODUCTS else operator


def tables(events: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each run, milliseconds by operator and of the whole."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    found = [Counter({"whole": end - start}) for start, end in runs]
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            at = next(i for i, (start, end) in enumerate(runs) if start <= event["ts"] <= end)
            found[at][kind_of(event)] += event["dur"]
    return [{name: micros / 1e3 for name, micros in table.items()} for table in found]


def median_table(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    names = {name for table in runs for name in table}
    medians = {name: statistics.median(table.get(name, 0.0) for table in runs) for name in names}
    return {name: round(ms, 3) for name, ms in sorted(medians.items(), key=lambda item: -item[1])}


def step_bytes(bundle: Path) -> int:
    """Weight bytes that a decoding step reads: all but the embeddings."""
    graph = onnx.load(bundle / GRAPH, load_external_data=False).graph
    sizes = {
        tensor.name: int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    }
    looked_up = {name for node in graph.node if node.op_type.startswith("Gather") for name in node.input}
    return sum(size for name, size in sizes.items() if name not in looked_up)


def measure(bundle: Path, batches: Sequence[int], steps: int, threads: int | None) -> dict[str, Any]:
    """Profile of a prompt and of steps of each batch, by what was run."""
    order: list[str] = []
    with tempfile.TemporaryDirectory() as folder, profiled(Path(folder)):
        with Session.open(bundle, max_batch_size=max(batches), threads=threads) as session:
            if not isinstance(session, OrtSession):
                raise click.ClickException(f"{bundle} does not run on ONNX Runtime, whose profile this is")
            runner = Runner(session)
            for name in ("warm-up", *[f"prefill {CONTEXT}"] * 3):
                runner.prefill(runner.tokens(CONTEXT))
                order.append(name)
            for batch in batches:
                runner.fill(runner.tokens(CONTEXT), batch)
                order.append("fill")
                for name in ("warm-up", f"decode {batch}"):
                    runner.decode(batch, steps)
                    order += [name] * steps
                runner.empty()
            path = session._session.end_profiling()
        events = json.loads(Path(path).read_text("utf-8"))
    found = tables(events)
    assert len(found) == len(order), f"{len(found)} runs were profiled and {len(order)} were made"
    kinds = [name for name in dict.fromkeys(order) if name not in ("warm-up", "fill")]
    return {kind: median_table([t for t, n in zip(found, order, strict=True) if n == kind]) for kind in kinds}


def markdown(result: dict[str, Any]) -> str:
    kinds = list(result["milliseconds"])
    names = sorted(
        {name for table in result["milliseconds"].values() for name in table},
        key=lambda name: -result["milliseconds"][kinds[0]].get(name, 0.0),
    )
    lines = [
        f"# Where a step's time goes: {result['bundle']}\n",
        f"{result['made'][:10]}, {result['machine']}, onnxruntime {result['onnxruntime']}. Command: `{result['command']}`. "
        f"Milliseconds, medians of the runs of a kind; behind {CONTEXT} tokens. A step reads {result['step_bytes'] / 1e9:.2f} "
        "GB of weights.\n",
        f"| operator | {' | '.join(kinds)} |",
        f"|---|{'---|' * len(kinds)}",
    ]
    for name in names:
        row = (result["milliseconds"][kind].get(name) for kind in kinds)
        lines.append(f"| {name} | {' | '.join('' if ms is None else f'{ms:.2f}' for ms in row)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--batch", "batches", multiple=True, default=(1, 4, 8), show_default=True)
@click.option("--steps", default=24, show_default=True)
@click.option("--threads", type=int)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
def main(bundle: Path, batches: tuple[int, ...], steps: int, threads: int | None, out: Path | None) -> None:
    """Profile a BUNDLE of ONNX Runtime."""
    result = {
        "bundle": bundle.name,
        "command": " ".join(
            [f"python benchmarks/step_profile.py {bundle.name} --steps {steps}"]
            + [f"--batch {batch}" for batch in batches]
            + [f"--threads {threads}"] * (threads is not None)
        ),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "onnxruntime": version("onnxruntime"),
        "step_bytes": step_bytes(bundle),
        "milliseconds": measure(bundle, batches, steps, threads),
    }
    text = markdown(result)
    click.echo(text)
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        out.with_suffix(".md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
