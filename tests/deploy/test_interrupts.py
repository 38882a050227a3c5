"""Signals: whatever the moment and however many come, 130, one line, and the old bundle or the new one whole."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm4_deploy import interrupts
from glm4_deploy.cli import main
from glm4_deploy.destination import Destination
from glm4_runtime.bundle import read_manifest, verify_files

ROOT = Path(__file__).parents[2]
INTERRUPTED = "glm4-deploy: interrupted"

# A command of its own in place of export: `work` does what the test says, without the seconds that torch takes.
COMMAND = """
import os, signal, sys, types
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background hands on "ignore"
from glm4_deploy import __main__ as entry, cli, destination, interrupts, show
import click

def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), getattr(signal, number))

def run(work):
    module = types.ModuleType("the_command")
    module.command = click.Command("work", callback=work)
    sys.modules["the_command"] = module
    cli.COMMANDS["work"] = "the_command"
    sys.argv = ["glm4-deploy", "work"]
    entry.main()
"""


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND + program, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def ended(process):
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    return process.returncode, out, err.strip()


# Before, while and after a command runs -----------------------------------------------------------


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_before_the_command_begins(number):
    program = "signal.signal(signal.SIGHUP, signal.SIG_DFL); interrupts.exit_at_once()"
    assert ended(start(f"{program}; send('{number}'); print('went on')")) == (130, "", INTERRUPTED)


def test_the_entry_point_answers_signals_before_it_imports_anything():
    lines = (ROOT / "glm4_deploy" / "__main__.py").read_text("utf-8").splitlines()
    code = [line for line in lines[1:] if line]
    assert code[:2] == ["from glm4_deploy import interrupts", "interrupts.exit_at_once()"]
    before = set(
        subprocess.check_output([sys.executable, "-c", "import sys; print(*sys.modules)"], text=True).split()
    )
    program = "import sys; from glm4_deploy import interrupts; print(*sys.modules)"
    loaded = (
        set(subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT).split()) - before
    )
    assert loaded <= {"glm4_deploy", "glm4_deploy.interrupts", "signal", *ENUM}


# What Python's own `signal` brings along.
ENUM = {"enum", "types", "operator", "_operator", "functools", "collections", "_collections", "_functools", "itertools",
        "keyword", "reprlib", "collections.abc", "typing", "re", "copyreg", "contextlib", "warnings"} | {
        f"re.{part}" for part in ("_casefix", "_compiler", "_constants", "_parser")} | {"_sre", "typing.io", "typing.re", "_typing"}  # fmt: skip


@pytest.mark.parametrize("numbers", [["SIGINT"], ["SIGTERM"], ["SIGINT", "SIGTERM"], ["SIGTERM"] * 3])
def test_while_it_runs(numbers):
    program = f"""
def work():
    try:
        send({numbers[0]!r})
    finally:
        send(*{numbers[1:]!r})
        print("cleaned up")

run(work)
"""
    assert ended(start(program)) == (130, "cleaned up\n", INTERRUPTED)


def test_an_interrupt_that_falls_into_a_destructor():
    program = """
import time

class Late:
    def __del__(self):
        send("SIGTERM")

def work():
    Late()
    while True:
        time.sleep(1)

run(work)
"""
    assert ended(start(program)) == (130, "", INTERRUPTED)


@pytest.mark.parametrize(
    "swallowed", ["except BaseException: pass", "except BaseException: raise ValueError"]
)
def test_what_a_library_makes_of_the_interrupt(swallowed):
    program = f"""
def work():
    with show.shown_progress() as progress:
        progress("read", 0, 2)
        try: send("SIGINT")
        {swallowed}
        progress("read", 1, 2)
        print("went on")

run(work)
"""
    assert ended(start(program)) == (130, "", f"read\n{INTERRUPTED}")


def test_after_its_end_a_signal_changes_nothing():
    program = """
import atexit
atexit.register(send, "SIGTERM", "SIGINT")
run(lambda: print("done"))
"""
    assert ended(start(program)) == (0, "done\n", "")


def test_nohup_is_respected():
    program = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
run(lambda: (send("SIGHUP"), print("done")))
"""
    assert ended(start(program)) == (0, "done\n", "")


def test_going_on_after_ctrl_c():
    program = """
def work():
    for number in ("SIGINT", "SIGINT", "SIGTERM"):
        try:
            send(number)
        except KeyboardInterrupt:
            interrupts.forgive()
        print(number)

run(work)
"""
    assert ended(start(program)) == (130, "SIGINT\nSIGINT\n", INTERRUPTED)


