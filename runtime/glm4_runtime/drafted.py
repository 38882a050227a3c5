"""Generation of one sequence at a time with a draft model, by a scheduler on its own thread."""

import queue
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Self

from glm4_runtime.generate import Token
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Scheduler, Started
from glm4_runtime.session import Session


class DraftedGeneration:
    """Runs on ``session`` until the end of the ``with`` block, which closes ``draft`` too.

    Attributes:
        cached_tokens: tokens of the last prompt that came from the cache.
    """

    def __init__(self, session: Session, draft: Session, store: PrefixStore | None = None) -> None:
        self._session = session
        self._scheduler = Scheduler(session, draft=draft, store=store)
        self._scheduler.start()
        self.cached_tokens = 0

    def generate(self, ids: Sequence[int], params: SamplingParams) -> Generator[Token, None, None]:
        """The tokens after a prompt: those of :meth:`Session.generate`. Closing the generator ends the request.

        Raises:
            Glm4Error: the request cannot be served, or failed.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = Request(tuple(ids), params, logprobs=False, adapter=self._session.adapter)
        ticket = self._scheduler.submit(request, events.put)
        try:
            while True:
                event = events.get()
                match event:
                    case Failed(error):
                        raise error
                    case Started():
                        self.cached_tokens = event.cached_tokens
                    case Generated():
                        yield event.token
                if event.last:
                    return
        finally:
            ticket.cancel()

    @property
    def figures(self) -> tuple[int, int]:
        """The number of drafted tokens, and how many of them were right."""
        stats = self._scheduler.stats()
        return stats.drafted_tokens, stats.accepted_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler.stop(0)
