"""Our bundles, through the runtime's session."""

from benchmarks.peers.worker import Place
from glm4_deploy.bench import Runner
from glm4_runtime import Session


class Driver:
    def __init__(self, place: Place) -> None:
        session = Session.open(
            place.folder,
            max_seq_len=place.positions,
            max_batch_size=place.slots,
            threads=place.threads,
        )
        self._runner = Runner(session)

    def prefill(self, ids: list[int]) -> None:
        self._runner.empty()
        self._runner.prefill(ids)

    def fill(self, ids: list[int], batch: int) -> None:
        self._runner.empty()
        self._runner.fill(ids, batch)
        self._batch = batch

    def decode(self, steps: int) -> None:
        self._runner.decode(self._batch, steps)
