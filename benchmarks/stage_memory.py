"""Memory of each stage of a bundle on Ray actors, against all stages in one process.

    python -m benchmarks.stage_memory STAGED --out benchmarks/results/stage-memory.json

Own memory is anonymous; mapped memory is what the process has read of its files, the weights. Both are read after a
prompt and a few further tokens. The whole is measured in a process of its own.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_runtime.session import Session

PROMPT, TOKENS = 64, 4


def memory(pid: int) -> dict[str, float]:
    """Own and mapped MiB of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    own = kib["Anonymous"]
    return {"own": round(own / 1024, 1), "mapped": round((kib["Rss"] - own) / 1024, 1)}


def use(session: Session) -> None:
    tokens = np.random.default_rng(0).integers(0, session.manifest.model.vocab_size, PROMPT)
    session.prefill(0, tokens)
    for _ in range(TOKENS):
        session.decode({0: 5})


@click.command()
@click.argument("staged", type=click.Path(exists=True, path_type=Path))
@click.option("--whole", is_flag=True, help="Measure all stages in this process, and nothing else.")
@click.option("--max-seq-len", type=int, default=1024, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(staged: Path, whole: bool, max_seq_len: int, out: Path | None) -> None:
    """Measure the stages of STAGED."""
    limits: dict[str, Any] = {"threads": 1, "max_seq_len": max_seq_len, "max_batch_size": 4}
    if whole:
        with Session.open(staged, **limits) as session:
            use(session)
            click.echo(json.dumps(memory(os.getpid())))
        return
    command = [sys.executable, "-m", "benchmarks.stage_memory", str(staged), "--whole"]
    together = json.loads(
        subprocess.run([*command, "--max-seq-len", str(max_seq_len)], check=True, capture_output=True).stdout
    )
    with Session.open(staged, stages_on="ray", **limits) as session:
        use(session)
        stages = [memory(pid) for pid in getattr(session, "pids", ())]
        manifest = session.manifest
    total = sum(together.values())
    result = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("onnxruntime", "ray")},
        "model": {
            "hidden": manifest.model.hidden_size,
            "precision": manifest.precision,
            "layers": [stage.layers for stage in manifest.stages],
        },
        "files MiB": [round(manifest.files[stage.weights].bytes / 2**20, 1) for stage in manifest.stages],
        "MiB": {"whole": together, "stages": stages},
        "share of the whole": [round(sum(stage.values()) / total, 3) for stage in stages],
    }
    text = json.dumps(result, indent=2) + "\n"
    click.echo(text)
    if out is not None:
        out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
