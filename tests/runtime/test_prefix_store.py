"""The prefix cache's files: what is read back is what was written, and anything else is skipped and removed."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from glm4_runtime.errors import RequestError
from glm4_runtime.prefix_store import piece, store
from glm4_runtime.prefix_store.folder import CacheFolder
from glm4_runtime.prefix_store.piece import TOKENS, Layout
from glm4_runtime.prefix_store.store import PrefixStore

LAYOUT = Layout("float32", (4, 2, TOKENS, 8))


def fake_session(sha256="0" * 64, **changes):
    """As much of a session as a store reads."""
    model = SimpleNamespace(num_layers=2, num_kv_heads=2, head_dim=8)
    facts = {"kv_cache": "float32", "target": "cpu", "config": {"rope_theta": 1e4}} | changes
    manifest = SimpleNamespace(files={"model.onnx": SimpleNamespace(sha256=sha256)}, model=model, **facts)
    return SimpleNamespace(
        manifest=manifest,
        kernels={"onnxruntime": "1"},
        folder=Path("bundle"),
        require_host_cache=lambda: None,
        adapter_digest=lambda name: f"digest of {name}",
    )


@pytest.fixture
def opened(tmp_path):
    """Open stores in one folder; all are closed in the end."""
    stores = []

    def open_one(most=10**8, **options):
        stores.append(PrefixStore(tmp_path / "cache", most, fake_session(**options)))
        return stores[-1]

    yield open_one
    for one in stores:
        one.close()


def ids_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, count)


def block_of(seed):
    return np.random.default_rng(seed).standard_normal(LAYOUT.shape, np.float32)


def fill(one, chain, count=None):
    """Write the first pieces of a chain, with the piece's number as seed."""
    for index in range(len(chain.names) if count is None else count):
        one.save(chain, index, block_of(index))
    one.flush()


def test_pieces_are_read_back_bit_by_bit(opened):
    one = opened()
    chain = one.chain(ids_of(200), None, "")
    fill(one, chain)
    again = opened().chain(ids_of(200), None, "")
    assert one.present(again) == 3
    for index in range(3):
        np.testing.assert_array_equal(one.read_piece(again, index), block_of(index))


