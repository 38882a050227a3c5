"""A checkpoint folder: its configuration, the place of each weight, and the reading of weights.

Opening reads ``config.json`` and the headers of the safetensors files, but no weight. A folder with inconsistent
files is refused. Weights are read later, whole or in blocks of rows into reused buffers. NaN and infinity are refused.

A quantized checkpoint is read as dequantized float32 values (``sources``).

A weight's canonical name is the name in the causal LM (``model.layers.0...``). A checkpoint saved from the bare
decoder has names without ``model.``; :meth:`Checkpoint.name_of` translates.
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from glm4_exporters.adapters import Adapter, Merged, merge, require_base
from glm4_exporters.adapters.changes import Change, Rows
from glm4_exporters.architecture import EMBEDDING, HEAD, expected_tensors
from glm4_exporters.config import DTYPES, TASKS, Glm4Config
from glm4_exporters.safetensors_file import PAGE, SafetensorsFile, TensorHeader
from glm4_exporters.sources import MODELOPT_CONFIG, SourceFormat, detect
from glm4_exporters.sources.view import NO_VIEWS, find_views
from glm4_runtime.bundle.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GGUF,
    INDEX,
    PICKLES,
    SAFETENSORS,
    SIDE_FILES,
)
from glm4_runtime.bundle.json_file import read_object, read_small
from glm4_runtime.errors import CheckpointError, shown, some

if TYPE_CHECKING:  # torch loads with the first weight, not with the headers
    from torch import Tensor

ROWS_TOGETHER = 64  # blocks have a multiple of this many rows if the buffer allows
BACKBONE = "model."

T = TypeVar("T")

# Further types of quantized checkpoints, beside DTYPES: safetensors' name and torch's.
TYPES = {"F8_E4M3": "float8_e4m3fn", "I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64"}

# Files that a folder without safetensors may hold instead, with advice for the error.
OTHER_WEIGHTS = {
    "model-*.safetensors": f"are shards without {INDEX}; download that file too",
    ADAPTER_WEIGHTS: "is an adapter; merge it into its base model and save that",
    **{
        f"*{end}": "is pickled, which can run code when it is read; convert it: from_pretrained(...).save_pretrained(...)"
        for end in PICKLES
    },
    f"*{GGUF}": "is a GGUF file; give the checkpoint that it was made from",
}
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # a buffer saved by old releases, and not needed
SCORES = frozenset({"score.weight", "score.bias"})
HEADS = re.compile(r"lm_head\.weight|score\.(weight|bias)")

# Likely causes of a mismatch: kind of mismatch, pattern of the tensor's name, cause. The first matching row is reported.
CAUSES = [
    (
        "surplus",
        r"(scale|scales|qweight|qzeros|weight_scale_inv|absmax|weight_packed)$",
        "the checkpoint is quantized, but config.json has no quantization_config that says how, or another one; "
        "copy config.json from the tool's output",
    ),
    (
        "surplus",
        r"lora_|modules_to_save|original_module|\.base_layer\.",
        "an adapter is not merged into the weights; merge it (merge_and_unload) and save that",
    ),
    (
        "surplus",
        r"mlp\.(gate|up)_proj",
        "gate and up are apart, so this is another architecture's checkpoint",
    ),
    ("surplus", r"mlp\.experts", "this is a mixture of experts, glm4_moe"),
    ("surplus layer", r"", "num_hidden_layers in config.json is smaller than the weights'"),
    ("surplus", r"[qkv]_proj\.bias", "attention_bias in config.json is false, but the weights have biases"),
    ("misshapen", r"[kv]_proj", "num_key_value_heads or head_dim in config.json is not the weights'"),
    ("misshapen", r"embed_tokens|lm_head", "vocab_size or hidden_size in config.json is not the weights'"),
    ("misshapen", r"mlp\.", "intermediate_size or hidden_size in config.json is not the weights'"),
    ("misshapen", r"score", "id2label in config.json does not name the labels of the weights"),
    (
        "missing",
        r"layers\.\d+\.(?!.*bias)",
        "num_hidden_layers in config.json is larger than the weights', or a file is not whole",
    ),
    ("missing", r"[qkv]_proj\.bias", "attention_bias in config.json is true, but the weights have no biases"),
    ("missing", r"score", "the checkpoint was not trained for this task"),
    ("missing", r"lm_head", "the embeddings are tied (then say tie_word_embeddings), or this is an encoder"),
    ("wrong dtype", r"", "the checkpoint is quantized; save it in bfloat16, float16 or float32"),
]

COMPARED = 8 << 20
LONGEST_FILE_NAME = 255  # bytes, on every usual file system
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Checkpoint:
    """An open checkpoint. The end of a ``with`` block closes its files.

    Attributes:
        folder: the path given by the caller.
        config: the contents of ``config.json``.
        task: one of ``config.TASKS``.
        prefix: prefix of the decoder's weights in this checkpoint, ``model.`` or empty.
        tensors: headers of the weights that the task needs, by the checkpoint's own names. A quantized matrix has
            the type float32 here.
        source: the quantization format. None: the checkpoint is not quantized.
        views: the quantized, split or fused matrices.
        adapters: LoRA adapters that are merged into the weights during reading.
    """

    def __init__(
        self,
        folder: Path,
        config: Glm4Config,
        task: str,
        prefix: str,
        shards: list[SafetensorsFile],
        tensors: Mapping[str, TensorHeader],
    ) -> None:
        self.folder, self.config, self.task, self.prefix = folder, config, task, prefix
        self._shards = {shard.path: shard for shard in shards}
        self.tensors: Mapping[str, TensorHeader] = MappingProxyType(dict(tensors))
        head = next((shard.headers[HEAD] for shard in shards if HEAD in shard.headers), None)
        self._second_head = head if task == "causal-lm" and config.tie_word_embeddings else None
        self.source: SourceFormat | None = None
        self.views = NO_VIEWS
        self.adapters: tuple[Adapter, ...] = ()
        self._changes: Mapping[str, list[Change]] = {}

    @classmethod
    def load(
        cls, folder: str | Path, task: str | None = None, adapters: Sequence[tuple[str | Path, float]] = ()
    ) -> "Checkpoint":
        """Open a checkpoint folder and check that its files are consistent. Reads no weight.

        Args:
            task: the task to read weights for. None: the task of an adapter's classification head, or else the task
                that ``config.json`` names.
            adapters: folders of LoRA adapters with a factor for each, merged in this order.

        Raises:
            ConfigError: ``config.json`` is not a GLM-4-0414 configuration.
            CheckpointError: files are missing, damaged, or do not match the configuration.
        """
        folder = Path(folder)
        _check_folder(folder)
        opened = tuple(Adapter(path, scale) for path, scale in adapters)
        config, task = _configured(folder, task, opened)
        shards = _open_shards(folder)
        headers = {name: header for shard in shards for name, header in shard.headers.items()}
        prefix = BACKBONE if any(name.startswith(BACKBONE) for name in headers) else ""
        for adapter in opened:
            require_base(adapter.folder, adapter.config.base, folder, config)
        merged = merge(opened, _mergeable(config, task))
        whole = {_own_name(name, prefix): header for name, header in merged.whole.items()}
        if merged.whole.keys() & SCORES:  # the adapter's classification head replaces the LM head
            headers.pop(HEAD, None)
        expected = {_own_name(name, prefix): shape for name, shape in expected_tensors(config, task).items()}
        source = detect(folder)
        views = NO_VIEWS if source is None else find_views(config, source, headers, expected).without(whole)
        headers = views.seen(headers, expected) | whole
        _check_tensors(folder, config, task, headers, expected)
        files = [*shards, *(adapter.file for adapter in opened)]
        checkpoint = cls(folder, config, task, prefix, files, {name: headers[name] for name in expected})
        checkpoint.adapters, checkpoint.source, checkpoint.views = opened, source, views
        checkpoint._changes = {_own_name(name, prefix): changes for name, changes in merged.changes.items()}
        return checkpoint

    def name_of(self, canonical: str) -> str:
        """This checkpoint's name of a weight. A tied head has the name of the embedding."""
        if canonical == HEAD and self.config.tie_word_embeddings:
            canonical = EMBEDDING
        return _own_name(canonical, self.prefix)

    def canonical(self, name: str) -> str:
        """The canonical name of the weight that this checkpoint calls ``name``."""
        inside = name.startswith(("layers.", "embed_tokens.", "norm."))
        return BACKBONE + name if not self.prefix and inside else name

    def read(self, name: str) -> "Tensor":
        """Read a whole tensor into new memory, dequantized and with adapters merged.

        Raises:
            CheckpointError: the file has changed, or a value is NaN or infinite.
        """
        import torch

        header = self._header(name)
        if name in self.views.by_name:
            blocks = [block for _, block in self._view_blocks(name, header.nbytes)]
            return self._merging(name)(torch.cat(blocks) if len(blocks) > 1 else blocks[0], 0)
        tensor = torch.empty(header.shape, dtype=getattr(torch, header.dtype))
        self._fill(header, tensor.reshape(-1).view(torch.uint8), 0)
        _check_finite(header, tensor, 0)
        return self._merging(name)(tensor, 0)

    def row_blocks(self, name: str, *buffers: "Tensor") -> Iterator[tuple[int, "Tensor"]]:
        """Read a tensor in blocks of whole rows that fit into a buffer; a multiple of 64 rows if the buffer allows.

        With two or more buffers, a thread reads the next block while the caller uses the current one. Reads bypass
        the page cache if the buffers are page-aligned, because a checkpoint is large and read only once.

        Args:
            buffers: uint8 [bytes] on the CPU, all of one size, filled in turn. Each block is a view into a buffer.
                A block is valid until the caller asks for the next one; with n > 2 buffers, for the (n - 1)-th one
                after it. Blocks that adapters change are float32 in new memory.

        Yields:
            The index of the block's first row, and the block [rows, ...].

        Raises:
            CheckpointError: the file has changed, a value is NaN or infinite, or a row is larger than a buffer.
        """
        import torch

        header = self._header(name)
        if name in self.views.by_name:
            merged = self._merging(name)
            yield from ((at, merged(rows, at)) for at, rows in self._view_blocks(name, buffers[0].numel()))
            return
        dtype: torch.dtype = getattr(torch, header.dtype)
        rows = header.shape[0]
        row_bytes = header.nbytes // rows
        room = buffers[0].numel()
        # Reads of whole pages may need one more page at each end. A large buffer keeps room for both.
        step = (room - 2 * PAGE if room >= 64 * PAGE else room) // row_bytes
        step -= step % ROWS_TOGETHER if step > ROWS_TOGETHER else 0
        if step == 0:
            raise CheckpointError(
                f"a row of {name} takes {row_bytes} bytes, the buffer has {buffers[0].numel()}"
            )
        starts = zip(range(0, rows, step), itertools.cycle(buffers), strict=False)

        def read(first: int, buffer: "Tensor") -> tuple[int, "Tensor"]:
            count = min(step, rows - first)
            flat = self._read_through(header, buffer, first * row_bytes, count * row_bytes)
            return first, flat.view(dtype).view(count, *header.shape[1:])

        blocks = (
            _one_ahead(read, starts) if len(buffers) > 1 and step < rows else itertools.starmap(read, starts)
        )
        merged = self._merging(name)
        for first, block in blocks:
            _check_finite(header, block, first)
            yield first, merged(block, first)

    def fingerprint(self, by_content: bool = False) -> str:
        """SHA-256, in hex, that identifies this checkpoint independently of its folder.

        The hash covers configuration, tokenizer and template files, the headers of the weights, and the adapters.
        A file of weights in a hub cache adds the cache's content hash; any other file adds its size and time of change.

        Args:
            by_content: read and hash the files of weights that are not in a hub cache, instead of size and time.
        """
        digest = hashlib.sha256()

        def add(name: str, data: bytes) -> None:
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)

        for name, path in sorted({**self._settings(), **self.side_files()}.items()):
            add(name, read_small(path, CheckpointError))
        merged = {adapter.file.path for adapter in self.adapters}
        for path, shard in sorted(
            (path, shard) for path, shard in self._shards.items() if path not in merged
        ):
            add(path.name, shard.header_sha256)
            add("content", (shard.content if by_content else shard.identity).encode())
        for adapter in self.adapters:
            add(f"adapter times {adapter.scale!r}", adapter.sha256().encode())
        return digest.hexdigest()

    def side_files(self) -> dict[str, Path]:
        """Paths of the tokenizer, chat template and generation settings that the folder has, by file name."""
        return {name: path for name in SIDE_FILES if (path := self.folder / name).is_file()}

    @property
    def stored(self) -> dict[str, TensorHeader]:
        """Headers of the stored tensors that the task's weights are made of, by name."""
        found = {name: header for shard in self._shards.values() for name, header in shard.headers.items()}
        plain = {name: header for name, header in self.tensors.items() if name not in self.views.by_name}
        return {name: found[name] for name in found if name in self.views.used} | plain

    def read_stored(self, header: TensorHeader) -> "Tensor":
        """Read a tensor into new memory in its stored type, without dequantization."""
        import torch

        tensor = torch.empty(header.shape, dtype=getattr(torch, TYPES.get(header.dtype, header.dtype)))
        self._fill(header, tensor.reshape(-1).view(torch.uint8), 0)
        return tensor

    def close(self) -> None:
        """Close the files. Afterwards no weight can be read."""
        for shard in self._shards.values():
            shard.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {self.task}, {len(self.tensors)} tensors)"

    def _settings(self) -> dict[str, Path]:
        """Paths of the files that describe the weights, by file name."""
        names = [CONFIG] if self.source is None else [CONFIG, MODELOPT_CONFIG]
        return {name: path for name in names if (path := self.folder / name).is_file()}

    def _view_blocks(self, name: str, room: int) -> "Iterator[tuple[int, Tensor]]":
        from glm4_exporters.sources.reading import view_blocks

        return view_blocks(self.views.by_name[name], self.read_stored, room)

    def dtype_of(self, name: str) -> str:
        """The element type of the tensor that a read returns. A tensor changed by adapters is float32."""
        return "float32" if name in self._changes else self.tensors[name].dtype

    def _merging(self, name: str) -> Rows:
        """A function that applies the adapters' changes to a block of rows, given the block's first row."""
        changes = [change.opened() for change in self._changes.get(name, ())]
        if not changes:
            return lambda rows, _first: rows

        def merged(rows: "Tensor", first: int) -> "Tensor":
            import torch

            rows = rows.to(torch.float32, copy=True)
            for change in changes:
                rows = change(rows, first)
            _check_finite(self.tensors[name], rows, first)
            return rows

        return merged

    def _header(self, name: str) -> TensorHeader:
        header = self.tensors[name]
        if self._second_head is not None and name == _own_name(EMBEDDING, self.prefix):
            self._check_tied(header, self._second_head)
            self._second_head = None
        return header

    def _check_tied(self, embedding: TensorHeader, head: TensorHeader) -> None:
        """Compare the embedding with a tied head that the checkpoint stores too. Refuse a difference."""
        for at in range(0, embedding.nbytes, COMPARED):
            size = min(COMPARED, embedding.nbytes - at)
            one, other = (bytearray(size), bytearray(size))
            self._shards[embedding.file].read_into(memoryview(one), embedding.offset + at)
            self._shards[head.file].read_into(memoryview(other), head.offset + at)
            if one != other:
                raise CheckpointError(
                    f"{self.folder / CONFIG} says tie_word_embeddings true, but {HEAD} and {embedding.name} differ; "
                    "set it to false"
                )

    def _read_through(self, header: TensorHeader, buffer: "Tensor", at: int, count: int) -> "Tensor":
        """Read ``count`` bytes of a tensor from offset ``at``, in whole pages if alignment allows.

        Returns:
            A view into ``buffer``, uint8 [count].
        """
        shard, offset = self._shards[header.file], header.offset + at
        shift = offset % PAGE
        fits = buffer.data_ptr() % PAGE == 0 and shift % 8 == 0 and shift + count + PAGE <= buffer.numel()
        if not (fits and shard.read_pages_into(buffer.numpy().data, offset - shift, shift + count)):
            shift = 0
            shard.read_into(buffer[:count].numpy().data, offset)
        return buffer[shift : shift + count]

    def _fill(self, header: TensorHeader, flat: "Tensor", at: int) -> None:
        self._shards[header.file].read_into(flat.numpy().data, header.offset + at)


