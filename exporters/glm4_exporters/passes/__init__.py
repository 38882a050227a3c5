"""Passes rewrite the canonical graph into the operators of a target. One file, one verb, one test each.

The order of all passes is in this file and nowhere else. A pass changes a graph and never a file.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import onnx_ir as ir

from glm4_exporters.form import Form
from glm4_exporters.formats import StoredFormat
from glm4_exporters.passes.add_adapters import AddAdapters
from glm4_exporters.passes.fix_capacity import FixCapacity
from glm4_exporters.passes.fp4_inputs import Fp4Inputs
from glm4_exporters.passes.fp4_weights import Fp4Weights
from glm4_exporters.passes.group_query_attention import GroupQueryAttention
from glm4_exporters.passes.input_major import InputMajor
from glm4_exporters.passes.mxfp8_weights import Mxfp8Weights
from glm4_exporters.passes.narrow_cache import NarrowCache
from glm4_exporters.passes.native_attention import NativeAttention
from glm4_exporters.passes.open_stages import OpenStages
from glm4_exporters.passes.packed_products import PackedProducts
from glm4_exporters.passes.plugin_attention import PluginAttention
from glm4_exporters.passes.quantize_cache import QuantizeCache
from glm4_exporters.passes.quantize_inputs import QuantizeInputs
from glm4_exporters.passes.quantize_weights import QuantizeWeights
from glm4_exporters.passes.round_cache import RoundCache
from glm4_exporters.passes.scale_eps import ScaleEps
from glm4_exporters.passes.skip_norm import SkipNorm
from glm4_exporters.passes.split_products import SplitProducts
from glm4_exporters.passes.transposed_matmul import TransposedMatMul
from glm4_exporters.quantize.calibrate import Magnitudes
from glm4_exporters.quantize.kv_cache import CacheScales
from glm4_exporters.targets import Target
from glm4_runtime.bundle import AdapterSlots, StageInfo

Pass = ir.passes.InPlacePass

# By the names in a target's row.
ATTENTION: Mapping[str, Callable[[], Pass]] = {
    "group-query": GroupQueryAttention,
    "standard": NativeAttention,
}
PRODUCTS: Mapping[str, tuple[Callable[[], Pass], ...]] = {
    "standard": (),
    "fused": (TransposedMatMul,),
    "packed": (TransposedMatMul,),
}
STORED: Mapping[str, tuple[Callable[[Mapping[str, StoredFormat]], Pass], ...]] = {
    "standard": (partial(QuantizeWeights, "standard"),),
    "fused": (partial(QuantizeWeights, "fused"),),
    "packed": (PackedProducts, partial(QuantizeWeights, "fused")),  # the second pass handles the rest
}
NORMS: Mapping[str, tuple[Callable[[], Pass], ...]] = {"standard": (), "skip": (SkipNorm,)}


def lowering(target: Target, plugin: PluginAttention | None = None) -> list[Pass]:
    """The passes from the canonical graph to the target's operators; ``plugin`` replaces the target's
    attention."""
    attention = [plugin] if plugin is not None else [ATTENTION[name]() for name in target.attention]
    products = [make() for make in PRODUCTS[target.products.name]]
    return [*attention, *products, *(make() for make in NORMS[target.norms])]


def model_passes(
    form: Form,
    *,
    norm_bits: Mapping[str, int],
    cache_scales: Sequence[CacheScales],
    input_scales: Mapping[str, float],
    key_factors: Sequence[Magnitudes] = (),
    plugin: PluginAttention | None = None,
    slots: AdapterSlots | None = None,
    stages: Sequence[StageInfo] = (),
) -> list[Pass]:
    """All passes before weights are written, in order. An empty argument leaves its pass out.

    Args:
        norm_bits, cache_scales, input_scales: results of the calibration.
        key_factors: of the keys of each layer, for a quantized cache of our operator.
        plugin: attention for an engine, in place of the target's own.
        slots: LoRA adapters that the graph takes at run time.
        stages: the parts into which the graph will be cut.
    """
    products = form.target.products
    return [
        *([AddAdapters(slots, form.target.dialect, form.activations)] if slots is not None else []),
        *([ScaleEps(norm_bits)] if norm_bits else []),  # before a pass that fuses norms
        *lowering(form.target, plugin),
        *_cache_passes(form, cache_scales, key_factors, plugin),
        *(make(form.formats) for make in STORED[products.name] if form.formats),
        *([QuantizeInputs(input_scales, unsigned=products.unsigned_inputs)] if input_scales else []),
        *([InputMajor()] if form.target.input_major else []),
        *([OpenStages([stage.first_layer for stage in stages])] if stages else []),
    ]


def _cache_passes(
    form: Form,
    scales: Sequence[CacheScales],
    key_factors: Sequence[Magnitudes],
    plugin: PluginAttention | None,
) -> list[Pass]:
    """A cache of another type than the activations'; in the graph that parity checks for an engine, its rounding alone."""
    if form.target.own_operators:
        other = form.kv_cache not in (None, form.activations)
        return [NarrowCache(str(form.kv_cache), key_factors)] if other else []
    if not scales or form.kv_cache is None:
        return []
    proof = form.target.engine is not None and plugin is None
    return [RoundCache(scales, form.kv_cache) if proof else QuantizeCache(scales, form.kv_cache)]


def engine_passes(capacity: int) -> list[Pass]:
    """The passes for the graph that TensorRT parses; its weights are written already."""
    return [FixCapacity(capacity), SplitProducts(), Fp4Inputs(), Fp4Weights(), Mxfp8Weights()]


def run(model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
    """Apply passes in order, in place."""
    for each in passes:
        each(model)
    return model
