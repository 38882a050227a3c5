"""Refusals: what the user asked for cannot be done, said in one line with what to do instead.

The command line prints the message of a ``Glm4Error`` and exits with its ``exit_code``; any other
exception is a defect of ours and keeps its traceback.
"""


class Glm4Error(Exception):
    """Base of every refusal. The message says what was wrong, what is right and what to do."""

    exit_code = 1


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
