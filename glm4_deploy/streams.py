"""Prepares the standard streams of a command, which may be closed, full, or of any encoding.

Text that a stream's encoding cannot express is written as an escape, ``\\u4f60``. A result that cannot be written is
a one-line error. A message that cannot be written is dropped, so that the work continues.
"""

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import Any

from glm4_runtime.errors import Glm4Error

COERCED = ("C.UTF-8", "C.utf8", "UTF-8")  # of PEP 538


class OutputError(Glm4Error):
    """Standard output cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written: {error.strerror}; give it a file with room")
        self.unread = error.errno == errno.EPIPE  # the reader closed the pipe, like `head`


class _Results(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from error


class _Messages(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Replace the three streams of this process. Call this before anything is read or written."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # closed: occupy the number here, otherwise the next opened file gets it
            os.open(os.devnull, flags)  # for standard output: open read-only, so that writing fails
    sys.stdin = _reader(sys.__stdin__)
    sys.stdout = _writer(_Results(1, "w", closefd=False), sys.__stdout__)
    sys.stderr = _writer(_Messages(2, "w", closefd=False), sys.__stderr__)


def discard_output() -> None:
    """Drop unwritten output, so that the interpreter's end does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def is_utf8() -> bool:
    """Whether standard output is UTF-8."""
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf-8")


def text(value: str, encoding: str | None = None) -> str:
    """Decode text whose bytes Python could not decode and kept as surrogates.

    The bytes are decoded in the locale's encoding, or else as UTF-8. ``encoding`` is the one that Python used;
    default: the file system's, as for arguments.

    Raises:
        ValueError: they are text in neither encoding.
    """
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        charsets = list(dict.fromkeys([*_named_charsets(), "utf-8"]))
    try:
        raw = os.fsencode(value) if encoding is None else value.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:  # the surrogates are not from bytes
        raise ValueError(f"{value!r} is not text: it holds half a surrogate pair") from None
    for charset in charsets:
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(charset)
    raise ValueError(f"{value!r} is not text in {' or '.join(charsets)}")


def _writer(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
    unbuffered = getattr(before, "write_through", False)  # as python -u requests
    charset = _forgotten_charset() if raw.isatty() else None
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=charset or getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty() or isinstance(raw, _Messages),
        write_through=unbuffered,
    )


def _reader(before: Any) -> Any:
    if before is None:
        return io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "surrogateescape")
    before.reconfigure(errors="surrogateescape")
    return before


def _forgotten_charset() -> str | None:
    """The terminal's encoding, if its locale is not installed and Python assumed UTF-8."""
    chosen = {"PYTHONUTF8", "PYTHONIOENCODING"} & os.environ.keys() or "utf8" in sys._xoptions
    return None if chosen or not sys.flags.utf8_mode else next(iter(_named_charsets()), None)


def _named_charsets() -> list[str]:
    """The encodings in the locale's variables, in order of priority: gb18030 from zh_CN.GB18030@stroke."""
    names = [os.environ.get(variable, "") for variable in ("LC_ALL", "LC_CTYPE", "LANG")]
    if names[1] in COERCED:
        names[1] = ""  # set by Python if a locale is not installed
    found = []
    for name in names:
        with contextlib.suppress(LookupError):  # no encoding, or an unknown one
            found.append(codecs.lookup(name.partition(".")[2].partition("@")[0]).name)
    return found
