"""One side of a comparison, a layer at a time: the reference, or a bundle's graph.

Both hold one sequence of hidden states per text, and give logits for a range of positions, so that the whole
[positions, vocabulary] never exists. A bundle's graph is cut at the taps: each sub-block is a small graph of
the bundle's own nodes, run on what the bundle itself made so far and, on request, on what the reference made,
which tells a sub-block that computes something else from one that was handed an error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glm4_deploy.metrics import ROWS, Logits
from glm4_deploy.parity import graph_inputs
from glm4_deploy.validate.taps import EMBEDDING, HEAD, NORM, GraphTap, GraphTaps, run_tapped
from glm4_exporters import streamed
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.pieces import GraphPieces, Piece, Values
from glm4_runtime.bundle import Manifest

Sequences = Sequence[Sequence[int]]
Tapped = Mapping[str, tuple[npt.NDArray[np.float32], ...]]


@dataclass(frozen=True)
class Error:
    """How far values are from the reference's over all positions; ``worst`` is the position that is furthest.

    Relative errors are norms of the difference over norms of the reference.
    """

    relative: float
    cosine: float
    worst: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.relative, self.cosine, self.worst)))


@dataclass(frozen=True)
class BlockError:
    """A sub-block's error: ``drift`` of the bundle's own run, ``local`` when it reads what the reference made."""

    layer: int | None  # None outside of the layers
    block: str
    covers: tuple[str, ...]
    drift: Error
    local: Error | None

    @property
    def name(self) -> str:
        where = self.block if self.layer is None else f"layer {self.layer} {self.block}"
        return f"{where} (with {', '.join(self.covers)})" if self.covers else where


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
    def outputs(self, spans: Sequence[slice]) -> list[Logits]:
        """The task's outputs at a span of positions per sequence, [positions, outputs]."""
        parts = [x[:, span] for x, span in zip(self._hidden, spans, strict=True)]
        return streamed.finish(self._checkpoint, parts)


class BundleGraph:
    """A bundle's graph on ONNX Runtime's CPU provider."""

    def __init__(
        self, folder: Path, manifest: Manifest, checkpoint: Checkpoint, sequences: Sequences
    ) -> None:
        self._manifest, self._pieces = manifest, GraphPieces(folder)
        self.arithmetic = self._pieces.arithmetic
        self._taps = GraphTaps(self._pieces.graph, checkpoint.config, is_smoothed(manifest))
        self._inputs = [graph_inputs(manifest, ids) for ids in sequences]
        self._own: list[Values] = [{} for _ in sequences]
        self._expected: list[Values] = [{} for _ in sequences]
        self._next = 0

    def embed(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        return self._run([self._taps.embedding], None, expected)

    def layer(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        """Run the next layer, and compare its taps with the reference's."""
        index, self._next = self._next, self._next + 1
        before = [set(own) for own in self._own]
        errors = self._run(self._taps.layers[index], index, expected)
        for values in (self._own, self._expected):
            for one, old in zip(values, before, strict=True):
                for name in old & one.keys():
                    del one[name]
        return errors

    def norm(self, expected: Sequence[Tapped] | None) -> list[BlockError]:
        comparable = None if self._taps.smoothed else expected
        errors = self._run([self._taps.norm], None, comparable)
        keep = self._taps.norm.values[0]
        self._own = [{keep: own[keep]} for own in self._own]
        self._expected = [{keep: known[keep]} for known in self._expected if keep in known]
        return errors

    def outputs(self, spans: Sequence[slice], local: bool = False) -> list[Logits]:
        """As :meth:`Reference.outputs`; ``local``, of the reference's own final states."""
        name, state = self._manifest.outputs[0].name, self._taps.norm.values[0]
        values = []
        for inputs, own, span in zip(
            self._inputs, self._expected if local else self._own, spans, strict=True
        ):
            part = own[state][:, span]
            asked = {"logits_indices": np.arange(part.shape[1])[None]} if "logits_indices" in inputs else {}
            values.append({**inputs, **asked, state: part})
        if name == state:
            found = values
        else:
            found = self._pieces.run_piece(self._pieces.slice(HEAD, [name], {state}), values)
        return [np.asarray(one[name], np.float32).reshape(-1, one[name].shape[-1]) for one in found]

    @property
    def can_be_local(self) -> bool:
        """Whether the head can be run on the reference's final states."""
        return bool(self._expected) and self._taps.norm.values[0] in self._expected[0]

    def _run(
        self, taps: Sequence[GraphTap], layer: int | None, expected: Sequence[Tapped] | None
    ) -> list[BlockError]:
        errors = []
        for tap in taps:
            piece = self._pieces.slice(
                tap.tap if layer is None else f"layer {layer} {tap.tap}", tap.values, self._own[0].keys()
            )
            drifted = self._execute(piece, self._own)
            local = None if expected is None else self._execute(piece, self._expected)
            for own, new in zip(self._own, drifted, strict=True):
                own.update(new)
            if expected is not None and local is not None:
                wanted = [self._as_in_graph(tap, one, drifted[0]) for one in expected]
                errors.append(
                    BlockError(layer, tap.tap, tap.covers, compare(wanted, drifted), compare(wanted, local))
                )
                for known, values in zip(self._expected, wanted, strict=True):
                    known.update(values)
        return errors

    def _execute(self, piece: Piece, known: Sequence[Values]) -> list[Values]:
        values = [{**inputs, **one} for inputs, one in zip(self._inputs, known, strict=True)]
        return self._pieces.run_piece(piece, values)

    def _as_in_graph(self, tap: GraphTap, expected: Tapped, like: Values) -> Values:
        """The reference's values by the graph's names, in its types and of its scale."""
        return {
            name: (array * 2.0**-tap.bits).astype(like[name].dtype)
            for name, array in zip(tap.values, expected[tap.tap], strict=True)
        }


def is_smoothed(manifest: Manifest) -> bool:
    """Whether channels between a norm and a matrix may be scaled, which the product undoes."""
    return manifest.precision in ("int8-sq", "int4")


def compare(wanted: Sequence[Values], found: Sequence[Values]) -> Error:
    """Over all sequences and all values of a tap."""
    total = ErrorSum()
    for one, two in zip(wanted, found, strict=True):
        for name, array in one.items():
            total.add(array, two[name])
    return total.error()


class ErrorSum:
    """The error of values that come in parts, summed in float64."""

    def __init__(self) -> None:
        self._square = self._other = self._dot = self._difference = 0.0
        self._positions: list[npt.NDArray[np.float64]] = []

    def add(self, wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
        """Values [..., channels] of some positions."""
        a = wanted.reshape(-1, wanted.shape[-1])
        b = found.reshape(a.shape)
        for at in range(0, len(a), ROWS):
            x, y = a[at : at + ROWS].astype(np.float64), b[at : at + ROWS].astype(np.float64)
            square, difference = (x * x).sum(-1), ((y - x) ** 2).sum(-1)
            self._square += float(square.sum())
            self._other += float((y * y).sum())
            self._dot += float((x * y).sum())
            self._difference += float(difference.sum())
            self._positions.append(np.stack((difference, square)))

    def error(self) -> Error:
        """A position that is nearly zero itself is held against a hundredth of the mean, not against itself."""
        difference, square = np.concatenate(self._positions, axis=-1)
        floor = max(1e-4 * float(square.mean()), 1e-300)
        return Error(
            relative=math.sqrt(self._difference / max(self._square, 1e-300)),
            cosine=self._dot / max(math.sqrt(self._square * self._other), 1e-300),
            worst=math.sqrt(float((difference / np.maximum(square, floor)).max())),
        )
