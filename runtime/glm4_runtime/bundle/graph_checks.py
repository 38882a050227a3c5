"""Checks the graph of a bundle against its manifest, before a runtime opens it.

Inputs and outputs must have the manifest's names, types and shapes. Operators must belong to the dialect. The graph
must have the model's numbers. And the graph must not grow: values that ONNX Runtime computes from constants while it
opens the graph take at most a few times the size of the weights, and a shape that depends on values must come from
another shape.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from glm4_runtime.bundle.adapter_inputs import adapter_specs
from glm4_runtime.bundle.file_names import ADAPTER_GRAPH, GRAPH
from glm4_runtime.bundle.manifest import EXPORT_AGAIN, Manifest, StageInfo
from glm4_runtime.bundle.manifest_checks import difference
from glm4_runtime.bundle.onnx_file import OnnxGraph, Tensor, read_graph
from glm4_runtime.bundle.stage_manifest import stage_manifest
from glm4_runtime.errors import BundleError, shown, some

STANDARD, MICROSOFT, OURS = "", "com.microsoft", "glm4"
MOST_NODES = 100_000
_COMMON = (
    "Add Cast Constant DequantizeLinear Gather GatherND MatMul Mul QuantizeLinear RMSNormalization Sigmoid Split Squeeze "
    "Sub Transpose Unsqueeze"
)
_NATIVE = "And Attention Expand Less LessOrEqual Min Range Reshape RotaryEmbedding Shape TensorScatter"
_FP4_INPUTS = "Abs Clip Div ReduceMax"  # round the inputs of NVFP4's products
_PRODUCTS = "FusedMatMul GatherBlockQuantized MatMulNBits SkipSimplifiedLayerNormalization"


def _named(domain: str, names: str) -> frozenset[tuple[str, str]]:
    return frozenset((domain, name) for name in names.split())


# dialect -> its operators; tests/deploy/test_graph_operators.py exports every combination
OPERATORS = {
    "native": _named(STANDARD, f"{_COMMON} {_NATIVE} {_FP4_INPUTS}"),
    "ort": _named(STANDARD, f"{_COMMON} {_NATIVE} ReduceMax")
    | _named(MICROSOFT, f"{_PRODUCTS} GroupQueryAttention"),
    "cpu": _named(STANDARD, _COMMON)
    | _named(MICROSOFT, _PRODUCTS)
    | _named(OURS, "BlockQuantizedMatMul LoraProduct PartialRopeGqaAttention"),
}
ENGINE_DIALECT = "native"  # of the graph that an engine is built from
ATTENTION_OPERATORS = ("Attention", "GroupQueryAttention", "PartialRopeGqaAttention")
# Operators that may read constants only. Their results have as many elements as their largest input.
OF_CONSTANTS = ("Cast", "DequantizeLinear", "Transpose")
MOST_COMPUTED = 8  # maximum elements of all their results, per byte of the weights
MOST_READ = 4  # maximum number of tensors that share one byte of the weights
# Operators that pass a shape on, without arithmetic.
OF_SHAPES = ("Cast", "Squeeze", "Unsqueeze")
NORM, TABLES = "model.norm.weight", ("rotary.cos", "rotary.sin")


def check_graph(folder: Path, manifest: Manifest) -> None:
    """Refuse a graph that does not fit its manifest.

    An engine's bundle may keep the graph that the engine was built from. Its inputs and outputs are its own, and the
    manifest has the engine's.

    Raises:
        BundleError: naming the first thing that differs.
    """
    for stage in manifest.stages:
        if stage.graph in manifest.files:  # an engine's bundle need not have one
            check_stage_graph(folder, manifest, stage)
    if manifest.stages:
        return
    _check_file(folder / GRAPH, manifest)
    slots = manifest.adapter_slots
    if slots is not None:
        inputs = (*manifest.inputs, *adapter_specs(slots, manifest.dialect))
        _check_file(folder / ADAPTER_GRAPH, replace(manifest, inputs=inputs))


def check_stage_graph(folder: Path, manifest: Manifest, stage: StageInfo) -> None:
    """As :func:`check_graph`, for one stage."""
    _check_file(folder / stage.graph, stage_manifest(manifest, stage))


def _check_file(path: Path, manifest: Manifest) -> None:
    graph = read_graph(path)

    def refuse(complaint: str) -> BundleError:
        return BundleError(f"{path} {complaint}; {EXPORT_AGAIN}")

    checks = (_check_operators, _check_weights, _check_constants, _check_shapes, _check_model)
    for check in checks if manifest.engine is not None else (_check_io, *checks):
        complaint = check(manifest, graph)
        if complaint is not None:
            raise refuse(complaint)


# Each check returns what is wrong, or None ------------------------------------------------------------------


def _check_io(manifest: Manifest, graph: OnnxGraph) -> str | None:
    for side in ("inputs", "outputs"):
        found = difference(getattr(graph, side), getattr(manifest, side))
        if found is not None:
            return f"has other {side} than the manifest: {found}"
    if dict(graph.opsets) != dict(manifest.opsets):
        return f"has the opsets {shown(dict(graph.opsets))}, but the manifest says {shown(dict(manifest.opsets))}"
    overridden = sorted(graph.initializers.keys() & {spec.name for spec in graph.inputs})
    return f"has inputs that are constants too ({some(overridden)})" if overridden else None


def _check_operators(manifest: Manifest, graph: OnnxGraph) -> str | None:
    if len(graph.nodes) > MOST_NODES:
        return f"has {len(graph.nodes)} nodes, but at most {MOST_NODES} are read"
    dialect = manifest.dialect if manifest.engine is None else ENGINE_DIALECT
    known = OPERATORS[dialect]
    strange = {str(node) for node in graph.nodes if (node.domain, node.operator) not in known}
    if strange:
        return f"has operators that the dialect {dialect} does not have ({some(sorted(strange))})"
    return None


def _check_weights(manifest: Manifest, graph: OnnxGraph) -> str | None:
    """External data must be inside files of the bundle, and must not be used many times."""
    read: Counter[str] = Counter()
    for tensor in _tensors(graph):
        if tensor.location is None:
            continue
        entry = manifest.files.get(tensor.location)
        if entry is None:
            return (
                f"takes {shown(tensor.name)} from {shown(tensor.location)}, which the manifest does not list"
            )
        if tensor.offset + tensor.nbytes > entry.bytes:
            return (
                f"takes {shown(tensor.name)} from {tensor.location} at {tensor.offset} to {tensor.offset + tensor.nbytes}, "
                f"but the file has {entry.bytes} bytes"
            )
        read[tensor.location] += tensor.nbytes
    for name, count in read.items():
        if count > MOST_READ * manifest.files[name].bytes:
            return f"takes {count} bytes of tensors from {name}, which has {manifest.files[name].bytes}"
    return None


def _check_constants(manifest: Manifest, graph: OnnxGraph) -> str | None:
    """Check values that follow from constants only: a runtime computes them when it opens the graph."""
    sizes = {name: _count(tensor) for name, tensor in graph.initializers.items()}
    computed = 0
    for node in graph.nodes:
        value = node.attributes.get("value")
        if node.operator == "Constant" and isinstance(value, Tensor):
            sizes |= dict.fromkeys(node.outputs, _count(value))
        elif all(name in sizes for name in node.inputs if name):
            if node.operator not in OF_CONSTANTS:
                return f"computes {node} from constants alone, which no graph of ours does"
            size = max((sizes[name] for name in node.inputs if name), default=0)
            sizes |= dict.fromkeys(node.outputs, size)
            computed += size
    stored = sum(entry.bytes for entry in manifest.files.values())
    if computed > MOST_COMPUTED * stored:
        return f"computes {computed} numbers from constants, too many for a bundle of {stored} bytes"
    return None


def _check_shapes(manifest: Manifest, graph: OnnxGraph) -> str | None:  # noqa: ARG001  one signature for all
    """A tensor's size at run time must come from the shape of an input, not from a number in the graph."""
    constants = {name: tensor.integer() for name, tensor in graph.initializers.items() if not tensor.location}
    shapes: set[str] = set()
    for node in graph.nodes:
        value = node.attributes.get("value")
        if isinstance(value, Tensor):
            constants |= dict.fromkeys(node.outputs, value.integer())
        if node.operator == "Shape" or (node.operator in OF_SHAPES and {*node.inputs[:1]} <= shapes):
            shapes |= set(node.outputs)
        counts = [constants.get(name) for name in node.inputs]
        if node.operator == "Range" and not (counts[0::2] == [0, 1] and node.inputs[1] in shapes):
            return "counts in a Range to a number that is no size of an input"
        if node.operator == "Expand" and not (len(node.inputs) == 2 and node.inputs[1] in shapes):
            return "expands a tensor to a shape that is not an input's"
    return None


