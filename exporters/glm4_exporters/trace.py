"""Traces the reference model to the canonical ONNX graph: standard operators, and one attention node per layer.

No weight is loaded. The model is built and exported with fake tensors, so a 32B needs only the memory of its graph.
The initializers have a name, a type and a shape, but no data. Their names are the checkpoint's, plus ``rotary.cos``
and ``rotary.sin`` [max positions, R / 2].

Every node is named after its module (``model.layers.3.mlp.down_proj/MatMul``). Passes keep these names, because
``pieces`` and ``validate`` cut the graph by them.
"""

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glm4_exporters.architecture import EMBEDDING, HEAD
from glm4_exporters.config import Glm4Config
from glm4_exporters.element_types import TORCH_TYPES, ir_type
from glm4_exporters.graph_io import model_io
from glm4_exporters.passes.split_sequences import SplitSequences
from glm4_exporters.reference import Glm4RMSNorm
from glm4_exporters.task_models import MODELS, Glm4ForSequenceClassification
from glm4_plugins.operator import DOMAIN, OP_TYPE, VERSION
from glm4_runtime.bundle.graph_io import GraphIO

OPSET = 24
ROTARY_COS, ROTARY_SIN = "rotary.cos", "rotary.sin"

# Example sizes; all different, and not 0 or 1, which torch.export would treat as constants.
EXAMPLE_SIZES = {"batch": 2, "sequence": 3, "capacity": 7, "positions": 5}


