"""Writes checkpoint tensors into the bundle's data file: reads row blocks, casts or quantizes, hashes, writes.

The file holds the graph's weights in the graph's order, each at a multiple of 4096 bytes, so that a runtime can map
the file. A stored matrix is written as the parts of its format.
Memory is a fixed set of buffers, independent of the model's size. The calling thread casts a block while other
threads read the next block, hash the source, hash the file and write. Encoding uses one thread per core. Later parts of
a matrix, usually its scales, wait in memory until their place in the file comes. So do the codes of a matrix that is
stored transposed. If a format needs the largest magnitude of a matrix, the matrix is read twice.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor

from glm4_exporters.aligned_file import ALIGNMENT, AlignedFile
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.element_types import TORCH_TYPES, type_name
from glm4_exporters.formats.base import Encoded, Format
from glm4_exporters.passes.builder import fixed
from glm4_exporters.passes.stored import Matrix, Source, source_of
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.reference import rotary_tables
from glm4_exporters.sources.kept import KeptMatrix
from glm4_exporters.trace import ROTARY_COS, ROTARY_SIN
from glm4_exporters.weight_reader import ROWS_TOGETHER
from glm4_runtime.bundle import FileEntry, sample_of
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

READ_BUFFER_BYTES = 32 << 20
READ_BUFFERS = 4  # one is being read, one is being cast, two wait for their hash
TABLE_ROWS = 1 << 16
M_TRIM_THRESHOLD, KEPT = -1, 64 << 20  # glibc's malloc.h; bytes
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 2 << 20
ENCODED_AT_ONCE = 1 << 18  # numbers per thread; as float32 they fit a core's own cache

T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """Position of one of the graph's weights in the data file, in bytes."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    source: Source | None = None  # set if this is a part of a stored matrix

    @property
    def type_name(self) -> str:
        return type_name(self.dtype)


class Found(Protocol):
    """Parts of a matrix that were computed earlier, such as by GPTQ."""

    def rows(self, first: int, count: int) -> Encoded:
        """The parts of ``count`` rows; scales may have any float type."""

    def written(self) -> None:
        """Called after the matrix was written."""


@dataclass(frozen=True)
class Edits:
    """Changes of tensors before they are stored.

    Attributes:
        smoothing: multipliers per row and column.
        found: by name: parts that replace the result of the format's ``encode``.
    """

    smoothing: Smoothing = field(default_factory=Smoothing)
    found: Mapping[str, Found] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenWeights:
    """
    Attributes:
        files: the written files, in the order of their layouts.
        source_sha256: digest of the tensors that were read; see :class:`~glm4_runtime.bundle.Manifest`.
    """

    files: tuple[FileEntry, ...]
    source_sha256: str


