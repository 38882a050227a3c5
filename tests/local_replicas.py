"""Replicas in threads of this process: a fleet without Ray, whose replicas a test kills."""

import pickle
import threading

from glm4_runtime.cluster.order import Identity
from glm4_runtime.cluster.watch import watch
from glm4_runtime.cluster.work import ReplicaWork
from glm4_runtime.errors import ReplicaError
from glm4_runtime.scheduler import Scheduler
from glm4_runtime.session import Session

SAME = Identity("bundle", "code", "kernels", "cpu", (512, 4))


class LocalReplica:
    """Runs orders on a session of its own; what crosses its border is pickled, as between processes."""

    def __init__(self, name, bundle, identity=SAME, traces=None):
        self.name, self.identity = name, identity
        self.session = Session.open(bundle, threads=1, max_batch_size=4)
        self.slots = 4
        self.scheduler = Scheduler(self.session)
        ends = self.session.manifest.model.eos_token_ids
        self.work = ReplicaWork(self.session, self.scheduler, ends, traces)
        self.dead = threading.Event()

    def submit(self, number, order):
        if not self.dead.is_set():
            self.work.submit(number, pickle.loads(pickle.dumps(order)))

    def act(self, number, action):
        if not self.dead.is_set():
            self.work.act(number, action)

    def report(self):
        found = self.work.report(0.02)
        if self.dead.is_set():  # a report on its way is lost with its replica
            raise ReplicaError(f"replica {self.name} was killed")
        return pickle.loads(pickle.dumps(found))

    def kill(self):
        self.dead.set()

    def close(self):
        self.dead.set()
        self.work.close()
        self.session.close()


def joined(fleet, replica, step_timeout=60.0):
    """Let a replica join, and watch it on a thread."""
    fleet.join(replica)
    thread = threading.Thread(target=watch, args=(fleet, replica, step_timeout), daemon=True)
    thread.start()
    return replica
