"""The options of a server: access, limits and timeouts."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm4_runtime.errors import RequestError, some
from glm4_runtime.prefix_store.limits import DEFAULT_BYTES
from glm4_runtime.trace_options import TraceOptions, require_traces

KEYS_VARIABLE = "GLM4_API_KEYS"

# Names by which a browser reaches this machine itself. Another name may be a DNS rebinding attack.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

LOG_LEVELS = ("debug", "info", "warning")

_COUNTS = ("max_body_bytes", "max_choices", "max_queue", "cache_bytes")
_TIMES = (
    "request_timeout",
    "header_timeout",
    "body_timeout",
    "send_timeout",
    "idle_timeout",
    "drain_timeout",
)


@dataclass(frozen=True)
class ServerOptions:
    """
    Attributes:
        host, port: where to listen; port 0 takes any free one.
        api_keys: each allows all routes. Empty: no key is needed. ``/health`` and the page never need one.
        allow_anonymous: whether to accept other machines without a key.
        served_name: the model's name in the API; by default the bundle's folder name.
        aliases: further names of models, each as ``ALIAS=NAME``.
        adapters: LoRA adapters that are loaded at the start, each as ``NAME=DIR``. Each is a model of the API.
        allow_lora_loading: whether the API may load and unload adapters, from any folder of this machine.
        max_body_bytes: the longest request body.
        max_prompt_tokens: maximum tokens of a prompt; by default the session's limit.
        max_choices: maximum number of replies of one request, over all its prompts.
        max_queue: maximum number of requests that wait for a slot.
        cache: the folder of the prefix cache on disk. None: there is none.
        cache_bytes: its maximum size.
        cache_shared: whether requests of all API keys share prefixes, in memory and on disk.
        draft: bundle of a draft model, whose guesses make generation faster. None: there is none.
        max_stored: maximum number of responses of ``/v1/responses`` that are kept in memory; 0 keeps none.
        request_timeout: maximum seconds of a request.
        header_timeout: maximum seconds for the header of a request.
        body_timeout: maximum seconds for its body.
        send_timeout: seconds for which a client may leave its answer unread.
        idle_timeout: seconds for which a connection is kept after an answer.
        drain_timeout: seconds that running requests get to finish after SIGTERM.
        allow_hosts: further host names of this server. If it listens beyond this machine and none is given, any name
            is accepted.
        allow_origins: origins whose web pages may use this server, such as ``https://name``.
        path_prefix: the path of this server behind a reverse proxy, such as ``/llm``; empty for none.
        log_level: the lowest level in the log: debug, info or warning.
        log_prompts: whether the log contains prompts and answers.
        traces: where traces go, as ``TraceOptions.endpoint``. None: there are none.
        trace_prompts: whether traces contain prompts and answers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_anonymous: bool = False
    served_name: str | None = None
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    allow_lora_loading: bool = False
    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_choices: int = 16
    max_queue: int = 64
    cache: Path | None = None
    cache_bytes: int = DEFAULT_BYTES
    cache_shared: bool = False
    draft: Path | None = None
    max_stored: int = 1000
    request_timeout: float = 600.0
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    idle_timeout: float = 5.0
    drain_timeout: float = 30.0
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    path_prefix: str = ""
    log_level: str = "info"
    log_prompts: bool = False
    traces: str | None = None
    trace_prompts: bool = False

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *_TIMES):
            if getattr(self, name) <= 0 and name != "drain_timeout":
                raise RequestError(f"{name} is {getattr(self, name)}, but must be above 0")
        if self.max_stored < 0:
            raise RequestError(f"max_stored is {self.max_stored}, but must be 0 or above")
        for name in _TIMES:
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise RequestError(f"{name} is {getattr(self, name)}, but must be a number of seconds")
        if self.log_level not in LOG_LEVELS:
            raise RequestError(
                f"log_level is {self.log_level!r}, but must be one of: {', '.join(LOG_LEVELS)}"
            )
        if self.traces is not None:
            require_traces(self.traces)
        elif self.trace_prompts:
            raise RequestError("trace_prompts goes with traces; add --traces ENDPOINT")
        _require_prefix(self.path_prefix)
        for origin in self.allow_origins:
            _require_origin(origin)
        for name in self.allow_hosts:
            _require_host_name(name)
        if not self.is_local and not self.api_keys and not self.allow_anonymous:
            raise RequestError(
                f"listening on {self.host} lets other machines in: set API keys by --api-key-file or "
                f"{KEYS_VARIABLE}, or add --allow-anonymous"
            )

    @property
    def is_local(self) -> bool:
        return self.host in (*LOOPBACK, "::1")

    @property
    def keeps_prompts(self) -> bool:
        """Whether the record of a request has its prompts and answers."""
        return self.log_prompts or self.trace_prompts

    @property
    def trace_options(self) -> TraceOptions | None:
        return None if self.traces is None else TraceOptions(self.traces, self.trace_prompts)

    def names(self, bundle: Path) -> dict[str, str]:
        """The model of each name in the API: the base model first, its adapters, and aliases.

        Raises:
            RequestError: an adapter or an alias has another form, an alias names no model, or a name comes twice.
        """
        base = self.served_name or bundle.resolve().name
        models = [base, *self.adapter_folders]
        if base in models[1:]:
            raise RequestError(
                f"--lora gives the name {base!r}, which the model has; give the adapter another name"
            )
        names = {name: name for name in models}
        for given in self.aliases:
            alias, _, model = given.partition("=")
            if not alias or model not in models:
                known = (
                    f"the models are {some(map(repr, models))}"
                    if models[1:]
                    else f"the model's name is {base!r}"
                )
                raise RequestError(f"alias {given[:100]!r} must be ALIAS=NAME, and {known}")
            if alias in names:
                raise RequestError(f"alias {given[:100]!r} gives a name that the server has already")
            names[alias] = model
        return names

    @property
    def adapter_folders(self) -> dict[str, str]:
        """The folder of each adapter by its name.

        Raises:
            RequestError: another form than ``NAME=DIR``, or a name that comes twice.
        """
        found: dict[str, str] = {}
        for given in self.adapters:
            name, _, folder = given.partition("=")
            if not (name and folder):
                raise RequestError(f"--lora {given[:100]!r} must be NAME=DIR, such as poet=adapters/poet")
            if name in found:
                raise RequestError(
                    f"--lora gives the name {name[:100]!r} twice; give each adapter its own name"
                )
            found[name] = folder
        return found

    @property
    def host_names(self) -> frozenset[str] | None:
        """The accepted host names; None for any."""
        if not self.is_local and not self.allow_hosts:
            return None
        return frozenset(LOOPBACK) | {name.lower() for name in self.allow_hosts}


def _require_prefix(prefix: str) -> None:
    if prefix and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix):
        raise RequestError(
            f"path_prefix is {prefix[:100]!r}, but must be a path without a slash at its end, such as /llm"
        )


def _require_origin(origin: str) -> None:
    """Refuse ``*``: it would let every web page that a user opens use this server."""
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d+)?", origin):
        raise RequestError(
            f"{origin[:100]!r} is no origin; write each as a browser sends it, such as https://chat.example or "
            "http://localhost:3000, in small letters and without a path"
        )


def _require_host_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", name):
        raise RequestError(f"{name[:100]!r} is no host name; write it without a port, such as llm.example")


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
