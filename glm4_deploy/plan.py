"""The plan of an export: all options are resolved once, before the first step, into one frozen object."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from glm4_exporters.architecture import EMBEDDING, expected_tensors
from glm4_exporters.cache_types import cache_providers, choose_cache
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.engine.checks import require_engine, require_plugin
from glm4_exporters.engine.gpu import gpu_capability, gpu_processors
from glm4_exporters.engine.kinds import ENGINE_KINDS
from glm4_exporters.engine.options import (
    SMALL_TILES,
    EngineOptions,
    engine_attention,
    engine_capabilities,
    plugin_phases,
)
from glm4_exporters.engine.profiles import engine_capacity
from glm4_exporters.form import Form, choose_form
from glm4_exporters.quantize.recipe import read_recipe
from glm4_exporters.sources.fitting import keep_form
from glm4_exporters.sources.inputs import brought_scales
from glm4_exporters.stages import stage_list
from glm4_exporters.targets import RECIPE_FORMATS
from glm4_runtime.adapters.base_model import released_name
from glm4_runtime.bundle import AdapterInfo, AdapterSlots, Limits, StageInfo
from glm4_runtime.bundle.manifest_checks import MOST_ADAPTERS, MOST_RANK
from glm4_runtime.errors import ExportError

DEFAULT_RANK = 64
CPU_PROVIDER = "CPUExecutionProvider"
DEFAULT_TARGET, DEFAULT_PRECISION, DEFAULT_BATCH = "ort", "int8", 8


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export. Every field except ``parity`` changes the bundle and its cache key."""

    target: str = DEFAULT_TARGET
    precision: str | None = None  # None: the checkpoint's own quantization, else int8
    task: str | None = None  # default: the checkpoint's own
    max_seq_len: int | None = None  # default: the model's positions
    max_batch_size: int = DEFAULT_BATCH
    parity: bool = True
    activations: str | None = None  # of a quantized bundle; default: the target's
    calibration: str | None = None  # a file of text or token ids
    text: str | None = None  # a file of text or token ids to compare on, which the bundle keeps
    recipe: str | None = None  # a file of formats by tensor
    adapters: tuple[tuple[str, float], ...] = ()  # folders of LoRA adapters, and a factor for each
    kv_cache: str = "auto"  # one of KV_CACHES; auto: the target's choice
    lora_slots: int = 0  # number of LoRA adapters that a session can load at run time
    lora_rank: int = DEFAULT_RANK  # maximum rank of such an adapter
    stages: tuple[int, ...] = ()  # the count of stages, or the count of layers of each
    engine: EngineOptions = field(default_factory=EngineOptions)


DEFAULTS = ExportOptions()


@dataclass(frozen=True)
class EngineBuild:
    """How an engine is built.

    Attributes:
        kind: the TensorRT that builds it.
        attention: ``plugin`` or ``native``.
        layout: ``shared`` or ``split``.
        graphs: names of the graphs that engines are built from: one for all profiles, or one each.
        capacity: positions of the cache, a constant in TensorRT.
        capabilities: GPUs to pass to the builder; empty: its default.
        runs_on: the GPUs that the engine runs on; empty: only the GPU of this machine.
        later_gpus: whether it also runs on later GPUs.
        gpu: compute capability of this machine's GPU, such as 89 for 8.9; None without a GPU.
        kv_cache: element type of the engine's cache; None for a task without one.
        processors: the GPU's number of streaming multiprocessors; None without a GPU.
        small_tiles: whether the plugin's blocks stay below 48 KiB of shared memory.
    """

    kind: str
    attention: str
    layout: str
    graphs: tuple[str, ...]
    capacity: int
    capabilities: tuple[str, ...]
    runs_on: tuple[str, ...]
    later_gpus: bool
    gpu: int | None
    kv_cache: str | None
    processors: int | None
    small_tiles: bool
    timing_cache: str | None
    keep_onnx: bool

    @property
    def by_plugin(self) -> bool:
        return self.attention == "plugin"

    @property
    def timed(self) -> bool:
        """Whether the builder times kernels on this machine's GPU, so that the engine depends on this GPU."""
        return ENGINE_KINDS[self.kind].times


