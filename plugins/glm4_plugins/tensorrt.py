"""The TensorRT plugins of the operator; importing this module registers them.

Three plugins share one kernel: ``glm4::PartialRopeGqaAttention``, and the same name with the suffix ``Int8`` or ``Fp8``.
The latter two have two more inputs, the scales of an int8 or fp8 cache. All are compiled ahead of time: the engine
stores PTX and symbolic launch expressions, and needs neither Python nor Triton to run.

TensorRT chooses a kernel by types and tactic, never by shape. It provides no workspace and zeroes no memory. So
scratch memory is an output (``partials``). Memory that must be zero is an input (``counters``) aliased to an output; the
kernel sets it back to zero. There is one tactic, because TensorRT would time several tactics with arbitrary inputs. The
attribute ``tiles`` gives the block sizes.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import Parameter, Signature
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp

from glm4_plugins.compile import CompiledKernel, compile_kernel
from glm4_plugins.launch import (
    PHASES,
    PLUGIN_ATTRIBUTES,
    PLUGIN_INPUTS,
    PLUGIN_OUTPUTS,
    PLUGIN_SCALES,
    KernelShape,
    Tiles,
    choices,
    grid,
    partials_shape,
    unsupported,
)
from glm4_plugins.operator import DOMAIN, OP_TYPE, PLUGIN_FP8, PLUGIN_INT8

PLUGINS = {
    f"{DOMAIN}::{OP_TYPE}": None,
    f"{DOMAIN}::{PLUGIN_INT8}": "int8",
    f"{DOMAIN}::{PLUGIN_FP8}": "fp8",
}
"""Names of the plugins, with the type of a quantized cache."""

# TensorRT's types: the name in the kernel, and the name for autotune.
_ACTIVATIONS = {trt.DataType.HALF: ("fp16", "FP16"), trt.DataType.BF16: ("bf16", "BF16")}
_TACTIC = 1


class Symbols:
    """:class:`glm4_plugins.launch.Arithmetic` on TensorRT's expressions."""

    def cdiv(self, a: Any, b: Any) -> Any:
        return trtp.cdiv(a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return trtp.min(a, b)

    def less(self, a: Any, b: Any) -> Any:
        return a < b


@lru_cache
def _compiled(shape: KernelShape, tiles: Tiles, capability: int) -> CompiledKernel:
    """The compiled kernel; cached, because all layers of a model share it."""
    return compile_kernel(shape, tiles, capability)


class _Plugin:
    """The three functions of a plugin. Each takes tensors and attributes by name."""

    def __init__(self, cache: str | None) -> None:
        self.quantized_cache, self.cache = cache is not None, cache or "int8"

    def shape_of(self, named: Mapping[str, Any]) -> KernelShape:
        """The kernel's shape for a node.

        Raises:
            ValueError: the kernel does not support it.
        """
        dtype = named["query"].dtype
        phase = {number: name for name, number in PHASES.items()}[named["phase"]]
        shape = KernelShape(
            named["num_heads"],
            named["kv_num_heads"],
            named["head_dim"],
            float(named["scale"].rstrip("\0")),
            named["max_batch"],
            _ACTIVATIONS[dtype][0] if dtype in _ACTIVATIONS else str(dtype),
            self.quantized_cache,
            phase,
            self.cache,
        )
        refusal = unsupported(shape, named["rotary_embedding_dim"], named["compute_capability"])
        if refusal:
            raise ValueError(refusal)
        return shape

    def tiles_of(self, named: Mapping[str, Any]) -> Tiles:
        """The block sizes of the attribute ``tiles``.

        Raises:
            ValueError: there is no such choice.
        """
        found = choices(named["compute_capability"], self.quantized_cache, named["processors"])
        if not -1 <= named["tiles"] < len(found):
            raise ValueError(
                f"tiles is {named['tiles']}; this kernel has {len(found)} choices, 0 the first and -1 the last"
            )
        tiles: Tiles = found[named["tiles"]]
        return tiles

    def describe(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The shape rule: an output like the query, aliased caches and counters, and scratch memory."""
        scratch = partials_shape(self.shape_of(named), self.tiles_of(named))
        aliased = (named[name].aliased() for name in ("past_key", "past_value", "counters"))
        return named["query"].like(), *aliased, trtp.from_shape_expr(scratch, trt.DataType.FLOAT)

    def autotune(self, named: Mapping[str, Any]) -> list[Any]:
        """One combination of types, all in linear format, and one tactic.

        Raises:
            ValueError: a profile allows a shape for which the kernel is not compiled.
        """
        shape = self.shape_of(named)
        batch, sequence = _largest(named["query"].shape)[:2]
        if batch > shape.max_batch:
            raise ValueError(f"a profile allows batch {batch}; the kernel is compiled for {shape.max_batch}")
        if shape.phase == "decode" and sequence > shape.decode_tokens:
            raise ValueError(
                f"a profile allows {sequence} new tokens; a decode kernel takes {shape.decode_tokens}"
            )
        types = {"activation": _ACTIVATIONS[named["query"].dtype][1], "int32": "INT32", "float32": "FP32"}
        types["cache"] = self.cache.upper() if self.quantized_cache else types["activation"]
        kinds = (
            *PLUGIN_INPUTS.values(),
            *(PLUGIN_SCALES.values() if self.quantized_cache else ()),
            *PLUGIN_OUTPUTS.values(),
        )
        return [trtp.AutoTuneCombination(", ".join(types[kind] for kind in kinds), "LINEAR", [_TACTIC])]

    def implement(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The kernel (the same for every tactic), its launch, and the sizes between inputs and outputs."""
        shape = self.shape_of(named)
        tiles = self.tiles_of(named)
        kernel = _compiled(shape, tiles, named["compute_capability"])
        batch, sequence = named["query"].shape_expr[0], named["query"].shape_expr[1]
        capacity = named["past_key"].shape_expr[2]
        launch = trtp.KernelLaunchParams(
            grid_x=grid(shape, tiles, batch, sequence, capacity, Symbols()),
            block_x=32 * kernel.warps,
            shared_mem=kernel.shared_memory,
        )
        sizes = trtp.SymIntExprs(3)
        for i, size in enumerate((batch, sequence, capacity)):
            sizes[i] = trtp.SymInt32(size)
        return kernel.name, kernel.ptx, launch, sizes


def _largest(dimensions: Any) -> tuple[int, ...]:
    return tuple(dimensions.max) if dimensions.is_dynamic else tuple(dimensions)


def _signed(
    function: Callable[[Mapping[str, Any]], Any], parameters: Mapping[str, Any], returns: Any
) -> Callable[..., Any]:
    """``function`` with the signature that TensorRT requires: one annotated argument per tensor and attribute."""
    kinds = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=a) for name, a in parameters.items()]
    signature = Signature(kinds, return_annotation=returns)

    def call(*args: Any, **named: Any) -> Any:
        return function(signature.bind(*args, **named).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _register(name: str, cache: str | None) -> None:
    plugin = _Plugin(cache)
    tensors = (*PLUGIN_INPUTS, *(PLUGIN_SCALES if cache else ()))
    inputs = dict.fromkeys(tensors, trtp.TensorDesc) | PLUGIN_ATTRIBUTES
    outputs = tuple.__class_getitem__((trtp.TensorDesc,) * len(PLUGIN_OUTPUTS))
    tuned = inputs | {"outputs": outputs}
    code = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(name)(_signed(plugin.describe, inputs, outputs))
    trtp.autotune(name)(_signed(plugin.autotune, tuned, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(_signed(plugin.implement, tuned | {"tactic": int}, code))


for _name, _cache in PLUGINS.items():
    _register(_name, _cache)
