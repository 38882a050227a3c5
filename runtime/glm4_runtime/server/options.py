"""How a server is set up: who may use it, how much of it, and for how long."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm4_runtime.errors import RequestError

KEYS_VARIABLE = "GLM4_API_KEYS"

# Names under which a browser reaches this machine itself; another one may be a page's attempt at rebinding.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class ServerOptions:
    """
    Attributes:
        host, port: where to listen; port 0 takes any free one.
        api_keys: any of them opens every route but ``/health`` and the page; empty asks for none.
        allow_anonymous: whether to listen beyond this machine without a key.
        served_name: the model's name in the API; the bundle's folder name where None.
        max_body_bytes: the longest request body.
        max_prompt_tokens: the longest prompt; the session's limit where None.
        max_choices: the most replies of one request, over all its prompts.
        max_queue: how many requests may wait for a slot before others are turned away.
        request_timeout: seconds from arrival until a request is ended.
        body_timeout: seconds that a client may take to send its body.
        drain_timeout: seconds that running requests get to finish after SIGTERM.
        log_prompts: whether the log holds what was asked and answered.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_anonymous: bool = False
    served_name: str | None = None
    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_choices: int = 16
    max_queue: int = 64
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    drain_timeout: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices", "max_queue", "request_timeout", "body_timeout"):
            if getattr(self, name) <= 0:
                raise RequestError(f"{name} is {getattr(self, name)}, but must be above 0")
        for name in ("request_timeout", "body_timeout", "drain_timeout"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise RequestError(f"{name} is {getattr(self, name)}, but must be a number of seconds")
        if not self.is_local and not self.api_keys and not self.allow_anonymous:
            raise RequestError(
                f"listening on {self.host} lets other machines in: set API keys by --api-key-file or "
                f"{KEYS_VARIABLE}, or say --allow-anonymous"
            )

    @property
    def is_local(self) -> bool:
        return self.host in (*LOOPBACK, "::1")

    @property
    def host_names(self) -> frozenset[str] | None:
        """The names a request may call this server by; None for any."""
        return frozenset(LOOPBACK) if self.is_local else None


def read_api_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Keys of a file (one a line; ``#`` first or after white space begins a comment) and of GLM4_API_KEYS (separated by
    commas)."""
    keys = environment.get(KEYS_VARIABLE, "").split(",")
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"the API keys cannot be read from {file}: {error}") from error
        found = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0] for line in lines]
        if not any(key.strip() for key in found):
            raise RequestError(f"{file} holds no API key; write one a line, or leave the option out")
        keys += found
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
