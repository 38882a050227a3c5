"""The Ray actor of a stage, and the session's side of it."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm4_runtime.arrays import Ids
from glm4_runtime.bundle import MANIFEST, read_manifest
from glm4_runtime.cluster.identity import code_digest
from glm4_runtime.cluster.ray_module import require_ray
from glm4_runtime.errors import BundleError, Glm4Error, LostStageError
from glm4_runtime.kv_cache import Move
from glm4_runtime.opening import check_stage
from glm4_runtime.session.ort import cores
from glm4_runtime.session.ort_stage import StageGraphs
from glm4_runtime.session.stage import Hidden, Pending, Positions, Stage, Step


@dataclass(frozen=True)
class StageOptions:
    """
    Attributes:
        bundle: the folder, which must exist under this path on the stage's node, with the manifest and the files of
            the stage.
        manifest: SHA-256 of the manifest of the session.
        number: of the stage, from 0.
        rows: of its cache.
        provider: as for ``Session.open``.
        threads: None: the cores of the node, divided by ``together``.
        together: number of the session's stages on the node.
        verify: hash large files whole.
    """

    bundle: str
    manifest: str
    number: int
    rows: int
    provider: str | None
    threads: int | None
    together: int
    verify: bool


@dataclass(frozen=True)
class StageFacts:
    """What must be equal for all stages of a session, because the bits depend on it.

    Attributes:
        code: digest of the runtime's source files.
        provider: of ONNX Runtime.
        kernels: versions of everything that computes.
    """

    code: str
    provider: str
    kernels: dict[str, str]


def manifest_digest(folder: Path) -> str:
    """SHA-256 of the manifest, which has the hashes of all files."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


class StageActor:
    """Runs in a process of Ray's. Its calls run one after another, in the order in which the session made them."""

    def __init__(self, options: StageOptions) -> None:
        self._options = options

    def open(self) -> tuple[StageFacts, int]:
        """Open the stage; called once. Not in the constructor, whose errors Ray passes on as text only.

        Returns:
            What must be equal for all stages, and the process id.

        Raises:
            BundleError: the files of the stage are not those of the session's manifest.
        """
        options, folder = self._options, Path(self._options.bundle)
        manifest = read_manifest(folder)
        if manifest_digest(folder) != options.manifest:
            raise BundleError(
                f"{folder} is another export on the node of stage {options.number + 1} than on the node of the session; "
                "copy it again"
            )
        stage = manifest.stages[options.number]
        check_stage(folder, manifest, stage, hashes=options.verify)
        threads = options.threads or max(1, cores() // options.together)
        graphs = StageGraphs(folder, manifest, options.provider, threads)
        self._stage = graphs.open(stage, options.rows)
        return StageFacts(code_digest(), graphs.provider, graphs.kernels), os.getpid()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of :class:`OrtStage`."""
        return getattr(self._stage, method)(*arguments)


@dataclass(frozen=True)
class _Call:
    """A call that may still run; implements ``Pending``."""

    stage: "RayStage"
    reference: Any

    def result(self) -> Any:
        return self.stage.result_of(self.reference)


class RayStage(Stage):
    """A stage on an actor."""

    overlaps = True

    def __init__(self, options: StageOptions, layers: int, scheduling: Any) -> None:
        """Start an actor; returns at once. ``scheduling``: where, as Ray's option ``scheduling_strategy``."""
        self.layers, self._number = layers, options.number + 1
        kind = require_ray().remote(num_cpus=0, max_restarts=0, scheduling_strategy=scheduling)(StageActor)
        self._actor = kind.remote(options)
        self._opening = self._actor.open.remote()

    def opened(self) -> tuple[StageFacts, int]:
        """Wait until the stage is open.

        Returns:
            What must be equal for all stages, and the id of the actor's process.

        Raises:
            Glm4Error: the stage cannot be opened there, or the actor died.
        """
        try:
            found: tuple[StageFacts, int] = self.result_of(self._opening)
        except Glm4Error:
            raise
        except Exception as error:
            raise self._lost(error) from error
        return found

    def begin(self, values: Ids | Pending, step: Step) -> Pending:
        given = values.reference if isinstance(values, _Call) else values
        if not isinstance(given, np.ndarray) and given is values:  # of a stage that is no actor
            given = values.result()
        return self._begin("run", given, step)

    def run(self, values: Ids | Hidden, step: Step) -> Hidden:
        result: Hidden = self._call("run", values, step)
        return result

    def move(self, move: Move) -> None:
        self._call("move", move)

    def clear(self, row: int) -> None:
        self._call("clear", row)

    def resize(self, capacity: int, used: int) -> None:
        self._call("resize", capacity, used)

    def read(self, row: int, start: int, stop: int) -> Positions:
        block: Positions = self._call("read", row, start, stop)
        return block

    def write(self, row: int, start: int, block: Positions) -> None:
        self._call("write", row, start, block)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the actor or the whole cluster may be gone
            require_ray().kill(self._actor)

    def _begin(self, method: str, *arguments: Any) -> _Call:
        try:
            return _Call(self, self._actor.call.remote(method, *arguments))
        except Exception as error:  # Ray has no one base class for what it raises here
            raise self._lost(error) from error

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._begin(method, *arguments).result()

    def result_of(self, reference: Any) -> Any:
        """Wait for a call. Raises the error of the stage, or :class:`LostStageError`."""
        ray = require_ray()
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = _origin(error)
            if isinstance(cause, ray.exceptions.RayError):
                raise self._lost(cause) from error
            raise cause from None  # of a stage that is alive

    def _lost(self, cause: BaseException) -> LostStageError:
        """The actor's state is unknown, so it must not go on."""
        self.lost = True
        self.close()
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
        return LostStageError(
            f"stage {self._number} of the model is lost ({type(cause).__name__}: {lines[0][:200]}); open the bundle again"
        )


def _origin(error: BaseException) -> BaseException:
    """The error that a call raised first: of the actor, or of the call whose result it needed."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return error
