"""What is bound in a step, on the CPU and on a device that copies an input when it is bound."""

import numpy as np
import pytest

from glm4_runtime.session.bound_rows import BoundRows

VOCAB = 7
INPUTS = ["input_ids", "past_lengths", "query_lengths", "logits_indices"]


class Binding:
    """Remembers what was bound."""

    def __init__(self):
        self.names, self.addresses = [], {}

    def bind_input(self, name, *place_and_type):
        self.names.append(name)
        self.addresses[name] = place_and_type[-1]

    bind_output = bind_input


class Cache:
    def views(self, first_row, count):
        return [("past", "present", np.float32, (count, 1, 4, 2), 4096 + first_row)]


def bound(device):
    binding = Binding()
    rows = BoundRows(
        binding, Cache(), 2, 3, device, lambda positions: np.empty((*positions, VOCAB), np.float32)
    )
    assert binding.names == ["past", "present"]
    assert binding.addresses == {"past": 4098, "present": 4098}
    binding.names.clear()
    return binding, rows


def write(rows, token, positions=1):
    return rows.write(np.full((3, 1), token), [4, 5, 6], np.zeros((3, positions), np.int64))


@pytest.mark.parametrize(("device", "again"), [("cpu", []), ("cuda", INPUTS)])
def test_a_step_of_the_same_shapes_binds_what_the_device_copies(device, again):
    binding, rows = bound(device)
    logits = write(rows, 9)
    assert logits.shape == (3, 1, VOCAB)
    assert set(binding.names) == {*INPUTS, "logits"}
    binding.names.clear()
    assert write(rows, 10) is logits
    assert binding.names == again


def test_other_shapes_and_forgetting_bind_anew():
    binding, rows = bound("cpu")
    first = write(rows, 9)
    second = write(rows, 9, positions=2)
    assert second.shape == (3, 2, VOCAB)
    assert binding.addresses["logits"] == second.ctypes.data != first.ctypes.data
    rows.forget()
    assert write(rows, 9, positions=2) is not second
