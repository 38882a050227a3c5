"""Damaged safetensors files."""

import importlib.util
import json
import os
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import pytest
from checkpoint_edits import refusal, write_file

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle.file_names import SAFETENSORS
from glm4_runtime.errors import CheckpointError


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, '"b" begins at 4, but the tensor before it ends at 8'),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, '"b" begins at 12, but the tensor before it ends at 8'),
        ({"a": entry(4, 12)}, 12, '"a" begins at 4'),
        ({"a": entry(0, 8)}, 7, "has 7 bytes of weights, its header says 8"),
        ({"a": entry(0, 8)}, 9, "has 9 bytes of weights, its header says 8"),
        ({"a": entry(8, 0)}, 8, "not a begin and an end"),
        ({"a": entry(-8, 0)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8.0)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[True])}, 8, "has the shape [true]"),
        ({"a": entry(0, 8, shape=[3])}, 8, "takes 8 bytes, but F32 [3] takes 12"),
        ({"a": entry(0, 8, shape=[2**62])}, 8, f"takes 8 bytes, but F32 [{2**62}] takes {2**64}"),
        ({"a": entry(0, 8, shape=[2**62] * 8)}, 8, "takes 8 bytes, but F32 [4611686018427387904, "),
        ({"a": entry(0, 8, shape=[2**70])}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[2**62] * 300)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[10**18] * 20_000)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[1] * 1_000_000)}, 8, "has the shape [1, 1, 1, "),
        ({"a": entry(0, 8, shape=[10**4000])}, 8, "has the shape [1000000000"),
        ({"a": entry(0, 10**4000)}, 8, "has the data_offsets [0, 1000000000"),
        ({"x" * 1_000_000: entry(0, 8)}, 8, "has a name of 1000000 characters, but at most 500 are read"),
        ({"layers.1." * 100_000: entry(0, 8)}, 8, "has a name of 900000 characters"),
        ({"a": entry(0, 8, dtype="F" * 1_000_000)}, 8, 'has the unknown dtype "FFFF'),
        ({"a": [[[[]]]] * 100_000}, 8, "has not exactly a dtype"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", 8, "nested more than 100 levels deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 8, "no JSON"),
        (b'{"a\\ud800": 1}', 8, "no JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 8, "no JSON"),
        ({"a": entry(0, 8, dtype="F33")}, 8, 'the unknown dtype "F33"'),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "the unknown dtype"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 4, 8]}}, 8, "not a begin and an end"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "not exactly a dtype"),
        ({"a": 5}, 8, "not exactly a dtype"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', 4, '"a" is there twice'),
        (b"{\xff}", 0, "no JSON"),
        (b"[]", 0, "must hold a JSON object"),
        (b"", 0, "no JSON"),
    ],
)  # fmt: skip
def test_damaged_headers(tiny, header, size, reason):
    write_file(tiny / SAFETENSORS, header, size)
    message = refusal(tiny)
    assert str(tiny / SAFETENSORS) in message
    assert reason in message


@pytest.mark.parametrize("twice", [False, True])
def test_a_header_of_300000_tensors_is_refused_in_seconds(tiny, twice):
    """A duplicate was looked for in all keys before it: 30 s."""
    entries = [f'"layers.{i}.x": {json.dumps(entry(8 * i, 8 * i + 8))}' for i in range(300_000)]
    header = "{" + ", ".join(entries + entries[-1:] * twice) + "}"
    write_file(tiny / SAFETENSORS, header.encode(), 8 * 300_000)
    began = time.process_time()
    message = refusal(tiny)
    assert time.process_time() - began < 15
    assert ('"layers.299999.x" is there twice' if twice else "300000 surplus (layers.0.x, ") in message


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut short or no safetensors file (0 bytes)"),
        (b"\1\0\0\0\0\0\0", "(7 bytes)"),
        (struct.pack("<Q", 2**63) + b"{}", "cut short"),
        (struct.pack("<Q", 3) + b"{}", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "run: git lfs pull"),
    ],
)
def test_damaged_beginnings(tiny, data, reason):
    (tiny / SAFETENSORS).write_bytes(data)
    assert reason in refusal(tiny)


def test_a_header_that_is_too_large(tiny):
    write_file(tiny / SAFETENSORS, b"{", 200_000_000, length=100_000_001)
    assert f"has a header of 100000001 bytes, but at most {32 << 20} are read" in refusal(tiny)


def test_a_half_downloaded_file(tiny):
    os.truncate(tiny / SAFETENSORS, (tiny / SAFETENSORS).stat().st_size // 2)
    assert "download it again" in refusal(tiny)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 3500), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3)
)
def test_any_damage_to_a_header_is_refused_in_one_line(tiny, damages):
    path = tiny / SAFETENSORS
    data = bytearray(path.read_bytes())
    for at, noise in damages:
        data[at : at + len(noise)] = noise
    (tiny.parent / "damaged").mkdir(exist_ok=True)
    damaged = tiny.parent / "damaged"
    shutil.copyfile(tiny / "config.json", damaged / "config.json")
    (damaged / SAFETENSORS).write_bytes(data)
    try:
        checkpoint = Checkpoint.load(damaged)
    except CheckpointError as error:
        assert str(error).isprintable()  # noqa: PT017  it may also be read
    else:  # the noise fell on the weights, or on what nobody reads
        assert len(checkpoint.tensors) == 29


def test_weights_that_are_a_file_of_the_system(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path.parent / f"{tmp_path.name}-linked")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: "):
        Checkpoint.load(folder)


def test_positions_are_read_and_written_as_on_windows(tmp_path, monkeypatch):
    """Without pread, by moving the one position of the descriptor."""
    monkeypatch.setattr(sys, "platform", "win32")
    windows = importlib.util.module_from_spec(importlib.util.find_spec("glm4_runtime.bundle.file_positions"))
    windows.__spec__.loader.exec_module(windows)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    data = os.urandom(40_000)
    with ThreadPoolExecutor(4) as pool:
        starts = range(0, 40_000, 1000)
        pool.map(lambda at: windows.write_at(fd, memoryview(data)[at : at + 1000], at), starts)
    found = bytearray(40_000)
    with ThreadPoolExecutor(4) as pool:
        counts = pool.map(lambda at: windows.read_at(fd, memoryview(found)[at : at + 1000], at), starts)
        assert set(counts) == {1000}
    assert windows.read_at(fd, memoryview(found), 40_000) == 0
    os.close(fd)
    assert found == data
