"""A checkpoint folder: its configuration, the place of each weight, and the reading of weights.

Opening reads ``config.json`` and the headers of the safetensors files, but no weight. A folder with inconsistent
files is refused. Weights are read later, whole or in blocks of rows into reused buffers. NaN and infinity are refused.

A quantized checkpoint is read as dequantized float32 values (``sources``).

A weight's canonical name is the name in the causal LM (``model.layers.0...``). A checkpoint saved from the bare
decoder has names without ``model.``; :meth:`Checkpoint.name_of` translates.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from glm4_exporters.adapters import Adapter, Merged, merge
from glm4_exporters.adapters.changes import Change, ChangeRows, combined
from glm4_exporters.architecture import BACKBONE, EMBEDDING, HEAD, SCORES, expected_tensors
from glm4_exporters.checkpoint_folder import open_shards, require_folder
from glm4_exporters.config import TASKS, Glm4Config
from glm4_exporters.sources import MODELOPT_CONFIG, SourceFormat, detect
from glm4_exporters.sources.view import NO_VIEWS, find_views
from glm4_exporters.tensor_checks import require_tensors
from glm4_exporters.weight_reader import WeightReader, require_finite_rows
from glm4_runtime.adapters.base_model import names_of, require_base
from glm4_runtime.bundle.file_names import CONFIG, SIDE_FILES
from glm4_runtime.bundle.json_file import read_small
from glm4_runtime.bundle.safetensors_file import SafetensorsFile, TensorHeader
from glm4_runtime.errors import CheckpointError

if TYPE_CHECKING:  # torch loads with the first weight, not with the headers
    from torch import Tensor


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
        self._reader = WeightReader(shards)
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
        require_folder(folder)
        opened = tuple(Adapter(path, scale) for path, scale in adapters)
        config, task = _configured(folder, task, opened)
        shards = open_shards(folder)
        headers = {name: header for shard in shards for name, header in shard.headers.items()}
        prefix = BACKBONE if any(name.startswith(BACKBONE) for name in headers) else ""
        for adapter in opened:
            size = config.hidden_size, config.num_hidden_layers
            require_base(adapter.folder, adapter.config.base, names_of(folder), size, folder)
        merged = merge(opened, _mergeable(config, task))
        whole = {_own_name(name, prefix): header for name, header in merged.whole.items()}
        if merged.whole.keys() & SCORES:  # the adapter's classification head replaces the LM head
            headers.pop(HEAD, None)
        expected = {_own_name(name, prefix): shape for name, shape in expected_tensors(config, task).items()}
        source = detect(folder)
        views = NO_VIEWS if source is None else find_views(config, source, headers, expected).without(whole)
        headers = views.seen(headers, expected) | whole
        require_tensors(folder, config, task, headers, expected)
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
            tensor = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        else:
            tensor = self._reader.read(header)
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
        header = self._header(name)
        if name in self.views.by_name:
            blocks = self._view_blocks(name, buffers[0].numel())
        else:
            blocks = self._reader.row_blocks(header, *buffers)
        merged = self._merging(name)
        yield from ((first, merged(block, first)) for first, block in blocks)

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
        """Paths of the tokenizer, chat template and generation settings that the folder has, by file name.

        Raises:
            CheckpointError: one is there, but is no file: a link to nothing, a folder, a pipe.
        """
        found = {name: path for name in SIDE_FILES if os.path.lexists(path := self.folder / name)}
        for path in found.values():
            if not path.is_file():
                what = "a link to a file that does not exist" if path.is_symlink() else "not a file"
                raise CheckpointError(f"{path} is {what}; finish the download, or remove it")
        return found

    @property
    def stored(self) -> dict[str, TensorHeader]:
        """Headers of the stored tensors that the task's weights are made of, by name."""
        found = {name: header for shard in self._shards.values() for name, header in shard.headers.items()}
        plain = {name: header for name, header in self.tensors.items() if name not in self.views.by_name}
        return {name: found[name] for name in found if name in self.views.used} | plain

    def read_stored(self, header: TensorHeader) -> "Tensor":
        """Read a tensor into new memory in its stored type, without dequantization."""
        return self._reader.read_stored(header)

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

    def _merging(self, name: str) -> ChangeRows:
        """A function that applies the adapters' changes to a block of rows, given the block's first row."""
        if name not in self._changes:
            return lambda rows, _first: rows
        change = combined(self._changes[name])

        def merged(rows: "Tensor", first: int) -> "Tensor":
            rows = change(rows, first)
            require_finite_rows(self.tensors[name], rows, first)
            return rows

        return merged

    def _header(self, name: str) -> TensorHeader:
        header = self.tensors[name]
        if self._second_head is not None and name == _own_name(EMBEDDING, self.prefix):
            self._require_tied(header, self._second_head)
            self._second_head = None
        return header

    def _require_tied(self, embedding: TensorHeader, head: TensorHeader) -> None:
        """Compare the embedding with a tied head that the checkpoint stores too. Refuse a difference."""
        if not self._reader.equal(embedding, head):
            raise CheckpointError(
                f"{self.folder / CONFIG} says tie_word_embeddings true, but {HEAD} and {embedding.name} differ; "
                "set it to false"
            )


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


def _own_name(canonical: str, prefix: str) -> str:
    return prefix + canonical.removeprefix(BACKBONE) if canonical.startswith(BACKBONE) else canonical
