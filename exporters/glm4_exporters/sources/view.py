"""Finds the model's tensors among the stored tensors of a quantized checkpoint. Needs no torch.

A matrix may be stored as a tool's quantized parts, as two halves (``gate_proj`` and ``up_proj``), or inside a larger
matrix (``qkv_proj``). A :class:`View` lists the stored rows that form a tensor.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from glm4_exporters.architecture import FUSED, HALVES
from glm4_exporters.config import DTYPES, Glm4Config
from glm4_exporters.sources.base import QuantizedMatrix, SourceFormat
from glm4_runtime.bundle.safetensors_file import TensorHeader

QKV_PARTS, QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj"
# Scales of an int8 or float8 KV cache. They are not used.
CACHE_SCALES = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point", ".q_scale", ".output_scale")


@dataclass(frozen=True)
class StoredRows:
    """Rows ``first`` ... ``first + count - 1`` of a stored matrix or tensor."""

    stored: QuantizedMatrix | TensorHeader
    first: int
    count: int


@dataclass(frozen=True)
class View:
    """A tensor of the model, composed of rows of stored tensors and read as float32."""

    header: TensorHeader
    pieces: tuple[StoredRows, ...]

    @property
    def quantized(self) -> bool:
        """Whether a piece comes from a quantized matrix."""
        return any(isinstance(piece.stored, QuantizedMatrix) for piece in self.pieces)


@dataclass(frozen=True)
class Views:
    """
    Attributes:
        by_name: views of the tensors that are stored in another form, by the checkpoint's names.
        used: names of stored tensors that views use, and of known tensors that are not needed.
    """

    by_name: Mapping[str, View] = field(default_factory=dict)
    used: frozenset[str] = frozenset()

    def without(self, names: Collection[str]) -> "Views":
        """A copy without the views of the tensors ``names``."""
        return Views({name: view for name, view in self.by_name.items() if name not in names}, self.used)

    def seen(self, headers: Mapping[str, TensorHeader], expected: Collection[str]) -> dict[str, TensorHeader]:
        """Headers of the views, of the stored tensors that no view uses, and of the ``expected`` stored tensors."""
        plain = {name: each for name, each in headers.items() if name not in self.used or name in expected}
        return plain | {name: view.header for name, view in self.by_name.items()}


NO_VIEWS = Views()


def find_views(
    config: Glm4Config,
    source: SourceFormat,
    headers: Mapping[str, TensorHeader],
    expected: Mapping[str, tuple[int, ...]],
) -> Views:
    """The views of the ``expected`` tensors that are stored in another form.

    Args:
        expected: shapes by the checkpoint's names.

    Raises:
        CheckpointError: the tensors of a quantized matrix do not match the format.
    """
    modules: dict[str, dict[str, TensorHeader]] = {}
    for name, header in headers.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = header
    finder = _Finder(config, source, modules, headers)
    views = {name: view for name, shape in expected.items() if (view := finder.view(name, shape)) is not None}
    finder.used |= {name for name in headers if name.endswith(CACHE_SCALES)}
    return Views(views, frozenset(finder.used))


@dataclass
class _Finder:
    config: Glm4Config
    source: SourceFormat
    modules: Mapping[str, Mapping[str, TensorHeader]]
    headers: Mapping[str, TensorHeader]
    used: set[str] = field(default_factory=set)

    def view(self, name: str, shape: tuple[int, ...]) -> View | None:
        """The view of a tensor. None: the tensor is stored under its own name, or is missing."""
        pieces = self._pieces(name, shape)
        if not pieces or (
            len(pieces) == 1 and isinstance(pieces[0].stored, TensorHeader) and pieces[0].stored.name == name
        ):
            return None
        first = pieces[0].stored
        file = first.file if isinstance(first, TensorHeader) else next(iter(first.tensors.values())).file
        header = TensorHeader(name, "float32", shape, file, 0, 4 * math.prod(shape))
        return View(header, tuple(pieces))

    def _pieces(self, name: str, shape: tuple[int, ...]) -> list[StoredRows]:
        own = self._stored(name, shape)
        if own is not None:
            return [StoredRows(own, 0, shape[0])]
        module, _, kind = name.rpartition(".")
        if module.endswith(FUSED):
            half = (shape[0] // 2, *shape[1:])
            halves = [self._stored(f"{module.removesuffix(FUSED)}{part}.{kind}", half) for part in HALVES]
            return (
                [StoredRows(part, 0, half[0]) for part in halves if part is not None] if all(halves) else []
            )
        for index, part in enumerate(QKV_PARTS):
            if module.endswith(part):
                return self._of_qkv(f"{module.removesuffix(part)}{QKV}.{kind}", index, shape)
        return []

    def _of_qkv(self, name: str, index: int, shape: tuple[int, ...]) -> list[StoredRows]:
        config = self.config
        queries, keys = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        whole = self._stored(name, (queries + 2 * keys, *shape[1:]))
        return [] if whole is None else [StoredRows(whole, (0, queries, queries + keys)[index], shape[0])]

    def _stored(self, name: str, shape: tuple[int, ...]) -> QuantizedMatrix | TensorHeader | None:
        """The stored tensor of this name and shape, quantized or not. None: there is none."""
        module, _, kind = name.rpartition(".")
        matrix = None
        if kind == "weight" and len(shape) == 2:
            matrix = self.source.matrix(module, (shape[0], shape[1]), self.modules.get(module, {}))
        if matrix is not None:
            suffixes = (*self.source.suffixes, "weight")
            self.used |= {f"{module}.{suffix}" for suffix in suffixes if suffix in self.modules[module]}
            return matrix
        header = self.headers.get(name)
        if header is None or header.shape != shape or header.dtype not in DTYPES:
            return None
        self.used.add(name)
        return header
