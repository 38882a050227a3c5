"""Destinations: what an export may replace, and that whatever ends one leaves the old bundle or the new."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy import destination
from glm4_deploy.destination import Destination
from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import ExportError

FAST = ExportOptions(precision="fp32", parity=False)
ROOT = Path(__file__).parents[2]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def bundle_at(folder, word="old", **manifest):
    """A folder with the form of a bundle, whose weights are one word."""
    folder.mkdir(parents=True)
    (folder / "model.onnx.data").write_text(word)
    entries = {"model.onnx.data": {"sha256": "0" * 64, "bytes": len(word)}}
    ours = {
        "schema_version": 1,
        "source_sha256": "0" * 64,
        "tools": {"glm4-deploy": "0.1.0"},
        "files": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(ours | manifest))
    (folder / "report.json").write_text("{}")
    return folder


def word_of(folder):
    return (folder / "model.onnx.data").read_text()


def publish(place, word="new", force=True, meanwhile=lambda: None):
    """Everything an export does with its destination, and what others do ``meanwhile``."""
    target = Destination(place, force)
    target.recover()
    target.check(place.parent / "checkpoint")
    with target.staged() as folder:
        folder.rmdir()
        bundle_at(folder, word)
        meanwhile()
        target.publish(folder)


def no_exchange(monkeypatch):
    monkeypatch.setattr(destination, "_exchange", lambda *_: False)


# What may be replaced -----------------------------------------------------------------------------


def test_what_is_no_bundle_is_never_replaced(tmp_path, tiny_checkpoint):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("...")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for name, reason in (
        ("precious", "is not a bundle"),
        ("file", "is not a folder"),
        ("link", "is not a folder"),
    ):
        with pytest.raises(ExportError, match=reason):
            export(tiny_checkpoint, tmp_path / name, FAST, force=True)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "..."
    assert left_in(tmp_path) == ["file", "link", "precious"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: (b / "notes.txt").write_text("mine"), "holds 'notes.txt', which is not of the bundle"),
        (lambda b: (b / ".hidden").mkdir(), "holds '.hidden'"),
        (lambda b: (b / "runs").symlink_to(b), "holds 'runs'"),
        (lambda b: (b / os.fsdecode(b"\xff")).write_text("mine"), r"holds '\\udcff'"),
        (lambda b: ((b / "report.json").unlink(), (b / "report.json").mkdir()), "holds 'report.json'"),
        (lambda b: (b / "manifest.json").write_text("{"), "is not a bundle"),
        (lambda b: (b / "manifest.json").write_text("[]"), "is not a bundle"),
        (lambda b: (b / "manifest.json").write_text('{"manifest_version": 3, "name": "of a browser"}'), "is not a bundle"),
        (lambda b: (b / "manifest.json").write_text("[" * 100_000), "is not a bundle"),
        (lambda b: (b / "manifest.json").unlink(), "is not a bundle"),
    ],
)  # fmt: skip
def test_only_our_own_bundles_and_their_files_are_replaced(tmp_path, change, reason):
    bundle = bundle_at(tmp_path / "bundle")
    change(bundle)
    with pytest.raises(ExportError, match=reason):
        publish(bundle)
    assert word_of(bundle) == "old"
    assert left_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("missing", ["files", "tools", "source_sha256", "schema_version"])
def test_a_manifest_of_others_is_not_ours(tmp_path, missing):
    with pytest.raises(ExportError, match="is not a bundle"):
        publish(bundle_at(tmp_path / "bundle", **{missing: None}))


def test_a_forged_manifest_gives_no_file_of_a_user_away(tmp_path):
    bundle = bundle_at(tmp_path / "bundle")
    (bundle / "thesis.tex").write_text("...")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["thesis.tex"] = {"sha256": "x", "bytes": 3}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"holds 'thesis\.tex', which is not of the bundle"):
        publish(bundle)
    assert (bundle / "thesis.tex").read_text() == "..."


def test_bundles_of_other_schemas_and_incomplete_ones_are_replaced(tmp_path):
    publish(bundle_at(tmp_path / "later", schema_version=99, new_field=1))
    incomplete = bundle_at(tmp_path / "incomplete")
    (incomplete / "model.onnx.data").unlink()
    publish(incomplete)
    assert [word_of(tmp_path / name) for name in ("later", "incomplete")] == ["new", "new"]
    assert left_in(tmp_path) == ["incomplete", "later"]


def test_a_link_in_a_bundle_is_removed_and_its_target_kept(tmp_path):
    bundle = bundle_at(tmp_path / "bundle")
    (bundle / "model.onnx.data").rename(tmp_path / "elsewhere")
    (bundle / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    publish(bundle)
    assert word_of(bundle) == "new"
    assert (tmp_path / "elsewhere").read_text() == "old"


def test_what_came_there_during_the_export_is_kept(tmp_path):
    bundle = tmp_path / "bundle"
    with pytest.raises(ExportError, match="is a bundle already"):
        publish(bundle, force=False, meanwhile=lambda: bundle_at(bundle))
    with pytest.raises(ExportError, match="holds 'mine'"):
        publish(bundle, meanwhile=(bundle / "mine").touch)
    assert word_of(bundle) == "old"
    assert left_in(tmp_path) == ["bundle"]


# Places that no bundle can take -------------------------------------------------------------------


def test_the_checkpoint_and_what_is_in_it(tmp_path, tiny_checkpoint):
    for place, reason in (
        (tiny_checkpoint, "is the checkpoint itself"),
        (tiny_checkpoint / "onnx", "is inside the checkpoint"),
        (tiny_checkpoint / "a" / "b", "is inside the checkpoint"),
        (tiny_checkpoint / ".." / tiny_checkpoint.name, "is the checkpoint itself"),
    ):
        with pytest.raises(ExportError, match=reason):
            export(tiny_checkpoint, place, FAST, force=True)
    (tmp_path / "link").symlink_to(tiny_checkpoint)
    with pytest.raises(ExportError, match="is inside the checkpoint"):
        export(tmp_path / "link", tiny_checkpoint / "onnx", FAST)
    bundle = bundle_at(tmp_path / "both")  # a checkpoint with our own manifest in it stays a checkpoint
    with pytest.raises(ExportError, match="is the checkpoint itself"):
        Destination(bundle, force=True).check(bundle)


@pytest.mark.parametrize("place", [".", "..", "../b", "../../b/inner/..", "/"])
def test_the_current_folder_and_those_above_it(tmp_path, monkeypatch, place):
    bundle = bundle_at(tmp_path / "b")
    (bundle / "inner").mkdir()
    monkeypatch.chdir(bundle / "inner" if place.startswith("../..") else bundle)
    with pytest.raises(ExportError, match=r"is the current folder or above it|mount point"):
        Destination(Path(place), force=True).check(tmp_path / "checkpoint")
    (bundle / "inner").rmdir()
    assert word_of(bundle) == "old"


def test_relative_places(tmp_path, monkeypatch):
    bundle = bundle_at(tmp_path / "b")
    (tmp_path / "else" / "where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else")
    for place in ("../b", "where/../../b", "../b/", "./../b/."):
        publish(Path(place), word=place)
        assert word_of(bundle) == place
    assert left_in(tmp_path) == ["b", "else"]


def test_mount_points(tmp_path, monkeypatch):
    place = tmp_path / "a volume"
    place.mkdir()
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(destination, "MOUNTS", mounts)
    for mounted in (place, place / "model.onnx.data"):
        line = str(mounted).replace(" ", "\\040")
        mounts.write_text(f"22 1 0:1 / / rw - ext4 /dev/sda rw\n45 22 0:41 / {line} rw - ext4 /dev/sdb rw\n")
        with pytest.raises(ExportError, match=r"is or holds a mount point.* name a new folder in it"):
            publish(place)
    publish(place / "bundle")
    assert left_in(place) == ["bundle"]


def test_names_that_are_not_utf8(tmp_path):
    for place in (tmp_path / os.fsdecode(b"b\xff"), tmp_path / os.fsdecode(b"\xff") / "b"):
        with pytest.raises(ExportError, match=r"udcff.* is not UTF-8 text") as refused:
            publish(place)
        str(refused.value).encode()
    assert left_in(tmp_path) == []


def test_parents_are_made_and_kept_only_with_a_bundle(tmp_path, monkeypatch):
    bundle = tmp_path / "a" / "b" / "bundle"

    def full():
        assert left_in(bundle.parent) != []
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ExportError, match="No space left"):
        publish(bundle, meanwhile=full)
    assert left_in(tmp_path) == []
    publish(bundle)
    assert left_in(bundle.parent) == ["bundle"]
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file is not a folder"):
        publish(tmp_path / "file" / "x" / "bundle")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ExportError, match="is not writable"):
        publish(tmp_path / "bundle")


@pytest.mark.parametrize("length", [232, 300])
def test_a_name_too_long_for_the_folder_beside_it(tmp_path, length):
    with pytest.raises(ExportError, match="is too long; choose a shorter one"):
        publish(tmp_path / ("b" * length))
    publish(tmp_path / ("b" * 229))


# Publication --------------------------------------------------------------------------------------


def test_folders_are_exchanged_in_one_step(tmp_path, monkeypatch):
    """At no moment is there no bundle: nothing is renamed over, or out of, its place."""
    bundle = bundle_at(tmp_path / "bundle")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("a rename"))
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("a rename"))
    publish(bundle)
    assert word_of(bundle) == "new"
    assert left_in(tmp_path) == ["bundle"]


def test_two_renames_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    no_exchange(monkeypatch)
    bundle = bundle_at(tmp_path / "bundle")
    publish(bundle)
    assert word_of(bundle) == "new"
    assert left_in(tmp_path) == ["bundle"]


def test_the_old_bundle_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    no_exchange(monkeypatch)
    bundle, real = bundle_at(tmp_path / "bundle"), Path.rename

    def rename(self, place):
        if self.name == destination.NEW:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, place)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Input/output error"):
        publish(bundle)
    assert word_of(bundle) == "old"
    assert left_in(tmp_path) == ["bundle"]


KILLED = """
import os, signal, sys
from pathlib import Path
from glm4_deploy import destination

