"""Who takes part: the table of peers, and one contender's files and process."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from glm4_exporters.peak_memory import peak_memory
from glm4_runtime.bundle import REPORT

ROOT = Path(__file__).parents[2]
CONVERTED = "converted.json"
PATIENCE = 900.0  # seconds for one answer


@dataclass(frozen=True)
class Cap:
    """How a runtime is limited to an instruction set: by variables, or by an environment compiled for the set."""

    variables: Mapping[str, str] = field(default_factory=dict)
    environment: str = ""


@dataclass(frozen=True)
class Peer:
    """A runtime: the module that drives it, the environment that ``setup.sh`` made, and what a reader must know."""

    module: str
    environment: str
    packages: tuple[str, ...]
    note: str = ""
    caps: Mapping[str, Cap] = field(default_factory=dict)


PEERS = {
    "llama.cpp": Peer(
        "llama_cpp",
        "llama-cpp",
        ("llama-cpp-python",),
        "flash attention, ubatch 512",
        {"avx2": Cap(environment="llama-cpp-avx2")},
    ),
    "openvino": Peer(
        "openvino",
        "openvino",
        ("openvino", "optimum-intel", "nncf"),
        caps={"avx2": Cap({"ONEDNN_MAX_CPU_ISA": "AVX2"})},
    ),
    "ort-genai": Peer(
        "ort_genai",
        "onnxruntime",
        ("onnxruntime-genai", "onnxruntime"),
        "a Qwen2 of the same matrices, without the norms after sub-blocks; blocks of 128, embeddings in float32",
    ),
    "transformers": Peer("eager", "onnxruntime", ("transformers", "torch"), "eager"),
}
OURS = Peer("ours", "", ("onnxruntime",), caps={"avx2": Cap({"GLM4_CPU_KERNELS": "avx2"})})


class ContenderError(Exception):
    """A contender that could not be made, or that failed; the others go on."""


def cap_of(peer: Peer, cap: str, name: str) -> Cap:
    if cap and cap not in peer.caps:
        raise ContenderError(f"{name} cannot be limited to {cap}")
    return peer.caps[cap] if cap else Cap()


@dataclass(frozen=True)
class Contender:
    """``name`` is PEER:FORMAT or PEER:FORMAT+SETTING for a peer; a bundle's own for ours."""

    name: str
    peer: Peer
    python: Path
    folder: Path
    format: str = ""
    setting: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_name(cls, name: str, environments: Path, models: Path, cap: str = "") -> "Contender":
        kind, _, rest = name.partition(":")
        form, _, setting = rest.partition("+")
        if kind not in PEERS or not form:
            known = ", ".join(f"{peer}:FORMAT" for peer in PEERS)
            raise ContenderError(f"{name!r} names no peer; those known are {known}, each with +SETTING")
        limit = cap_of(PEERS[kind], cap, name)
        python = environments / (limit.environment or PEERS[kind].environment) / "bin" / "python"
        return cls(name, PEERS[kind], python, models / f"{kind}-{form}", form, setting, limit.variables)

    def convert(self, checkpoint: Path, log: Path) -> None:
        """Make the peer's files, unless they are there; how long it took is kept beside them."""
        done = self.folder / CONVERTED
        if done.is_file():
            return
        if not self.python.is_file():
            raise ContenderError(f"there is no {self.python}; run benchmarks/peers/setup.sh")
        shutil.rmtree(self.folder, ignore_errors=True)  # what an earlier attempt left
        self.folder.mkdir(parents=True)
        start = time.perf_counter()
        arguments = [self.peer.module, "convert", checkpoint.resolve(), self.folder.resolve(), self.format]
        command = [self.python, "-m", "benchmarks.peers.worker", *arguments]
        with log.open("a") as stream:
            ended = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, check=False).returncode
        if ended:
            raise ContenderError(f"conversion ended with {ended}; see {log}")
        done.write_text(json.dumps({"seconds": round(time.perf_counter() - start, 1)}))

    def conversion_seconds(self) -> float | None:
        """Of a peer's conversion, or of our export with its parity; None where nothing says."""
        for made, total in ((CONVERTED, float), (REPORT, lambda stages: sum(stages.values()))):
            if (self.folder / made).is_file():
                return total(json.loads((self.folder / made).read_text())["seconds"])
        return None

    def versions(self) -> dict[str, str]:
        code = "import sys, json; from importlib.metadata import version as v; print(json.dumps({n: v(n) for n in sys.argv[1:]}))"
        said = subprocess.run(
            [self.python, "-c", code, *self.peer.packages], capture_output=True, text=True, check=False
        )
        found: dict[str, str] = json.loads(said.stdout) if said.returncode == 0 else {}
        return found

    def warm(self) -> None:
        """Read the files once, so that no contender loads from the disk."""
        for file in sorted(self.folder.iterdir()):
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def busy_seconds() -> float:
    """Processor time that was not idle since the machine began, stolen time included."""
    user, nice, system, _idle, _waiting, *interrupts = (
        int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


class Process:
    """A contender's process, loaded: ask it, and leave."""

    def __init__(self, contender: Contender, threads: int, positions: int, slots: int, log: Path) -> None:
        self._log = log.open("a")
        self._began, self._busy_before = time.monotonic(), busy_seconds()
        places = [str(ROOT / part) for part in (".", "exporters", "runtime", "plugins")]
        serve = [contender.peer.module, "serve", contender.folder.resolve(), contender.format]
        counts = [str(n) for n in (threads, positions, slots)]
        self._process = subprocess.Popen(
            [contender.python, "-m", "benchmarks.peers.worker", *serve, contender.setting, *counts],
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(places)}
            | contender.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def loaded(self) -> float:
        """Seconds from opening to the logits of a first token; imports are left out."""
        return self._answer()

    def ask(self, **what: Any) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def peak_bytes(self) -> int:
        return peak_memory(self._process.pid)

    def cores_of_others(self) -> float:
        """How many cores everything else kept busy, on average since the process began."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        own = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # utime and stime
        busy = busy_seconds() - self._busy_before
        return max(0.0, busy - own) / (time.monotonic() - self._began)

    def _answer(self) -> float:
        assert self._process.stdout is not None
        patience = threading.Timer(PATIENCE, self._process.kill)
        patience.start()
        line = self._process.stdout.readline()
        patience.cancel()
        if not line:
            raise ContenderError(f"the process ended with {self._process.wait()}; see {self._log.name}")
        return float(json.loads(line)["seconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
