"""One side of a comparison, a layer at a time: the reference, or a bundle's graph.

Both hold one sequence of hidden states per text, and give logits for a range of positions, so that the whole
[positions, vocabulary] never exists. A bundle's graph is cut at the taps: each sub-block is a small graph of
the bundle's own nodes, run on what the bundle itself made so far and, on request, on what the reference made,
which tells a sub-block that computes something else from one that was handed an error.
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
from glm4_deploy.validate.drift import BlockError, compare
from glm4_deploy.validate.taps import EMBEDDING, HEAD, NORM, GraphTap, GraphTaps, run_tapped
from glm4_exporters import streamed
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.pieces import GraphPieces, Piece, Values
from glm4_runtime.bundle import Manifest

Sequences = Sequence[Sequence[int]]
SMOOTHING = ("int4", "int8-sq")  # precisions whose export may scale channels
SMOOTHED_NORMS = ("input_layernorm", "post_attention_layernorm")
Tapped = dict[str, tuple[npt.NDArray[np.float32], ...]]


@dataclass(frozen=True)
class Part:
    """Some positions of one of the sequences."""

    sequence: int
    span: slice


class Reference:
    """The checkpoint, in float32."""

    def __init__(self, checkpoint: Checkpoint, sequences: Sequences, tapped: bool) -> None:
        self._checkpoint, self._tapped = checkpoint, tapped
        self._layers = streamed.layers(checkpoint)
        self._attends = [streamed.full_attention(checkpoint.config, len(ids)) for ids in sequences]
        self._hidden: list[Tensor] = streamed.embed(checkpoint, sequences)

    @property
    def embedding(self) -> list[Tapped]:
        return [{EMBEDDING: (x.numpy(),)} for x in self._hidden]

    @torch.inference_mode()
    def layer(self) -> list[Tapped]:
        """Run the next layer; its taps per sequence, none where they are not asked for."""
        layer = next(self._layers)
        if not self._tapped:
            self._hidden = [layer(x, attend) for x, attend in zip(self._hidden, self._attends, strict=True)]
            return [{} for _ in self._hidden]
        self._hidden, taps = run_tapped(layer, self._hidden, self._attends)
        return [{name: tuple(x.numpy() for x in values) for name, values in one.items()} for one in taps]

    @torch.inference_mode()
    def norm(self) -> list[Tapped]:
        states = streamed.final_norm(self._checkpoint, self._hidden)
        return [{NORM: (x[None].numpy(),)} for x in states]

    @torch.inference_mode()
    def outputs(self, parts: Sequence[Part]) -> list[Logits]:
        """The task's outputs, [positions, outputs] for each part of a sequence."""
        return streamed.finish(
            self._checkpoint, [self._hidden[part.sequence][:, part.span] for part in parts]
        )


@dataclass(frozen=True)
class _Step:
    """One sub-block: where it is, its tap, and the nodes that make it."""

    layer: int | None
    tap: GraphTap
    piece: Piece


