"""Which tests are slow: ``slow.txt`` lists them, made from one measured run by ``make slow-list``.

The measure is processor time, of the test and of its child processes: a busy machine changes it little.
A test function counts with all its cases. A run names the slow ones that the list lacks.
"""

import contextlib
import os
from collections import Counter
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("slow.txt")
LIMIT = 1.0  # seconds
FAR = 7.5  # times the limit, from which a run says that the list is out of date
spent = pytest.StashKey[Counter]()


def pytest_addoption(parser):
    parser.addoption("--write-slow", action="store_true", help="write tests/slow.txt from this run")


def pytest_configure(config):
    config.stash[spent] = Counter()


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items):
    slow = listed()
    for item in items:
        if function_of(item.nodeid) in slow:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = processor_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append(("seconds", processor_seconds() - before))


def processor_seconds():
    """Of this process, of the children that have ended, and on Linux of those that run, such as Triton's interpreter."""
    seconds = sum(os.times()[:4])
    for child in running_children():
        with contextlib.suppress(OSError):  # it has just ended
            times = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
            seconds += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return seconds


def running_children():
    found = []
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found += (thread / "children").read_text().split()
    return found


def measured(config, report):
    """Add up what a test function took; its report may come from another process."""
    if report.when == "call":
        config.stash[spent][function_of(report.nodeid)] += dict(report.user_properties).get("seconds", 0)


def pytest_terminal_summary(terminalreporter, config):
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                measured(config, report)
    found = config.stash[spent]
    if config.getoption("--write-slow"):
        LIST.write_text("".join(f"{name}\n" for name in sorted(found) if found[name] > LIMIT), "utf-8")
    late = sorted(name for name in found.keys() - listed() if found[name] > FAR * LIMIT)
    if late:
        terminalreporter.write_line(f"slow, and not in {LIST.name} (make slow-list): {', '.join(late)}")


def listed():
    return {*LIST.read_text("utf-8").split()}


def function_of(nodeid):
    return nodeid.partition("[")[0]