def layout(model: ir.Model) -> list[StoredTensor]:
    """Positions of all initializers that have no data yet, in the graph's order.

    Two initializers of the same part, with different shapes, share one position.
    """
    tensors: list[StoredTensor] = []
    places: dict[object, int] = {}
    end = 0
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(fixed(axis) for axis in value.shape)
        nbytes = int(torch.Size(shape).numel() * value.dtype.itemsize)  # an item may be half a byte
        source = source_of(value)
        offset = places.setdefault(source or name, end)
        tensors.append(StoredTensor(name, value.dtype, shape, offset, nbytes, source))
        end = max(end, offset + -(-nbytes // ALIGNMENT) * ALIGNMENT)
    return tensors


def _cores() -> int:
    """Number of cores that this process may use; all cores if the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stored_bytes(tensors: list[StoredTensor]) -> int:
    """Size of the data file for a layout."""
    return max(tensor.offset + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def attach(model: ir.Model, tensors: list[StoredTensor], location: str) -> None:
    """Point the graph's weights at the data file ``location``, relative to the graph's own file."""
    for tensor in tensors:
        model.graph.initializers[tensor.name].const_value = ir.ExternalTensor(
            location,
            tensor.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
        )


def share_weights(source: ir.Model, target: ir.Model) -> None:
    """Point the weights of ``target``, another graph of the same model, at the data that ``source`` reads."""
    for name, value in target.graph.initializers.items():
        if value.const_value is None:
            value.const_value = source.graph.initializers[name].const_value


def write_weights(
    checkpoint: Checkpoint,
    tensors: list[StoredTensor],
    path: Path,
    edits: Edits = Edits(),
    progress: Progress = silent,
) -> WrittenWeights:
    """Stream every tensor of ``tensors`` from the checkpoint into ``path``.

    Raises:
        CheckpointError: a shard changed or a weight is NaN or infinite.
        ExportError: a weight does not fit the type it is cast to.
        OSError: the disk is full.
    """
    return write_files(checkpoint, {path: tensors}, edits, progress)


def write_files(
    checkpoint: Checkpoint,
    layouts: Mapping[Path, list[StoredTensor]],
    edits: Edits = Edits(),
    progress: Progress = silent,
) -> WrittenWeights:
    """As :func:`write_weights`, into several files. A tensor of two files is read twice."""
    _keep_freed()
    sizes = {path: stored_bytes(tensors) for path, tensors in layouts.items()}
    total, done, files = sum(sizes.values()), 0, []
    with _one_torch_thread(), _Writer(checkpoint, edits) as writer:
        for path, tensors in layouts.items():
            with AlignedFile(path) as file:
                writer.begin(file)
                for tensor in tensors:
                    if tensor.offset < file.position:
                        continue  # a second initializer of data that is written already
                    writer.write(tensor)
                    file.pad()
                    progress("write weights", done + tensor.offset + tensor.nbytes, total)
            files.append(FileEntry(file.sha256(), sizes[path], sample_of(path)))
            done += sizes[path]
    progress("write weights", total, total)
    return WrittenWeights(tuple(files), writer.source_sha256())


class _Writer:
    """Appends one tensor of a layout after the other."""

    _file: AlignedFile

    def __init__(self, checkpoint: Checkpoint, edits: Edits) -> None:
        self._checkpoint, self._edits = checkpoint, edits
        self._buffers = [
            torch.frombuffer(mmap.mmap(-1, READ_BUFFER_BYTES), dtype=torch.uint8) for _ in range(READ_BUFFERS)
        ]
        self._hasher = ThreadPoolExecutor(1, "hash source")
        self._encoders = ThreadPoolExecutor(_cores(), "encode")
        self._hashes: dict[str, str] = {}
        self._waiting: dict[Source, list[Tensor]] = {}  # packed parts whose position in the file comes later

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for threads in (self._hasher, self._encoders):
            threads.shutdown(wait=True, cancel_futures=True)

    def begin(self, file: AlignedFile) -> None:
        """Write to another file from here on."""
        self._file = file
        self._waiting.clear()

    def write(self, tensor: StoredTensor) -> None:
        if tensor.source is not None:
            self._write_part(tensor.source)
        elif tensor.name in (ROTARY_COS, ROTARY_SIN):
            for block in _table_blocks(self._checkpoint.config, tensor):
                self._file.append(block, TORCH_TYPES[tensor.type_name])
        else:
            name, dtype = self._checkpoint.name_of(tensor.name), TORCH_TYPES[tensor.type_name]
            for first, block in self._read(tensor.name):
                flat = self._edits.smoothing.apply(tensor.name, block, first).reshape(-1)
                _require_range(name, flat, dtype)
                self._file.append(flat, dtype)

    def _write_part(self, source: Source) -> None:
        """Write a part of a matrix. The whole matrix is encoded with its first part; the other parts wait."""
        chunks: Iterable[Tensor] | None = self._waiting.pop(source, None)
        if chunks is None:
            chunks = self._encoded(source)
        part = source.matrix.parts[source.part]
        for piece in source.matrix.arrangement.written(chunks, part):
            self._file.append(piece.reshape(-1).view(torch.uint8), torch.uint8)

    def _encoded(self, wanted: Source) -> Iterator[Tensor]:
        """Yields the wanted part, packed, some rows at a time."""
        matrix = wanted.matrix
        found = self._edits.found.get(matrix.name)
        encode = self._encoding(matrix) if found is None else lambda first, rows: found.rows(first, len(rows))

        def packed(first: int, rows: Tensor) -> Encoded:
            return _packed(matrix, encode(first, rows))

        plain, begun = matrix.parts, set()
        blocks = (
            self._read_kept(matrix.name, found) if isinstance(found, KeptMatrix) else self._read(matrix.name)
        )
        for first, block in blocks:
            for parts in self._in_parts(packed, first, block):
                for name, chunk in parts.items():
                    if plain[name].shape or name not in begun:  # a scalar part is the same for all rows
                        self._waiting.setdefault(Source(matrix, name), []).append(chunk)
                        begun.add(name)
                yield from self._waiting.pop(wanted, ())
        if found is not None:
            found.written()

    def _encoding(self, matrix: Matrix) -> Callable[[int, Tensor], Encoded]:
        """A function that encodes rows [n, width] of a matrix after its edits, given their first row."""
        form, scale_type = matrix.format, TORCH_TYPES[matrix.scale_type]
        assert isinstance(form, Format)  # any other format only keeps numbers, and these are in the edits
        largest = self._largest(matrix.name) if form.needs_largest else None

        def encode(first: int, rows: Tensor) -> Encoded:
            wide = self._edits.smoothing.apply(matrix.name, rows, first).float()
            return form.encode(wide, scale_type, largest=largest)

        return encode

    def _largest(self, name: str) -> float:
        """The largest magnitude of a matrix after its edits."""

        def largest(first: int, rows: Tensor) -> float:
            low, high = self._edits.smoothing.apply(name, rows, first).float().aminmax()
            return max(-float(low), float(high))

        blocks = self._checkpoint.row_blocks(self._checkpoint.name_of(name), *self._buffers)
        return max(max(self._in_parts(largest, first, block)) for first, block in blocks)

    def _in_parts(self, work: Callable[[int, Tensor], T], first: int, block: Tensor) -> Iterator[T]:
        """Run ``work`` on a block of rows, a few rows per thread. ``first`` is the block's first row in its matrix."""
        step = max(1, ENCODED_AT_ONCE // (block.shape[1] * ROWS_TOGETHER)) * ROWS_TOGETHER
        starts = range(0, len(block), step)
        jobs = [self._encoders.submit(work, first + start, block[start : start + step]) for start in starts]
        for job in jobs:
            yield job.result()
        _give_back_freed()

    def _read(self, canonical: str) -> Iterator[tuple[int, Tensor]]:
        """Yields row blocks of a tensor; another thread hashes them."""
        name, buffers = self._checkpoint.name_of(canonical), self._buffers
        digest, hashing = hashlib.sha256(), deque[Future[None]]()
        for first, block in self._checkpoint.row_blocks(name, *buffers):
            flat = block.reshape(-1)
            hashing.append(self._hasher.submit(digest.update, flat.view(torch.uint8).numpy().data))
            yield first, block
            if len(hashing) == len(buffers) - 1:
                hashing.popleft().result()  # its buffer is filled next
        for job in hashing:
            job.result()
        self._hashes[canonical] = digest.hexdigest()

    def _read_kept(self, canonical: str, kept: KeptMatrix) -> Iterator[tuple[int, Tensor]]:
        """Yields row blocks of a kept matrix, without data: its numbers come from ``kept.rows``."""
        yield from kept.blocks()
        self._hashes[canonical] = kept.sha256

    def source_sha256(self) -> str:
        """SHA-256 of all tensors' contents, independent of their order and their shards."""
        digest = hashlib.sha256()
        for canonical in sorted(self._hashes):
            name = self._checkpoint.name_of(canonical)
            dtype, shape = self._checkpoint.dtype_of(name), list(self._checkpoint.tensors[name].shape)
            digest.update(f"{canonical} {dtype} {shape} {self._hashes[canonical]}\n".encode())
        return digest.hexdigest()


def _packed(matrix: Matrix, encoded: Encoded) -> Encoded:
    """Pack encoded rows in the matrix's arrangement.

    Raises:
        ExportError: a scale overflows its type.
    """
    packed = {}
    for name, part in matrix.parts.items():
        values = encoded[name]
        if part.scaled_by is None:
            dtype = TORCH_TYPES[part.dtype]
            values, limit = values.to(dtype), torch.finfo(dtype).max
            if not bool((values.float().abs() <= limit).all()):
                raise ExportError(
                    f"a scale of tensor {matrix.name} is beyond {part.dtype}'s {limit:g}; "
                    "export with --activations bf16 or fp32"
                )
        packed[name] = matrix.arrangement.pack(name, values, part, matrix.format)
    return packed


def _require_range(name: str, flat: Tensor, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    if torch.finfo(flat.dtype).max <= limit:
        return
    low, high = (float(x) for x in flat.aminmax())
    if max(-low, high) > limit:
        raise ExportError(
            f"tensor {name} holds {max(-low, high):g}, beyond {str(dtype)[6:]}'s {limit:g}; "
            "export with --precision bf16 or fp32"
        )


def _keep_freed() -> None:
    """Tell glibc to keep freed memory for the next allocation.

    By default glibc returns most of the memory at once, and every page is faulted in again for the next rows. Other C
    libraries lack these options.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def _give_back_freed() -> None:
    """Return freed memory sometimes: aligned blocks leave holes, and an int4 export of a 9B held 2.4 GB."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread: a cast is bound by memory, and the other cores hash."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _table_blocks(config: Glm4Config, tensor: StoredTensor) -> Iterator[Tensor]:
    for start in range(0, tensor.shape[0], TABLE_ROWS):
        positions = torch.arange(start, min(start + TABLE_ROWS, tensor.shape[0]))
        yield rotary_tables(config, positions)[tensor.name == ROTARY_SIN].reshape(-1)
