"""What each precision costs in accuracy, beside llama.cpp's formats of the same checkpoint.

    python benchmarks/accuracy.py --peer peer/bin/python --out benchmarks/results/accuracy

The peer's interpreter: ``python -m venv peer && peer/bin/pip install llama-cpp-python gguf``; without
``--peer`` only our rows are measured. Each precision is exported for ``ort`` and scored by the runtime;
the reference is the checkpoint in PyTorch, float32. All see the same windows: each document of the text,
``<|endoftext|>`` appended, in windows of 510 tokens behind ``[gMASK]<sop>``, teacher-forced, every token of
a window counted. The calibration text is not part of the text that is scored.
"""

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import onnx
import torch

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.architecture import expected_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.streamed import reference_outputs
from glm4_runtime import Session
from glm4_runtime.bundle import GRAPH, WEIGHTS
from glm4_runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
DOCUMENT_END = "\n\f\n"
WINDOW = 512
PREFIX, END = ("[gMASK]", "<sop>"), "<|endoftext|>"
TOOLS = ("torch", "onnx", "onnxruntime", "numpy")
PEER = ("Q4_K_M", "Q4_0", "Q8_0")


@dataclass(frozen=True)
class Row:
    """One of our rows: how it is exported, and the largest ratio of perplexities it may have."""

    name: str
    options: Mapping[str, str]
    limit: float | None = None
    calibrated: bool = False


ROWS = (
    Row("fp32", {"precision": "fp32"}),
    Row("int8", {"precision": "int8"}, 1.001),
    Row("int8, int8 KV cache", {"precision": "int8", "kv_cache": "int8"}, 1.003, calibrated=True),
    Row("int8-sq", {"precision": "int8-sq"}, 1.01, calibrated=True),
    Row("int4", {"precision": "int4"}),
    Row("int4, calibrated", {"precision": "int4"}, calibrated=True),
    Row("int8, target cpu", {"precision": "int8", "target": "cpu"}, 1.001),
    Row("int4, calibrated, target cpu", {"precision": "int4", "target": "cpu"}, calibrated=True),
)


@dataclass(frozen=True)
class Result:
    name: str
    bits_per_weight: float
    perplexity: float
    ratio: float
    kl: float
    top1: float
    limit: float | None = None


class Reference:
    """What the checkpoint says at every counted position, and how others' logits compare with it."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> None:
        self._skip = len(PREFIX)
        self._lengths = [len(window) for window in windows]
        self._targets = torch.tensor([i for window in windows for i in window[self._skip :]])
        self._log_p = self._log_softmax(np.concatenate(reference_outputs(checkpoint, windows)))
        self._loss = self._mean_loss(self._log_p)

    def compare(self, name: str, bits: float, logits: np.ndarray, limit: float | None = None) -> Result:
        """``logits`` [all tokens of all windows, vocab]."""
        log_q = self._log_softmax(logits)
        loss = self._mean_loss(log_q)
        kl = float(
            torch.stack(
                [
                    (p.double().exp() * (p.double() - q)).sum()
                    for p, q in zip(self._log_p, log_q, strict=False)
                ]
            ).mean()
        )
        top1 = float((log_q.argmax(1) == self._log_p.argmax(1)).double().mean())
        return Result(name, bits, float(np.exp(loss)), float(np.exp(loss - self._loss)), kl, top1, limit)

    def _log_softmax(self, logits: np.ndarray) -> torch.Tensor:
        """Of the positions whose next token counts: the last of the prefix to the last but one."""
        if len(logits) != sum(self._lengths):
            raise ValueError(f"{len(logits)} rows of logits for {sum(self._lengths)} tokens")
        parts = np.split(logits, np.cumsum(self._lengths)[:-1])
        return torch.from_numpy(np.concatenate([part[self._skip - 1 : -1] for part in parts])).log_softmax(1)

    def _mean_loss(self, log_p: torch.Tensor) -> float:
        return float(-log_p.gather(1, self._targets[:, None]).double().mean())


def windows_of(text: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    prefix = [tokenizer.id_of(token) for token in PREFIX]
    width = WINDOW - len(prefix)
    for document in text.rstrip("\n").split(DOCUMENT_END):
        ids = [*tokenizer.encode(document, add_special_tokens=False), tokenizer.id_of(END)]
        yield from (prefix + ids[start : start + width] for start in range(0, len(ids), width))


def bits_per_weight(bundle: Path, matrices: Sequence[str], elements: int) -> float:
    """Bytes in the data file of all matrices and their scales, embedding and head included."""
    parts: dict[int, int] = {}
    for tensor in onnx.load(bundle / GRAPH, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and any(tensor.name == name or tensor.name.startswith(f"{name}.") for name in matrices):
            assert place["location"] == WEIGHTS
            parts[int(place["offset"])] = int(place["length"])
    return 8 * sum(parts.values()) / elements


def measure_ours(
    row: Row, checkpoint: Path, calibration: Path, folder: Path, windows: Sequence[Sequence[int]]
) -> tuple[float, np.ndarray]:
    """Bits per weight and logits of one precision."""
    given = {"calibration": str(calibration)} if row.calibrated else {}
    bundle = folder / "bundle"
    export(checkpoint, bundle, ExportOptions(**row.options, **given, parity=False), force=True)
    with Checkpoint.load(checkpoint) as source:
        shapes = {n: s for n, s in expected_tensors(source.config, source.task).items() if len(s) == 2}
    bits = bits_per_weight(bundle, list(shapes), sum(int(np.prod(shape)) for shape in shapes.values()))
    with Session.open(bundle) as session:
        return bits, np.concatenate([block for window in windows for block in session.score(window)])


def measure_peer(
    python: str, source: Checkpoint, windows: Sequence[Sequence[int]], folder: Path
) -> tuple[dict[str, tuple[float, np.ndarray]], dict[str, str]]:
    """Bits per weight and logits by format, and the peer's versions."""
    config = source.config
    given = {
        "layers": config.num_hidden_layers,
        "positions": config.max_position_embeddings,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rotated": int(config.head_dim * config.rope.partial_rotary_factor),
        "rope_theta": config.rope.theta,
        "eps": config.rms_norm_eps,
        "vocab": config.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(given))
    names = expected_tensors(config, source.task)
    np.savez(folder / "tensors.npz", **{n: source.read(source.name_of(n)).float().numpy() for n in names})
    rows = np.full((len(windows), WINDOW), -1, np.int32)
    for row, window in zip(rows, windows, strict=True):
        row[: len(window)] = window
    np.save(folder / "windows.npy", rows)
    script = Path(__file__).with_name("llama_cpp_peer.py")
    subprocess.run([python, script, folder, folder, *PEER], check=True, stderr=subprocess.DEVNULL)
    report = json.loads((folder / "peer.json").read_text())
    formats = report["formats"]
    return {k: (formats[k]["bits_per_weight"], np.load(folder / f"{k}.npy")) for k in formats}, report[
        "versions"
    ]


