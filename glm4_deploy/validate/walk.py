"""Runs one side of a comparison layer by layer: the reference, or a bundle's graph.

Both keep the hidden states of each sequence, and compute logits for a range of positions, so that the whole
[positions, vocabulary] never exists. A bundle's graph is cut at the taps: each sub-block is a small graph of the
bundle's own nodes. It runs on the bundle's own values and, on request, on the reference's values. The second run
shows whether the sub-block itself is wrong, or only its input.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from glm4_deploy.metrics import Logits
from glm4_deploy.parity import graph_inputs
from glm4_deploy.validate.bands import arithmetic_of
from glm4_deploy.validate.drift import BlockError
from glm4_deploy.validate.readers import Readers
from glm4_deploy.validate.readings import Block, Readings
from glm4_deploy.validate.taps import EMBEDDING_TAP, HEAD_TAP, NORM_TAP, GraphTap, GraphTaps, run_tapped
from glm4_exporters import streamed
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.passes.add_adapters import PREFIX
from glm4_exporters.pieces import GraphPieces, Piece, Values
from glm4_runtime.bundle import GRAPH, Manifest
from glm4_runtime.bundle.adapter_inputs import ROWS
from glm4_runtime.bundle.file_names import ADAPTER_GRAPH
from glm4_runtime.session.adapters import make_table

Sequences = Sequence[Sequence[int]]
Tapped = dict[str, tuple[npt.NDArray[np.float32], ...]]


@dataclass(frozen=True)
class SequencePart:
    """Some positions of one of the sequences."""

    sequence: int
    span: slice


class Reference:
    """The checkpoint, in float32."""

    def __init__(self, checkpoint: Checkpoint, sequences: Sequences, tapped: bool) -> None:
        self._checkpoint, self._tapped = checkpoint, tapped
        self._layers = streamed.layers(checkpoint)
        self._attends = [streamed.full_attention(checkpoint.config, len(ids)) for ids in sequences]
        self._hidden: list[Tensor] = streamed.embed_sequences(checkpoint, sequences)

    @property
    def embedding(self) -> list[Tapped]:
        return [{EMBEDDING_TAP: (x.numpy(),)} for x in self._hidden]

    @torch.inference_mode()
    def layer(self) -> list[Tapped]:
        """Run the next layer; returns its taps per sequence, or none if not requested."""
        layer = next(self._layers)
        if not self._tapped:
            self._hidden = [layer(x, attend) for x, attend in zip(self._hidden, self._attends, strict=True)]
            return [{} for _ in self._hidden]
        self._hidden, taps = run_tapped(layer, self._hidden, self._attends)
        return [{name: tuple(x.numpy() for x in values) for name, values in one.items()} for one in taps]

    @torch.inference_mode()
    def norm(self) -> list[Tapped]:
        states = streamed.final_norm(self._checkpoint, self._hidden)
        return [{NORM_TAP: (x[None].numpy(),)} for x in states]

    @torch.inference_mode()
    def outputs(self, parts: Sequence[SequencePart]) -> list[Logits]:
        """The task's outputs, [positions, outputs] for each part of a sequence."""
        return streamed.finish(
            self._checkpoint, [self._hidden[part.sequence][:, part.span] for part in parts]
        )


@dataclass(frozen=True)
class _Step:
    """One sub-block: its layer, its tap and its nodes."""

    layer: int | None
    tap: GraphTap
    piece: Piece


