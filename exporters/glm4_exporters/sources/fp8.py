"""Float8 checkpoints of transformers (a scale per block), FBGEMM (a scale per row), or with a scale per matrix.

``weight`` is float8_e4m3fn [rows, width]. A scale per block is ``weight_scale_inv`` [rows / 128, width / 128]; the
weight is multiplied by this scale, in spite of the name. Other scales are ``weight_scale``.
"""

from collections.abc import Mapping

from glm4_exporters.sources.base import FP8, TAKE_ORIGINAL, QuantizedMatrix, Settings, SourceFormat
from glm4_exporters.sources.float8 import float8_blocks, float8_matrix
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError, shown

SCALES_OF_BLOCKS, SCALE_OF_MATRIX = "weight_scale_inv", "weight_scale"


class Fp8(SourceFormat):
    name = "FP8"
    suffixes = (SCALES_OF_BLOCKS, SCALE_OF_MATRIX, "input_scale")

    def __init__(self, settings: Settings) -> None:
        settings.one_of("fmt", ("e4m3",), "e4m3")
        self.block: tuple[int, int] | None = None
        found = settings.values.get("weight_block_size")
        if found is not None:
            if not (
                isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
            ):
                raise settings.refuse(f"weight_block_size is {shown(found)}, but must be two sizes")
            self.block = found[0], found[1]

    def matrix(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> QuantizedMatrix | None:
        weight = tensors.get("weight")
        if weight is None or weight.dtype != FP8:
            return None
        if SCALES_OF_BLOCKS in tensors:
            if self.block is None:
                raise CheckpointError(
                    f"{module} has {SCALES_OF_BLOCKS}, but quantization_config has no weight_block_size"
                )
            return float8_blocks(module, shape, tensors, SCALES_OF_BLOCKS, self.block)
        if SCALE_OF_MATRIX in tensors:
            return float8_matrix(module, shape, tensors, SCALE_OF_MATRIX)
        raise CheckpointError(
            f"{module}.weight is float8 and has no scale ({SCALES_OF_BLOCKS}, {SCALE_OF_MATRIX}); {TAKE_ORIGINAL}"
        )
