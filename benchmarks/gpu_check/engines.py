"""Whole models on the GPU: engines of whichever TensorRT is there, and the ``ort`` bundle on the CUDA provider.

Each is exported from one random checkpoint of the 9B's widths, made on the device, held against the eager model
on the same device, and timed through the session that serves it.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.make_checkpoint import SIZES, Size, config_of, split_into_shards
from glm4_deploy.memory import available_memory
from glm4_deploy.metrics import Logits, kl_divergence
from glm4_deploy.thresholds import PARITY
from glm4_exporters.architecture import expected_tensors, parameter_count
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.task_models import load_model
from glm4_runtime import Session

POSITIONS = 8192  # of a slot
PREFILLS = (512, 2048, 8000)
CONTEXT, STEPS = 1024, 32  # positions before the first decode step that is timed, and how many steps are
PARITY_TOKENS, PARITY_STEPS = 600, 8  # more than one chunk of a prefill
SHARD_BYTES = 4 << 30
CALIBRATION = "calibration.ids"
# Largest mean KL against the eager model in float32: twice parity's limit, which is for the graph alone.
LARGEST_KL = {name: 2 * limits["mean_kl"] for name, limits in PARITY.items() if "mean_kl" in limits}


@dataclass(frozen=True)
class Candidate:
    """A bundle to try: what it is exported as, what must be installed, and the provider that runs it."""

    target: str
    precision: str
    module: str
    provider: str | None = None

    @property
    def name(self) -> str:
        return f"{self.target} {self.precision}"


PRECISIONS = ("fp16", "int8", "int4", "fp8")
CANDIDATES = (
    *(Candidate("tensorrt-rtx", precision, "tensorrt_rtx") for precision in PRECISIONS),
    *(Candidate("tensorrt", precision, "tensorrt") for precision in PRECISIONS),
    *(
        Candidate("ort", precision, "onnxruntime", "CUDAExecutionProvider")
        for precision in ("fp16", "int8", "int4")
    ),
)


def layers_that_fit(size: Size, gpu_bytes: int, disk_bytes: int, host_bytes: int) -> int:
    """How many of a model's layers can be exported and run here, beside the vocabulary.

    On the GPU lie the eager model in float32 and, later, an engine; on the disk the checkpoint, the ONNX weights and
    the engine, in two bytes a number; the builder holds an engine and its mapped weights in the host's memory.
    """
    whole, less = (parameter_count(Glm4Config.from_dict(config_of(size, n))) for n in (2, 1))
    layer = whole - less
    rest = less - layer
    room = min(0.8 * gpu_bytes / 4, 0.9 * disk_bytes / 6, 0.8 * host_bytes / 5)
    return max(0, min(size.layers, int((room - rest) // layer)))


def write_checkpoint(folder: Path, config: dict[str, Any], device: str) -> None:
    """A random checkpoint under which activations keep their size; numbers are drawn on ``device``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shapes = expected_tensors(Glm4Config.from_dict(config), "causal-lm")
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(split_into_shards(shapes, SHARD_BYTES)):
        file = f"model-{i:05}.safetensors"
        save_file({name: _random(name, shapes[name], generator, device) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    if "norm" in name:
        drawn = 1 + 0.1 * drawn
    elif name.endswith("bias"):
        drawn = 0.2 * drawn
    elif "embed_tokens" not in name:
        drawn = drawn * shape[1] ** -0.5
    return drawn.cpu()


def reference_logits(model: nn.Module, tokens: Sequence[int], device: str) -> Logits:
    """Logits after the last positions of ``tokens``, of which the first prefill and the others are steps."""
    with torch.inference_mode():
        ids = torch.tensor([tokens], device=device)
        logits: Logits = model(ids, logits_to_keep=PARITY_STEPS + 1).logits[0].float().cpu().numpy()
    return logits


def parity_tokens(vocab: int) -> list[int]:
    return np.random.default_rng(0).integers(0, vocab, PARITY_TOKENS + PARITY_STEPS).tolist()


def parity(session: Session, tokens: Sequence[int], expected: Logits) -> dict[str, float]:
    """Prefill in one slot and step on; against the eager model's logits at the same positions."""
    rows = [session.prefill(0, tokens[:-PARITY_STEPS])[-1]]
    rows += [session.decode({0: token})[0] for token in tokens[-PARITY_STEPS:]]
    session.release(0)
    found = np.stack(rows)
    return {
        "mean_kl": float(kl_divergence(expected, found).mean()),
        "top1": float((expected.argmax(-1) == found.argmax(-1)).mean()),
        "max_abs_error": float(np.abs(found - expected).max()),
    }


def seconds(run: Any, repeats: int) -> float:
    """Median wall time, after two runs that compile and capture."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        run()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def prefill_seconds(session: Session, length: int) -> float:
    tokens = np.random.default_rng(1).integers(0, session.manifest.model.vocab_size, length).tolist()

    def run() -> None:
        session.prefill(0, tokens)
        session.release(0)

    return seconds(run, 5)


def decode_seconds(session: Session, batch: int, context: int = CONTEXT, steps: int = STEPS) -> float:
    """A step of ``batch`` slots, each of ``context`` positions and more; the logits' way to the host included."""
    tokens = np.random.default_rng(2).integers(0, session.manifest.model.vocab_size, context).tolist()
    for slot in range(batch):
        session.prefill(slot, tokens)
    result = seconds(lambda: session.decode_block(dict.fromkeys(range(batch), 5)), steps)
    for slot in range(batch):
        session.release(slot)
    return result


def bytes_read(session: Session, weight_bytes: int, batch: int, context: int) -> int:
    """By a decode step: every weight but the embedding, and the cache."""
    model = session.manifest.model
    cache = batch * context * model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2
    return weight_bytes + cache


def measured(session: Session, weight_bytes: int, bandwidth: float | None) -> dict[str, Any]:
    """Times of prefills and of decode steps, and what share of the copy bandwidth a step has."""
    room, batches = session.max_seq_len, [n for n in (1, 8) if n <= session.max_batch_size]
    context, steps = min(CONTEXT, room // 2), min(STEPS, room // 4)
    record: dict[str, Any] = {"prefill_seconds": {}, "decode_seconds": {}, "of_copy_bandwidth": {}}
    for length in sorted({min(n, room) for n in PREFILLS}):
        record["prefill_seconds"][str(length)] = prefill_seconds(session, length)
    for batch in batches:
        step = decode_seconds(session, batch, context, steps)
        record["decode_seconds"][str(batch)] = step
        if bandwidth is not None:
            read = bytes_read(session, weight_bytes, batch, context)
            record["of_copy_bandwidth"][str(batch)] = read / step / bandwidth
    return record


def weight_bytes_of(folder: Path) -> int:
    """Size of what the bundle's weights were written as, without the table that a step looks few rows up in."""
    from glm4_runtime.bundle import WEIGHTS, read_manifest

    manifest = read_manifest(folder)
    entry = manifest.engine.built_from[WEIGHTS] if manifest.engine is not None else manifest.files[WEIGHTS]
    table = manifest.model.vocab_size * manifest.model.hidden_size
    return entry.bytes - table * (1 if manifest.tensor_precisions["embedding"].startswith("int8") else 2)


@contextmanager
def checkpoint_of(size: Size, folder: Path | None, most: int | None) -> Iterator[tuple[Path, int]]:
    """A random checkpoint in a folder that goes away, and its layers: as many as fit, at most ``most``.

    Raises:
        RuntimeError: there is not the room for one layer.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        free_gpu = torch.cuda.mem_get_info()[0]
        layers = layers_that_fit(size, free_gpu, shutil.disk_usage(name).free, available_memory())
        layers = min(layers, most or layers)
        if layers == 0:
            raise RuntimeError("there is no room for one layer of the 9B: see layers_that_fit")
        write_checkpoint(Path(name, "checkpoint"), config_of(size, layers), "cuda")
        yield Path(name), layers


def run_candidate(
    candidate: Candidate, folder: Path, tokens: Sequence[int], expected: Logits, bandwidth: float
) -> dict[str, Any]:
    """Export, open, compare and time one bundle; its files go away afterwards."""
    from glm4_deploy.pipeline import ExportOptions, export

    bundle = folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    options = ExportOptions(
        target=candidate.target,
        precision=candidate.precision,
        max_seq_len=POSITIONS,
        parity=False,
        activations=None if candidate.precision == "fp16" else "fp16",
        calibration=str(folder / CALIBRATION) if candidate.precision == "fp8" else None,
    )
    result = export(folder / "checkpoint", bundle, options)
    with Session.open(bundle, provider=candidate.provider) as session:
        record = {"provider": session.provider, "export_seconds": result.seconds}
        record |= {"parity": parity(session, tokens, expected)}
        record |= measured(session, weight_bytes_of(bundle), bandwidth)
    record["ok"] = record["parity"]["mean_kl"] <= LARGEST_KL[candidate.precision]
    shutil.rmtree(bundle)
    return record


class WholeModels:
    """Candidates run one by one on one checkpoint, which is made when the first of them needs it.

    Args:
        folder: has room for a checkpoint, its ONNX and its engine.
        most: layers at most; as many as fit where None.
    """

    def __init__(self, folder: Path | None, most: int | None) -> None:
        self._folder, self._most, self._closing = folder, most, ExitStack()
        self._made: tuple[Path, int, list[int], Logits] | None = None

    def run(self, candidate: Candidate, bandwidth: float) -> dict[str, Any]:
        """Export, open, compare and time one candidate."""
        if self._made is None:
            self._made = self._make()
        where, layers, tokens, expected = self._made
        record = run_candidate(candidate, where, tokens, expected, bandwidth)
        return {"bundle": candidate.name, "layers": layers} | record

    def _make(self) -> tuple[Path, int, list[int], Logits]:
        where, layers = self._closing.enter_context(checkpoint_of(SIZES["9b"], self._folder, self._most))
        tokens = parity_tokens(config_vocab(where / "checkpoint"))
        expected = eager_logits(where / "checkpoint", tokens, "cuda")
        (where / CALIBRATION).write_text(" ".join(map(str, tokens)))
        return where, layers, tokens, expected

    def close(self) -> None:
        self._closing.close()


def why_absent(candidate: Candidate) -> str | None:
    """What this host lacks for a candidate."""
    if find_spec(candidate.module) is None:
        return f"{candidate.module} is not installed"
    if candidate.provider is not None:
        import onnxruntime

        if candidate.provider not in onnxruntime.get_available_providers():
            return f"the installed {candidate.module} has no {candidate.provider}"
    return None


def config_vocab(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "config.json").read_text())["vocab_size"])


def eager_logits(checkpoint: Path, tokens: Sequence[int], device: str) -> Logits:
    """The reference in float32 on the device, gone from its memory afterwards."""
    with Checkpoint.load(checkpoint) as source:
        model = load_model(source, device)
        expected = reference_logits(model, tokens, device)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return expected
