"""Building a TensorRT engine from an ONNX graph: options, refusals, and the process that builds.

The builder runs in its own process (``engine_worker``), for three reasons. A failed assertion of the parser ends only
this process. An interrupt can end it at once. Its memory is measured separately.

Two builds of one graph have the same size but not always the same bytes (TensorRT-RTX 1.7): the builder orders
the cache tensors by their addresses in memory, and its threads share the heap. Neither one thread nor addresses
that are not randomised made ten builds equal.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glm4_exporters.config import Glm4Config
from glm4_exporters.targets import PRECISIONS
from glm4_plugins.launch import KernelShape, choices, unsupported
from glm4_plugins.operator import OP_TYPE, PLUGIN_INT8
from glm4_runtime.bundle import ENGINE, EngineProfile, FileEntry, Limits, TensorSpec
from glm4_runtime.errors import ExportError
from glm4_runtime.install import install_command
from glm4_runtime.progress import Progress, silent

LAYOUTS = ("shared", "split")
ATTENTIONS = ("plugin", "plugin-small", "native")
SMALL_TILES = "plugin-small"
PLUGIN_MODULE = "glm4_plugins.tensorrt"
# Above this capacity TensorRT-RTX 1.7 has no attention kernel for exactly one query: 20480 built and 24576 did
# not, for 4 to 48 heads of 64 and 128. For one or two queries it takes the kernel of the prefill, at any capacity.
ONE_QUERY_CAPACITY = 16384
CAPACITY_STEP = 64  # positions; keeps each row of a cache a multiple of 256 bytes, which TensorRT requires
PREFILL_WIDTH = 512  # most new positions of one run
LOGITS_WIDTH = 128  # most positions of one run that get logits: 151552 of them in float32 take 78 MB
SAMPLE_SECONDS = 0.05
COMPUTE_CAPABILITY_ATTRIBUTES = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
PROCESSORS_ATTRIBUTE = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


@dataclass(frozen=True)
class EngineKind:
    """One of the two TensorRTs.

    Attributes:
        capabilities: compute capabilities that it can build for; empty if it builds for the GPU of this machine.
        default: capabilities that an engine runs on if none is named; also all later ones.
        times: whether it times kernels during a build. This needs a GPU, and makes a timing cache useful.
        attention: possible ways to run attention, the default first.
        index: text after "install PACKAGE", if its libraries are not on the public index.
    """

    module: str
    package: str
    capabilities: tuple[str, ...]
    default: tuple[str, ...]
    times: bool
    attention: tuple[str, ...]
    index: str = ""


ENGINE_KINDS = {
    "tensorrt-rtx": EngineKind(
        "tensorrt_rtx",
        "tensorrt-rtx",
        ("75", "80", "86", "89", "120", "121"),
        ("80", "86", "89", "120"),
        times=False,
        attention=("native",),  # it has no plugins, and an unknown node ends the process
    ),
    "tensorrt": EngineKind(
        "tensorrt",
        "tensorrt",
        (),
        (),
        times=True,
        attention=ATTENTIONS,
        index=" with NVIDIA's package index as --extra-index-url (docs/tensorrt.md)",
    ),
}

# What to use on a GPU that TensorRT-RTX does not support, such as 9.0 and 10.0.
ELSEWHERE = "Other GPUs run --target tensorrt, exported on them, or --target ort --precision fp16"

# The layer that the parser makes from an operator. The parser drops some inputs and nodes silently, so we count.
LAYERS_OF_OPERATORS = {
    "TensorScatter": "KV_CACHE_UPDATE",
    "Attention": "ATTENTION_INPUT",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    "MatMul": "MATRIX_MULTIPLY",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    OP_TYPE: "PLUGIN_V3",
}


@dataclass(frozen=True)
class EngineOptions:
    """A user's options for an engine. Every field except ``timing_cache`` changes the engine.

    Attributes:
        sm: compute capabilities to build for, such as 89 for 8.9; empty for the default.
        layout: ``shared`` or ``split``, see :class:`~glm4_runtime.bundle.EngineInfo`.
        attention: ``plugin``, ``plugin-small`` (blocks with less than 48 KiB of shared memory) or ``native``; None
        for the default.
        timing_cache: a file that is read if it exists, and written after the build.
        keep_onnx: leave the graph and the weights that the engine was built from in the bundle.
    """

    sm: tuple[str, ...] = ()
    layout: str = "shared"
    attention: str | None = None
    timing_cache: str | None = None
    keep_onnx: bool = False


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
        kernels: per profile, the built engine's layers by type, those of attention by the kernel's name.
        peak_rss_bytes: of the process, with the mapped weights; ``peak_anonymous_bytes`` is without them.
        warnings: problems that did not stop the build, one line each.
    """

    files: Mapping[str, FileEntry]
    layers: Mapping[str, int]
    float32: Mapping[str, int]
    capabilities: tuple[str, ...]
    kernels: Mapping[str, Mapping[str, int]]
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    warnings: tuple[str, ...] = ()


