"""Refusals of impossible engines, before any work."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from glm4_exporters.config import Glm4Config
from glm4_exporters.engine.gpu import gpu_capability
from glm4_exporters.engine.kinds import ENGINE_KINDS, EngineKind
from glm4_exporters.engine.options import ENGINE_LAYOUTS, SMALL_TILES, EngineOptions, engine_attention
from glm4_exporters.form import Form
from glm4_exporters.targets import PRECISIONS
from glm4_plugins.launch import QUANTIZED, KernelShape, choices, unsupported
from glm4_runtime.bundle.element_types import QUANTIZED_CACHES
from glm4_runtime.errors import ExportError
from glm4_runtime.install import install_command

# Advice for a GPU that TensorRT-RTX does not support, such as 9.0 and 10.0.
OTHER_GPUS = "Other GPUs run --target tensorrt, exported on them, or --target ort --precision fp16"


def require_engine(
    kind_name: str | None, target: str, precision: str, task: str, options: EngineOptions
) -> None:
    """Refuse impossible engines before any work.

    Raises:
        ExportError: engine options without an engine, an unknown or too old GPU, or a TensorRT, GPU or
            library that is missing here.
    """
    if kind_name is None:
        _require_no_options(target, options)
        return
    kind = ENGINE_KINDS[kind_name]
    _require_layout_and_attention(kind_name, task, options)
    _require_capabilities(kind_name, precision, options.sm)
    if options.timing_cache is not None and not kind.times:
        raise ExportError(
            f"{kind_name} times no kernels while it builds, so a timing cache would do nothing; leave it out"
        )
    by_plugin = engine_attention(kind_name, task, options) == "plugin"  # Triton compiles its kernels
    _require_installed(kind_name, target, (*["triton"] * by_plugin, kind.module, "polygraphy"))
    if kind.times:
        _require_builder(kind)
        _require_gpu(target, precision)


def _require_no_options(target: str, options: EngineOptions) -> None:
    given = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default]
    if given:
        raise ExportError(
            f"target {target} builds no engine, so {', '.join(given)} cannot be used; "
            f"leave it out, or take one of the targets {', '.join(ENGINE_KINDS)}"
        )


def _require_layout_and_attention(kind_name: str, task: str, options: EngineOptions) -> None:
    attentions = ENGINE_KINDS[kind_name].attention
    if options.layout not in ENGINE_LAYOUTS:
        raise ExportError(
            f"unknown engine layout {options.layout!r}; the layouts are {', '.join(ENGINE_LAYOUTS)}"
        )
    if options.attention not in (None, *attentions):
        raise ExportError(
            f"{kind_name} has no attention {options.attention!r}; it has {', '.join(attentions)}"
        )
    if options.attention in ("plugin", SMALL_TILES) and task != "causal-lm":
        raise ExportError(
            f"the attention plugin needs a KV cache, but task {task} has none; leave --attention out"
        )


def _require_installed(kind_name: str, target: str, modules: Sequence[str]) -> None:
    for module in modules:
        if find_spec(module) is None:
            raise ExportError(
                f"{module} is not installed, which target {target} needs; "
                f"run {install_command(kind_name)}{ENGINE_KINDS[kind_name].index}"
            )


def _require_capabilities(kind_name: str, precision: str, asked: Sequence[str]) -> None:
    known = ENGINE_KINDS[kind_name].capabilities
    if asked and not known:
        raise ExportError(f"{kind_name} builds for the GPU of this machine; leave --sm out")
    for sm in asked:
        if sm not in known:
            raise ExportError(
                f"{kind_name} has no compute capability {sm!r}; it builds for {', '.join(known)} (89 means 8.9). "
                f"{OTHER_GPUS}"
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


def require_plugin(config: Glm4Config, form: Form, max_batch: int, capability: str) -> None:
    """Refuse a model, a cache or a GPU for which our attention plugin has no kernel.

    Raises:
        ExportError: the model's heads, or the GPU.
    """
    name = {"float16": "fp16", "bfloat16": "bf16"}.get(form.activations, form.activations)
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
    cache = QUANTIZED_CACHES.get(str(form.kv_cache))
    if cache is not None and int(capability) < QUANTIZED[cache][1]:
        raise ExportError(
            f"the KV cache cannot be {cache}: this needs compute capability {QUANTIZED[cache][1]} or newer, and this "
            f"GPU has {capability}; use --kv-cache int8"
        )
