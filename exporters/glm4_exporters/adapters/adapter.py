"""Reads a LoRA adapter's folder, and assigns each tensor to the base model's weight that it changes.

PEFT names a tensor after the adapted module, with the prefix ``base_model.model.``. FSDP, torch.compile and older
releases add further prefixes. Without these prefixes, the name is the base model's.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from glm4_exporters.adapters.changes import Added, Change, LowRank
from glm4_exporters.adapters.config import AdapterConfig
from glm4_exporters.architecture import EMBEDDING, FUSED, HALVES, HEAD
from glm4_exporters.config import DTYPES
from glm4_exporters.safetensors_file import SafetensorsFile, TensorHeader
from glm4_runtime.bundle.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from glm4_runtime.errors import CheckpointError, shown, some

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass
class Merged:
    """The changes that adapters make to a checkpoint's weights.

    Attributes:
        expected: shapes of the exported weights, by canonical name.
        tied: whether the LM head shares the embedding's weight.
        ignored: canonical names of weights that the task does not use. Changes of these weights are skipped.
        whole: tensors that replace the checkpoint's, by canonical name.
        changes: changes of each weight in order of application, by canonical name.
    """

    expected: Shapes
    tied: bool = False
    ignored: frozenset[str] = frozenset()
    whole: ModuleParts = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=dict)


class Adapter:
    """An open adapter.

    Attributes:
        folder: the path given by the caller.
        scale: a factor for all changes of the adapter, beside alpha / rank.
        config: the contents of ``adapter_config.json``.
        file: the safetensors file.
    """

    def __init__(self, folder: str | Path, scale: float = 1.0) -> None:
        """Open an adapter's folder. Reads no tensor.

        Raises:
            CheckpointError: the folder holds no adapter, or an adapter that cannot be merged.
        """
        self.folder, self.scale = Path(folder), scale
        if not math.isfinite(scale):
            raise CheckpointError(f"the scale of {folder} is {scale}, but must be a finite number")
        if not (self.folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {ADAPTER_CONFIG}; give the folder of a LoRA adapter")
        self.config = AdapterConfig.from_file(self.folder / ADAPTER_CONFIG)
        self.file = SafetensorsFile(_weights(self.folder))
        self._modules = self._named()

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

    def sha256(self) -> str:
        """SHA-256 of the configuration and the tensors, in hex."""
        config = (self.folder / ADAPTER_CONFIG).read_bytes()
        return hashlib.sha256(config + self.file.content.encode()).hexdigest()

    def add_to(self, merged: Merged) -> None:
        """Append the changes of this adapter to the changes of earlier adapters.

        Raises:
            CheckpointError: the model lacks a changed weight, or the adapter lacks a weight of its configuration.
        """
        self._require_complete(merged.expected)
        for module, parts in self._modules.items():
            name = _canonical(module)
            if merged.tied and f"{name}.weight" in (EMBEDDING, HEAD):
                self._refuse(f"changes {module} alone, but the checkpoint ties the head to the embedding")
            adapted = bool(parts.keys() - {"weight", "bias"})
            for leaf in sorted({"weight", "bias"} & parts.keys()):
                self._replace(merged, f"{name}.{leaf}", parts[leaf], scaled=self.scale != 1 and not adapted)
            if adapted:
                self._adapt(merged, module)

    def close(self) -> None:
        """Close the file. Afterwards the changes of this adapter cannot be applied."""
        self.file.close()

    def _named(self) -> dict[str, ModuleParts]:
        """Headers by module name without prefixes, then by part (``lora_A``, ``weight``, ``bias`` and others)."""
        found: dict[str, ModuleParts] = {}
        for name, header in self.file.headers.items():
            plain = _unwrapped(name)
            if IGNORED in plain:
                continue
            named = PART.fullmatch(plain) or WHOLE_TENSOR.fullmatch(plain)
            if named is None:
                self._refuse(f"has the tensor {shown(name)}, which is not one of LoRA's")
            if header.dtype not in DTYPES:
                self._refuse(
                    f"stores {shown(name)} in {header.dtype}; save it in float32, bfloat16 or float16"
                )
            bias_of_part = named["part"].startswith("lora_") and named["leaf"] == "bias"
            part = named["part"] + ("_bias" if bias_of_part else "")
            parts = found.setdefault(named["module"], {})
            if part in parts:
                self._refuse(
                    f"has two tensors for {part} of {shown(named['module'])}; save one adapter alone"
                )
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
            self._refuse(
                f"lacks {some(sorted(missing))}, which its {ADAPTER_CONFIG} names; finish the download"
            )
        adapted = {module for module, parts in self._modules.items() if parts.keys() - {"weight", "bias"}}
        unnamed = {module for module in adapted if not self.config.names(module)}
        if unnamed:
            self._refuse(
                f"holds {some(sorted(unnamed))}, which its {ADAPTER_CONFIG} does not name; save it again"
            )

    def _replace(self, merged: Merged, name: str, header: TensorHeader, scaled: bool) -> None:
        """Replace a weight by the adapter's tensor: a trained one, or the base model's if B·A of this module follows.

        Args:
            scaled: whether the adapter has a scale, which a trained tensor cannot have. Such an adapter is refused.
        """
        if name in merged.ignored:
            return
        self._require_shape(merged, name, header.shape)
        if name in merged.whole:
            self._refuse(f"replaces {name}, as another adapter does; give one of them")
        if scaled:
            self._refuse(f"stores {name} whole, which has no scale; give it without ={self.scale:g}")
        merged.whole[name] = header

    def _adapt(self, merged: Merged, module: str) -> None:
        """Add the low-rank change of a module: B·A for a matrix, (B·A)ᵀ for an embedding."""
        parts = self._modules[module]
        owner, half = _fused(_canonical(module))
        if f"{owner}.weight" in merged.ignored:
            return
        lookup = not {"lora_embedding_A", "lora_embedding_B"}.isdisjoint(parts)
        right, left = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A", "lora_B")
        (rank, inputs), (outputs, again) = self._matrix(module, right), self._matrix(module, left)
        asked = self.config.rank_of(module) or rank
        if {rank, again} != {asked}:
            self._refuse(f"has the ranks {rank} and {again} in {module}, its {ADAPTER_CONFIG} says {asked}")
        rows, columns = (inputs, outputs) if lookup else (outputs, inputs)
        self._require_shape(merged, f"{owner}.weight", (rows * (1 if half is None else 2), columns))
        first, scaling = rows * (half or 0), self.scale * self.config.scaling(module, rank)
        factors = partial(self._read, parts[left]), partial(self._read, parts[right])
        if lookup:
            factors = partial(self._turned, parts[right]), partial(self._turned, parts[left])
        change = LowRank(first, rows, scaling, *factors, self._magnitude(module, rows, lookup))
        merged.changes.setdefault(f"{owner}.weight", []).append(change)
        if ("lora_B_bias" in parts) != self.config.biased:
            self._refuse(f"and its {ADAPTER_CONFIG} disagree on lora_bias in {module}")
        if self.config.biased:
            self._add_bias(merged, f"{owner}.bias", first, scaling, parts["lora_B_bias"])

    def _magnitude(self, module: str, rows: int, lookup: bool) -> "partial[Tensor] | None":
        """A function that reads DoRA's magnitudes [rows]. None: the adapter is plain LoRA."""
        header = self._modules[module].get("lora_magnitude_vector")
        if (header is not None) != self.config.dora:
            self._refuse(f"and its {ADAPTER_CONFIG} disagree on whether {module} has DoRA's magnitudes")
        if header is None:
            return None
        if lookup or header.shape != (rows,):
            self._refuse(f"has magnitudes {list(header.shape)} for {module} with {rows} rows")
        return partial(self._read, header)

    def _add_bias(self, merged: Merged, name: str, first: int, scaling: float, header: TensorHeader) -> None:
        if name not in merged.expected:
            self._refuse(f"changes {name}, but the checkpoint has no such bias")
        if len(header.shape) != 1 or first + header.shape[0] > merged.expected[name][0]:
            self._refuse(f"has a bias {list(header.shape)} for {name}")
        added = Added(first, header.shape[0], scaling, partial(self._read, header))
        merged.changes.setdefault(name, []).append(added)

    def _matrix(self, module: str, part: str) -> tuple[int, int]:
        """The shape (rows, columns) of a part, which must be a matrix."""
        header = self._modules[module].get(part)
        if header is None:
            self._refuse(f"lacks {part} of {module}; save it again")
        if len(header.shape) != 2 or 0 in header.shape:
            self._refuse(f"has {part} {list(header.shape)} in {module}, which is no matrix")
        return header.shape[0], header.shape[1]

    def _require_shape(self, merged: Merged, name: str, shape: tuple[int, ...]) -> None:
        if name not in merged.expected:
            self._refuse(f"changes {name}, which the model does not have; is it for another model?")
        if shape != merged.expected[name]:
            self._refuse(f"is for {name} {list(shape)}, but the model has {list(merged.expected[name])}")

    def _read(self, header: TensorHeader) -> "Tensor":
        """Read a tensor as float32. Refuses NaN and infinity."""
        import torch

        tensor = torch.empty(header.shape, dtype=getattr(torch, header.dtype))
        self.file.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, header.offset)
        if not bool(tensor.isfinite().all()):
            self._refuse(f"holds NaN or infinite values in {header.name}; its training diverged")
        return tensor.float()

    def _turned(self, header: TensorHeader) -> "Tensor":
        return self._read(header).T.contiguous()

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"the adapter {self.folder} {what}")


def merge(adapters: Iterable[Adapter], merged: Merged) -> Merged:
    """Add the changes of all adapters, in order, to ``merged`` and return it."""
    for adapter in adapters:
        adapter.add_to(merged)
    return merged


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


def _canonical(module: str) -> str:
    return module if module.startswith("model.") or module in ("lm_head", "score") else f"model.{module}"


def _fused(module: str) -> tuple[str, int | None]:
    """The fused matrix of a module and the half's index. For any other module: the module and None."""
    half = next((place for place, name in enumerate(HALVES) if module.endswith(f".{name}")), None)
    return module if half is None else module.removesuffix(HALVES[half]) + FUSED, half
