"""Worker processes: what a task may cost, and that nothing it does reaches the process that asks."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from glm4_runtime.workers import frames
from glm4_runtime.workers.pool import WorkerPool
from glm4_runtime.workers.worker import TaskLimits, WorkerError

# Longer than anything takes on a busy machine, where a test is not about time.
LIMITS = TaskLimits(seconds=60, deadline=120, memory=64 * 2**20, answer=2**16)
SHORT = replace(LIMITS, seconds=0.3)  # of processor time
HASTY = replace(LIMITS, deadline=3)
PROGRAM = """
import os, signal, time
from glm4_runtime.workers import child

def main(limits):
    child.answer_tasks(answer, limits)

def answer(task):
    return TASKS[task[0]](*task[1:])

def endless():
    while True:
        pass

def fill():
    held = []
    while True:
        held.append(bytes(2**20))

def nest(depth=0):
    return [nest(depth + 1)]

def noisy():
    print("a line on standard output", flush=True)
    os.write(1, b"bytes")
    return "quiet"

TASKS = {
    "echo": lambda value: value,
    "pid": os.getpid,
    "environment": lambda: dict(os.environ),
    "sleep": lambda seconds: time.sleep(seconds) or os.getpid(),
    "priority": lambda: time.sleep(0.3) or os.getpriority(os.PRIO_PROCESS, 0),
    "ignores": lambda: signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    "endless": endless,
    "fill": fill,
    "text": lambda count: "x" * count,
    "exit": os._exit,
    "raise": lambda: 1 / 0,
    "signal": lambda number: os.kill(os.getpid(), number),
    "noisy": noisy,
}
"""


@pytest.fixture
def pool_of(tmp_path, monkeypatch):
    """A function: a pool under these limits."""
    (tmp_path / "tasks_of_a_test.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    with contextlib.ExitStack() as stack:

        def make(limits):
            pool = WorkerPool("tasks_of_a_test", limits)
            stack.callback(pool.close)
            return pool

        yield make


@pytest.fixture
def pool(pool_of):
    return pool_of(LIMITS)


@pytest.mark.parametrize("value", [None, 1.5, "東京 \ud800 \0", {"a": [1, {"b": True}]}, "x" * 60_000])
def test_a_worker_answers(pool, value):
    assert pool.call(["echo", value]) == value


def test_one_worker_answers_call_after_call(pool):
    assert len({pool.call(["pid"]) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("limits", "task", "said"),
    [
        (SHORT, ["endless"], "more than 0.3 s of processor time"),
        (HASTY, ["sleep", 300], "more than 3 s"),
        (LIMITS, ["fill"], "more than 64 MiB of memory"),
        (LIMITS, ["text", 2**16], "more than 0 MiB of text"),
        (LIMITS, ["exit", 0], "ended the process"),
        (LIMITS, ["raise"], "ended the process"),
        (LIMITS, ["signal", signal.SIGSEGV], "ended the process"),
        (LIMITS, ["signal", signal.SIGABRT], "more than 64 MiB of memory"),
    ],
)
def test_a_task_that_goes_too_far_fails_alone(pool_of, limits, task, said):
    pool = pool_of(limits)
    with pytest.raises(WorkerError, match=said) as caught:
        pool.call(task)
    assert caught.value.overtime == (limits is not LIMITS)
    assert pool.call(["echo", "on"]) == "on"


def test_no_more_workers_than_allowed_and_every_answer_to_its_own_call(pool):
    answers, counts = {}, []

    def ask(number):
        answers[number] = pool.call(["echo", number])
        counts.append(pool._count)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: number for number in range(12)}
    assert max(counts) <= 2


def test_a_worker_that_died_while_idle_is_replaced(pool):
    worker = pool.call(["pid"])
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # it is gone, and its end is still to be noticed
    assert pool.call(["echo", "on"]) == "on"


def test_an_answer_that_nobody_waited_for_goes_to_nobody(pool, monkeypatch):
    def interrupted(_stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frames, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.call(["echo", "first"])
    assert pool.call(["echo", "second"]) == "second"


def test_a_worker_knows_no_keys_ignores_ctrl_c_and_keeps_its_frames_clean(pool, monkeypatch):
    monkeypatch.setenv("GLM4_API_KEYS", "secret")
    assert "secret" not in pool.call(["environment"]).values()
    assert pool.call(["ignores"])
    assert pool.call(["noisy"]) == "quiet"


def test_a_long_task_goes_on_at_a_low_priority_and_its_worker_is_replaced(pool):
    before = pool.call(["pid"])
    assert pool.call(["priority"]) >= 10
    assert pool.call(["pid"]) != before


def test_what_is_no_json_is_refused(pool):
    with pytest.raises(TypeError):
        pool.call(["echo", {1, 2}])
    assert pool.call(["echo", "on"]) == "on"


def test_a_worker_that_is_started_early_is_the_first_to_answer(pool):
    pool.start()
    pool.start()
    assert pool.call(["echo", 1]) == 1
    assert pool._count == 1


RUN = """
import sys
from glm4_runtime.workers.pool import WorkerPool
from glm4_runtime.workers.worker import TaskLimits
pool = WorkerPool("tasks_of_a_test", TaskLimits(seconds=5, deadline=5, memory=2**26, answer=2**16))
print(pool.call(["pid"]), flush=True)
"""


def started(tmp_path, code):
    (tmp_path / "tasks_of_a_test.py").write_text(PROGRAM)
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def gone(pid, seconds=5):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_no_worker_outlives_the_process_that_asked(tmp_path, how):
    process = started(tmp_path, RUN + ("" if how == "ends" else "sys.stdin.read()\n"))
    worker = int(process.stdout.readline())
    if how == "is killed":
        assert Path(f"/proc/{worker}").exists()
        process.kill()
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
    assert gone(worker)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_workers_of_its_own(tmp_path):
    code = RUN + (
        "import os\nif (child := os.fork()) == 0:\n"
        "    print(pool.call(['pid']), flush=True)\n    pool.close()\n    os._exit(0)\n"
        "os.waitpid(child, 0)\nprint(pool.call(['pid']))\n"
    )
    process = started(tmp_path, code)
    first, second, third = map(int, process.communicate(timeout=20)[0].split())
    assert first == third != second
