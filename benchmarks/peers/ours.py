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
        self._session, self._runner = session, Runner(session)

    def prefill(self, ids: list[int]) -> None:
        self._runner.empty()
        self._runner.prefill(ids)

    def fill(self, ids: list[int], batch: int) -> None:
        self._runner.empty()
        self._runner.fill(ids, batch)
        self._batch = batch

    def spread(self, batch: int) -> None:
        for slot in range(1, batch):
            self._session.release(slot)
            self._session.copy_prefix(0, slot, self._session.length(0))
        self._batch = batch

    def decode(self, steps: int) -> None:
        self._runner.decode(self._batch, steps)
