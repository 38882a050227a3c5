"""Reads a LoRA adapter's folder, and assigns each tensor to the base model's weight that it changes.

PEFT names a tensor after the adapted module, with the prefix ``base_model.model.``. FSDP, torch.compile and older
releases add further prefixes. Without these prefixes, the name is the base model's.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from glm4_runtime.adapters.config import AdapterConfig
from glm4_runtime.adapters.modules import EMBEDDING, FUSED, HALVES, HEAD, canonical, fused
from glm4_runtime.bundle.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from glm4_runtime.bundle.safetensors_file import DTYPE_OF_CODE, SafetensorsFile, TensorHeader
from glm4_runtime.errors import CheckpointError, shown, some

PICKLE = "adapter_model.bin"
TASK_OF_PEFT = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
}  # keys: PEFT's names

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = re.compile(r"(?:(?:base_model\.model|module)\.)+")
PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
WHOLE_TENSOR = re.compile(
    r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.(?P<part>weight|bias)"
)
IGNORED = ".original_module."  # the base model's weight, which PEFT saves beside its replacement

Shapes = Mapping[str, tuple[int, ...]]
ModuleParts = dict[str, TensorHeader]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WholeTensor:
    """A tensor that replaces the model's tensor ``name``: a trained one, or the base model's if B·A of this module
    follows (``adapted``)."""

    name: str
    header: TensorHeader
    adapted: bool


@dataclass(frozen=True)
class LowRankTensors:
    """The low-rank change of rows ``first`` ... ``first + rows - 1`` of a matrix: s·B·A.

    Attributes:
        matrix: canonical name of the matrix, without ``.weight``.
        scaling: the factor s, by the adapter's configuration.
        left, right: B [rows, r] and A [r, in].
        lookup: the matrix is an embedding, and its change is (B·A)ᵀ: ``left`` is A [r, rows], ``right`` is B [columns, r].
        magnitude: DoRA's m [rows]. None: LoRA.
        bias: the bias of B, which s times is added to the module's bias. None: B has none.
    """

    matrix: str
    first: int
    rows: int
    scaling: float
    left: TensorHeader
    right: TensorHeader
    lookup: bool
    magnitude: TensorHeader | None
    bias: TensorHeader | None


class AdapterFolder:
    """An open adapter.

    Attributes:
        folder: the path given by the caller.
        config: the contents of ``adapter_config.json``.
        file: the safetensors file.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open an adapter's folder. Reads no tensor.

        Raises:
            CheckpointError: the folder holds no adapter, or an adapter that cannot be applied.
        """
        self.folder = Path(folder)
        if not (self.folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {ADAPTER_CONFIG}; give the folder of a LoRA adapter")
        self.config = AdapterConfig.from_file(self.folder / ADAPTER_CONFIG)
        self.file = SafetensorsFile(_weights(self.folder))
        try:
            self._modules = self._named()
        except BaseException:
            self.file.close()
            raise

    @property
    def name(self) -> str:
        """The folder's name, or the repository's name if the folder is in a hub cache."""
        parts = self.folder.absolute().parts
        cached = [part for part in parts if part.startswith("models--")]
        return cached[-1].removeprefix("models--").replace("--", "/") if cached else parts[-1]

    @property
    def task(self) -> str | None:
        """The task of the adapter's classification head. None: the adapter has no such head."""
        if "weight" not in self._modules.get("score", {}):
            return None
        return TASK_OF_PEFT.get(self.config.task or "", TASK_OF_PEFT["SEQ_CLS"])

    @property
    def labels(self) -> int:
        """Number of labels of the classification head."""
        return self._matrix("score", "weight")[0]

    @property
    def whole(self) -> list[str]:
        """Names of tensors that replace tensors of the model, or are copies of them."""
        return sorted(
            f"{module}.{leaf}"
            for module, parts in self._modules.items()
            for leaf in {"weight", "bias"} & parts.keys()
        )

    def sha256(self) -> str:
        """SHA-256 of the configuration and the tensors, in hex."""
        config = (self.folder / ADAPTER_CONFIG).read_bytes()
        return hashlib.sha256(config + self.file.content.encode()).hexdigest()

    def changes(
        self, expected: Shapes, *, tied: bool, ignored: frozenset[str] = frozenset()
    ) -> Iterator[LowRankTensors | WholeTensor]:
        """The changes of a model's weights, each checked. Reads no tensor.

        Args:
            expected: shapes of the model's weights, by canonical name.
            tied: whether the LM head shares the embedding's weight.
            ignored: canonical names of weights that the task does not use. Changes of these weights are skipped.

        Raises:
            CheckpointError: the model lacks a changed weight, or the adapter lacks a weight of its configuration.
        """
        self._require_complete(expected)
        for module, parts in self._modules.items():
            name = canonical(module)
            if tied and f"{name}.weight" in (EMBEDDING, HEAD):
                self.refuse(f"changes {module} alone, but the checkpoint ties the head to the embedding")
            adapted = bool(parts.keys() - {"weight", "bias"})
            for leaf in sorted({"weight", "bias"} & parts.keys()):
                whole = WholeTensor(f"{name}.{leaf}", parts[leaf], adapted)
                if whole.name not in ignored:
                    self._require_shape(expected, whole.name, whole.header.shape)
                    yield whole
            if adapted and f"{fused(name)[0]}.weight" not in ignored:
                yield self._low_rank(expected, module)

    def read(self, header: TensorHeader) -> Floats:
        """Read a tensor as float32. Refuses NaN and infinity."""
        stored = np.dtype({"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[header.dtype])
        values = np.empty(header.shape, stored)
        self.file.read_into(values.reshape(-1).view(np.uint8).data, header.offset)
        wide: Floats = (
            (values.astype(np.uint32) << 16).view(np.float32)
            if header.dtype == "bfloat16"
            else values.astype(np.float32, copy=False)
        )
        if not np.isfinite(wide).all():
            self.refuse(f"holds NaN or infinite values in {header.name}; its training diverged")
        return wide

    def close(self) -> None:
        """Close the file. Afterwards no tensor of this adapter can be read."""
        self.file.close()

    def refuse(self, what: str) -> NoReturn:
        """Raise :class:`CheckpointError`: the adapter ``what``."""
        raise CheckpointError(f"the adapter {self.folder} {what}")

    def _named(self) -> dict[str, ModuleParts]:
        """Headers by module name without prefixes, then by part (``lora_A``, ``weight``, ``bias`` and others)."""
        found: dict[str, ModuleParts] = {}
        for name, header in self.file.headers.items():
            plain = _unwrapped(name)
            if IGNORED in plain:
                continue
            named = PART.fullmatch(plain) or WHOLE_TENSOR.fullmatch(plain)
            if named is None:
                self.refuse(f"has the tensor {shown(name)}, which is not one of LoRA's")
            if header.dtype not in DTYPE_OF_CODE.values():
                self.refuse(
                    f"stores {shown(name)} in {header.dtype}; save it in float32, bfloat16 or float16"
                )
            bias_of_part = named["part"].startswith("lora_") and named["leaf"] == "bias"
            part = named["part"] + ("_bias" if bias_of_part else "")
            parts = found.setdefault(named["module"], {})
            if part in parts:
                self.refuse(f"has two tensors for {part} of {shown(named['module'])}; save one adapter alone")
            parts[part] = header
        return found

    def _require_complete(self, expected: Shapes) -> None:
        """Refuse an adapter whose tensors and configuration name different modules, so that none is applied in part."""
        present = self._modules.keys()
        matrices = [name.removesuffix(".weight") for name, shape in expected.items() if len(shape) == 2]
        for half in HALVES:
            if any(module.endswith(f".{half}") for module in present):
                matrices += [name.replace(FUSED, half) for name in matrices if name.endswith(f".{FUSED}")]
        bare = not any(module.startswith("model.") for module in present)  # trained on a bare decoder
        absent = {name.removeprefix("model.") if bare else name for name in matrices} - present
        missing = {name for name in absent if self.config.names(name) or self.config.saves(name)}
        if missing:
            self.refuse(
                f"lacks {some(sorted(missing))}, which its {ADAPTER_CONFIG} names; finish the download"
            )
        adapted = {module for module, parts in self._modules.items() if parts.keys() - {"weight", "bias"}}
        unnamed = {module for module in adapted if not self.config.names(module)}
        if unnamed:
            self.refuse(
                f"holds {some(sorted(unnamed))}, which its {ADAPTER_CONFIG} does not name; save it again"
            )

    def _low_rank(self, expected: Shapes, module: str) -> LowRankTensors:
        """The low-rank change of a module: B·A for a matrix, (B·A)ᵀ for an embedding."""
        parts = self._modules[module]
        owner, half = fused(canonical(module))
        lookup = not {"lora_embedding_A", "lora_embedding_B"}.isdisjoint(parts)
        right, left = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A", "lora_B")
        (rank, inputs), (outputs, again) = self._matrix(module, right), self._matrix(module, left)
        asked = self.config.rank_of(module) or rank
        if {rank, again} != {asked}:
            self.refuse(f"has the ranks {rank} and {again} in {module}, its {ADAPTER_CONFIG} says {asked}")
        rows, columns = (inputs, outputs) if lookup else (outputs, inputs)
        self._require_shape(expected, f"{owner}.weight", (rows * (1 if half is None else 2), columns))
        first = rows * (half or 0)
        if ("lora_B_bias" in parts) != self.config.biased:
            self.refuse(f"and its {ADAPTER_CONFIG} disagree on lora_bias in {module}")
        return LowRankTensors(
            matrix=owner,
            first=first,
            rows=rows,
            scaling=self.config.scaling(module, rank),
            left=parts[right] if lookup else parts[left],
            right=parts[left] if lookup else parts[right],
            lookup=lookup,
            magnitude=self._magnitude(module, rows, lookup),
            bias=self._bias(expected, owner, first, parts["lora_B_bias"]) if self.config.biased else None,
        )

    def _magnitude(self, module: str, rows: int, lookup: bool) -> TensorHeader | None:
        """DoRA's magnitudes [rows]. None: the adapter is plain LoRA."""
        header = self._modules[module].get("lora_magnitude_vector")
        if (header is not None) != self.config.dora:
            self.refuse(f"and its {ADAPTER_CONFIG} disagree on whether {module} has DoRA's magnitudes")
        if header is not None and (lookup or header.shape != (rows,)):
            self.refuse(f"has magnitudes {list(header.shape)} for {module} with {rows} rows")
        return header

    def _bias(self, expected: Shapes, owner: str, first: int, header: TensorHeader) -> TensorHeader:
        name = f"{owner}.bias"
        if name not in expected:
            self.refuse(f"changes {name}, but the checkpoint has no such bias")
        if len(header.shape) != 1 or first + header.shape[0] > expected[name][0]:
            self.refuse(f"has a bias {list(header.shape)} for {name}")
        return header

    def _matrix(self, module: str, part: str) -> tuple[int, int]:
        """The shape (rows, columns) of a part, which must be a matrix."""
        header = self._modules[module].get(part)
        if header is None:
            self.refuse(f"lacks {part} of {module}; save it again")
        if len(header.shape) != 2 or 0 in header.shape:
            self.refuse(f"has {part} {list(header.shape)} in {module}, which is no matrix")
        return header.shape[0], header.shape[1]

    def _require_shape(self, expected: Shapes, name: str, shape: tuple[int, ...]) -> None:
        if name not in expected:
            self.refuse(f"changes {name}, which the model does not have; is it for another model?")
        if shape != expected[name]:
            self.refuse(f"is for {name} {list(shape)}, but the model has {list(expected[name])}")


def _weights(folder: Path) -> Path:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return folder / ADAPTER_WEIGHTS
    if (folder / PICKLE).is_file():
        raise CheckpointError(
            f"{folder / PICKLE} is pickled, which can run code when it is read; save it as {ADAPTER_WEIGHTS}"
        )
    raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}; finish the download")


def _unwrapped(name: str) -> str:
    """The tensor's name without the prefixes of PEFT and training wrappers."""
    name = WRAPPERS.sub("", name)
    outer = OUTER.match(name)
    return name[outer.end() :] if outer else name