class _OperatorRMSNorm(Glm4RMSNorm):
    """RMSNorm as one ONNX operator: float32 inside, rounded, then times the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "RMSNormalization",
            (x, self.weight),
            dict(axis=-1, epsilon=self.eps, stash_type=1),
            dtype=x.dtype,
            shape=x.shape,
            version=23,
        )


class _OperatorAttention:
    """Attention as one ``glm4::PartialRopeGqaAttention`` node; ``presents`` collects its new caches."""

    def __init__(
        self,
        config: Glm4Config,
        tables: "_Tables",
        past: Sequence[Tensor],
        past_lengths: Tensor | None,
        query_lengths: Tensor,
    ) -> None:
        self.attributes: dict[str, Any] = dict(
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            rotary_embedding_dim=config.rotary_dim,
            scale=config.scale,
        )
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.tables, self.past, self.lengths = tables, past, (past_lengths, query_lengths)
        self.presents: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        past = self.past[2 * layer : 2 * layer + 2] or (None, None)
        empty = (query.shape[0], self.kv_heads, query.shape[1], self.head_dim)
        cache_shape = empty if past[0] is None else past[0].shape
        output, *presents = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{OP_TYPE}",
            (query, key, value, *past, self.tables.cos, self.tables.sin, *self.lengths),
            self.attributes,
            dtypes=(query.dtype,) * 3,
            shapes=(query.shape, cache_shape, cache_shape),
            version=VERSION,
        )
        self.presents += presents
        return output


class _Tables(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        shape = (config.positions, config.rotary_dim // 2)
        self.cos, self.sin = nn.Buffer(torch.empty(shape)), nn.Buffer(torch.empty(shape))


class _Graph(nn.Module):
    """The reference model with the graph's inputs and outputs."""

    def __init__(self, config: Glm4Config, task: str) -> None:
        super().__init__()
        self.config, self.task = config, task
        self.reference = MODELS[task](config)
        self.rotary = _Tables(config)
        for module in self.reference.modules():
            if isinstance(module, Glm4RMSNorm):
                module.__class__ = _OperatorRMSNorm

    def forward(self, input_ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        reference: nn.Module = self.reference
        backbone: nn.Module = reference if self.task == "encoder" else reference.model  # type: ignore[assignment]
        if self.task == "causal-lm":
            past_lengths, query_lengths, logits_indices, *past = others
        else:
            (query_lengths,), past, past_lengths = others, [], None
        attend = _OperatorAttention(self.config, self.rotary, past, past_lengths, query_lengths)
        hidden = backbone.run(backbone.embed_tokens(input_ids), attend)  # type: ignore[operator]
        if self.task == "causal-lm":
            logits = reference.lm_head(_rows(hidden, logits_indices))  # type: ignore[operator]
            return logits.float(), *attend.presents
        if isinstance(reference, Glm4ForSequenceClassification):
            last = (query_lengths.long() - 1).unsqueeze(-1)
            return (reference.score(_rows(hidden, last)).squeeze(1).float(),)
        return (hidden.float() if self.task == "encoder" else reference.score(hidden).float(),)  # type: ignore[operator]


def _rows(hidden: Tensor, indices: Tensor) -> Tensor:
    """hidden [B, S, H] at indices [B, n] -> [B, n, H]."""
    return torch.onnx.ops.symbolic(
        "GatherND",
        (hidden, indices.unsqueeze(-1)),
        dict(batch_dims=1),
        dtype=hidden.dtype,
        shape=(*indices.shape, hidden.shape[-1]),
        version=13,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's deprecation warnings, and its remarks about packages that we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trace(config: Glm4Config, task: str, activations: str) -> ir.Model:
    """The canonical graph of ``task``. Weights, activations and cache have the type ``activations``.

    Args:
        activations: ``float32``, ``float16`` or ``bfloat16``.
    """
    io = model_io(config, task, activations)
    with FakeTensorMode(), _default_dtype(TORCH_TYPES[activations]), _quiet():
        module = _Graph(config, task).eval()
        arguments = tuple(
            torch.empty(
                [EXAMPLE_SIZES[a] if isinstance(a, str) else a for a in spec.shape],
                dtype=TORCH_TYPES[spec.dtype],
            )
            for spec in io.inputs
        )
        dynamic = tuple(
            {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(spec.shape) if isinstance(axis, str)}
            for spec in io.inputs
        )
        exported = torch.export.export(
            module, arguments, dynamic_shapes={"input_ids": dynamic[0], "others": dynamic[1:]}, strict=False
        )
        program = torch.onnx.export(exported, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    assert program is not None
    model = program.model
    _name_inputs_and_outputs(model.graph, io)
    _name_initializers(model.graph, task)
    if config.tie_word_embeddings and task == "causal-lm":
        _tie_head(model.graph)
    _name_nodes(model.graph, task)
    SplitSequences()(model)
    model.producer_name, model.producer_version = "glm4-deploy", None
    model.graph.name = f"glm4-{task}"
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


def _name_inputs_and_outputs(graph: ir.Graph, io: GraphIO) -> None:
    for values, specs in ((graph.inputs, io.inputs), (graph.outputs, io.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)
            value.type = ir.TensorType(ir_type(spec.dtype))
            value.metadata_props.clear()


def _name_initializers(graph: ir.Graph, task: str) -> None:
    """Give each weight its checkpoint name, and remove its fake data."""
    prefix = "model." if task == "encoder" else ""
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = value.name.replace("reference.", prefix, 1)
        graph.initializers.pop(value.name)
        value.name = name
        graph.initializers[name] = value
        value.const_value = None
        value.metadata_props.clear()


def _tie_head(graph: ir.Graph) -> None:
    """Replace a tied head by the embedding: the tracer writes it as a second weight."""
    head, embedding = (graph.initializers.pop(name, None) for name in (HEAD, EMBEDDING))
    if embedding is not None and head is not None:
        ir.convenience.replace_all_uses_with(head, embedding)
    tied = embedding or head
    assert tied is not None
    tied.name = EMBEDDING
    graph.initializers[EMBEDDING] = tied


def _name_nodes(graph: ir.Graph, task: str) -> None:
    """Name nodes after their modules, and values after their nodes. Drop the tracer's metadata, which contains paths."""
    used: dict[str, int] = {}
    keep = {id(value) for value in graph.outputs}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        # The last scope is the operation, the one before it is the module.
        scope = scopes[-2] if len(scopes) > 1 else ""
        scope = re.sub(r"^reference\.?", "model." if task == "encoder" else "", scope)
        name = f"{scope or 'graph'}/{node.op_type}"
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        for i, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in keep:
                value.name = f"{node.name}:{i}"
                # The tracer's symbols have no meaning outside; fixed sizes do.
                axes = value.shape or ()
                value.shape = ir.Shape([a if isinstance(a, int) else None for a in axes]) if axes else None
