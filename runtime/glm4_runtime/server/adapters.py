"""The names of the served models: the base model, its LoRA adapters, and aliases."""

import threading
from pathlib import Path

from glm4_runtime.backend import Backend
from glm4_runtime.errors import BundleError, BusyError, CheckpointError, RequestError
from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.options import ServerOptions


class ModelNames:
    """Each name of a model in the API, and the adapter that it means.

    Attributes:
        base: the name of the base model.
    """

    def __init__(self, options: ServerOptions, bundle: Path) -> None:
        """Raises :class:`RequestError` if an option gives a name twice, or an alias of no model."""
        fixed = options.names(bundle)
        self.base = next(iter(fixed))
        self._lock = threading.Lock()  # of changes; the dictionary itself never changes
        self._adapters: dict[str, str | None] = {
            name: None if model == self.base else model for name, model in fixed.items()
        }

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter of a model. None: the base model.

        Raises:
            ApiError: (404) there is no such model.
        """
        if name is not None and name not in self._adapters:
            names = ", ".join(map(repr, self.all))[:300]
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; this server has {names}",
                param="model",
                code="model_not_found",
            )
        return None if name is None else self._adapters[name]

    def add(self, name: str) -> None:
        """Add a loaded adapter."""
        with self._lock:
            self._adapters = {**self._adapters, name: name}

    def remove(self, name: str) -> None:
        """Remove an adapter, and its aliases."""
        with self._lock:
            self._adapters = {own: adapter for own, adapter in self._adapters.items() if adapter != name}


def load(backend: Backend | None, names: ModelNames, name: str, folder: str) -> None:
    """Load an adapter under a name that no model has.

    Raises:
        ApiError: (400) the adapter cannot be applied, or the name is taken.
    """
    if name in names.all:
        raise ApiError(400, f"there is a model {name[:100]!r} already; give another name", param="lora_name")
    try:
        _require(backend).load_adapter(name, folder)
    except (BundleError, CheckpointError) as error:
        raise ApiError(400, str(error), param="lora_path") from error
    names.add(name)


def unload(backend: Backend | None, names: ModelNames, name: str) -> None:
    """Free an adapter.

    Raises:
        ApiError: (404) no such adapter, (409) requests use it.
    """
    if name not in names.all or names.adapter_of(name) != name:
        raise ApiError(404, f"no adapter {name[:100]!r} is loaded", param="lora_name", code="model_not_found")
    try:
        _require(backend).unload_adapter(name)
    except BusyError as error:
        raise ApiError(409, str(error), param="lora_name", code="adapter_in_use") from error
    names.remove(name)


def _require(backend: Backend | None) -> Backend:
    if backend is None:
        raise RequestError("this server's bundle does not generate text, and takes no adapters")
    return backend
