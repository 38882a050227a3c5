"""A session of stages whose stages fail: all caches keep the same rows and capacity."""

import dataclasses

import numpy as np
import pytest

from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import SlotError
from glm4_runtime.session.memory import HostMemory
from glm4_runtime.session.stage import Stage
from glm4_runtime.session.staged import StagedSession

HIDDEN, VOCAB = 4, 320


class Rows(Stage):
    """Remembers each token in a real cache; its hidden states are what the cache holds."""

    def __init__(self, manifest, layer, is_last):
        self.memory, self.is_last = HostMemory(manifest, 4, range(layer, layer + 1)), is_last
        self.fails, self.layers = None, 1

    def _fail(self, what):
        if self.fails == what:
            raise MemoryError

    def run(self, values, step):
        for row, past in enumerate(step.past):
            tokens = values[row] if values.ndim == 2 else values[row, :, 0]
            for array in self.memory.arrays:
                array[step.first_row + row, :, past : past + len(tokens)] = tokens[None, :, None]
        if self.is_last:
            return np.zeros((*step.logits_indices.shape, VOCAB), np.float32)
        return np.repeat(values[..., None], HIDDEN, axis=-1).astype(np.float32)

    def move(self, move):
        self._fail("move")
        self.memory.move(move)

    def clear(self, row):
        self.memory.clear(row)

    def resize(self, capacity, used):
        self._fail("resize")
        self.memory.resize(capacity, used)

    def read(self, row, start, stop):
        return self.memory.read(row, start, stop)

    def write(self, row, start, block):
        self.memory.write(row, start, block)

    def close(self):
        self.memory.free()


@pytest.fixture
def session(tiny_bundles):
    manifest = read_manifest(tiny_bundles["ort"])
    manifest = dataclasses.replace(manifest, limits=dataclasses.replace(manifest.limits, max_seq_len=1024))
    stages = [Rows(manifest, 0, False), Rows(manifest, 1, True)]
    with StagedSession(tiny_bundles["ort"], manifest, 1024, 4, stages, "none", {}) as session:
        yield session


def held(session, slot):
    """What each stage's cache holds of a slot."""
    row, length = session._slots.row(slot), session.length(slot)
    return [stage.memory.arrays[0][row, 0, :length, 0].tolist() for stage in session._stages]


def fill(session):
    for slot in range(3):
        session.prefill(slot, [slot + 1] * (slot + 2))


def test_a_failed_swap_is_undone_in_the_stages_before(session):
    fill(session)
    before = [held(session, slot) for slot in range(3)]
    session._stages[1].fails = "move"
    with pytest.raises(MemoryError):
        session.decode({2: 9})
    assert [held(session, slot) for slot in range(3)] == before
    session._stages[1].fails = None
    session.decode({2: 9})
    assert held(session, 2) == [[3, 3, 3, 3, 9]] * 2
    assert [held(session, slot) for slot in range(2)] == before[:2]


def test_a_failed_copy_leaves_the_source(session):
    fill(session)
    session._stages[1].fails = "move"
    with pytest.raises(MemoryError):
        session.copy_prefix(1, 3, 2)
    assert held(session, 1) == [[2, 2, 2]] * 2


@pytest.mark.parametrize("length", [300, 900])
def test_a_failed_growth_leaves_all_stages_as_they_were(session, length):
    fill(session)
    session._stages[1].fails = "resize"
    with pytest.raises(SlotError, match="no memory for a KV cache"):
        session.prefill(3, [7] * length)
    assert {stage.memory.arrays[0].shape[2] for stage in session._stages} == {256}
    session._stages[1].fails = None
    session.prefill(3, [7] * length)
    assert held(session, 3) == [[7] * length] * 2
    assert [held(session, slot) for slot in range(3)] == [[[s + 1] * (s + 2)] * 2 for s in range(3)]


def test_a_failed_shrinking_leaves_room_for_what_is_held(session):
    fill(session)
    session.prefill(3, [7] * 1000)
    session.release(3)
    session._stages[1].fails = "resize"
    session.decode({0: 9})
    assert [stage.memory.arrays[0].shape[2] for stage in session._stages] == [256, 1024]
    session._stages[1].fails = None
    session.prefill(3, [8] * 300)
    assert [stage.memory.arrays[0].shape[2] for stage in session._stages] == [512, 512]
    assert held(session, 0) == [[1, 1, 9]] * 2
    assert held(session, 3) == [[8] * 300] * 2


def test_discard_clears_the_row_of_every_stage(session):
    fill(session)
    row = session._slots.row(1)
    session.discard(1)
    assert all(not array[row].any() for stage in session._stages for array in stage.memory.arrays)