def require_engine(
    kind_name: str | None, target: str, precision: str, task: str, options: EngineOptions
) -> None:
    """Refuse impossible engines before any work.

    Raises:
        ExportError: engine options without an engine, an unknown or too old GPU, or a TensorRT, GPU or
            library that is missing here.
    """
    if kind_name is None:
        given = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default]
        if given:
            raise ExportError(
                f"target {target} builds no engine, so {', '.join(given)} cannot be used; "
                f"leave it out, or take one of the targets {', '.join(ENGINE_KINDS)}"
            )
        return
    kind = ENGINE_KINDS[kind_name]
    if options.layout not in LAYOUTS:
        raise ExportError(f"unknown engine layout {options.layout!r}; the layouts are {', '.join(LAYOUTS)}")
    if options.attention not in (None, *kind.attention):
        raise ExportError(
            f"{kind_name} has no attention {options.attention!r}; it has {', '.join(kind.attention)}"
        )
    if options.attention in ("plugin", SMALL_TILES) and task != "causal-lm":
        raise ExportError(
            f"the attention plugin needs a KV cache, but task {task} has none; leave --attention out"
        )
    _require_capabilities(kind_name, precision, options.sm)
    if options.timing_cache is not None and not kind.times:
        raise ExportError(
            f"{kind_name} times no kernels while it builds, so a timing cache would do nothing; leave it out"
        )
    by_plugin = engine_attention(kind_name, task, options) == "plugin"  # Triton compiles its kernels
    for module in (*["triton"] * by_plugin, kind.module, "polygraphy"):
        if find_spec(module) is None:
            raise ExportError(
                f"{module} is not installed, which target {target} needs; "
                f"run {install_command(kind_name)}{kind.index}"
            )
    if kind.times:
        _require_builder(kind)
        _require_gpu(target, precision)


def _require_capabilities(kind_name: str, precision: str, asked: Sequence[str]) -> None:
    known = ENGINE_KINDS[kind_name].capabilities
    if asked and not known:
        raise ExportError(f"{kind_name} builds for the GPU of this machine; leave --sm out")
    for sm in asked:
        if sm not in known:
            raise ExportError(
                f"{kind_name} has no compute capability {sm!r}; it builds for {', '.join(known)} (89 means 8.9). "
                f"{ELSEWHERE}"
            )
        if int(sm) < PRECISIONS[precision].capability:
            raise ExportError(
                f"{precision} needs compute capability {PRECISIONS[precision].capability} or newer in {kind_name}, "
                f"not {sm}; leave {sm} out, or take another precision"
            )


def _require_builder(kind: EngineKind) -> None:
    """Try to create a builder: the package on the public index may be a stub without libraries."""
    probe = f"import {kind.module}; {kind.module}.Builder({kind.module}.Logger())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExportError(
            f"{kind.package} is installed but has no builder that starts here ({reason}); "
            f"install it again on a GPU host{kind.index}, or export for tensorrt-rtx"
        )


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, such as 89 for 8.9; None without a GPU."""
    numbers = _gpu_attributes(*COMPUTE_CAPABILITY_ATTRIBUTES)
    return None if numbers is None else "".join(map(str, numbers))


def gpu_processors() -> int | None:
    """Number of streaming multiprocessors of the first GPU; None without a GPU."""
    numbers = _gpu_attributes(PROCESSORS_ATTRIBUTE)
    return None if numbers is None else numbers[0]


def gpu_identity() -> dict[str, str | int | None] | None:
    """The facts about the first GPU that decide an engine built on it; None without a GPU.

    Model, compute capability and processors. GPUs with equal facts run each other's engines at the timed speed.
    """
    driver = _driver()
    name = ctypes.create_string_buffer(256)
    if driver is None or driver.cuDeviceGetName(name, len(name), 0) != 0:
        return None
    model = name.value.decode("utf-8", "replace")
    return {"model": model, "capability": gpu_capability(), "processors": gpu_processors()}


def _driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, initialised; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _gpu_attributes(*attributes: int) -> tuple[int, ...] | None:
    """Attributes of the first GPU from the driver; None without a GPU."""
    numbers = [ctypes.c_int(0) for _ in attributes]
    driver = _driver()
    if driver is None:
        return None
    for number, attribute in zip(numbers, attributes, strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0) != 0:
            return None
    return tuple(number.value for number in numbers)


def _require_gpu(target: str, precision: str) -> None:
    found = gpu_capability()
    if found is None:
        raise ExportError(
            f"target {target} times kernels on a GPU while it builds, and there is none here; "
            "run the export on a GPU host, or export for tensorrt-rtx, which needs none"
        )
    if int(found) < PRECISIONS[precision].capability:
        raise ExportError(
            f"{precision} needs compute capability {PRECISIONS[precision].capability} or newer, and this GPU has {found}; "
            "take another precision, or another GPU"
        )


def require_plugin(config: Glm4Config, activations: str, max_batch: int, capability: str) -> None:
    """Refuse what our attention plugin has no kernel for.

    Raises:
        ExportError: the model's heads, or the GPU.
    """
    name = {"float16": "fp16", "bfloat16": "bf16"}.get(activations, activations)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    refusal = unsupported(KernelShape(*heads, config.scale, max_batch, name), config.rotary_dim)
    try:
        choices(int(capability))
    except ValueError as error:
        refusal = refusal or str(error)
    if refusal:
        raise ExportError(
            f"there is no attention plugin for this model here: {refusal}; use --attention native"
        )


def engine_version(kind_name: str) -> str:
    """Version of the installed builder, without importing the builder."""
    kind = ENGINE_KINDS[kind_name]
    try:
        return version(kind.package)
    except PackageNotFoundError:
        raise ExportError(
            f"{kind_name} is not installed, which target {kind_name} needs; "
            f"run {install_command(kind_name)}{kind.index}"
        ) from None


def engine_capabilities(
    kind_name: str, precision: str, options: EngineOptions
) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Capabilities to pass to the builder (empty: its default), those that the engine runs on, and whether later ones
    work too."""
    kind = ENGINE_KINDS[kind_name]
    if options.sm:
        chosen = tuple(sorted(set(options.sm), key=int))
        return chosen, chosen, False
    able = tuple(sm for sm in kind.default if int(sm) >= PRECISIONS[precision].capability)
    if able == kind.default:
        return (), able, bool(able)
    return able, able, False


