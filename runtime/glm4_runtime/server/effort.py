"""The efforts of the APIs, as limits of the thinking."""

from typing import Literal

from glm4_runtime.server.errors import ApiError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# Most tokens of the thinking; None: no limit. Z1 has no levels of effort: a limit can only end its thinking earlier.
BUDGETS: dict[Effort, int | None] = {
    "minimal": 512,
    "low": 2048,
    "medium": None,
    "high": None,
    "xhigh": None,
    "max": None,
}


def thinking_limit(effort: Effort | None, budget: int | None) -> int | None:
    """The lower of the limits that an effort and a budget set, in tokens."""
    limits = [budget, None if effort is None else BUDGETS.get(effort)]
    return min((limit for limit in limits if limit is not None), default=None)


def require_effort(effort: Effort | None, thinks: bool, default: Effort, param: str) -> None:
    """Check that the model can think as much as the request asks.

    Args:
        default: the API's effort of a request without one; every model takes it.
        param: the option's name in the API.

    Raises:
        ApiError: 400; no thinking is asked of a model that thinks, or an effort of one that does not think.
    """
    if thinks and effort == "none":
        raise ApiError(400, f"{param} is 'none', but this model always thinks", param=param)
    if not thinks and effort not in (None, "none", default):
        raise ApiError(
            400, f"{param} is {effort!r}, but this model does not think; leave the option out", param=param
        )
