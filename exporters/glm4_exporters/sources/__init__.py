"""Source formats: how other tools store quantized matrices in a checkpoint. Needs no torch.

To add a format, add a class in a file of this package and a row of ``SOURCES``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm4_exporters.sources.awq import Awq
from glm4_exporters.sources.base import (
    TAKE_ORIGINAL,
    QuantizedMatrix,
    Read,
    Rows,
    Settings,
    SourceFormat,
    Storage,
)
from glm4_exporters.sources.compressed_tensors import CompressedTensors
from glm4_exporters.sources.fp8 import Fp8
from glm4_exporters.sources.gptq import Gptq
from glm4_exporters.sources.modelopt import ModelOpt
from glm4_runtime.bundle.file_names import CONFIG
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import CheckpointError, shown

MODELOPT_CONFIG = "hf_quant_config.json"

# Keys: quant_method in quantization_config.
SOURCES: Mapping[str, Callable[[Settings], SourceFormat]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Fp8,
    "fp8": Fp8,
    "gptq": Gptq,
    "modelopt": ModelOpt,
}
# Known formats that cannot be read, with advice for the error.
SAVE_WHOLE = "load the model in its original precision, save_pretrained it, and export that folder"
REFUSED = {
    "bitsandbytes": f"bitsandbytes quantizes while it loads; {SAVE_WHOLE}",
    "gguf": f"GGUF is another program's format; {TAKE_ORIGINAL}",
    "hqq": f"HQQ is not read; {TAKE_ORIGINAL}",
    "torchao": f"torchao's tensors are Python objects; {TAKE_ORIGINAL}",
}


def detect(folder: Path) -> SourceFormat | None:
    """The source format that the checkpoint's configuration names. None: the weights are not quantized.

    Raises:
        CheckpointError: the tool or its settings are not supported.
    """
    found = read_object(folder / CONFIG, CheckpointError).get("quantization_config")
    if found is not None:
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{folder / CONFIG}: quantization_config is {shown(found)}, but must be an object"
            )
        return _make(found, f"{folder / CONFIG}: quantization_config")
    path = folder / MODELOPT_CONFIG
    if not path.is_file():
        return None
    nested = read_object(path, CheckpointError).get("quantization")
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path} has no object 'quantization'; quantize the model again")
    if nested.get("quant_algo") is None:
        return None  # only the KV cache is quantized
    return _make({"quant_method": "modelopt"} | nested, str(path))


def _make(values: dict[str, Any], place: str) -> SourceFormat:
    settings = Settings(values, place)
    method = settings.text("quant_method")
    if method is None and any(key.startswith(("load_in_", "_load_in_", "bnb_")) for key in values):
        method = "bitsandbytes"
    if method in REFUSED:
        raise CheckpointError(f"{place}: {REFUSED[method]}")
    if method is None or method not in SOURCES:
        raise settings.refuse(f"quant_method is {shown(method)}; what is read is {', '.join(SOURCES)}")
    return SOURCES[method](settings)


__all__ = [
    "MODELOPT_CONFIG",
    "SOURCES",
    "QuantizedMatrix",
    "Read",
    "Rows",
    "Settings",
    "SourceFormat",
    "Storage",
    "detect",
]
