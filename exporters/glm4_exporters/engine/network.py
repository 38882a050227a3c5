"""Checks of a parsed TensorRT network: no layer of the model and the graph is missing, and each weight is stored once."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from glm4_plugins.operator import OP_TYPE, PLUGIN_FP8, PLUGIN_INT8
from glm4_runtime.errors import ExportError

# Operators that compute in float32 on purpose: inside norms, and the last cast of the logits.
FLOAT32_OPERATORS = frozenset({"RMSNormalization", "Cast"})

# The layer that the parser makes from an operator. The parser drops some inputs and nodes silently, so we count.
LAYERS_OF_OPERATORS = {
    "TensorScatter": "KV_CACHE_UPDATE",
    "Attention": "ATTENTION_INPUT",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    "MatMul": "MATRIX_MULTIPLY",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "TRT_FP4DynamicQuantize": "DYNAMIC_QUANTIZE",
    OP_TYPE: "PLUGIN_V3",
}

# Operators from which the parser makes the same layer as from another one.
SAME_LAYER = {PLUGIN_INT8: OP_TYPE, PLUGIN_FP8: OP_TYPE, "TRT_MXFP8DequantizeLinear": "DequantizeLinear"}


class Network:
    """A view of an ``INetworkDefinition`` with the producer and the readers of each tensor."""

    def __init__(self, trt: Any, definition: Any) -> None:
        self.trt, self.definition = trt, definition
        self.layers = [definition.get_layer(i) for i in range(definition.num_layers)]
        self.inputs = [definition.get_input(i) for i in range(definition.num_inputs)]
        self.outputs = [definition.get_output(i) for i in range(definition.num_outputs)]
        self.maker: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        for layer in self.layers:
            for tensor in _tensors(layer.num_outputs, layer.get_output):
                self.maker[tensor.name] = layer
            for tensor in _tensors(layer.num_inputs, layer.get_input):
                self.readers.setdefault(tensor.name, []).append(layer)

    def type_of(self, layer: Any) -> str:
        return str(layer.type).rpartition(".")[2]

    def count(self) -> Counter[str]:
        return Counter(map(self.type_of, self.layers))

    def used_inputs(self) -> set[str]:
        """Inputs that at least one output depends on."""
        seen = {tensor.name for tensor in self.outputs}
        waiting = list(seen)
        while waiting:
            layer = self.maker.get(waiting.pop())
            if layer is None:
                continue
            for tensor in _tensors(layer.num_inputs, layer.get_input):
                if tensor.name not in seen:
                    seen.add(tensor.name)
                    waiting.append(tensor.name)
        return seen & {tensor.name for tensor in self.inputs}


def _tensors(count: int, get: Any) -> list[Any]:
    return [tensor for i in range(count) if (tensor := get(i)) is not None]


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
    found = Counter(SAME_LAYER.get(name, name) for name in operators.values())
    for name, count in model.items():
        if found[name] != count:
            raise ExportError(
                f"the graph has {found[name]} {name} where the model has {count}; no engine is built from it"
            )
    return {layer: found[name] for name, layer in LAYERS_OF_OPERATORS.items()}


def check_layers(network: Network, expected: Mapping[str, int]) -> dict[str, int]:
    """Compare the network with the graph: one layer for each operator that is counted.

    Raises:
        ExportError: naming the layers that are missing or too many.
    """
    found = network.count()
    wrong = [
        f"{found[name]} {name} layers instead of {n}" for name, n in expected.items() if found[name] != n
    ]
    if wrong:
        raise ExportError(f"the parsed network has {' and '.join(wrong)}; no engine is built from it")
    return {name: found[name] for name in sorted(expected)}


def check_inputs(network: Network, declared: Sequence[str]) -> None:
    """Check that every declared input reaches an output: the parser drops unknown inputs without an error.

    Raises:
        ExportError: naming the inputs that do not.
    """
    lost = [name for name in declared if name not in network.used_inputs()]
    if lost:
        raise ExportError(
            f"the parsed network does not use the inputs {', '.join(lost)}; no engine is built from it"
        )


def float32_operators(network: Network, operators: Mapping[str, str]) -> dict[str, int]:
    """Nodes of the graph that compute in float32, counted by operator. Weights with a tool's scales of float32 may, if a
    Cast narrows them.

    Args:
        operators: operator by the name of its node.

    Raises:
        ExportError: an operator computes in float32 that should not.
    """
    nodes: set[str] = set()
    read = network.readers.keys() | {tensor.name for tensor in network.outputs}
    for layer in network.layers:
        if network.type_of(layer) == "CONSTANT":  # scales and epsilons; their readers are checked instead
            continue
        for tensor in _tensors(layer.num_outputs, layer.get_output):
            if tensor.dtype == network.trt.float32 and tensor.name in read:  # else a plugin's scratch
                nodes |= _origins(network, layer)
    allowed = {name for name, operator in operators.items() if operator in FLOAT32_OPERATORS}
    fell = sorted(nodes - allowed - _narrowed_weights(network))
    if fell:
        raise ExportError(
            f"{len(fell)} nodes of the network compute in float32, {fell[0]} among them, "
            "though the activations are of another type; no engine is built from it"
        )
    return dict(sorted(Counter(operators[name] for name in nodes).items()))


def _narrowed_weights(network: Network) -> set[str]:
    """The nodes that dequantize what only a Cast reads."""
    return {
        _node_of(layer)
        for layer in network.layers
        if network.type_of(layer) == "DEQUANTIZE"
        and {network.type_of(reader) for reader in network.readers.get(layer.get_output(0).name, ())}
        == {"CAST"}
    }


def _origins(network: Network, layer: Any) -> set[str]:
    """The graph's nodes that a layer was made for. A helper layer without a node counts for the nodes of its readers."""
    own = _node_of(layer)
    if own:
        return {own}
    found: set[str] = set()
    for tensor in _tensors(layer.num_outputs, layer.get_output):
        for reader in network.readers.get(tensor.name, []):
            found |= _origins(network, reader)
    return found