class BundleGraph:
    """A bundle's graph on ONNX Runtime's CPU provider."""

    def __init__(
        self, folder: Path, manifest: Manifest, checkpoint: Checkpoint, sequences: Sequences
    ) -> None:
        self._manifest, self._pieces = manifest, GraphPieces(folder)
        self.arithmetic = self._pieces.arithmetic
        smoothed = manifest.precision in SMOOTHING and self._is_smoothed(checkpoint)
        self._taps = GraphTaps(self._pieces.graph, checkpoint.config, smoothed)
        self._types = {tensor.name: tensor.data_type for tensor in self._pieces.graph.initializer}
        self._types |= {value.name: value.type.tensor_type.elem_type for value in self._pieces.graph.input}
        self._inputs = [graph_inputs(manifest, ids) for ids in sequences]
        self._own: list[Values] = [{} for _ in sequences]
        self._expected: list[Values] = [{} for _ in sequences]
        self._steps = self._plan()
        state, name = self._taps.norm.values[0], manifest.outputs[0].name
        self._head = self._pieces.slice(HEAD, [name], {state})
        self.head_arithmetic = self._arithmetic(self._head, {})
        self._readers = Counter(name for step in self._steps for name in step.piece.reads)

    def embed(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        return self._run(1, expected)

    def layer(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        """Run the next layer, and compare its taps with the reference's, which it uses up."""
        index = self._steps[0].layer
        return self._run(sum(step.layer == index for step in self._steps), expected)

    def norm(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        return self._run(1, None if self._taps.smoothed else expected)

    def outputs(self, parts: Sequence[Part], local: bool = False) -> list[Logits]:
        """As :meth:`Reference.outputs`; ``local``, of the reference's own final states."""
        name, state = self._manifest.outputs[0].name, self._taps.norm.values[0]
        states = self._expected if local else self._own
        values = []
        for part in parts:
            inputs, array = self._inputs[part.sequence], states[part.sequence][state][:, part.span]
            asked = {"logits_indices": np.arange(array.shape[1])[None]} if "logits_indices" in inputs else {}
            values.append({**inputs, **asked, state: array})
        found = values if name == state else self._pieces.run_piece(self._head, values)
        return [np.asarray(one[name], np.float32).reshape(-1, one[name].shape[-1]) for one in found]

    @property
    def can_be_local(self) -> bool:
        """Whether the head can be run on the reference's final states."""
        return bool(self._expected) and self._taps.norm.values[0] in self._expected[0]

    def _plan(self) -> list[_Step]:
        """Every tap in order, each made of those before it."""
        taps = [(None, self._taps.embedding), *_flat(self._taps.layers), (None, self._taps.norm)]
        known: set[str] = set()
        steps = []
        for layer, tap in taps:
            name = tap.tap if layer is None else f"layer {layer} {tap.tap}"
            steps.append(_Step(layer, tap, self._pieces.slice(name, tap.values, known)))
            known.update(tap.values)
        return steps

    def _run(self, count: int, expected: Sequence[Tapped] | None) -> list[BlockError]:
        errors = []
        for step in self._steps[:count]:
            tap, sides = step.tap, [*self._own, *([] if expected is None else self._expected)]
            inputs = self._inputs * (len(sides) // len(self._inputs))
            values = [{**given, **known} for given, known in zip(inputs, sides, strict=True)]
            found = self._pieces.run_piece(step.piece, values)
            drifted, local = found[: len(self._own)], found[len(self._own) :]
            if expected is not None:
                wanted = [self._as_in_graph(tap, one, drifted[0]) for one in expected]
                arithmetic = self._arithmetic(step.piece, drifted[0])
                drift, own_error = compare(wanted, drifted), compare(wanted, local)
                errors.append(BlockError(step.layer, tap.tap, tap.covers, arithmetic, drift, own_error))
                for known, new in zip(self._expected, wanted, strict=True):
                    known.update(new)
            for known, new in zip(self._own, drifted, strict=True):
                known.update(new)
            self._forget(step.piece)
        del self._steps[:count]
        return errors

    def _forget(self, piece: Piece) -> None:
        """Drop the values that no later sub-block reads."""
        for name in piece.reads:
            self._readers[name] -= 1
            if not self._readers[name] and name not in self._taps.norm.values:
                for known in (*self._own, *self._expected):
                    known.pop(name, None)

    def _arithmetic(self, piece: Piece, values: Values) -> str:
        given = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in values.items()}
        return arithmetic_of(piece.nodes, self._types | given)

    def _is_smoothed(self, checkpoint: Checkpoint) -> bool:
        """Whether channels are scaled between norms and matrices, which shows in the norms' weights."""
        layers = range(checkpoint.config.num_hidden_layers)
        for name in (f"model.layers.{i}.{norm}.weight" for i in layers for norm in SMOOTHED_NORMS):
            own = self._pieces.read(name).astype(np.float32)
            expected = checkpoint.read(checkpoint.name_of(name)).float().numpy()
            if np.mean(np.abs(own - expected) > 0.01 * np.abs(expected)) > 0.5:
                return True
        return False

    def _as_in_graph(self, tap: GraphTap, expected: Tapped, like: Values) -> Values:
        """The reference's values by the graph's names, in its types and of its scale; they are used up."""
        arrays = expected.pop(tap.tap)
        scaled = [array * np.float32(2.0**-tap.bits) if tap.bits else array for array in arrays]
        return {
            name: array.astype(like[name].dtype, copy=False)
            for name, array in zip(tap.values, scaled, strict=True)
        }


def _flat(layers: Sequence[Sequence[GraphTap]]) -> Iterator[tuple[int, GraphTap]]:
    for index, taps in enumerate(layers):
        for tap in taps:
            yield index, tap
