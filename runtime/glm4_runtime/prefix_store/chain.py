"""The pieces of one sequence, and their reading ahead."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from glm4_runtime.prefix_store.piece import TOKENS, Block, Tokens

_AHEAD = 4  # pieces that are being read or wait to be taken


@dataclass(frozen=True, eq=False)
class Chain:
    """The whole pieces of a sequence.

    Attributes:
        folder: of the group.
        ids: the sequence's tokens, int32.
        names: the file name of each piece.
    """

    facts: str
    folder: Path
    ids: Tokens
    names: list[str]
    began_ns: int

    def path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def ids_of(self, index: int) -> Tokens:
        """All tokens up to the end of a piece."""
        return self.ids[: (index + 1) * TOKENS]

    def used_ns(self, index: int) -> int:
        """The time of use that a piece gets: later pieces get an earlier time, because they are useless without the
        pieces before them, and so must go first."""
        return self.began_ns - index * 1000


class Reading:
    """Pieces of a chain in order, read by other threads."""

    def __init__(
        self,
        threads: Executor,
        read: Callable[[int], Block | None],
        indices: Iterable[int],
        wake: Callable[[], None],
    ) -> None:
        self._threads, self._read, self._wake = threads, read, wake
        self._rest = deque(indices)
        self._running: deque[Future[Block | None]] = deque()
        self._refill()

    @property
    def ready(self) -> bool:
        """Whether :meth:`take` returns at once."""
        return not self._running or self._running[0].done()

    @property
    def ended(self) -> bool:
        return not self._running

    def take(self) -> Block | None:
        """The next piece. None: it could not be read, and the reading ends."""
        block = self._running.popleft().result()
        if block is None:
            self.close()
        else:
            self._refill()
        return block

    def close(self) -> None:
        """Read no more."""
        self._rest.clear()
        while self._running:
            self._running.popleft().cancel()

    def _refill(self) -> None:
        while self._rest and len(self._running) < _AHEAD:
            future = self._threads.submit(self._read, self._rest.popleft())
            self._running.append(future)
            future.add_done_callback(lambda _: self._wake())
