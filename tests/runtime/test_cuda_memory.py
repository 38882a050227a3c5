"""The cache in GPU memory against the cache on the host, on a CUDA runtime made of host bytes."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import INVALID_VALUE, FakeCuda, install

from glm4_runtime import BundleError
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.cuda_memory import CudaMemory
from glm4_runtime.session.memory import HostMemory


@pytest.fixture
def cuda(monkeypatch):
    return install(monkeypatch, FakeCuda())


def manifest(kv_cache="float16", layers=3):
    return SimpleNamespace(
        kv_cache=kv_cache, model=SimpleNamespace(num_kv_heads=2, head_dim=4, num_layers=layers)
    )


def on_the_gpu(kv_cache, rows):
    return CudaMemory(manifest(kv_cache), rows, Cuda("cuda", "go elsewhere"))


def memories(cuda, kv_cache, rows):
    return on_the_gpu(kv_cache, rows), HostMemory(manifest(kv_cache), rows)


def array_at(view):
    """A NumPy array over the memory that a view names, once all that was sent to the GPU is done."""
    getattr(sys.modules.get("cuda.bindings.runtime"), "wait", lambda: None)()
    _, _, dtype, shape, address = view
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)


def fill(memory, rng, row, start, stop):
    """Write as a kernel would: through the views, the same values in every memory."""
    for view in memory.views(row, 1):
        array_at(view)[0, :, start:stop] = rng.standard_normal((2, stop - start, 4))


def assert_equal(device, host, lengths):
    """The positions in use are equal; what lies past them may differ, but is finite."""
    for one, other in zip(device.views(0, host.rows), host.views(0, host.rows), strict=True):
        assert one[:2] == other[:2]
        assert (np.dtype(one[2]), one[3]) == (np.dtype(other[2]), other[3])
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(array_at(one)[row, :, :length], array_at(other)[row, :, :length])
        assert np.isfinite(array_at(one)).all()


def test_one_row_is_cleared_and_no_other(cuda):
    for memory in memories(cuda, "float16", 3):
        memory.resize(8, 0)
        for row in range(3):
            fill(memory, np.random.default_rng(row), row, 0, 8)
        memory.clear(1)
        for view in memory.views(0, 3):
            assert array_at(view)[[0, 2]].all()
            assert not array_at(view)[1].any()


@pytest.mark.parametrize(("kv_cache", "number"), [("bfloat16", 16), ("float8e4m3fn", 17)])
def test_types_that_numpy_lacks_are_named_by_onnxs_number(cuda, kv_cache, number):
    memory = on_the_gpu(kv_cache, 3)
    memory.resize(8, 0)
    assert {view[2] for view in memory.views(0, 3)} == {number}
    assert {view[3] for view in memory.views(1, 2)} == {(2, 2, 8, 4)}
    first, second = memory.views(0, 1)[0], memory.views(1, 1)[0]
    assert second[4] - first[4] == 2 * 8 * 4 * {16: 2, 17: 1}[number]


@pytest.mark.parametrize("kv_cache", ["float32", "float16"])
@pytest.mark.parametrize("seed", range(8))
def test_random_operations_leave_both_memories_equal(cuda, kv_cache, seed):
    rng, rows, capacity = np.random.default_rng(seed), 4, 8
    device, host = memories(cuda, kv_cache, rows)
    lengths = [0] * rows
    for memory in (device, host):
        memory.resize(capacity, 0)
    for _ in range(60):
        kind = rng.choice(["write", "move", "swap", "resize", "release"])
        source, target = (int(x) for x in rng.permutation(rows)[:2])
        if kind == "write":
            stop = int(rng.integers(lengths[source], capacity + 1))
            value_seed = int(rng.integers(1 << 30))
            for memory in (device, host):
                fill(memory, np.random.default_rng(value_seed), source, lengths[source], stop)
            lengths[source] = stop
        elif kind == "move":
            for memory in (device, host):
                memory.move(Move(source, target, lengths[source]))
            lengths[target] = lengths[source]
        elif kind == "swap":
            for memory in (device, host):
                memory.move(Move(source, target, lengths[source], lengths[target]))
            lengths[source], lengths[target] = lengths[target], lengths[source]
        elif kind == "resize":
            capacity = int(rng.choice([c for c in (8, 16, 32, 64) if c >= max(lengths)]))
            for memory in (device, host):
                memory.resize(capacity, max(lengths))
        else:
            lengths[source] = 0
        assert_equal(device, host, lengths)
    assert len(cuda.blocks) <= 6 + 1  # one per layer and side, and at most one to swap through
    device.free()
    assert cuda.blocks == {}
    device.free()  # a second time is harmless


def test_views_are_addresses_of_rows_inside_one_allocation(cuda):
    device, _ = memories(cuda, "float16", rows=4)
    device.resize(16, 0)
    first, second = device.views(0, 1), device.views(1, 3)
    row_bytes = 2 * 16 * 4 * 2
    assert [b[4] - a[4] for a, b in zip(first, second, strict=True)] == [row_bytes] * 6
    assert {view[3] for view in second} == {(3, 2, 16, 4)}
    assert [view[:2] for view in first][:2] == [
        ("past_key_values.0.key", "present_key_values.0.key"),
        ("past_key_values.0.value", "present_key_values.0.value"),
    ]


def test_bfloat16_is_bound_by_its_onnx_number(cuda):
    device, _ = memories(cuda, "float16", 1)
    assert device.views(0, 1)[0][2] == np.float16
    wide = on_the_gpu("bfloat16", 2)
    wide.resize(16, 0)
    assert {view[2] for view in wide.views(0, 2)} == {16}
    assert cuda.used() == (6 * 2 + 1) * (2 * 16 * 4 * 2)  # and one row to swap through


def test_growing_never_holds_old_and_new_whole(cuda):
    device, _ = memories(cuda, "float16", 2)
    device.resize(64, 0)
    before = cuda.used()
    device.resize(128, 64)
    assert cuda.used() <= 2.1 * before
    assert cuda.peak <= 2.5 * before  # 2 for the new ones, 1/6 for one old block, some for the spare


@pytest.mark.parametrize("fits", range(6))
def test_out_of_memory_while_growing_leaves_what_was_there(cuda, fits):
    """Some blocks have grown when the memory ends: every slot still reads what it wrote."""
    device, host = memories(cuda, "float16", 2)
    for memory in (device, host):
        memory.resize(8, 0)
        fill(memory, np.random.default_rng(0), 0, 0, 5)
        fill(memory, np.random.default_rng(1), 1, 0, 8)
    small = 2 * 2 * 8 * 4 * 2
    cuda.limit = cuda.used() + fits * 3 * small + 2 * small  # a grown block is four times as large
    with pytest.raises(MemoryError):
        device.resize(32, 8)
    for one, other in zip(device.views(0, 2), host.views(0, 2), strict=True):
        assert one[3][2] >= 8
        for row, length in ((0, 5), (1, 8)):
            np.testing.assert_array_equal(array_at(one)[row, :, :length], array_at(other)[row, :, :length])
    for memory in (device, host):  # and moving still works
        memory.move(Move(0, 1, 5, 8))
    for one, other in zip(device.views(0, 2), host.views(0, 2), strict=True):
        for row, length in ((1, 5), (0, 8)):
            np.testing.assert_array_equal(array_at(one)[row, :, :length], array_at(other)[row, :, :length])
    cuda.limit = 1 << 40
    for memory in (device, host):
        memory.resize(32, 8)
    assert_equal(device, host, [8, 5])


def test_a_swap_needs_no_memory_that_is_not_there_yet(cuda):
    """When rows are swapped the table of slots has changed already: it must not fail then."""
    device, host = memories(cuda, "float16", 2)
    for memory in (device, host):
        memory.resize(8, 0)
        fill(memory, np.random.default_rng(0), 0, 0, 5)
        fill(memory, np.random.default_rng(1), 1, 0, 8)
    cuda.limit = cuda.used()
    for memory in (device, host):
        memory.move(Move(0, 1, 5, 8))
    assert_equal(device, host, [8, 5])


def test_on_the_host_out_of_memory_changes_nothing(monkeypatch):
    host = HostMemory(manifest(), 2)
    host.resize(8, 0)
    fill(host, np.random.default_rng(0), 0, 0, 8)
    before = [array.copy() for array in host.arrays]
    real, calls = HostMemory._new, []

    def fails(self, capacity):
        calls.append(capacity)
        if len(calls) == 4:
            raise MemoryError
        return real(self, capacity)

    monkeypatch.setattr(HostMemory, "_new", fails)
    with pytest.raises(MemoryError):
        host.resize(32, 8)
    for array, old in zip(host.arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)  # and of the old shape: layers of two capacities cannot run


def test_another_failure_is_said_with_the_calls_name(cuda, monkeypatch):
    device, _ = memories(cuda, "float16", 1)
    monkeypatch.setattr(cuda, "cudaMemsetAsync", lambda *_: (INVALID_VALUE,))
    with pytest.raises(BundleError, match="cudaMemsetAsync failed on the GPU: 1"):
        device.resize(8, 0)


def test_without_cuda_bindings_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BundleError, match=r"cuda-bindings cannot be imported.*pip install .*\[cuda\]"):
        Cuda("cuda", "go elsewhere")


def test_every_move_keeps_its_place_among_the_runs(cuda):
    """All goes to the session's stream and nothing is done before: a run of before sees what was, of after what is."""
    device, _ = memories(cuda, "float16", 2)
    device.resize(8, 0)
    stream, seen = device._cuda.stream, []
    cuda.wait()
    view = device.views(0, 1)[0]
    address, count = view[4], int(np.prod(view[3]))

    def look():
        seen.append(np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(address)).copy())

    for value in (1, 2):
        cuda.enqueue(stream, lambda value=value: ctypes.memset(address, value, 2 * count))
        cuda.enqueue(stream, look)
        device.clear(0)
        cuda.enqueue(stream, look)
    device.move(Move(1, 0, 8))
    cuda.enqueue(stream, look)
    assert seen == []  # nothing has waited
    cuda.wait()
    assert [int(found[0]) for found in seen] == [0x0101, 0, 0x0202, 0, 0]
