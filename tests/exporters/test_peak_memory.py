"""The peak memory of a process: of this one, of another, and without Linux's /proc."""

import resource
import sys

from glm4_exporters import peak_memory as module
from glm4_exporters.peak_memory import peak_memory


def test_it_counts_what_this_process_touched():
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    assert peak_memory() >= len(block)


def test_another_process_has_a_peak_of_its_own():
    assert 0 < peak_memory(1) != peak_memory()


def test_without_proc_this_process_asks_the_system(monkeypatch):
    monkeypatch.setattr(
        module, "Path", type("Absent", (), {"__init__": lambda *_: None, "read_text": _absent})
    )
    assert peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak_memory(1) == 0
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory() == 0


def _absent(_path):
    raise FileNotFoundError