# The folder ---------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that holds it and {CONFIG}")
    if not folder.is_dir():
        hub = HUB_ID.fullmatch(str(folder))
        advice = (
            f"; if it is a model of the Hugging Face hub, first: hf download {folder} --local-dir ..."
            if hub
            else ""
        )
        raise CheckpointError(f"there is no folder {folder}{advice}")
    if not (folder / CONFIG).is_file():
        adapter = (folder / ADAPTER_CONFIG).is_file()
        advice = (
            "it is an adapter: merge it into its base model and save that"
            if adapter
            else "give a checkpoint's folder"
        )
        raise CheckpointError(f"{folder} has no {CONFIG}; {advice}")


def _configured(folder: Path, task: str | None, adapters: Sequence[Adapter]) -> tuple[Glm4Config, str]:
    """The configuration and the task. An adapter's classification head sets the labels, and the task if None."""
    config = Glm4Config.from_file(folder / CONFIG)
    heads = [adapter for adapter in adapters if adapter.task is not None]
    task = _choose_task(folder, config, task or (heads[0].task if heads else None))
    if heads and task.endswith("classification") and heads[0].labels != config.num_labels:
        config = config.with_labels(heads[0].labels)
    return config, task


def _mergeable(config: Glm4Config, task: str) -> Merged:
    """The weights that adapters may change. For an encoder, changes of heads are skipped."""
    heads = frozenset({HEAD, *SCORES} if task == "encoder" else ())
    return Merged(expected_tensors(config, task), config.tie_word_embeddings and task == "causal-lm", heads)


