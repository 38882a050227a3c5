"""Taps: the values between the sub-blocks of a layer, in the reference and in a graph.

In the reference a tap is the output or input of a module. In a graph it is the value that leaves the nodes of the
same module, because every node is named after its module, for all dialects and precisions. If a graph does not have a
value, its sub-block is compared together with the next one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from torch import Tensor

from glm4_exporters.config import Glm4Config
from glm4_exporters.eager_attention import Attention
from glm4_exporters.reference import Glm4DecoderLayer

EMBEDDING_TAP, ATTENTION_TAP, NORM_TAP, HEAD_TAP = "embedding", "attention", "final_norm", "head"


@dataclass(frozen=True)
class Tap:
    """A sub-block of a layer, identified by its output.

    Attributes:
        name: of the sub-block.
        modules: the modules with this output; several are side by side.
        reads: whether the tap is the module's input instead: a sum or product without a module of its own.
        value: the value's name in a graph, below the layer's name, if the graph has such a name.
        says: a description for users.
    """

    name: str
    modules: tuple[str, ...]
    says: str
    reads: bool = False
    value: str | None = None


TAPS = (
    Tap("input_layernorm", ("input_layernorm",), "norm in front of attention"),
    Tap("qk", ("self_attn.q_proj", "self_attn.k_proj"), "query and key"),
    Tap("v", ("self_attn.v_proj",), "value"),
    Tap(ATTENTION_TAP, ("self_attn.o_proj",), "RoPE, cache and attention", reads=True, value="self_attn"),
    Tap("o_proj", ("self_attn.o_proj",), "output projection"),
    Tap("post_self_attn_layernorm", ("post_self_attn_layernorm",), "norm behind attention"),
    Tap("attention_residual", ("post_attention_layernorm",), "first residual sum", reads=True, value="Add:0"),
    Tap("post_attention_layernorm", ("post_attention_layernorm",), "norm in front of the MLP"),
    Tap("gate_up", ("mlp.down_proj",), "gate and up, silu(gate) * up", reads=True, value="mlp"),
    Tap("down", ("mlp.down_proj",), "down projection"),
    Tap("post_mlp_layernorm", ("post_mlp_layernorm",), "norm behind the MLP"),
    Tap("mlp_residual", (), "second residual sum", value="Add_2:0"),
)
# Matrices whose output may be scaled by a power of two, which the eps of the next norm undoes.
SCALED_BY = {"o_proj": "post_self_attn_layernorm", "down": "post_mlp_layernorm"}


# The reference's side -----------------------------------------------------------------------------


def run_tapped(
    layer: Glm4DecoderLayer, hidden: Sequence[Tensor], attends: Sequence[Attention]
) -> tuple[list[Tensor], list[dict[str, tuple[Tensor, ...]]]]:
    """Run the layer; returns its output and its taps for each sequence."""
    outputs, taps = [], []
    for x, attend in zip(hidden, attends, strict=True):
        with _recorded(layer) as found:
            outputs.append(layer(x, attend))
        taps.append({tap.name: found[tap.name] for tap in TAPS[:-1]} | {TAPS[-1].name: (outputs[-1],)})
    return outputs, taps


@contextmanager
def _recorded(layer: torch.nn.Module) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    found: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str) -> Any:
        def hook(_module: object, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            value = inputs[0] if output is None else output
            found[name] = (*found.get(name, ()), value)

        return hook

    handles = []
    for tap in TAPS:
        for name in tap.modules:
            module = layer.get_submodule(name)
            listen = module.register_forward_pre_hook if tap.reads else module.register_forward_hook
            handles.append(listen(keep(tap.name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# The graph's side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphTap:
    """A tap of one graph.

    Attributes:
        tap: the name of the sub-block.
        values: the names of its values.
        bits: the values are smaller than the reference's by a factor of 2^bits.
        covers: earlier sub-blocks for which this graph has no tap.
    """

    tap: str
    values: tuple[str, ...]
    bits: int = 0
    covers: tuple[str, ...] = ()


class GraphTaps:
    """The taps of one graph, in the order of computation.

    Attributes:
        layers: per layer, the graph's taps.
        embedding: the input of the first layer.
        norm: the input of the head, even if it cannot be compared.
    """

    def __init__(self, graph: onnx.GraphProto, config: Glm4Config) -> None:
        self._leaving = _leaving_values(graph)
        self._made = {name for node in graph.node for name in node.output}
        self._scale = _scales(graph, config)
        self.layers = [self._layer(index) for index in range(config.num_hidden_layers)]
        self.embedding = GraphTap(EMBEDDING_TAP, self._leaving["model.embed_tokens"])
        self.norm = GraphTap(NORM_TAP, self._leaving["model.norm"])

    def output_of(self, module: str) -> str | None:
        """The name of a module's only output; None if the graph has none or several."""
        found = self._leaving.get(module, ())
        return found[0] if len(found) == 1 else None

    def _layer(self, index: int) -> list[GraphTap]:
        found: list[GraphTap] = []
        covered: tuple[str, ...] = ()
        for tap in TAPS:
            one = self._find(tap, index)
            if one is None:
                covered = (*covered, tap.name)
            else:
                found.append(replace(one, covers=covered))
                covered = ()
        return found

    def _find(self, tap: Tap, layer: int) -> GraphTap | None:
        base = f"model.layers.{layer}"
        if tap.value is None:
            found = [self._leaving.get(f"{base}.{module}", ()) for module in tap.modules]
            values = tuple(names[0] for names in found if len(names) == 1)
            complete = len(values) == len(tap.modules)
        elif ":" in tap.value:
            values = (f"{base}/{tap.value}",)
            complete = values[0] in self._made
        else:
            values = self._leaving.get(f"{base}.{tap.value}", ())
            complete = len(values) == 1
        if not complete:
            return None
        norm = f"{base}.{SCALED_BY[tap.name]}" if tap.name in SCALED_BY else ""
        return GraphTap(tap.name, values, self._scale.get(norm, 0))


def _scope(node: onnx.NodeProto) -> str:
    return str(node.name).rpartition("/")[0]


def _leaving_values(graph: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """By module: the outputs of its nodes that other modules read, except the KV cache.

    A residual sum that is fused with a norm has the layer's name, and does not belong to the norm.
    """
    scope_of = {
        name: _scope(node)
        for node in graph.node
        for name in node.output
        if name and node.op_type != "Constant"
    }
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(_scope(node))
    for value in graph.output:
        if not value.name.startswith("present_key_values."):
            readers.setdefault(value.name, set()).add("")
    found: dict[str, tuple[str, ...]] = {}
    for name, scope in scope_of.items():
        is_residual = re.fullmatch(r"model\.layers\.\d+/Add(_2)?:0", name) is not None
        if not is_residual and readers.get(name, set()) - {scope}:
            found[scope] = (*found.get(scope, ()), name)
    return found


def _scales(graph: onnx.GraphProto, config: Glm4Config) -> Mapping[str, int]:
    """By norm: k, if its input is scaled by 2^-k and its eps therefore by 2^-2k (exact in fp16)."""
    found = {}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon" and 0 < attribute.f < config.rms_norm_eps / 2:
                ratio = torch.tensor(config.rms_norm_eps / attribute.f).log2()
                found[_scope(node)] = round(float(ratio) / 2)
    return found
