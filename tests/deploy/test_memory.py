"""Memory: the least of what the machine, the control groups above the process, and its own limits leave."""

import subprocess
import sys
from pathlib import Path

import pytest

from glm4_deploy.memory import available_memory

ROOT = Path(__file__).parents[2]
MIB = 2**20
MEASURE = "from glm4_deploy.memory import available_memory; print(available_memory())"
HIDDEN = "12 11 0:20 / /proc rw - proc proc rw\n"  # a mount that is none of ours
V1 = HIDDEN + "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2 = HIDDEN + "31 24 0:27 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def machine(tmp_path):
    """A function that makes a machine of 8000 MiB; ``files`` are those under /sys/fs/cgroup, in MiB or as text."""

    def make(cgroup="", mountinfo="", **files):
        process = tmp_path / "proc" / "self"
        process.mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1 kB\nMemAvailable: 8192000 kB\n")
        (process / "cgroup").write_text(cgroup)
        (process / "mountinfo").write_text(mountinfo)
        for name, value in files.items():
            path = tmp_path / "sys" / "fs" / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value * MIB}\n" if isinstance(value, int) else value)
        return available_memory(tmp_path) / MIB

    return make


def test_without_groups(machine, tmp_path):
    assert machine() == 8000
    assert available_memory(tmp_path / "nowhere") == 0


def test_version_2(machine):
    files = {
        "a/memory.max": 600,
        "a/memory.current": 250,
        "a/memory.stat": f"anon 1\ninactive_file {50 * MIB}\n",
    }
    assert machine("0::/a\n", V2.format(mounted="/"), **files) == 400


def test_version_1(machine):
    files = {"memory/a/memory.limit_in_bytes": 600, "memory/a/memory.usage_in_bytes": 250,
             "memory/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {50 * MIB}\n",
             "memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": 300}  # fmt: skip
    assert machine("9:cpu,cpuacct:/\n4:memory:/a\n0::/\n", V1.format(mounted="/"), **files) == 400


def test_the_groups_above_count(machine):
    files = {"a/b/memory.max": "max\n", "a/b/memory.current": 100, "a/memory.max": 700, "a/memory.current": 300,
             "a/b/c/memory.max": 900, "a/b/c/memory.current": 10}  # fmt: skip
    assert machine("0::/a/b/c\n", V2.format(mounted="/"), **files) == 400


def test_throttling_is_a_limit_too(machine):
    files = {"a/memory.max": "max\n", "a/memory.high": 500, "a/memory.current": 100}
    assert machine("0::/a\n", V2.format(mounted="/"), **files) == 400


@pytest.mark.parametrize("group", ["/docker/0123", "/docker/0123/inner", "/../elsewhere", "/"])
def test_in_a_container(machine, group):
    """The path may be the host's, while the mount point is the container's own group."""
    files = {"memory.max": 600, "memory.current": 200}
    assert machine(f"0::{group}\n", V2.format(mounted="/docker/0123"), **files) == 400


def test_both_versions_at_once(machine):
    """As systemd's hybrid mode: the memory controller is of version 1, and version 2 has no limits."""
    mounts = V1.format(mounted="/") + V2.format(mounted="/").replace(
        "/sys/fs/cgroup", "/sys/fs/cgroup/unified"
    )
    files = {
        "memory/a/memory.limit_in_bytes": 600,
        "memory/a/memory.usage_in_bytes": 200,
        "unified/a/cgroup.procs": "",
    }
    assert machine("4:memory:/a\n0::/a\n", mounts, **files) == 400


def test_a_group_over_its_limit_leaves_nothing(machine):
    files = {"a/memory.max": 600, "a/memory.current": 700}
    assert machine("0::/a\n", V2.format(mounted="/"), **files) == 0


def test_no_limit_is_above_the_machine(machine):
    files = {"a/memory.max": 10**6, "a/memory.current": 0}
    assert machine("0::/a\n", V2.format(mounted="/"), **files) == 8000


@pytest.mark.parametrize("limit", ["-v", "-d"])
def test_limits_of_the_process(limit):
    command = f"ulimit {limit} 2000000; '{sys.executable}' -c '{MEASURE}'"
    room = int(subprocess.check_output(["bash", "-c", command], text=True, cwd=ROOT))
    assert 500e6 < room < 2000000 * 1024


def test_a_real_group():
    group = Path("/sys/fs/cgroup/memory") / "glm4-deploy-test"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(600 * MIB))
        command = f"echo $$ > {group}/cgroup.procs && exec '{sys.executable}' -c '{MEASURE}'"
        room = int(subprocess.check_output(["sh", "-c", command], text=True, cwd=ROOT))
    finally:
        group.rmdir()
    assert 400 * MIB < room < 600 * MIB
