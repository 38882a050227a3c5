"""Builds a TensorRT engine from an ONNX graph.

The builder runs in a separate process (``worker``), for three reasons. A failed assertion of the parser ends only this
process. An interrupt can end the builder at once. The builder's memory is measured separately.

Two builds of one graph have the same size but not always the same bytes (TensorRT-RTX 1.7). The builder orders the
cache tensors by their addresses in memory, and its threads share the heap. Ten builds differed even with one thread,
and also with fixed addresses.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm4_exporters.engine.kinds import ENGINE_KINDS
from glm4_runtime.bundle import EngineProfile, FileEntry, TensorSpec, sample_of
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

PLUGIN_MODULE = "glm4_plugins.tensorrt"
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class EnginePlan:
    """The input of the building process, as JSON."""

    kind: str
    graphs: Mapping[str, str]  # by the engine's file
    capabilities: tuple[str, ...]
    profiles: tuple[EngineProfile, ...]
    inputs: tuple[TensorSpec, ...]
    operators: Mapping[str, str]  # by the name of the node
    layers: Mapping[str, int]
    timing_cache: str | None
    plugin: str | None  # the module that registers our plugin


@dataclass(frozen=True)
class BuiltEngine:
    """The result of the building process.

    Attributes:
        capabilities: of the GPU that built the engine, if the engine is for this GPU only.
        layers, float32: as in :class:`~glm4_runtime.bundle.EngineInfo`.
        kernels: per profile, the number of the built engine's layers by type. Attention layers have the kernel's name.
        weights: per profile, the number of the built engine's layers that read weights of 8 bits or less, by type.
        peak_rss_bytes: of the process, with the mapped weights; ``peak_anonymous_bytes`` is without them.
        warnings: problems that did not stop the build, one line each.
        seconds: time of the build.
    """

    files: Mapping[str, FileEntry]
    layers: Mapping[str, int]
    float32: Mapping[str, int]
    capabilities: tuple[str, ...]
    kernels: Mapping[str, Mapping[str, int]]
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    warnings: tuple[str, ...] = ()
    weights: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: float = 0.0


def build_engine(folder: Path, plan: EnginePlan, progress: Progress = silent) -> BuiltEngine:
    """Build the engine files of ``plan`` in ``folder``, where its graph lies.

    Raises:
        ExportError: the message of the parser, the network check or the builder, in one line.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "glm4_exporters.engine.worker"],
        cwd=folder,
        env=_environment(plan.kind),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # an interrupt reaches only the export, which then ends the builder
    )
    try:
        built = _follow(process, plan, progress)
        # the builder's process hashes while it writes, and cannot choose a sample before the end
        files = {name: replace(entry, sample=sample_of(folder / name)) for name, entry in built.files.items()}
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    return replace(built, files=files, seconds=round(time.monotonic() - start, 2))


def _follow(process: "subprocess.Popen[str]", plan: EnginePlan, progress: Progress) -> BuiltEngine:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    noise: list[str] = []
    stderr = process.stderr
    listener = threading.Thread(target=lambda: noise.extend(stderr), daemon=True)
    listener.start()
    with contextlib.suppress(BrokenPipeError):  # it died at once; its message follows
        process.stdin.write(json.dumps(dataclasses.asdict(plan)))
        process.stdin.close()
    answer: dict[str, Any] = {}
    with _memory_of(process.pid) as memory:
        for line in process.stdout:
            message = json.loads(line)
            if "progress" in message:
                progress("build the engine", *message["progress"])
            else:
                answer = message
        process.wait()
    listener.join(timeout=10)
    if "error" in answer:
        raise ExportError(answer["error"])
    if "files" not in answer:
        last = [text.strip() for text in noise if text.strip()][-1:]
        reason = f"signal {-process.returncode}" if process.returncode < 0 else f"exit {process.returncode}"
        raise ExportError(
            f"{plan.kind}'s builder died ({reason}{': ' + last[0] if last else ''}); "
            "where it was killed, the machine needs more memory"
        )
    return BuiltEngine(
        files={name: FileEntry(**entry) for name, entry in answer["files"].items()},
        layers=answer["layers"],
        float32=answer["float32"],
        capabilities=tuple(answer["capabilities"]),
        kernels=answer["kernels"],
        peak_rss_bytes=answer["peak_rss_bytes"],
        peak_anonymous_bytes=memory[0],
        warnings=tuple(answer["warnings"]),
        weights=answer["weights"],
    )


def _environment(kind: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONWARNINGS": "ignore",
        "POLYGRAPHY_USE_TENSORRT_RTX": str(int(ENGINE_KINDS[kind].rtx)),
    }


@contextlib.contextmanager
def _memory_of(pid: int) -> Iterator[list[int]]:
    """Watches a process; the list's one element is the largest anonymous memory seen, in bytes."""
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            with contextlib.suppress(OSError, IndexError, ValueError):
                status = Path(f"/proc/{pid}/status").read_text()
                peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
