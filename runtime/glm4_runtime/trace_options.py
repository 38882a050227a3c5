"""The options of traces. This file imports nothing of OpenTelemetry."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from glm4_runtime.errors import RequestError, UnavailableError
from glm4_runtime.install import install_command

if TYPE_CHECKING:
    from glm4_runtime.tracing import Traces

# The endpoint that stands for OpenTelemetry's own environment variables.
FROM_ENVIRONMENT = "env"


@dataclass(frozen=True)
class TraceOptions:
    """
    Attributes:
        endpoint: address of a collector, or :data:`FROM_ENVIRONMENT`.
        prompts: whether spans have the texts of prompts and answers.
        environment: variables ``OTEL_...`` of the server, for a replica in another process.
        replica: the name of a replica. Empty: this process is the server.
    """

    endpoint: str
    prompts: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    replica: str = ""

    @property
    def url(self) -> str | None:
        """The URL of the collector's route for traces. None: the environment names it."""
        if self.endpoint == FROM_ENVIRONMENT:
            return None
        has_path = re.fullmatch(r"https?://[^/]+/?", self.endpoint) is None
        return self.endpoint if has_path else f"{self.endpoint.rstrip('/')}/v1/traces"


def require_traces(endpoint: str) -> None:
    """Check the endpoint, and that OpenTelemetry is installed.

    Raises:
        RequestError: the endpoint is no URL. UnavailableError: the extra is missing.
    """
    if endpoint != FROM_ENVIRONMENT and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", endpoint):
        raise RequestError(
            f"--traces is {endpoint[:100]!r}, but must be an address of OTLP over HTTP, such as "
            f"http://127.0.0.1:4318, or {FROM_ENVIRONMENT} for the variables OTEL_EXPORTER_OTLP_..."
        )
    for module in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
        if not _is_installed(module):
            raise UnavailableError(f"--traces needs OpenTelemetry; run {install_command('otel')}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def started(options: TraceOptions | None) -> Traces | None:
    """Begin to export traces. None: they are off, and nothing is imported.

    Raises:
        UnavailableError: the extra is missing, or the environment names something unknown.
    """
    if options is None:
        return None
    require_traces(options.endpoint)
    for name, value in options.environment.items():
        os.environ.setdefault(name, value)
    try:
        from glm4_runtime.tracing import exporting

        return exporting(options)
    except (ImportError, ValueError, RuntimeError) as error:  # as OpenTelemetry says it
        raise UnavailableError(
            f"OpenTelemetry cannot start; check the variables OTEL_...: {error}"
        ) from error