def engine_attention(kind_name: str, task: str, options: EngineOptions) -> str:
    """The engine's attention; ``native`` for a task without a cache."""
    if options.attention == SMALL_TILES:
        return "plugin"
    return options.attention or (ENGINE_KINDS[kind_name].attention[0] if task == "causal-lm" else "native")


def plugin_phases(layout: str) -> tuple[str, ...]:
    """The phases of the plugin's kernels: one kernel for both profiles, or one each."""
    return ("prefill", "decode") if layout == "split" else ("shared",)


def engine_capacity(max_seq_len: int) -> int:
    """Positions of the cache, which TensorRT takes as a constant."""
    return -(-max_seq_len // CAPACITY_STEP) * CAPACITY_STEP


def engine_profiles(
    task: str, limits: Limits, layout: str, attention: str = "native"
) -> tuple[EngineProfile, ...]:
    """The profiles: one sequence of many positions, and for a decoder one position of many sequences.

    A prefill always has batch 1; its cache is the row of one sequence.
    """
    width, rows = min(PREFILL_WIDTH, limits.max_seq_len), limits.max_batch_size
    one = (1, 1, 1)
    short = engine_capacity(limits.max_seq_len) <= ONE_QUERY_CAPACITY
    step = one if short or attention == "plugin" else (1, 1, 2)
    if task != "causal-lm":
        whole = limits.max_seq_len
        return (EngineProfile("encode", ENGINE, 0, {"batch": one, "sequence": (1, width, whole)}),)
    prefill = {"batch": one, "sequence": (1, width, width), "positions": (1, 1, min(LOGITS_WIDTH, width))}
    decode = {"batch": (1, rows, rows), "sequence": step, "positions": one}
    names = {"prefill": prefill, "decode": decode}
    if layout == "split":
        return tuple(EngineProfile(name, f"{name}.engine", 0, axes) for name, axes in names.items())
    return tuple(EngineProfile(name, ENGINE, i, axes) for i, (name, axes) in enumerate(names.items()))


def expected_layers(
    operators: Mapping[str, str], num_layers: int, has_cache: bool, attention: str
) -> dict[str, int]:
    """Layers that the parsed network must have, from the model and from the operators of the graph.

    Raises:
        ExportError: the graph lacks operators that the model has.
    """
    if attention == "plugin":
        model = {OP_TYPE: num_layers}
    else:
        model = {"Attention": num_layers, "RotaryEmbedding": 2 * num_layers}
        model["TensorScatter"] = 2 * num_layers if has_cache else 0
    found = Counter(OP_TYPE if name == PLUGIN_INT8 else name for name in operators.values())
    for name, count in model.items():
        if found[name] != count:
            raise ExportError(
                f"the graph has {found[name]} {name} where the model has {count}; no engine is built from it"
            )
    return {layer: found[name] for name, layer in LAYERS_OF_OPERATORS.items()}


def build_engine(folder: Path, plan: EnginePlan, progress: Progress = silent) -> BuiltEngine:
    """Build the engine files of ``plan`` in ``folder``, where its graph lies.

    Raises:
        ExportError: the message of the parser, the network check or the builder, in one line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "glm4_exporters.engine_worker"],
        cwd=folder,
        env=_environment(plan.kind),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # an interrupt reaches only the export, which then ends the builder
    )
    try:
        return _follow(process, plan, progress)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


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
    )


def _environment(kind: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONWARNINGS": "ignore",
        "POLYGRAPHY_USE_TENSORRT_RTX": str(int(kind == "tensorrt-rtx")),
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
