"""What Triton's Python backend calls. ``triton_python_backend_utils`` exists only inside Triton."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm4_runtime.errors import BundleError
from glm4_runtime.session import Session
from glm4_runtime.triton_server import BUNDLE
from glm4_runtime.triton_server.generating import Generating
from glm4_runtime.triton_server.pooling import Pooling


class TritonPythonModel:
    """One instance of the model: one session, on one GPU or on the CPU."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Args:
            args: Triton's: ``model_config`` (JSON), ``model_repository``, ``model_version``, ``model_instance_kind``
                and ``model_instance_device_id``.

        Raises:
            BundleError: the bundle cannot be opened; Triton then logs the message and does not load the model.
        """
        import triton_python_backend_utils as triton

        if args["model_instance_kind"] == "GPU":  # an instance is a process of its own
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        options = _parameters(json.loads(args["model_config"]))
        queue = {name: options.pop(name) for name in QUEUE & options.keys()}
        session = Session.open(Path(args["model_repository"]) / args["model_version"] / BUNDLE, **options)
        generates = session.manifest.task == "causal-lm"
        if queue and not generates:
            raise BundleError(
                f"a model for {session.manifest.task} has no queue; leave out {', '.join(queue)}"
            )
        self._work = Generating(triton, session, **queue) if generates else Pooling(triton, session)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests. A causal LM answers later, through each request's response sender."""
        return self._work.execute(requests)

    def finalize(self) -> None:
        """Let running requests finish, and free the session."""
        self._work.close()


# Parameters of config.pbtxt: options of Session.open, and of a causal LM's queue.
PARAMETERS = {"threads": int, "max_seq_len": int, "max_batch_size": int, "provider": str, "max_queue": int}
QUEUE = {"max_queue"}


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``parameters`` of config.pbtxt, by name. Raises :class:`BundleError` for an unknown one or a wrong value."""
    found = {}
    for name, value in config.get("parameters", {}).items():
        if name not in PARAMETERS:
            raise BundleError(f"config.pbtxt has the parameter {name!r}; known are {', '.join(PARAMETERS)}")
        try:
            found[name] = PARAMETERS[name](value["string_value"])
        except ValueError as error:
            raise BundleError(
                f"parameter {name} of config.pbtxt must be a whole number, not {value['string_value']!r}"
            ) from error
    return found