def verdicts(results: Sequence[Result], q4_k_m: Result | None) -> list[str]:
    """One line per limit: what it is, and whether it holds."""
    lines = [_verdict(r.name, r.ratio, r.limit, r.ratio <= r.limit) for r in results if r.limit is not None]
    best = results[-1]
    if q4_k_m is not None:
        holds = best.ratio < q4_k_m.ratio and best.bits_per_weight <= q4_k_m.bits_per_weight
        lines.append(
            _verdict(f"{best.name}, against Q4_K_M's at no more bits", best.ratio, q4_k_m.ratio, holds)
        )
    return lines


def _verdict(name: str, ratio: float, limit: float, holds: bool) -> str:
    return f"{name}: {_percent(ratio)}, limit {_percent(limit)}: {'holds' if holds else 'FAILS'}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.3f} %"


def table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| | bits per weight | perplexity | against fp32 | mean KL | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.bits_per_weight:.3f} | {r.perplexity:.4f} | {_percent(r.ratio)} "
        f"| {r.kl:.2g} | {100 * r.top1:.2f} % |"
        for r in results
    ]
    return lines


@click.command()
@click.option("--checkpoint", type=Path, default=ROOT / "demo" / "glm4-tiny", show_default="demo/glm4-tiny")
@click.option("--text", type=Path, default=ROOT / "demo" / "heldout.txt", show_default="demo/heldout.txt")
@click.option(
    "--calibration",
    type=Path,
    default=ROOT / "demo" / "calibration.jsonl",
    show_default="demo/calibration.jsonl",
)
@click.option("--peer", metavar="PYTHON", help="An interpreter with llama-cpp-python and gguf.")
@click.option("--out", type=Path, help="Write OUT.md and OUT.json, too.")
def main(checkpoint: Path, text: Path, calibration: Path, peer: str | None, out: Path | None) -> None:
    """Measure perplexity, KL divergence, agreement and size of every precision."""
    tokenizer = Tokenizer.from_folder(checkpoint)
    windows = list(windows_of(text.read_text("utf-8"), tokenizer))
    ours: list[Result] = []
    theirs: list[Result] = []
    versions = {tool: version(tool) for tool in TOOLS}
    with tempfile.TemporaryDirectory() as name, Checkpoint.load(checkpoint) as source:
        folder = Path(name)
        reference = Reference(source, windows)
        for row in ROWS:
            found = measure_ours(row, checkpoint, calibration, folder, windows)
            ours.append(reference.compare(row.name, *found, row.limit))
            click.echo(table(ours)[-1], err=True)
        if peer is not None:
            measured, peer_versions = measure_peer(peer, source, windows, folder)
            versions |= peer_versions
            theirs = [reference.compare(f"llama.cpp {k}", *found) for k, found in measured.items()]
    q4_k_m = next((r for r in theirs if r.name.endswith("Q4_K_M")), None)
    checks = verdicts(ours, q4_k_m)
    command = "python benchmarks/accuracy.py" + (" --peer PYTHON" if peer else "")
    about = ", ".join(f"{tool} {v}" for tool, v in versions.items())
    counted = sum(map(len, windows)) - len(PREFIX) * len(windows)
    lines = [
        "# What each precision costs in accuracy",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {about}.",
        f"{checkpoint.name} on {text.name}: {len(windows)} windows of at most {WINDOW - len(PREFIX)} tokens behind",
        f"{''.join(PREFIX)}, {counted} tokens counted. Bits per weight are those of all matrices, embedding and head",
        "included, with their scales. KL and top-1 are against the checkpoint in PyTorch, float32. Ours run on ONNX",
        "Runtime's CPU provider; llama.cpp's are quantized by itself from F32, without an importance matrix.",
        "",
        f"    {command}",
        "",
        *table([*ours, *theirs]),
        "",
        *(f"- {line}" for line in checks),
    ]
    click.echo("\n".join(lines))
    if out is not None:
        out.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
        rows = [asdict(result) for result in (*ours, *theirs)]
        out.with_suffix(".json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
    if any(check.endswith("FAILS") for check in checks):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
