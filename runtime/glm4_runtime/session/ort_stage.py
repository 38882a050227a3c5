"""Stages on ONNX Runtime's CPU provider, all in this process."""

from pathlib import Path
from typing import Any

import numpy as np

from glm4_runtime.arrays import Ids
from glm4_runtime.bundle import Manifest, StageInfo
from glm4_runtime.bundle.graph_io import stage_io
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.bound_rows import BoundRows, Ends
from glm4_runtime.session.memory import HostMemory
from glm4_runtime.session.ort import (
    Graphs,
    choose_provider,
    failed_step,
    kernels_of,
    load_onnxruntime,
    session_options,
)
from glm4_runtime.session.stage import Hidden, Positions, Stage, Step
from glm4_runtime.session.staged import StagedSession


def open_stages(
    folder: Path,
    manifest: Manifest,
    max_seq_len: int,
    max_batch_size: int,
    *,
    provider: str | None,
    threads: int | None,
) -> StagedSession:
    """Open all stages of a bundle in this process; they run one after another.

    Raises:
        BundleError: a graph cannot be opened. UnavailableError: ONNX Runtime is not installed.
    """
    graphs = StageGraphs(folder, manifest, provider, threads)
    stages = [graphs.open(stage, max_batch_size) for stage in manifest.stages]
    session = StagedSession(
        folder, manifest, max_seq_len, max_batch_size, stages, graphs.provider, graphs.kernels
    )
    session.skipped = graphs.skipped
    return session


class StageGraphs:
    """Opens stages of a bundle.

    Attributes:
        provider: in use; ``skipped`` says by name why others are not used.
        kernels: versions of everything that computes keys and values.
    """

    def __init__(self, folder: Path, manifest: Manifest, provider: str | None, threads: int | None) -> None:
        """Raises :class:`UnavailableError` if ONNX Runtime is not installed."""
        ort = load_onnxruntime()
        self.provider, self.skipped = choose_provider(manifest, ort.get_available_providers(), provider)
        self.kernels = kernels_of(ort, manifest, self.provider)
        options = session_options(ort, manifest, threads)
        # Otherwise the threads of a stage that has just run would spin on the cores of the next stage.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._graphs, self._manifest = Graphs(ort, folder, options, self.provider), manifest

    def open(self, stage: StageInfo, rows: int) -> "OrtStage":
        """``rows``: of its cache. Raises :class:`BundleError`."""
        return OrtStage(self._graphs, self._manifest, stage, rows)


class OrtStage(Stage):
    """A stage whose graph and cache are in this process.

    Args:
        rows: of its cache.
    """

    def __init__(self, graphs: Graphs, manifest: Manifest, stage: StageInfo, rows: int) -> None:
        self.layers = stage.layers
        layers = range(stage.first_layer, stage.first_layer + stage.layers)
        io = stage_io(manifest.model, str(manifest.kv_cache), manifest.activations, stage)
        result, is_last = io.outputs[0], layers.stop == manifest.model.num_layers
        self._ends = Ends(io.inputs[0].name, result.name, is_last)
        self._width, self._type = int(result.shape[-1]), np.dtype(result.dtype)
        self._session: Any = graphs.open(stage.graph)
        self._cache = HostMemory(manifest, rows, layers)
        self._bindings: dict[tuple[int, int], BoundRows] = {}

    def run(self, values: Ids | Hidden, step: Step) -> Hidden:
        rows = self._bound_rows(step.first_row, len(values))
        result = rows.write(values, step.past, step.logits_indices)
        try:
            self._session.run_with_iobinding(rows.binding)
        except Exception as error:
            raise failed_step(error) from error
        if values.shape[1] > 1:  # hidden states of a chunk are large
            rows.forget()
        return result

    def _bound_rows(self, first_row: int, count: int) -> BoundRows:
        key = first_row, count
        if key not in self._bindings:
            binding = self._session.io_binding()
            self._bindings[key] = BoundRows(
                binding, self._cache, *key, "cpu", self._new_result, ends=self._ends
            )
        return self._bindings[key]

    def _new_result(self, positions: tuple[int, int]) -> Hidden:
        return np.empty((*positions, self._width), self._type)

    def move(self, move: Move) -> None:
        self._cache.move(move)

    def clear(self, row: int) -> None:
        self._cache.clear(row)

    def resize(self, capacity: int, used: int) -> None:
        self._bindings.clear()
        self._cache.resize(capacity, used)

    def read(self, row: int, start: int, stop: int) -> Positions:
        return self._cache.read(row, start, stop)

    def write(self, row: int, start: int, block: Positions) -> None:
        self._cache.write(row, start, block)

    def close(self) -> None:
        self._bindings.clear()
        self._cache.free()
        self._session = None
