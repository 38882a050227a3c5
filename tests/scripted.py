"""A scheduler that answers from a script: replies that a tiny model would never give, at a pace that a test sets."""

import queue
import threading
import time

from glm4_runtime.generate import Token
from glm4_runtime.scheduler import Generated, SchedulerStats, Started


class ScriptedTicket:
    def __init__(self):
        self.cancelled = threading.Event()

    held = lagging = False  # a script goes on whoever reads

    def cancel(self):
        self.cancelled.set()

    def hold(self):
        """The script knows its end."""


class ScriptedScheduler:
    """Each request is answered by the next of ``replies``: a list of texts, one a token; an exception is raised by
    ``submit``, and an event is passed on as it is. A text of None waits until :attr:`go` is set.

    Attributes:
        requests, tickets: of every submission that was taken.
    """

    def __init__(self, *replies, token_ids=None):
        self.replies = list(replies)
        self.token_ids = token_ids or {}
        self.requests, self.tickets = [], []
        self.go = threading.Event()
        self.stopped_after = None
        self._work = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()

    def submit(self, request, on_event):
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        self.requests.append(request)
        self.tickets.append(ScriptedTicket())
        self._work.put((request, reply, on_event, self.tickets[-1]))
        return self.tickets[-1]

    def stop(self, drain=None):
        self.stopped_after = drain
        self._work.put(None)
        self._thread.join()

    def stats(self):
        return SchedulerStats(1, 2, 4, 50, 20, 30, 8, 6, {"stop": 3}, 9, 0.5, 0.25)

    def stats_by_replica(self):
        return {}

    ready = True

    def _run(self):
        while (item := self._work.get()) is not None:
            self._play(*item)

    def _play(self, request, reply, on_event, ticket):
        if not isinstance(reply, list):
            on_event(reply)
            return
        on_event(Started(cached_tokens=3, prompt_tokens=len(request.prompt_ids)))
        texts = [text for text in reply if text is not None]
        last = len(texts) - 1
        done = -1
        for text in reply:
            if text is None:
                while not self.go.wait(0.01) and not ticket.cancelled.is_set():
                    pass
                continue
            if ticket.cancelled.is_set():
                return
            if not isinstance(text, str):
                on_event(text)
                return
            done += 1
            token = Token(self.token_ids.get(text, 0), text, -0.5, "stop" if done == last else None)
            on_event(Generated(token, ((0, -0.5), (1, -1.5))[: request.top_logprobs]))
            time.sleep(0)
