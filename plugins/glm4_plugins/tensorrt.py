"""The TensorRT plugins of the operator; importing this module registers them.

Two plugins share one kernel: ``glm4::PartialRopeGqaAttention`` and, with two more inputs, the scales of an int8
cache, ``glm4::PartialRopeGqaAttentionInt8``. Both are ahead of time: TensorRT gets PTX and symbolic launch
expressions, stores them in the engine, and needs neither Python nor Triton to run it.

TensorRT picks the kernel by types and tactic, never by shape, gives it no workspace and zeroes nothing. So every
tactic is right for every shape, scratch is an output (``partials``), and what must be zero is an input
(``counters``) aliased to an output, zero before and after each launch.
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
from glm4_plugins.operator import DOMAIN, OP_TYPE, PLUGIN_INT8

PLUGINS = {f"{DOMAIN}::{OP_TYPE}": False, f"{DOMAIN}::{PLUGIN_INT8}": True}
"""Names, and whether the cache is int8."""

# TensorRT's types: the kernel's name, and autotune's.
_ACTIVATIONS = {trt.DataType.HALF: ("fp16", "FP16"), trt.DataType.BF16: ("bf16", "BF16")}


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
    """All layers of a model share a kernel."""
    return compile_kernel(shape, tiles, capability)


class _Plugin:
    """The three functions that TensorRT wants of a plugin. Each takes tensors and attributes by name."""

    def __init__(self, quantized_cache: bool) -> None:
        self.quantized_cache = quantized_cache

    def shape_of(self, named: Mapping[str, Any]) -> KernelShape:
        """What to compile for a node.

        Raises:
            ValueError: the kernel does not take it.
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
        )
        refusal = unsupported(shape, named["rotary_embedding_dim"])
        if refusal:
            raise ValueError(refusal)
        return shape

    def tiles_of(self, named: Mapping[str, Any]) -> tuple[Tiles, ...]:
        return choices(named["compute_capability"], self.quantized_cache)

    def describe(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The shape rule: the output like the query, caches and counters aliased, and scratch."""
        scratch = partials_shape(self.shape_of(named), self.tiles_of(named)[0].decode_blocks)
        aliased = (named[name].aliased() for name in ("past_key", "past_value", "counters"))
        return named["query"].like(), *aliased, trtp.from_shape_expr(scratch, trt.DataType.FLOAT)

    def autotune(self, named: Mapping[str, Any]) -> list[Any]:
        """One combination of types, linear throughout, and a tactic for each choice of block sizes.

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
        types["cache"] = "INT8" if self.quantized_cache else types["activation"]
        kinds = (
            *PLUGIN_INPUTS.values(),
            *(PLUGIN_SCALES.values() if self.quantized_cache else ()),
            *PLUGIN_OUTPUTS.values(),
        )
        tactics = range(1, len(self.tiles_of(named)) + 1)
        return [trtp.AutoTuneCombination(", ".join(types[kind] for kind in kinds), "LINEAR", list(tactics))]

    def implement(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The kernel of one tactic, its launch, and the sizes that it takes between inputs and outputs."""
        shape = self.shape_of(named)
        # Without timing TensorRT asks for tactic 0: the first choice.
        tiles = self.tiles_of(named)[max(named["tactic"] - 1, 0)]
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
    """``function`` under the signature that TensorRT demands: tensors and attributes one by one, annotated."""
    kinds = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=a) for name, a in parameters.items()]
    signature = Signature(kinds, return_annotation=returns)

    def call(*args: Any, **named: Any) -> Any:
        return function(signature.bind(*args, **named).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _register(name: str, quantized_cache: bool) -> None:
    plugin = _Plugin(quantized_cache)
    tensors = (*PLUGIN_INPUTS, *(PLUGIN_SCALES if quantized_cache else ()))
    inputs = dict.fromkeys(tensors, trtp.TensorDesc) | PLUGIN_ATTRIBUTES
    outputs = tuple.__class_getitem__((trtp.TensorDesc,) * len(PLUGIN_OUTPUTS))
    tuned = inputs | {"outputs": outputs}
    code = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(name)(_signed(plugin.describe, inputs, outputs))
    trtp.autotune(name)(_signed(plugin.autotune, tuned, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(_signed(plugin.implement, tuned | {"tactic": int}, code))


for _name, _quantized in PLUGINS.items():
    _register(_name, _quantized)
