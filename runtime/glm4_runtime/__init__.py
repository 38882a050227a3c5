"""The runtime: opens a bundle and generates with it. Needs neither torch nor onnx."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from glm4_runtime.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    ExportError,
    GateError,
    Glm4Error,
    RequestError,
    SlotError,
)

if TYPE_CHECKING:
    from glm4_runtime.sampling import SamplingParams
    from glm4_runtime.session import Session

# ONNX Runtime (since 1.32) and huggingface_hub send events, unless they find these variables when they are loaded.
for _variable in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_variable, "1")

# Imported at first use: they bring numpy and tokenizers, which --help and a refusal do without.
_LAZY = {"SamplingParams": "glm4_runtime.sampling", "Session": "glm4_runtime.session"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "GateError",
    "Glm4Error",
    "RequestError",
    "SamplingParams",
    "Session",
    "SlotError",
]