def _choose_task(folder: Path, config: Glm4Config, task: str | None) -> str:
    if task is not None and task not in TASKS:
        raise CheckpointError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    chosen = task or config.task
    if chosen is None:
        raise CheckpointError(
            f"{folder / CONFIG} names no architecture; choose the task with --task: {', '.join(TASKS)}"
        )
    return chosen


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SAFETENSORS).is_file():
            return [SafetensorsFile(folder / SAFETENSORS)]
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    if SAFETENSORS not in names and (folder / SAFETENSORS).is_file():
        raise CheckpointError(
            f"{folder} has both {SAFETENSORS} and {INDEX}; remove the one that is out of date"
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {some(absent)} of the {len(names)} files that {INDEX} names; finish the download"
        )
    shards = [SafetensorsFile(folder / name) for name in names]
    _check_index(index, weight_map, shards)
    return shards


def _no_weights(folder: Path) -> str:
    wanted = f"{folder} has neither {SAFETENSORS} nor {INDEX}"
    for pattern, advice in OTHER_WEIGHTS.items():
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            return f"{wanted}; {found[0]} {advice}"
    return f"{wanted}; finish the download"


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map that names each tensor's file; download it again")
    for name in weight_map.values():
        if not _is_plain(name):
            raise CheckpointError(f"{index} names the file {shown(name)}, but only files beside it are read")
    return weight_map


