"""Stages that run on threads of this process as if they were on other machines: what crosses their border is pickled."""

import pickle
from concurrent.futures import Future, ThreadPoolExecutor

from glm4_runtime.errors import LostStageError
from glm4_runtime.session.stage import Stage


class ThreadStage(Stage):
    """Runs the calls of another stage in order, on a thread."""

    overlaps = True

    def __init__(self, inner):
        self.inner, self.layers = inner, inner.layers
        self.thread, self.dead = ThreadPoolExecutor(1), False

    def begin(self, values, step):
        return self.call("run", values, step)

    def call(self, method, *arguments):
        self.alive()
        return self.thread.submit(self.run_there, method, arguments)

    def run_there(self, method, arguments):
        given = [one.result() if isinstance(one, Future) else one for one in arguments]
        self.alive()
        found = getattr(self.inner, method)(*pickle.loads(pickle.dumps(given)))
        return pickle.loads(pickle.dumps(found))

    def alive(self):
        if self.dead:
            self.lost = True
            raise LostStageError("stage 2 of the model is lost (it was killed); open the bundle again")

    def run(self, values, step):
        return self.begin(values, step).result()

    def move(self, move):
        self.call("move", move).result()

    def clear(self, row):
        self.call("clear", row).result()

    def resize(self, capacity, used):
        self.call("resize", capacity, used).result()

    def read(self, row, start, stop):
        return self.call("read", row, start, stop).result()

    def write(self, row, start, block):
        self.call("write", row, start, block).result()

    def close(self):
        self.thread.submit(self.inner.close).result()
        self.thread.shutdown()


def remote(session):
    """Let the stages of a session run on threads."""
    session.use([ThreadStage(stage) for stage in session._stages])
    return session