at, place, exchange = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "exchange"
if not exchange:
    destination._exchange = lambda *_: False

def die(name, real):
    def call(*arguments, **named):
        count[0] += 1
        if count[0] == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call

count = [0]
Path.rename, Path.unlink, Path.rmdir, Path.mkdir = [
    die(name, getattr(Path, name)) for name in ("rename", "unlink", "rmdir", "mkdir")
]
destination._exchange, destination.lock = die("exchange", destination._exchange), die("lock", destination.lock)
destination.shutil.rmtree = die("rmtree", destination.shutil.rmtree)

target = destination.Destination(place, force=True)
target.recover()
target.check(place / "checkpoint")
with target.staged() as folder:
    (folder / "model.onnx.data").write_text("new")
    (folder / "manifest.json").write_text((place / "manifest.json").read_text())
    target.publish(folder)
print("done")
"""


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_before_any_step_the_old_bundle_or_the_new_is_there(tmp_path, way):
    """A process for each step that changes the disk, killed before that step: no instant is left out."""
    running = []
    for at in range(1, 16):
        bundle = bundle_at(tmp_path / str(at) / "bundle")
        command = [sys.executable, "-c", KILLED, str(at), str(bundle), way]
        running.append((bundle, subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)))
    ended = []
    for bundle, process in running:
        said, _ = process.communicate(timeout=60)
        ended.append(process.returncode)
        if way == "exchange":
            assert word_of(bundle) in ("old", "new")
        bundle_is_whole = bundle.exists()
        with pytest.raises(ExportError, match="is a bundle already"):  # refused, and yet it recovers
            publish(bundle, force=False)
        assert word_of(bundle) in ("old", "new")
        assert bundle_is_whole or word_of(bundle) == "old"
        assert left_in(bundle.parent) == ["bundle"]
        assert (process.returncode == 0) == (said == "done\n")
    assert -signal.SIGKILL in ended
    assert ended[-1] == 0, "more steps than this test kills at"


def test_the_only_copy_of_a_bundle_is_never_swept_away(tmp_path):
    work = tmp_path / f".bundle.{'0' * 16}.partial"
    bundle_at(work / "replaced")
    bundle_at(work / "bundle", "new")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").touch()
    target = Destination(tmp_path / "bundle", force=True)
    target.recover()
    assert word_of(work / "replaced") == "old"
    (tmp_path / "bundle" / "mine").unlink()
    target.recover()  # an empty folder is in nobody's way
    assert word_of(target.place) == "old"
    assert left_in(tmp_path) == ["bundle"]


# Exports side by side -----------------------------------------------------------------------------


def test_recovery_leaves_what_lives_and_what_is_of_another_bundle(tmp_path):
    dead, alive, word = "0" * 16, "1" * 16, "2" * 16
    names = {
        f".b[1].{dead}.partial": False,
        f".b[1].{word}.partial": False,
        f".b[1].{alive}.partial": True,
        f".b1.{dead}.partial": True,
        f".b[1].x.{dead}.partial": True,
        ".b[1].notes.partial": True,
        ".b[1].4711.partial": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f".b[1].{dead}.partial" / "lock").touch()
    with (tmp_path / f".b[1].{alive}.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        publish(tmp_path / "b[1]")
    assert left_in(tmp_path) == sorted(["b[1]", *(name for name, kept in names.items() if kept)])


def test_process_numbers_tell_nothing(tmp_path):
    """Two containers on one volume see each other's folders and not each other's processes."""
    one, two = (Destination(tmp_path / "bundle", force=True) for _ in range(2))
    with one.staged() as first:
        two.recover()
        with two.staged() as second:
            one.recover()
            assert first.is_dir()
            assert second.is_dir()
            assert first != second
            assert str(os.getpid()) not in first.parent.name.split(".")


def test_a_folder_taken_for_a_dead_one_is_not_used(tmp_path, monkeypatch):
    """Another export may lock, or remove, a working folder in the instant before its own export locks it."""
    real, tried = destination.lock, []

    def lock(path):
        tried.append(path.parent)
        if len(tried) == 1:
            os.close(real(path))
            shutil.rmtree(path.parent)
        elif len(tried) == 2:
            raise BlockingIOError
        return real(path)

    monkeypatch.setattr(destination, "lock", lock)
    with Destination(tmp_path / "bundle", force=False).staged() as folder:
        assert folder.parent == tried[2]


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    other = Destination(tmp_path / "bundle", force=False)
    with other.staged() as folder:
        Destination(tmp_path / "bundle", force=False).recover()
        assert folder.is_dir()  # nobody can tell that it is dead
    publish(tmp_path / "bundle")
    assert left_in(tmp_path) == ["bundle"]


# Other systems ------------------------------------------------------------------------------------

OTHER_SYSTEM = """
import builtins, errno, json, os, shutil, signal, subprocess, sys, types
from pathlib import Path

