"""The session of a bundle whose stages are Ray actors, on one node each if there are enough."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from glm4_runtime.bundle import Manifest
from glm4_runtime.cluster.identity import code_digest
from glm4_runtime.cluster.places import Places
from glm4_runtime.cluster.ray_module import require_ray
from glm4_runtime.cluster.stage_actor import RayStage, StageFacts, StageOptions, manifest_digest
from glm4_runtime.cluster.start import ensure_connected
from glm4_runtime.errors import BundleError
from glm4_runtime.session.staged import StagedSession


def open_stages(
    folder: Path,
    manifest: Manifest,
    max_seq_len: int,
    max_batch_size: int,
    *,
    provider: str | None,
    threads: int | None,
    verify: bool,
) -> "RayStagedSession":
    """Open each stage of a bundle on an actor: in the placement group of this actor, if there is one.

    Joins no cluster: if this process has none, a cluster starts on this machine.

    Raises:
        Glm4Error: a stage cannot be opened where it was placed.
    """
    with ExitStack() as held:  # what is freed at the end of the session
        if ensure_connected():
            held.callback(require_ray().shutdown)
        places = Places.of_this_actor() or Places(len(manifest.stages))
        held.callback(places.close)
        together = Counter(nodes := places.nodes())
        digest, folder = manifest_digest(folder), folder.resolve()
        stages = []
        for number, (stage, node) in enumerate(zip(manifest.stages, nodes, strict=True)):
            options = StageOptions(
                str(folder), digest, number, max_batch_size, provider, threads, together[node], verify
            )
            stages.append(RayStage(options, stage.layers, places.of(number)))
            held.callback(stages[-1].close)
        facts, pids = zip(*(stage.opened() for stage in stages), strict=True)
        _require_equal(facts)
        session = RayStagedSession(
            folder, manifest, max_seq_len, max_batch_size, stages, facts[0].provider, facts[0].kernels
        )
        session.pids, session.held = pids, held.pop_all()
    return session


def _require_equal(facts: Sequence[StageFacts]) -> None:
    """Raises :class:`BundleError` if a stage would compute with other code than the session and the first stage."""
    wanted = replace(facts[0], code=code_digest())
    for number, other in enumerate(facts, 1):
        if names := [name for name, value in vars(wanted).items() if getattr(other, name) != value]:
            raise BundleError(
                f"stage {number} differs from the session or the first stage in: {', '.join(names)}; "
                "give all nodes the same version of glm4-deploy and its packages"
            )


class RayStagedSession(StagedSession):
    """
    Attributes:
        pids: the process of each stage, on its node.
        held: frees the actors and their places.
    """

    pids: tuple[int, ...]
    held: ExitStack

    def close(self) -> None:
        super().close()
        self.held.close()
