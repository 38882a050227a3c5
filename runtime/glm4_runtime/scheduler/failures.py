"""The errors that a request receives when it fails."""

from glm4_runtime.errors import DamagedModelError, DeadlineError, Glm4Error, ModelError, NotANumberError
from glm4_runtime.scheduler.job import Job


def overdue(job: Job) -> DeadlineError:
    return DeadlineError(
        f"the request was not done by its deadline: {job.count} tokens were generated; "
        "allow it more time or fewer tokens"
    )


def unread(job: Job) -> DeadlineError:
    return DeadlineError(
        f"the answer was not read while too many requests waited: {job.count} tokens were generated; "
        "read a stream as it arrives"
    )


def model_error(error: BaseException) -> ModelError:
    """The error that the client receives after a failed step; its message has one line."""
    if isinstance(error, NotANumberError | DamagedModelError):
        return DamagedModelError(str(error))
    if isinstance(error, Glm4Error):
        return ModelError(str(error))
    if isinstance(error, MemoryError):
        return ModelError("no memory for a step of the model; send shorter prompts or allow fewer slots")
    lines = str(error).splitlines() or [""]
    return ModelError(f"a step of the model failed ({type(error).__name__}: {lines[0][:200]})")
