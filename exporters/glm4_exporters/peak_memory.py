"""The peak memory of a process. Needs neither torch nor onnx."""

import sys
from contextlib import suppress
from pathlib import Path


def peak_memory(process: int | str = "self") -> int:
    """Bytes that a process had resident at its peak, mapped files included; 0 if the system does not tell.

    Linux's VmHWM. Elsewhere, of this process only: getrusage, which also counts the process that started it.
    """
    try:
        return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # not Linux, or a sandbox that does not tell
        pass
    if sys.platform != "win32" and process == "self":
        with suppress(ImportError):  # a system with neither
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0