def _check_model(manifest: Manifest, graph: OnnxGraph) -> str | None:
    """Check the model's numbers that inputs and outputs do not show."""
    model, limits = manifest.model, manifest.limits
    attention = [node for node in graph.nodes if node.operator in ATTENTION_OPERATORS]
    if len(attention) != model.num_layers:
        return f"has {len(attention)} attention nodes, but the manifest says {model.num_layers} layers"
    for name, wanted in (("num_heads", model.num_heads), ("kv_num_heads", model.num_kv_heads)):
        found = {node.attributes.get(name, wanted) for node in attention} - {wanted}
        if found:
            return f"has attention of {name} {shown(found.pop())}, but the manifest says {wanted}"
    norm = graph.initializers.get(NORM)
    if norm is not None and norm.shape != (model.hidden_size,):
        return f"has {NORM} of shape {shown(list(norm.shape))}, but the manifest says hidden_size {model.hidden_size}"
    for name in TABLES:
        table = graph.initializers.get(name)
        if table is None or len(table.shape) != 2 or table.shape[0] < limits.max_seq_len:
            found_shape = "nothing" if table is None else shown(list(table.shape))
            return f"has {found_shape} as {name}, but the manifest says {limits.max_seq_len} positions"
    return None


def _tensors(graph: OnnxGraph) -> list[Tensor]:
    inline = [
        value for node in graph.nodes for value in node.attributes.values() if isinstance(value, Tensor)
    ]
    return [*graph.initializers.values(), *inline]


def _count(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count