def _is_plain(name: object) -> bool:
    """Whether the name is a file name without a folder, so that the file is beside the index."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name.encode()) <= LONGEST_FILE_NAME
        and not set(name) & set("/\\\0")
    )


def _check_index(index: Path, weight_map: dict[str, str], shards: list[SafetensorsFile]) -> None:
    count = Counter(name for shard in shards for name in shard.headers)
    shard_of = {name: shard.path.name for shard in shards for name in shard.headers}
    complaints = {
        "in two files": [name for name, times in count.items() if times > 1],
        "in the index but not in its file": [
            name for name, file in weight_map.items() if count[name] < 2 and shard_of.get(name) != file
        ],
        "in a file but not in the index": [name for name in count if name not in weight_map],
    }
    found = [f"{len(names)} {what} ({some(names)})" for what, names in complaints.items() if names]
    if found:
        raise CheckpointError(
            f"{index} and its files disagree, tensors: {'; '.join(found)}; download them again"
        )


def _check_tensors(
    folder: Path,
    config: Glm4Config,
    task: str,
    headers: Mapping[str, TensorHeader],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise one error that lists all mismatches between the tensors and the expected shapes and types."""
    wanted = dict(expected)
    if task == "causal-lm" and config.tie_word_embeddings and HEAD in headers:
        wanted[HEAD] = (config.vocab_size, config.hidden_size)  # a tied head that is stored too
    surplus = [name for name in headers if name not in wanted and not HARMLESS.search(name)]
    if task == "encoder":
        surplus = [name for name in surplus if not HEADS.fullmatch(name)]
    present = [name for name in wanted if name in headers]
    misshapen = [name for name in present if headers[name].shape != wanted[name]]
    mistyped = [name for name in present if headers[name].dtype not in DTYPES]
    shapes = {
        name: f"{name} {list(headers[name].shape)} instead of {list(wanted[name])}" for name in misshapen
    }
    complaints = {
        "missing": {name: name for name in wanted if name not in headers},
        "surplus": {name: name for name in surplus},
        "misshapen": shapes,
        "wrong dtype": {name: f"{name} {headers[name].dtype}" for name in mistyped},
    }
    found = [f"{len(names)} {what} ({some(names.values())})" for what, names in complaints.items() if names]
    if found:
        complaints["surplus layer"] = {
            name: name for name in surplus if _layer(name) >= config.num_hidden_layers
        }
        causes = [
            cause
            for what, pattern, cause in CAUSES
            if any(re.search(pattern, name) for name in complaints[what])
        ]
        wrapper = _wrapper(headers)
        if wrapper and "an adapter" not in "".join(causes[:1]):
            causes = [
                f"all names begin with {wrapper!r}, a training wrapper's; save the model inside it",
                *causes,
            ]
        likely = f"; likely cause: {causes[0]}" if causes else ""
        raise CheckpointError(
            f"the weights in {folder} are not the {task} model of its {CONFIG}: {'; '.join(found)}{likely}"
        )
    tied = headers.get(HEAD) if HEAD in wanted and HEAD not in expected else None
    if tied is not None and tied.dtype != headers[next(iter(expected))].dtype:
        raise CheckpointError(
            f"{tied.file} holds a tied {HEAD} in {tied.dtype}, which is not the embedding's type"
        )


