"""NVIDIA ModelOpt's checkpoints: FP8 with one scale per matrix, and NVFP4.

FP8: ``weight`` float8_e4m3fn, multiplied by ``weight_scale``.
NVFP4: ``weight`` uint8 [rows, width / 2] with two numbers per byte, multiplied by ``weight_scale`` float8
[rows, width / 16] and by ``weight_scale_2``.
"""

from collections.abc import Mapping

from glm4_exporters.sources.base import FP8, UINT8, QuantizedMatrix, Settings, SourceFormat
from glm4_exporters.sources.float4 import nvfp4_matrix
from glm4_exporters.sources.float8 import float8_matrix, owned
from glm4_runtime.bundle.safetensors_file import TensorHeader

SECOND_SCALE = "weight_scale_2"
ALGORITHMS = ("FP8", "NVFP4", "FP8_PER_CHANNEL_PER_TOKEN")


class ModelOpt(SourceFormat):
    name = "ModelOpt"
    suffixes = ("weight_scale", SECOND_SCALE, "input_scale")

    def __init__(self, settings: Settings) -> None:
        settings.one_of("quant_algo", ALGORITHMS, None)

    def matrix(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> QuantizedMatrix | None:
        weight = tensors.get("weight")
        if weight is not None and weight.dtype == FP8 and "weight_scale" in tensors:
            return float8_matrix(module, shape, tensors, "weight_scale")
        if weight is not None and weight.dtype == UINT8:
            own = owned(tensors, "weight", "weight_scale", SECOND_SCALE)
            return nvfp4_matrix(module, shape, own, "weight", SECOND_SCALE, divides=False)
        return None