@dataclass(frozen=True)
class Plan:
    """One export, with every choice made.

    Attributes:
        config: of the checkpoint.
        options: the user's options with the precision resolved, for the cache key.
        form: how every tensor is stored, and the target's row.
        engine: None if ONNX Runtime runs the bundle.
        adapters: the adapters to merge into the weights.
        slots: the adapters that a session can load at run time; None: no adapters.
        stages: the parts of the model, each with its own graph and weights; empty: one graph.
    """

    config: Glm4Config
    task: str
    options: ExportOptions
    form: Form
    limits: Limits
    engine: EngineBuild | None
    adapters: tuple[AdapterInfo, ...] = ()
    slots: AdapterSlots | None = None
    stages: tuple[StageInfo, ...] = ()

    @property
    def graph_cache(self) -> str | None:
        """Element type of the cache in the graph that parity checks; for an engine, the type of activations."""
        cache = self.form.kv_cache
        return self.form.activations if cache is not None and self.engine is not None else cache

    @property
    def text(self) -> Path | None:
        """The path of the user's text to compare on."""
        return Path(self.options.text) if self.options.text else None

    @property
    def calibration(self) -> Path | None:
        """The path of the user's calibration text."""
        return Path(self.options.calibration) if self.options.calibration else None


def make_plan(source: Checkpoint, options: ExportOptions) -> Plan:
    """Decide everything about the export of a checkpoint.

    Raises:
        ExportError: the options do not fit each other, the model or this machine. The message says which would.
    """
    stages = _stages(source, options)
    kept = options.precision is None and source.source is not None and not source.adapters
    form = _with_cache(source, options, _kept_form(source, options) if kept else _form(source, options))
    options = replace(options, precision=form.precision, stages=tuple(stage.layers for stage in stages))
    if stages and form.target.engine is None:
        _require_cpu_kernels(form)
    if options.calibration is not None and not form.uses_text:
        stored = "kept numbers" if form.kept else form.precision
        raise ExportError(
            f"--calibration changes nothing in a bundle of {stored} with {form.activations} activations; leave it out, "
            "or choose --precision int4, nvfp4, int8-sq or fp8, --activations fp16 or --kv-cache int8"
        )
    _require_limits(source.config, options)
    limits = Limits(options.max_seq_len or source.config.positions, options.max_batch_size)
    engine = _engine(source, options, form, limits)
    adapters = tuple(AdapterInfo(each.name, each.sha256(), each.scale) for each in source.adapters)
    slots = _adapter_slots(source, options, form)
    return Plan(source.config, source.task, options, form, limits, engine, adapters, slots, stages)


def _stages(source: Checkpoint, options: ExportOptions) -> tuple[StageInfo, ...]:
    """The stages of the bundle.

    Raises:
        ExportError: the task or another option does not allow them, or their layers do not fit the model.
    """
    if not options.stages:
        return ()
    reason = None
    if source.task != "causal-lm":
        reason = f"the task is {source.task}; take --task causal-lm"
    elif options.lora_slots:
        reason = (
            "stages take no adapters at run time; leave --lora-slots out, or merge an adapter with --lora"
        )
    if reason is not None:
        raise ExportError(f"a bundle with --stages cannot be made: {reason}")
    return stage_list(source.config, source.task, options.stages)


def _require_cpu_kernels(form: Form) -> None:
    if CPU_PROVIDER not in cache_providers(form.kv_cache, form.target, form.activations):
        raise ExportError(
            f"a bundle with --stages for target {form.target.name} runs on ONNX Runtime's CPU provider alone, which has "
            "no bfloat16 kernels; take fp32 or fp16 for --precision and --activations"
        )