class BundleGraph:
    """A bundle's graph on ONNX Runtime's CPU provider.

    Attributes:
        readings: the reference's values, if given, in the graph's scale.
        head_arithmetic: the numbers that the head computes with; float32 until it has run.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        checkpoint: Checkpoint,
        sequences: Sequences,
        adapter: str | None = None,
    ) -> None:
        """``adapter``: the folder of a LoRA adapter that the graph takes at run time."""
        graph, adapters = (
            (GRAPH, {}) if adapter is None else (ADAPTER_GRAPH, _adapter_inputs(manifest, adapter))
        )
        self._manifest, self._pieces = manifest, GraphPieces(folder, graph)
        self.arithmetic = self._pieces.arithmetic
        self._taps = GraphTaps(self._pieces.graph, checkpoint.config)
        self._types = {tensor.name: tensor.data_type for tensor in self._pieces.graph.initializer}
        self._types |= {value.name: value.type.tensor_type.elem_type for value in self._pieces.graph.input}
        self._inputs = [{**graph_inputs(manifest, ids), **adapters} for ids in sequences]
        self._own: list[Values] = [{} for _ in sequences]
        readers = Readers(self._pieces, self._taps, checkpoint)
        self.readings = Readings(checkpoint.config, len(sequences), readers.undone)
        self._steps = self._plan()
        state, name = self._taps.norm.values[0], manifest.outputs[0].name
        product = _product_of_head(self._pieces.graph) or name
        self._head = self._pieces.slice(HEAD_TAP, [product], {state})
        # the head runs in blocks of rows, and an adapter's matrices are not cut with it
        self._after_head = self._pieces.slice("adapter of the head", [name], {state, product})
        self.head_arithmetic = "float32"
        self._readers = Counter(name for step in self._steps for name in step.piece.reads)

    def embed(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        return self._run(1, expected)

    def layer(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        """Run the next layer, and compare its taps with the reference's, which are consumed."""
        index = self._steps[0].layer
        return self._run(sum(step.layer == index for step in self._steps), expected)

    def norm(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        """Run the final norm."""
        return self._run(1, expected)

    def outputs(self, parts: Sequence[SequencePart], local: bool = False) -> list[Logits]:
        """As :meth:`Reference.outputs`; with ``local``, of the reference's final states."""
        name, state = self._manifest.outputs[0].name, self._taps.norm.values[0]
        states = self.readings.known if local else self._own
        values = []
        for part in parts:
            inputs, array = self._inputs[part.sequence], states[part.sequence][state][:, part.span]
            asked = {"logits_indices": np.arange(array.shape[1])[None]} if "logits_indices" in inputs else {}
            values.append({**inputs, **asked, state: array})
        nodes = (*self._head.nodes, *self._after_head.nodes)
        self.head_arithmetic = self._arithmetic(Piece(HEAD_TAP, nodes), {state: states[0][state]})
        found = values if name == state else self._pieces.run_piece(self._head, values)
        if name != state and self._after_head.nodes:
            joined = [{**one, **given} for one, given in zip(found, values, strict=True)]
            found = self._pieces.run_piece(self._after_head, joined)
        return [np.asarray(one[name], np.float32).reshape(-1, one[name].shape[-1]) for one in found]

    def _plan(self) -> list[_Step]:
        """Every tap in order, each computed from earlier ones."""
        taps = [(None, self._taps.embedding), *_flat(self._taps.layers), (None, self._taps.norm)]
        known: set[str] = set()
        steps = []
        for layer, tap in taps:
            name = tap.tap if layer is None else f"layer {layer} {tap.tap}"
            steps.append(_Step(layer, tap, self._pieces.slice(name, tap.values, known)))
            known.update(tap.values)
        return steps

    def _run(self, count: int, expected: Sequence[Tapped] | None) -> list[BlockError]:
        """Run the next sub-blocks; their errors, where the reference's values are given, which are used up."""
        errors = []
        for step in self._steps[:count]:
            own, found = self._run_piece(step.piece, local=expected is not None)
            if expected is not None:
                reference = [one.pop(step.tap.tap) for one in expected]
                block = Block(step.layer, step.tap, self._arithmetic(step.piece, own[0]), reference)
                errors.append(self.readings.add(block, own, found))
            for known, new in zip(self._own, own, strict=True):
                known.update(new)
            self._forget(step.piece)
        del self._steps[:count]
        return errors

    def _run_piece(self, piece: Piece, local: bool) -> tuple[list[Values], list[Values]]:
        """What a piece gives per sequence: of the bundle's own values and, if ``local``, of the reference's."""
        sides = [self._own, *([self.readings.known] if local else [])]
        values = [
            {**given, **known} for side in sides for given, known in zip(self._inputs, side, strict=True)
        ]
        found, count = self._pieces.run_piece(piece, values), len(self._inputs)
        return found[:count], found[count:]

    def _forget(self, piece: Piece) -> None:
        """Drop the values that no later sub-block reads."""
        for name in piece.reads:
            self._readers[name] -= 1
            if not self._readers[name] and name not in self._taps.norm.values:
                self.readings.forget(name)
                for known in self._own:
                    known.pop(name, None)

    def _arithmetic(self, piece: Piece, values: Values) -> str:
        given = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in values.items()}
        return arithmetic_of(piece.nodes, self._types | given)


def _adapter_inputs(manifest: Manifest, folder: str) -> Values:
    """The inputs of the graph with adapters, for one sequence with the adapter in ``folder``."""
    assert manifest.adapter_slots is not None
    table = make_table(manifest, manifest.adapter_slots)
    table.load(folder, Path(folder))
    return {ROWS: table.numbers([folder]), **table.arrays}


def _product_of_head(graph: onnx.GraphProto) -> str | None:
    """The result of the head's product, to which an adapter's change is added. None: the head takes no adapter."""
    added = {f"lm_head/{PREFIX}LoraProduct": 1, f"lm_head/{PREFIX}Add": 0}
    found = next((node for node in graph.node if node.name in added), None)
    return None if found is None else str(found.input[added[found.name]])


def _flat(layers: Sequence[Sequence[GraphTap]]) -> Iterator[tuple[int, GraphTap]]:
    for index, taps in enumerate(layers):
        for tap in taps:
            yield index, tap