def test_a_caller_in_python_keeps_its_handlers(capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for arguments in (["--version"], ["inspect", "nowhere"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert {number: signal.getsignal(number) for number in before} == before
    assert not interrupts.received()


# Around the publication ---------------------------------------------------------------------------

PUBLISH = """
at, place, exchange, *numbers = sys.argv[1:]
place, count = Path(place), 0

def step(real):
    def call(*arguments, **named):
        global count
        count += 1
        if count == int(at):
            send(*numbers)
        result = real(*arguments, **named)
        if count == int(at):
            send(*numbers)
        return result
    return call

if exchange == "renames":
    destination._exchange = lambda *_: False
for name in ("rename", "unlink", "rmdir", "mkdir"):
    setattr(Path, name, step(getattr(Path, name)))
destination._exchange, destination.lock = step(destination._exchange), step(destination.lock)
destination.shutil.rmtree = step(destination.shutil.rmtree)

def work():
    target = destination.Destination(place, force=True)
    target.check(place / "checkpoint")
    with target.staged() as folder:
        (folder / "model.onnx.data").write_text("new")
        (folder / "manifest.json").write_text((place / "manifest.json").read_text())
        target.publish(folder)

run(work)
"""


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_signal_at_each_step_of_the_publication(tmp_path, way):
    """Sent before the step and after it, so the first or the second comes in the middle of the clean-up."""
    running = []
    for at in range(1, 13):
        bundle = tmp_path / str(at) / "bundle"
        bundle.mkdir(parents=True)
        (bundle / "model.onnx.data").write_text("old")
        files = {"model.onnx.data": {"sha256": "", "bytes": 3}}
        manifest = {"schema_version": 1, "source_sha256": "", "tools": {"glm4-deploy": "0"}, "files": files}
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        numbers = ("SIGINT", "SIGTERM") if at % 2 else ("SIGTERM",)
        running.append((bundle, start(PUBLISH, at, bundle, way, *numbers)))
    codes, words = [], set()
    for bundle, process in running:
        code, out, err = ended(process)
        codes.append(code)
        words.add((bundle / "model.onnx.data").read_text())
        assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
        assert (code, out, err) in ((130, "", INTERRUPTED), (0, "", ""))
    assert words == {"old", "new"}
    assert codes[:6] == [130] * 6
    assert codes[-1] == 0, "more steps than this test sends signals at"


# The goal: 500 kills of real exports ---------------------------------------------------------------

# Has loaded everything, and forks a child for each export: what is killed is the export and not seconds of imports.
ZYGOTE = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
import onnx_ir as ir, torch
from glm4_deploy import __main__ as entry, destination, pipeline
import glm4_deploy.commands.export, glm4_exporters.weights, glm4_deploy.calibration, onnx

checkpoint, graph = sys.argv[1:]

def traced(plan, prepared):
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model

def publish(self, folder, real=destination.Destination.publish):
    os.write(3, b"p")
    import time; time.sleep(0.003)
    real(self, folder)

pipeline._trace, destination.Destination.publish = traced, publish
for line in os.fdopen(os.dup(0)):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        sys.argv = ["glm4-deploy", "export", checkpoint, line.strip(), "--precision", "fp32", "--no-parity", "--force"]
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        os.dup2(tell, 3)
        entry.main()
    os.close(tell)
    print(pid, flush=True)
    if os.read(ready, 1):
        print("publishes", flush=True)
    os.close(ready)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def whole(bundle):
    verify_files(bundle, read_manifest(bundle), hashes=True)
    return read_manifest(bundle).source_sha256


@pytest.mark.more
@pytest.mark.timeout(3600)
def test_five_hundred_kills(tmp_path, tiny_checkpoint, tiny_bundles):
    """200 over the whole run, 200 around the publication, 100 in the first 0.3 s of the program."""
    from checkpoints import tiny_config, write_checkpoint

    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    graph = tiny_bundles["ort"] / "model.onnx"
    place = tmp_path / "here" / "bundle"
    place.parent.mkdir()
    shutil.copytree(tiny_bundles["ort"], place)
    old = whole(place)
    source = random.Random(1)
    messages = tmp_path / "messages"
    with messages.open("wb") as file:
        zygote = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, other, graph],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, cwd=ROOT,
        )  # fmt: skip

    def begin():
        zygote.stdin.write(f"{place}\n".encode())
        zygote.stdin.flush()
        return int(zygote.stdout.readline())

    def finish():
        line = zygote.stdout.readline()
        return int(zygote.stdout.readline() if line == b"publishes\n" else line)

    begin()
    start_time = time.monotonic()
    assert finish() == 0
    usual = time.monotonic() - start_time
    seen = {}

    def judge(code, numbers):
        names = left_in(place.parent)
        assert "bundle" in names
        word = "old" if whole(place) == old else "new"
        if signal.SIGKILL not in numbers:
            assert code in (130, 0), code
            assert names == ["bundle"]
        Destination(place, force=True).recover()  # after SIGKILL there is something to recover
        assert left_in(place.parent) == ["bundle"]
        seen[word, code] = seen.get((word, code), 0) + 1
        if word == "new":
            shutil.rmtree(place)
            shutil.copytree(tiny_bundles["ort"], place)

    kinds = (
        [signal.SIGKILL],
        [signal.SIGINT],
        [signal.SIGTERM],
        [signal.SIGINT, signal.SIGTERM],
        [signal.SIGTERM] * 2,
    )
    for turn in range(400):
        numbers = kinds[turn % len(kinds)]
        pid = begin()
        if turn < 200:
            time.sleep(source.uniform(0, usual))
        else:
            assert zygote.stdout.readline() == b"publishes\n"
            time.sleep(source.uniform(0, 0.008))
        for number in numbers:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
            time.sleep(source.choice((0, 0.001, 0.01)))
        judge(finish() if turn < 200 else int(zygote.stdout.readline()), numbers)
    zygote.stdin.close()
    zygote.wait()
    assert "Traceback" not in messages.read_text()
    assert sum(count for (_, code), count in seen.items() if code) > 200, seen
    for turn in range(100):
        command = [sys.executable, "-m", "glm4_deploy", "export", other, place, "--force", "--no-parity"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT)
        time.sleep(0.003 * turn)
        process.send_signal(signal.SIGTERM if turn % 2 else signal.SIGINT)
        process.communicate(timeout=60)
        assert left_in(place.parent) == ["bundle"]
        assert whole(place) == old
        assert process.returncode in (130, -signal.SIGTERM, -signal.SIGINT, 1)
        seen["early", process.returncode] = seen.get(("early", process.returncode), 0) + 1
    print(seen)
    for kind in (("old", 130), ("new", 130), ("old", -9), ("new", -9), ("early", 130)):
        assert seen.get(kind, 0) > 0, seen
