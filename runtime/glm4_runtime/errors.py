"""The errors that users see. Each message is one line and says what to do.

The command line prints the message of a ``Glm4Error`` and exits with its ``exit_code``. Any other exception is a bug
and keeps its traceback.

Messages quote untrusted files and requests. :func:`shown` and :func:`some` keep quotes short, and :class:`Glm4Error`
limits every message to one line of 500 characters.
"""

from collections.abc import Iterable

LONGEST = 500  # characters of a message
LISTED = 4  # names of a list


def one_line(text: str, most: int = LONGEST) -> str:
    """``text`` without line breaks and control characters. The middle of a long text is cut: a message begins with
    its subject and ends with what to do."""
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
    """Any value as JSON, in at most ``most`` characters."""
    import json  # imported only for an error, so that --help stays quick

    text = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
            text += piece
            if len(text) > most:
                return f"{text[: most - 3]}..."
    except (
        ValueError,
        TypeError,
    ):  # a number of thousands of digits, a cycle, a key that JSON does not allow
        return f"{text[: most - 3]}..."
    return text


def some(names: Iterable[str], between: str = ", ") -> str:
    """The first names of a list, and how many more there are; each in at most 80 characters."""
    names = list(names)
    more = f"{between}and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return between.join(one_line(name, 80) for name in names[:LISTED]) + more


class Glm4Error(Exception):
    """Base class of all errors for users. The message says what was wrong, what is right and what to do, in one line."""

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
    """A valid bundle that cannot run here: a package or a device is missing."""


class RequestError(Glm4Error):
    """A request that cannot be served (bad token, bad option). The session is not affected."""


class SlotError(RequestError):
    """A slot that does not exist, is not in use, or is too small for the request."""


class BusyError(RequestError):
    """What cannot be freed now, because requests use it."""


class NotANumberError(RequestError):
    """The model gave NaN logits."""


class ModelError(Glm4Error):
    """The model failed on one request (NaN logits, no memory, a kernel's error). Other requests continue."""


class DamagedModelError(ModelError):
    """The model gave NaN logits, so later results are in doubt, too."""


class LostStageError(DamagedModelError):
    """A stage of the model has died. Its session cannot be used any more."""


class ReplicaError(Glm4Error):
    """No replica could finish the request, or a replica has died."""


class QueueFullError(Glm4Error):
    """The queue is full. ``retry_after`` estimates the seconds until a place is free."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        return QueueFullError, (str(self), self.retry_after)  # so that it can go to another process


class DeadlineError(Glm4Error):
    """A request that was not finished by its deadline."""


class OvertimeError(RequestError, DeadlineError):
    """A request whose preparation took longer than allowed."""


class StoppedError(Glm4Error):
    """A request that arrived after the scheduler stopped, or was not finished then."""


class ExportError(Glm4Error):
    """An export that is not possible, or whose options contradict each other."""


class GateError(Glm4Error):
    """The accuracy gate failed: the bundle's outputs differ too much from the reference's."""

    exit_code = 3


class TextError(Glm4Error):
    """A file of text or token ids that cannot be read, or holds nothing to compare or calibrate with."""
