"""The first step of a session, before its first request."""

from glm4_runtime.session.base import Session


def warm_up(session: Session) -> None:
    """Run one token, if the model generates.

    The first step maps the weights' pages and makes buffers, so it takes longer than the next one. A server takes this
    time before it says that it is ready.

    Raises:
        Glm4Error: the step failed.
    """
    if session.manifest.task == "causal-lm":
        session.prefill(0, [0])
        session.release(0)