def _wrapper(names: Iterable[str]) -> str:
    """The prefix of all names that a training wrapper added, such as ``module.``. Empty in a plain checkpoint."""
    names = list(names)
    place = next((name for name in names if name.endswith("embed_tokens.weight")), "")
    prefix = place.removesuffix("embed_tokens.weight").removesuffix(BACKBONE)
    return prefix[:100] if names and all(name.startswith(prefix) for name in names) else ""


def _layer(name: str) -> int:
    found = re.match(r"(model\.)?layers\.(\d+)\.", name)
    return int(found[2]) if found else -1


def _own_name(canonical: str, prefix: str) -> str:
    return prefix + canonical.removeprefix(BACKBONE) if canonical.startswith(BACKBONE) else canonical


def _one_ahead(read: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Yield ``read(*a)`` for each ``a``. A thread computes the next result while the caller uses the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as thread:
        coming: Future[T] | None = None
        for following in arguments:
            ready, coming = coming, None
            if ready is not None:
                result = ready.result()
                coming = thread.submit(read, *following)
                yield result
            else:
                coming = thread.submit(read, *following)
        if coming is not None:
            yield coming.result()


def _check_finite(header: TensorHeader, block: "Tensor", first_row: int) -> None:
    """Refuse NaN and infinity. Minimum and maximum reveal both, and run at memory speed."""
    low, high = (float(value) for value in block.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return
    index = (~block.isfinite()).nonzero()[0].tolist()
    value = float(block[tuple(index)])
    index[0] += first_row
    raise CheckpointError(
        f"{header.file}: {header.name}{index} is {value}; the checkpoint is damaged, or training diverged"
    )