def _form(source: Checkpoint, options: ExportOptions) -> Form:
    recipe = read_recipe(Path(options.recipe), RECIPE_FORMATS) if options.recipe is not None else None
    asked = options.target, options.precision or DEFAULT_PRECISION, options.activations
    form = choose_form(source.config, source.task, *asked, recipe)
    if form.needs_text and options.calibration is None and not brought_scales(source, form.rounded_inputs):
        raise ExportError(
            f"precision {form.precision} needs --calibration FILE (.txt, .jsonl or .ids): its activations' scales "
            "are found on text like that which the model will see"
        )
    return form


def _kept_form(source: Checkpoint, options: ExportOptions) -> Form:
    if options.recipe is not None:
        raise ExportError(
            "the numbers of this checkpoint are kept as they are, so --recipe decides nothing; "
            "leave it out, or say --precision to quantize the values again"
        )
    return keep_form(source, options.target, options.activations)


def _with_cache(source: Checkpoint, options: ExportOptions, form: Form) -> Form:
    kind = form.target.engine
    native = kind is not None and engine_attention(kind, source.task, options.engine) == "native"
    asked_cache = form.activations, options.kv_cache, native
    return form.with_cache(choose_cache(source.config, source.task, form.target, *asked_cache))


def _adapter_slots(source: Checkpoint, options: ExportOptions, form: Form) -> AdapterSlots | None:
    """The adapters that the bundle takes at run time.

    Raises:
        ExportError: the target, the task or the form cannot take adapters.
    """
    if options.lora_slots == 0:
        return None
    for name, value, most in (
        ("slots", options.lora_slots, MOST_ADAPTERS),
        ("rank", options.lora_rank, MOST_RANK),
    ):
        if not 1 <= value <= most:
            raise ExportError(f"--lora-{name} is {value}, but must be 1 ... {most}")
    reason = None
    if form.target.engine is not None:
        reason = f"target {form.target.name} has no products for adapters; take --target cpu, ort or native"
    elif source.task != "causal-lm":
        reason = f"the task is {source.task}; take --task causal-lm"
    elif form.activations == "bfloat16":
        reason = "ONNX Runtime's CPU provider has no bfloat16 kernels; take --activations fp32 or fp16"
    if reason is not None:
        raise ExportError(f"a bundle with --lora-slots cannot be made: {reason}")
    tensors = expected_tensors(source.config, source.task)
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in tensors.items()
        if len(shape) == 2 and name != EMBEDDING
    }
    return AdapterSlots(options.lora_slots, options.lora_rank, matrices, released_name(source.folder))


def _require_limits(config: Glm4Config, options: ExportOptions) -> None:
    length = options.max_seq_len
    if length is not None and not 1 <= length <= config.positions:
        raise ExportError(f"max_seq_len is {length}, but this model has 1 ... {config.positions} positions")
    if options.max_batch_size < 1:
        raise ExportError(f"max_batch_size is {options.max_batch_size}, but must be at least 1")


def _engine(source: Checkpoint, options: ExportOptions, form: Form, limits: Limits) -> EngineBuild | None:
    kind, asked = form.target.engine, options.engine
    require_engine(kind, options.target, form.precision, source.task, asked)
    if kind is None:
        return None
    attention, gpu = engine_attention(kind, source.task, asked), gpu_capability()
    by_plugin = attention == "plugin"
    if by_plugin:
        require_plugin(source.config, form, limits.max_batch_size, gpu or "")
    named, runs_on, later = engine_capabilities(kind, form.precision, asked)
    return EngineBuild(
        kind=kind,
        attention=attention,
        layout=asked.layout,
        graphs=plugin_phases(asked.layout) if by_plugin else ("shared",),
        capacity=engine_capacity(limits.max_seq_len),
        capabilities=named,
        runs_on=runs_on,
        later_gpus=later,
        gpu=None if gpu is None else int(gpu),
        kv_cache=form.kv_cache,
        processors=gpu_processors(),
        small_tiles=asked.attention == SMALL_TILES,
        timing_cache=asked.timing_cache,
        keep_onnx=asked.keep_onnx,
    )
