"""The walk: runs every layer of the reference and of the bundles, then the logits of a few positions at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm4_deploy.metrics import Logits
from glm4_deploy.validate.comparison import NO_TARGET, Comparison
from glm4_deploy.validate.drift import BlockError, ErrorSum
from glm4_deploy.validate.memory import chunk_of_positions
from glm4_deploy.validate.taps import HEAD_TAP
from glm4_deploy.validate.text import Text
from glm4_deploy.validate.walk import BundleGraph, Reference, SequencePart
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle import Manifest
from glm4_runtime.progress import Progress

COMPARE_STAGE = "compare"


@dataclass(frozen=True)
class Bundle:
    """``adapter``: the folder of a LoRA adapter that the bundle applies at run time."""

    folder: Path
    manifest: Manifest
    adapter: str | None = None


@dataclass(frozen=True)
class Models:
    """The models of one comparison.

    Attributes:
        checkpoint: the reference.
        bundles: the bundle, and a second one if there is one.
        original: the checkpoint before its quantization.
    """

    checkpoint: Checkpoint
    bundles: Sequence[Bundle]
    original: Checkpoint | None = None

    @property
    def task(self) -> str:
        return self.checkpoint.task


@dataclass(frozen=True)
class Walked:
    """Results of the walk that are not in the comparisons; ``arithmetic`` is per bundle."""

    blocks: list[BlockError]
    arithmetic: list[str]


def walk(
    models: Models, text: Text, layers: bool, comparisons: Sequence[Comparison], progress: Progress
) -> Walked:
    """Run all models over the text. With ``layers``, also compare every sub-block of the first bundle."""
    checkpoint, original, sequences = models.checkpoint, models.original, text.sequences
    graphs = [
        BundleGraph(one.folder, one.manifest, checkpoint, sequences, one.adapter) for one in models.bundles
    ]
    reference = Reference(checkpoint, sequences, tapped=layers)
    chunks = list(_chunks(checkpoint, text))
    unquantized = None if original is None else Reference(original, sequences, tapped=False)
    count = 1 + len(graphs) + (unquantized is not None)
    step = _Steps(progress, (checkpoint.config.num_hidden_layers + len(chunks)) * count)

    blocks = []
    for graph in graphs:
        blocks += graph.embed(reference.embedding if layers and graph is graphs[0] else None)
    for _ in range(checkpoint.config.num_hidden_layers):
        taps = reference.layer()
        step()
        if unquantized is not None:
            unquantized.layer()
            step()
        for graph in graphs:
            blocks += graph.layer(taps if layers and graph is graphs[0] else None)
            step()
    for graph in graphs:
        blocks += graph.norm(reference.norm() if layers and graph is graphs[0] else None)

    head = _HeadErrors(graphs[0]) if layers else None
    for chunk in chunks:
        expected = reference.outputs(chunk)
        step()
        outputs = {"reference": expected}
        if unquantized is not None:
            outputs["original"] = unquantized.outputs(chunk)
            step()
        for name, graph in zip(("bundle", "against"), graphs, strict=False):
            outputs[name] = graph.outputs(chunk)
            step()
        if head is not None:
            head.add(chunk, expected, outputs["bundle"])
        _add(comparisons, chunk, text, outputs)
    if head is not None:
        blocks.append(head.error())
    return Walked(blocks, [graph.arithmetic for graph in graphs])


class _Steps:
    """Counts steps for progress; a layer of any model costs about the same."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress(COMPARE_STAGE, 0, total)

    def __call__(self) -> None:
        self._done += 1
        self._progress(COMPARE_STAGE, self._done, self._total)


class _HeadErrors:
    """The last sub-block: drift of the outputs, and the head's own error."""

    def __init__(self, graph: BundleGraph) -> None:
        self._graph, self._drift, self._local = graph, ErrorSum(), ErrorSum()

    def add(
        self, chunk: Sequence[SequencePart], expected: Sequence[Logits], actual: Sequence[Logits]
    ) -> None:
        for wanted, own, found in zip(expected, actual, self._graph.outputs(chunk, local=True), strict=True):
            self._drift.add(wanted, own)
            self._local.add(wanted, found)

    def error(self) -> BlockError:
        return BlockError(
            None, HEAD_TAP, (), self._graph.head_arithmetic, self._drift.error(), self._local.error()
        )


def _chunks(checkpoint: Checkpoint, text: Text) -> Iterator[list[SequencePart]]:
    """Parts of the sequences whose logits fit into memory together; other tasks' outputs are small."""
    if checkpoint.task != "causal-lm":
        yield [SequencePart(number, slice(0, len(ids))) for number, ids in enumerate(text.sequences)]
        return
    most, first = chunk_of_positions(checkpoint.config), max(0, text.prefix - 1)
    parts: list[SequencePart] = []
    room = most
    for number, ids in enumerate(text.sequences):
        start = first
        while start < len(ids):
            count = min(room, len(ids) - start)
            parts.append(SequencePart(number, slice(start, start + count)))
            start, room = start + count, room - count
            if not room:
                yield parts
                parts, room = [], most
    if parts:
        yield parts


def _add(
    comparisons: Sequence[Comparison],
    chunk: Sequence[SequencePart],
    text: Text,
    outputs: dict[str, list[Logits]],
) -> None:
    for comparison in comparisons:
        sides = outputs[comparison.expected], outputs[comparison.actual]
        for part, expected, actual in zip(chunk, *sides, strict=True):
            ids = [*text.sequences[part.sequence], NO_TARGET]
            index = np.arange(part.span.start, part.span.stop)
            comparison.add(part.sequence, index, np.array(ids)[index + 1], expected, actual)
