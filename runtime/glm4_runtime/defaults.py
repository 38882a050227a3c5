"""The sampling defaults of ``generation_config.json``; every command reads them the same way."""

from pathlib import Path
from typing import Any

from glm4_runtime.bundle.file_names import GENERATION_CONFIG
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.sampling import SamplingParams

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Values that mean "off" in other libraries.
_OFF = {("top_k", -1): 0}


def read_sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """The fields of :class:`SamplingParams` that a checkpoint or bundle recommends.

    As in transformers, ``do_sample: false`` or no entry about sampling means temperature 0. Sampling without a
    temperature means temperature 1.

    Raises:
        BundleError: the file is no JSON object, or a value is outside its range.
    """
    file = Path(folder) / GENERATION_CONFIG
    config = read_object(file, BundleError) if file.is_file() else {}
    given = {name: config[name] for name in _SAMPLING if config.get(name) is not None}
    found = {name: _mapped(name, value) for name, value in given.items()}
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise BundleError(f"{file}: {error}; mend it in the checkpoint and export again") from error
    samples = config.get("do_sample")
    if samples is False or (samples is None and not found.keys() - {"repetition_penalty"}):
        found["temperature"] = 0.0
    return {"temperature": 1.0} | found


def _mapped(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value  # a boolean is an int in Python, but no number here
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return _OFF.get((name, value), value) if isinstance(value, int) else value


def recommended_params(folder: str | Path, **given: Any) -> SamplingParams:
    """The given values; for values that are None, the folder's defaults."""
    asked = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**read_sampling_defaults(folder) | asked)