def _node_of(layer: Any) -> str:
    text = str(layer.metadata)
    return text.partition("[ONNX Layer: ")[2].partition("]")[0]


def fold_weight_transposes(network: Network) -> int:
    """Replace a Transpose between a dequantized weight [out, in] and its product by the product's own transpose flag.

    TensorRT-RTX 1.7 folds a transposed dequantized weight into one constant per profile. An engine with two profiles
    then took 2.17 bytes a parameter in int8; with the flag it takes 1.15.

    Returns:
        How many products were changed.
    """
    trt, changed = network.trt, 0
    for layer in network.layers:
        if network.type_of(layer) != "MATRIX_MULTIPLY":
            continue
        weight, transposed, rank = layer.get_input(1), False, len(layer.get_input(0).shape)
        while (maker := network.maker.get(weight.name)) is not None and network.type_of(maker) == "SHUFFLE":
            maker.__class__ = trt.IShuffleLayer  # the bindings return layers of the base class
            transposed |= tuple(maker.first_transpose)[:2] == (1, 0)
            weight = maker.get_input(0)
        if not transposed or len(weight.shape) != 2 or not _is_dequantized(network, maker):
            continue
        layer.__class__ = trt.IMatrixMultiplyLayer
        broadcast = network.definition.add_shuffle(weight)
        broadcast.reshape_dims = (1,) * (rank - 2) + tuple(weight.shape)
        layer.set_input(1, broadcast.get_output(0))
        layer.op1 = trt.MatrixOperation.TRANSPOSE
        changed += 1
    return changed


def _is_dequantized(network: Network, maker: Any) -> bool:
    """Whether a layer dequantizes a weight, or casts a dequantized one."""
    if maker is not None and network.type_of(maker) == "CAST":
        maker = network.maker.get(maker.get_input(0).name)
    return maker is not None and network.type_of(maker) == "DEQUANTIZE"


# Operators that every profile of the built engine must contain, alone or fused.
COMPILED_OPERATORS = frozenset({"Attention", "TensorScatter", "RotaryEmbedding", "MatMul"})
LAYER_LINE = re.compile(r"^Name: .*_myl(?P<profile>\d+)_\d+, LayerType: (?P<type>\w+),")
ATTENTION_KERNEL = re.compile(r"TacticName: _*(?P<name>\w*?mha\w*?)_0x")


def check_compiled(
    log: str, profiles: Sequence[str], operators: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Compare the built engine's layers, from the builder's log, with the graph.

    This is the only view of an engine's layers without a GPU: an inspector needs a loaded engine.

    Args:
        log: the builder's message that lists the layers; empty if there was none.
        profiles: names of the profiles, in order.

    Returns:
        Per profile: number of layers by type; attention kernels by name.

    Raises:
        ExportError: a profile has no layer for a node of the graph.
    """
    found: dict[str, Counter[str]] = {name: Counter() for name in profiles}
    nodes: dict[str, set[str]] = {name: set() for name in profiles}
    for line in log.splitlines():
        layer = LAYER_LINE.match(line)
        if layer is None or int(layer["profile"]) >= len(profiles):
            continue
        profile = profiles[int(layer["profile"])]
        attention = ATTENTION_KERNEL.search(line)
        found[profile][attention["name"] if attention else layer["type"]] += 1
        nodes[profile] |= set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", line))
    if not log:
        return {}
    wanted = {name for name, operator in operators.items() if operator in COMPILED_OPERATORS}
    for profile in profiles:
        lost = sorted(wanted - nodes[profile])
        if lost:
            raise ExportError(
                f"the engine's {profile} profile has no layer of {len(lost)} nodes of the graph, {lost[0]} among them"
            )
    return {profile: dict(sorted(count.items())) for profile, count in found.items()}


NARROW = re.compile(r"Datatype: (FP4E2M1|FP8|Int4|Int8),")


def compiled_weights(log: str, profiles: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per profile of the built engine: how many layers read constants of each narrow type, by TensorRT's name.

    Args:
        log: the builder's message that lists the layers; empty if there was none.
    """
    found: dict[str, Counter[str]] = {name: Counter() for name in profiles}
    for line in log.splitlines():
        layer = LAYER_LINE.match(line)
        if layer is not None and int(layer["profile"]) < len(profiles):
            constants = line.partition("Constants: [")[2].partition("Outputs: [")[0]
            found[profiles[int(layer["profile"])]].update(set(NARROW.findall(constants)))
    return {profile: dict(sorted(count.items())) for profile, count in found.items()} if log else {}