def test_a_file_is_safetensors_with_ids_and_facts(opened):
    one = opened()
    chain = one.chain(ids_of(128), "poet", "me")
    fill(one, chain)
    with safe_open(chain.path(1), "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("ids"), ids_of(128))
        np.testing.assert_array_equal(file.get_tensor("cache"), block_of(1))
        facts = json.loads(file.metadata()["facts"])
    assert (facts["adapter"], facts["cache"]) == ("digest of poet", "float32")
    assert re.fullmatch("[0-9a-f]{64}", facts["group"])  # and not "me": a folder reveals no API key
    assert facts["rope"] == {"rope_theta": 1e4}


def test_prompts_with_the_same_beginning_share_files(opened):
    one = opened()
    system = ids_of(128)
    fill(one, one.chain(np.concatenate([system, ids_of(100, 1)]), None, ""))
    other = one.chain(np.concatenate([system, ids_of(100, 2)]), None, "")
    assert one.present(other) == 2
    assert one.present(one.chain(ids_of(100, 1), None, "")) == 0  # the same tokens elsewhere are no prefix


@pytest.mark.parametrize(
    "other",
    [{"sha256": "1" * 64}, {"kv_cache": "int8"}, {"target": "ort"}, {"config": {"rope_theta": 1e6}}],
    ids=str,
)
def test_other_facts_share_nothing(opened, other):
    one = opened()
    fill(one, one.chain(ids_of(64), None, ""))
    assert opened(**other).present(opened(**other).chain(ids_of(64), None, "")) == 0


def test_other_adapters_and_groups_share_nothing(opened):
    one = opened()
    fill(one, one.chain(ids_of(64), "poet", "a"))
    for adapter, group in ((None, "a"), ("clerk", "a"), ("poet", "b"), ("poet", "")):
        assert one.present(one.chain(ids_of(64), adapter, group)) == 0


DAMAGES = {
    "empty": lambda _: b"",
    "torn in the header": lambda data: data[:100],
    "torn in the data": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "zeros at the end, as after a power failure": lambda data: data[:-4096] + bytes(4096),
    "a flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "another header": lambda data: data.replace(b"prefix 1", b"prefix 9"),
    "no safetensors": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_skipped_and_removed(opened, name):
    one = opened()
    chain = one.chain(ids_of(64), None, "")
    fill(one, chain)
    path = chain.path(0)
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    assert one.read_piece(chain, 0) is None
    assert not path.exists()


def test_ids_are_compared_and_not_their_hash_alone(opened, monkeypatch):
    one = opened()
    monkeypatch.setattr(store, "names_of", lambda _, ids: ["a" * 64 + ".safetensors"] * (len(ids) // TOKENS))
    fill(one, one.chain(ids_of(64, 1), None, ""))
    other = one.chain(ids_of(64, 2), None, "")
    assert one.present(other) == 1  # the hash says so
    assert one.read_piece(other, 0) is None


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links and FIFOs")
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/passwd"), os.mkfifo])
def test_no_link_and_no_fifo_is_followed(opened, make):
    one = opened()
    chain = one.chain(ids_of(64), None, "")
    fill(one, chain)
    chain.path(0).unlink()
    make(chain.path(0))
    assert one.read_piece(chain, 0) is None
    assert not os.path.lexists(chain.path(0))


def test_a_good_file_stays_if_reading_fails(opened, monkeypatch):
    one = opened()
    chain = one.chain(ids_of(64), None, "")
    fill(one, chain)

    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(store, "read", refuse)
        assert one.read_piece(chain, 0) is None
    np.testing.assert_array_equal(one.read_piece(chain, 0), block_of(0))


def test_only_the_owner_can_read(opened, tmp_path):
    one = opened()
    chain = one.chain(ids_of(64), None, "")
    fill(one, chain)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache", chain.folder, chain.path(0))]
    assert modes == [0o700, 0o700, 0o600]


def test_a_folder_that_others_may_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(RequestError, match="chmod 700"):
        PrefixStore(tmp_path, 10**8, fake_session())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="choose another --cache"):
        PrefixStore(tmp_path / "file", 10**8, fake_session())


def test_the_size_is_bounded_and_the_least_recently_used_goes_first(opened, tmp_path):
    size = 18_000  # of a file, and a little more
    one = opened(10 * size)
    old, new = one.chain(ids_of(64 * 4, 1), None, ""), one.chain(ids_of(64 * 4, 2), None, "")
    fill(one, old)
    fill(one, new)
    time.sleep(0.01)
    again = one.chain(ids_of(64 * 4, 1), None, "")
    one.present(again)  # the older chain is used once more
    fill(one, one.chain(ids_of(64 * 6, 3), None, ""))
    total = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert total <= 10 * size
    assert one.present(again) == 4
    assert one.present(new) < 4


def test_the_end_of_a_chain_goes_before_its_beginning(opened):
    one = opened()
    chain = one.chain(ids_of(64 * 5), None, "")
    fill(one, chain)
    pieces = CacheFolder(chain.folder.parent).pieces()
    assert [found.path for found in pieces] == [chain.path(index) for index in reversed(range(5))]


def test_a_disk_that_refuses_costs_one_line_of_the_log(opened, monkeypatch, caplog):
    one = opened()
    chain = one.chain(ids_of(64 * 5), None, "")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_atomically", refuse)
    fill(one, chain)
    assert [record.getMessage() for record in caplog.records] == [
        "the prefix cache cannot be written: No space left on device; requests go on, and writing is tried again in 60 s"
    ]
    assert not one.wants(chain, 0)
    assert not list(chain.folder.glob(".*"))


def test_a_size_for_no_prompt_is_refused(opened):
    with pytest.raises(RequestError, match="give at least 131072"):
        opened(10**5)


def test_a_value_that_is_not_finite_is_not_stored(opened):
    one = opened()
    chain = one.chain(ids_of(64), None, "")
    block = block_of(0)
    block[1, 0, 3, 2] = np.nan
    one.save(chain, 0, block)
    one.flush()
    assert one.present(chain) == 0


def test_foreign_files_stay(opened, tmp_path):
    one = opened()
    fill(one, one.chain(ids_of(64), None, ""))
    mine = [
        tmp_path / "cache" / "notes.txt",
        tmp_path / "cache" / ("a" * 32),
        one.chain(ids_of(64), None, "").folder / "x",
    ]
    for path in mine:
        path.write_text("mine")
    assert CacheFolder(tmp_path / "cache").clear() > 0
    assert all(path.read_text() == "mine" for path in mine)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_temporary_files_of_dead_processes_are_removed(opened):
    one = opened()
    chain = one.chain(ids_of(64), None, "")
    fill(one, chain)
    dead, alive = chain.folder / ".1-1.tmp", chain.folder / ".2-1.tmp"
    for path in (dead, alive):
        path.write_bytes(b"x")
    os.utime(dead, (0, 0))
    CacheFolder(chain.folder.parent).pieces()
    assert (dead.exists(), alive.exists()) == (False, True)


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_prefix_store import PrefixStore, block_of, fake_session, ids_of
from pathlib import Path
store = PrefixStore(Path(sys.argv[1]), 300_000, fake_session())
for turn in range(int(sys.argv[2])):
    if turn == 1:
        print("ready", flush=True)
    chain = store.chain(ids_of(64 * 8, turn % 5), None, "")
    for index in range(8):
        block = store.read_piece(chain, index) if index < store.present(chain) else None
        assert block is None or (block == block_of(index)).all()
        store.save(chain, index, block_of(index))
    store.flush()
"""


def start_writer(folder, turns):
    code = WRITER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(turns)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_two_processes_share_a_folder(tmp_path):
    writers = [start_writer(tmp_path / "cache", 10) for _ in range(2)]
    for writer in writers:
        assert writer.communicate(timeout=60)[1] == b""
        assert writer.returncode == 0
    assert 0 < sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 300_000 * 1.05


def kill_in_a_loop(folder, times):
    for turn in range(times):
        writer = start_writer(folder, 10**6)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.005 * (turn % 7))
        writer.kill()
        assert writer.communicate(timeout=60)[1] == b""  # no read found wrong values
    reader = PrefixStore(folder, 10**8, fake_session())
    found = 0
    for seed in range(5):
        chain = reader.chain(ids_of(64 * 8, seed), None, "")
        for index in range(reader.present(chain)):
            np.testing.assert_array_equal(reader.read_piece(chain, index), block_of(index))
            found += 1
    reader.close()
    assert found > 0


def test_kills_while_writing_leave_no_wrong_file(tmp_path):
    kill_in_a_loop(tmp_path / "cache", 3)


@pytest.mark.more
def test_two_hundred_kills_while_writing_leave_no_wrong_file(tmp_path):
    kill_in_a_loop(tmp_path / "cache", 200)


def test_the_header_has_an_aligned_length():
    for tokens in (64, 128, 100_032):
        header = piece._header("{}", tokens, LAYOUT)
        assert len(header) % 8 == 0
