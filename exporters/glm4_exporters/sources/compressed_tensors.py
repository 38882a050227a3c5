"""The compressed-tensors format, as llm-compressor writes it: packed and plain integers, float8, and NVFP4.

Packed 4-bit integers: ``weight_packed`` int32 [rows, width / 8] and ``weight_scale`` [rows, groups]. Zero points, if
any: ``weight_zero_point`` int32 [rows / 8, groups], packed along the rows. With 8 bits, / 8 becomes / 4.
Plain integers and float8: ``weight`` [rows, width] and ``weight_scale``.
NVFP4: ``weight_packed`` uint8 [rows, width / 2], and ``weight_scale`` float8 [rows, width / 16], which is divided by
``weight_global_scale``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glm4_exporters.sources.base import (
    FLOATS,
    FP8,
    INT8,
    INT32,
    UINT8,
    QuantizedMatrix,
    Read,
    Rows,
    Settings,
    SourceFormat,
    Storage,
    groups_of,
    require,
    require_finite,
)
from glm4_exporters.sources.float4 import nvfp4_matrix
from glm4_exporters.sources.float8 import ScaledMatrix, float8_blocks, float8_matrix, owned
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError, shown

WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_ZEROS, GLOBAL_SCALE = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
)
GROUP_INDEX = "weight_g_idx"
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


@dataclass(frozen=True)
class PackedMatrix(QuantizedMatrix):
    def load(self, read: Read) -> "Callable[[int, int], Rows]":
        import torch

        from glm4_exporters.sources.bits import around_zero, unpack

        bits, packed = self.storage.bits, read(self.tensors[WEIGHT_PACKED])
        scales = require_finite(self.tensors[WEIGHT_SCALE], read(self.tensors[WEIGHT_SCALE])).reshape(
            -1, self._count
        )
        scales = scales.expand(self.rows, -1)
        zeros = None
        if self.storage.zeros:
            zeros = around_zero(unpack(read(self.tensors[WEIGHT_ZEROS]).t(), bits), bits).t()
        groups = None
        if GROUP_INDEX in self.tensors:
            groups = read(self.tensors[GROUP_INDEX]).long()
            if bool((groups < 0).any()) or bool((groups >= self._count).any()):
                raise CheckpointError(
                    f"{self.module}.{GROUP_INDEX} names groups beyond 0 ... {self._count - 1}; the checkpoint is damaged"
                )
            in_order = torch.arange(self.width) // (self.width // self._count)
            groups = None if torch.equal(groups, in_order) else groups

        def rows(first: int, count: int) -> Rows:
            some = slice(first, first + count)
            numbers = around_zero(unpack(packed[some], bits)[:, : self.width], bits)
            return Rows(numbers, scales[some], None if zeros is None else zeros[some], groups)

        return rows

    @property
    def _count(self) -> int:
        return groups_of(self.width, self.storage.group, self.module)


@dataclass(frozen=True)
class _Scheme:
    """One entry of ``config_groups``: the storage of the weights of the modules that it targets."""

    settings: Settings
    targets: tuple[str, ...]
    bits: int
    kind: str
    strategy: str
    group: int | None
    symmetric: bool
    block: tuple[int, int] | None

    @classmethod
    def read(cls, group: Settings) -> "_Scheme | None":
        """Read one entry. None: the entry does not quantize weights."""
        weights = group.section("weights")
        if weights is None:
            return None
        block = weights.values.get("block_structure")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        ):
            raise weights.refuse(f"block_structure is {shown(block)}, but must be two sizes")
        return cls(
            weights,
            group.names("targets"),
            weights.one_of("num_bits", (4, 8), None),
            weights.one_of("type", ("int", "float"), "int"),
            weights.one_of("strategy", STRATEGIES, None),
            weights.integer("group_size"),
            weights.boolean("symmetric", True),
            None if block is None else (block[0], block[1]),
        )

    def takes(self, module: str) -> bool:
        """Whether a target is this module, its class (``Linear``, ``Embedding``), or a matching ``re:`` pattern."""
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        return any(
            target in (kind, module)
            or (target.startswith("re:") and re.match(target.removeprefix("re:"), module))
            for target in self.targets
        )


class CompressedTensors(SourceFormat):
    name = "compressed-tensors"
    suffixes = (
        WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_ZEROS, GLOBAL_SCALE, GROUP_INDEX, "weight_shape", "input_scale", "input_zero_point", "input_global_scale",
    )  # fmt: skip

    def __init__(self, settings: Settings) -> None:
        sparse = settings.section("sparsity_config")
        if sparse is not None and sparse.text("format", "dense") != "dense":
            raise settings.refuse(
                f"the weights are sparse ({shown(sparse.values.get('format'))}), which is not read"
            )
        if settings.section("transform_config") is not None:
            raise settings.refuse(
                "transform_config turns activations while the model runs, which is not read"
            )
        settings.one_of("quantization_status", ("compressed",), "compressed")
        groups = settings.section("config_groups") or Settings({})
        sections = [groups.section(name) for name in groups.values]
        self._schemes = [
            scheme for group in sections if group is not None and (scheme := _Scheme.read(group)) is not None
        ]
        _require_patterns(settings, self._schemes)

    def matrix(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> QuantizedMatrix | None:
        if WEIGHT_PACKED not in tensors and WEIGHT_SCALE not in tensors:
            return None
        scheme = next((scheme for scheme in self._schemes if scheme.takes(module)), None)
        if scheme is None:
            raise CheckpointError(
                f"{module} is quantized, but none of quantization_config's config_groups names it"
            )
        packed, weight = tensors.get(WEIGHT_PACKED), tensors.get("weight")
        if packed is not None and packed.dtype == UINT8:
            return self._float4(module, shape, tensors, scheme)
        if packed is not None:
            return self._packed(module, shape, tensors, scheme)
        if weight is not None and weight.dtype == FP8:
            if scheme.strategy == "block":
                block = scheme.block or (128, 128)
                return float8_blocks(module, shape, tensors, WEIGHT_SCALE, block)
            return float8_matrix(module, shape, tensors, WEIGHT_SCALE)
        return self._plain(module, shape, tensors, scheme)

    def _float4(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader], scheme: _Scheme
    ) -> QuantizedMatrix:
        if GLOBAL_SCALE not in tensors:
            raise scheme.settings.refuse(
                f"{module} has 4-bit floats without {GLOBAL_SCALE}; of these NVFP4 alone is read"
            )
        return nvfp4_matrix(
            module,
            shape,
            owned(tensors, WEIGHT_PACKED, WEIGHT_SCALE, GLOBAL_SCALE),
            WEIGHT_PACKED,
            GLOBAL_SCALE,
            divides=True,
        )

    def _packed(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader], scheme: _Scheme
    ) -> QuantizedMatrix:
        (rows, width), bits = shape, scheme.bits
        if scheme.kind != "int" or scheme.strategy not in ("tensor", "channel", "group"):
            raise scheme.settings.refuse(f"{module} is packed as {scheme.kind} by {scheme.strategy}")
        group = scheme.group if scheme.strategy == "group" else None
        count = groups_of(width, group, module)
        require(tensors[WEIGHT_PACKED], f"{module}.{WEIGHT_PACKED}", (INT32,), (rows, -(-width * bits // 32)))
        shapes = ((1,), (1, 1)) if scheme.strategy == "tensor" else ((rows, count),)
        scales = require(tensors.get(WEIGHT_SCALE), f"{module}.{WEIGHT_SCALE}", FLOATS, *shapes)
        if not scheme.symmetric:
            require(
                tensors.get(WEIGHT_ZEROS),
                f"{module}.{WEIGHT_ZEROS}",
                (INT32,),
                (-(-rows * bits // 32), count),
            )
        if GROUP_INDEX in tensors:
            require(tensors[GROUP_INDEX], f"{module}.{GROUP_INDEX}", (INT32, "I64"), (width,))
        storage = Storage("int", bits, group, not scheme.symmetric, scales.dtype)
        return PackedMatrix(
            module,
            rows,
            width,
            storage,
            owned(tensors, WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_ZEROS, GROUP_INDEX),
        )

    def _plain(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader], scheme: _Scheme
    ) -> QuantizedMatrix:
        (rows, width), weight = shape, tensors.get("weight")
        require(weight, f"{module}.weight", (INT8,), shape)
        if scheme.kind != "int" or scheme.strategy not in ("tensor", "channel"):
            raise scheme.settings.refuse(f"{module} is int8 by {scheme.strategy}, which is not read")
        shapes = ((1,), (1, 1), ()) if scheme.strategy == "tensor" else ((rows, 1), (rows,))
        scales = require(tensors.get(WEIGHT_SCALE), f"{module}.{WEIGHT_SCALE}", FLOATS, *shapes)
        if not scheme.symmetric:
            require(tensors.get(WEIGHT_ZEROS), f"{module}.{WEIGHT_ZEROS}", (INT8,), *shapes)
        together = None if scheme.strategy == "tensor" else 1
        storage = Storage("int", 8, None, not scheme.symmetric, scales.dtype, together)
        own = owned(tensors, "weight", WEIGHT_SCALE, WEIGHT_ZEROS, "input_zero_point")
        return ScaledMatrix(module, rows, width, storage, own, WEIGHT_SCALE)


def _require_patterns(settings: Settings, schemes: list[_Scheme]) -> None:
    for target in (target for scheme in schemes for target in scheme.targets if target.startswith("re:")):
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise settings.refuse(f"the target {shown(target)} is no pattern: {error}") from error
