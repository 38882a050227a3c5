"""Refusals: what the user asked for cannot be done, said in one line with what to do instead.

The command line prints the message of a ``Glm4Error`` and exits with its ``exit_code``; any other
exception is a defect of ours and keeps its traceback.

Messages quote files and requests that strangers wrote. :func:`shown` and :func:`some` quote them in few
characters, and :class:`Glm4Error` keeps every message to one line of at most 500.
"""

from collections.abc import Iterable

LONGEST = 500  # characters of a message
LISTED = 4  # names of a list


def one_line(text: str, most: int = LONGEST) -> str:
    """``text`` without line breaks and control characters. The middle of a long text is left out: a message
    names its subject first and says last what to do."""
    if len(text) > 4 * most:
        text = f"{text[: 2 * most]} ... {text[-2 * most :]}"
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 5]} ... {text[len(text) - end :]}"


def shown(value: object, most: int = 80) -> str:
    """A value of any size and depth, as JSON writes it, in at most ``most`` characters."""
    import json  # loaded when something is wrong, so that --help stays quick

    text = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
            text += piece
            if len(text) > most:
                return f"{text[: most - 3]}..."
    except (ValueError, TypeError):  # a number of thousands of digits, a cycle, a key that JSON has not
        return f"{text[: most - 3]}..."
    return text


def some(names: Iterable[str], between: str = ", ") -> str:
    """The first names of a list, and how many more there are; each in at most 80 characters."""
    names = list(names)
    more = f"{between}and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return between.join(one_line(name, 80) for name in names[:LISTED]) + more


class Glm4Error(Exception):
    """Base of every refusal. The message says what was wrong, what is right and what to do, in one line."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class ConfigError(Glm4Error):
    """A ``config.json`` that is not a GLM-4-0414 configuration, or an impossible one."""


class CheckpointError(Glm4Error):
    """A checkpoint folder whose files are missing, damaged or not what the configuration says."""


class BundleError(Glm4Error):
    """A bundle that cannot be read, verified or opened on this machine."""


class UnavailableError(BundleError):
    """A sound bundle that nothing here can run: what it needs is not installed, or not on this machine."""


class RequestError(Glm4Error):
    """One request that cannot be served (bad token, bad option); the session goes on unharmed."""


class SlotError(RequestError):
    """A slot that does not exist, is not in use, or has no room for what was asked."""


class ModelError(Glm4Error):
    """The model failed on one request (NaN logits, no memory, a kernel's error); the others go on."""


class QueueFullError(Glm4Error):
    """Too many requests wait already; ``retry_after`` is an estimate of the seconds until one may enter."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(Glm4Error):
    """A request that was not done by its deadline."""


class OvertimeError(RequestError, DeadlineError):
    """A request whose preparation took longer than any request's may."""


class StoppedError(Glm4Error):
    """A request that came, or was not done, when the scheduler stopped."""


class ExportError(Glm4Error):
    """An export that cannot be done as asked, or that was given options that contradict each other."""


class GateError(Glm4Error):
    """The accuracy gate failed: the bundle computes something else than the reference."""

    exit_code = 3


class TextError(Glm4Error):
    """A file of text or token ids that cannot be read, or holds nothing to compare or calibrate with."""