import fcntl as real, onnxruntime  # libraries may use what there is

posix = {"fcntl", "resource", "termios", "pwd", "grp", "tty", "pty"}
found = builtins.__import__
def without_posix(name, globals=None, *rest):
    if name.partition(".")[0] in posix and (globals or {}).get("__name__", "").startswith("glm4_"):
        raise ImportError(f"no module named {name!r}")
    return found(name, globals, *rest)

def locking(file, kind, count):
    assert (kind, count) == (2, 1)
    try:
        real.flock(file, real.LOCK_EX | real.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied")

import importlib
module_of = importlib.import_module
def import_module(name, package=None):
    return without_posix(name, {"__name__": "glm4_"}) if name in posix else module_of(name, package)
importlib.import_module = import_module
builtins.__import__ = without_posix
if sys.argv[1] == "win32":
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    for name in ("SIGHUP", "SIGALRM", "setitimer", "ITIMER_REAL"):
        delattr(signal, name)
del os.sched_getaffinity
"""


def elsewhere(system, program, *arguments):
    """The exit code and output of a program on a system that lacks POSIX's modules."""
    command = [sys.executable, "-c", OTHER_SYSTEM + program, system, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return done.returncode, done.stdout + done.stderr


COMMANDS = """
from glm4_deploy.cli import main
from glm4_deploy import destination, interrupts, locks, memory, pipeline, report
from glm4_exporters.peak_memory import peak_memory
from glm4_deploy.validate import run
import glm4_exporters.engine.worker, glm4_exporters.weights
assert locks.POSIX is None
assert peak_memory(0) == 0 and memory.available_memory() > 0
main(sys.argv[2:])
"""


@pytest.mark.parametrize("system", ["win32", "neither"])
def test_commands_start_where_posix_modules_are_missing(tiny_bundles, system):
    code, said = elsewhere(system, COMMANDS, "inspect", tiny_bundles["ort"])
    assert code == 0, said
    assert "causal-lm" in said


PUBLISHED = """
from glm4_deploy import destination
from glm4_deploy.destination import Destination
destination.sys = types.SimpleNamespace(platform=sys.argv[1])
place = Path(sys.argv[2])
for word in ("old", "new"):
    one, two = (Destination(place, force=True) for _ in range(2))
    with one.staged() as folder:
        two.recover()
        assert folder.is_dir() or sys.argv[1] != "win32", "a lock that is held was taken"
        (folder / "model.onnx.data").write_text(word)
        ours = {"schema_version": 1, "source_sha256": "", "tools": {"glm4-deploy": ""}}
        (folder / "manifest.json").write_text(json.dumps(ours | {"files": {"model.onnx.data": {"sha256": "", "bytes": 3}}}))
        if sys.argv[3] == "killed" and word == "new":
            os.kill(os.getpid(), signal.SIGKILL)
        one.publish(folder)
"""


@pytest.mark.parametrize("system", ["win32", "neither"])
def test_a_bundle_is_published_where_posix_modules_are_missing(tmp_path, system):
    (tmp_path / "bundle").mkdir()
    code, said = elsewhere(system, PUBLISHED, tmp_path / "bundle", "whole")
    assert code == 0, said
    assert (word_of(tmp_path / "bundle"), left_in(tmp_path)) == ("new", ["bundle"])


def test_what_a_killed_process_leaves_there_is_recovered(tmp_path):
    code, _ = elsewhere("win32", PUBLISHED, tmp_path / "bundle", "killed")
    assert code == -signal.SIGKILL
    assert (word_of(tmp_path / "bundle"), len(left_in(tmp_path))) == ("old", 2)
    Destination(tmp_path / "bundle", force=True).recover()
    assert (word_of(tmp_path / "bundle"), left_in(tmp_path)) == ("old", ["bundle"])


def test_windows_renames_no_folder_onto_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "bundle").mkdir()
    real = Path.rename

    def rename(self, place):
        if Path(place).exists():
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")
        return real(self, place)

    monkeypatch.setattr(Path, "rename", rename)
    publish(tmp_path / "bundle")
    assert (word_of(tmp_path / "bundle"), left_in(tmp_path)) == ("new", ["bundle"])


# Whole exports ------------------------------------------------------------------------------------


def test_no_force_no_replacement(tmp_path, tiny_checkpoint):
    bundle = tmp_path / "bundle"
    export(tiny_checkpoint, bundle, FAST)
    before = contents(bundle)
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    with pytest.raises(ExportError, match=r"is a bundle already; replace it with --force"):
        export(other, bundle, FAST)
    assert contents(bundle) == before
    export(other, bundle, FAST, force=True)
    assert contents(bundle)["model.onnx.data"] != before["model.onnx.data"]
    assert left_in(tmp_path) == ["bundle", "other"]


def test_an_empty_folder_is_taken(tmp_path, tiny_checkpoint):
    (tmp_path / "bundle").mkdir()
    export(tiny_checkpoint, tmp_path / "bundle", FAST)
    assert read_manifest(tmp_path / "bundle").task == "causal-lm"
    assert left_in(tmp_path) == ["bundle"]


SLOW_EXPORT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background hands on "ignore"
import onnx_ir as ir
from glm4_deploy import cli, pipeline
from glm4_exporters import aligned_file

checkpoint, bundle, graph = sys.argv[1:]

def traced(plan, prepared):
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model

def slow(fd, chunk, at, write=os.pwrite):
    print("writing", flush=True)
    time.sleep(0.2)
    return write(fd, chunk, at)

pipeline._trace, os.pwrite, aligned_file.WRITE_BLOCK = traced, slow, 4096
cli.main(["export", checkpoint, bundle, "--precision", "fp32", "--no-parity", "--force"])
"""


def test_whatever_ends_an_export_leaves_the_old_bundle_or_none(tmp_path, tiny_checkpoint, tiny_bundles):
    """Real processes, ended by real signals while they write; each beside an old bundle, or none."""
    cases = {
        (name, number): tmp_path / f"{name} {number.name}"
        for name in ("old", "none")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
        if name == "old" or number == signal.SIGKILL
    }
    running = {}
    for (name, number), folder in cases.items():
        folder.mkdir()
        if name == "old":
            shutil.copytree(tiny_bundles["ort"], folder / "bundle")
        command = [sys.executable, "-c", SLOW_EXPORT, tiny_checkpoint, folder / "bundle"]
        running[name, number] = subprocess.Popen(
            [*map(str, command), str(tiny_bundles["ort"] / "model.onnx")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    for (name, number), process in running.items():
        folder = cases[name, number]
        assert process.stdout.readline() == "writing\n", process.stderr.read()
        (partial,) = (name for name in left_in(folder) if name.endswith(".partial"))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        kept = ["bundle"] * (name == "old")
        if name == "old":
            assert contents(folder / "bundle") == contents(tiny_bundles["ort"])
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
            assert left_in(folder) == [partial, *kept]
            export(tiny_checkpoint, folder / "bundle", FAST, force=True)  # sweeps up
            assert left_in(folder) == ["bundle"]
        else:
            assert process.returncode == 130
            assert errors.strip().splitlines()[-1] == "glm4-deploy: interrupted"
            assert left_in(folder) == kept
