"""Checkpoint tensors into the bundle's one data file: read in row blocks, cast or quantized, hashed, written.

The file is the concatenation of the graph's weights in the graph's order, each at a multiple of 4096
bytes, so that a runtime can map it. A stored matrix is its format's parts. Memory is a fixed
set of buffers, whatever the model's size. The calling thread casts a block while others read the next, hash
the source, hash the file and write it; stored formats are encoded by as many threads as there are cores.
Two things are in memory until their place in the file comes: the parts of a matrix that are not written first, its
scales as a rule, and the codes of a matrix that is stored transposed. A format that needs the largest magnitude of a
matrix has it read twice.
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
from glm4_exporters.checkpoint import ROWS_TOGETHER, Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.element_types import TORCH_TYPES, type_name
from glm4_exporters.formats.base import Encoded
from glm4_exporters.passes.builder import fixed
from glm4_exporters.passes.stored import Matrix, Source, source_of
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.reference import rotary_tables
from glm4_exporters.trace import ROTARY_COS, ROTARY_SIN
from glm4_runtime.bundle import FileEntry, sample_of
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

READ_BLOCK = 32 << 20
READ_BUFFERS = 4  # one is read into, one is cast, two wait for their hash
TABLE_ROWS = 1 << 16
M_TRIM_THRESHOLD, KEPT = -1, 64 << 20  # glibc's malloc.h; bytes
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 2 << 20
ENCODED_AT_ONCE = 1 << 18  # numbers that one thread works on, in float32: a core's own cache holds them

T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """Where one of the graph's weights lies in the data file, in bytes."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    source: Source | None = None  # the part of a stored matrix that it is

    @property
    def type_name(self) -> str:
        return type_name(self.dtype)


class Found(Protocol):
    """The parts of a matrix that were found before its file is written, as by GPTQ."""

    def rows(self, first: int, count: int) -> Encoded:
        """Of ``count`` rows; scales of any float type."""

    def written(self) -> None:
        """Called when the matrix is in the file."""


@dataclass(frozen=True)
class Edits:
    """What is done to tensors before they are stored.

    Attributes:
        smoothing: multipliers per row and column.
        found: parts of matrices, by name, in place of what their format's ``encode`` would give.
    """

    smoothing: Smoothing = field(default_factory=Smoothing)
    found: Mapping[str, Found] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenWeights:
    file: FileEntry
    source_sha256: str


def layout(model: ir.Model) -> list[StoredTensor]:
    """The place of every initializer that has no data yet, in the graph's order.

    The parts of one matrix that two operators read in different shapes lie at one place.
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
        nbytes = int(torch.Size(shape).numel() * value.dtype.itemsize)  # of half a byte, sometimes
        source = source_of(value)
        offset = places.setdefault(source or name, end)
        tensors.append(StoredTensor(name, value.dtype, shape, offset, nbytes, source))
        end = max(end, offset + -(-nbytes // ALIGNMENT) * ALIGNMENT)
    return tensors


def _cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not tell."""
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
    _keep_freed()
    total = stored_bytes(tensors)
    with _one_torch_thread(), AlignedFile(path) as file, _Writer(checkpoint, edits, file) as writer:
        for tensor in tensors:
            if tensor.offset < file.position:
                continue  # another reader of what lies there already
            writer.write(tensor)
            file.pad()
            progress("write weights", tensor.offset + tensor.nbytes, total)
    progress("write weights", total, total)
    return WrittenWeights(FileEntry(file.sha256(), total, sample_of(path)), writer.source_sha256())


class _Writer:
    """Appends one tensor of a layout after the other."""

    def __init__(self, checkpoint: Checkpoint, edits: Edits, file: AlignedFile) -> None:
        self._checkpoint, self._edits, self._file = checkpoint, edits, file
        self._buffers = [
            torch.frombuffer(mmap.mmap(-1, READ_BLOCK), dtype=torch.uint8) for _ in range(READ_BUFFERS)
        ]
        self._hasher = ThreadPoolExecutor(1, "hash source")
        self._encoders = ThreadPoolExecutor(_cores(), "encode")
        self._hashes: dict[str, str] = {}
        self._waiting: dict[
            Source, list[Tensor]
        ] = {}  # packed parts whose place in the file is still to come

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for threads in (self._hasher, self._encoders):
            threads.shutdown(wait=True, cancel_futures=True)

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
        """A part of a matrix; the matrix is encoded where its first part is written, and the others wait."""
        chunks: Iterable[Tensor] | None = self._waiting.pop(source, None)
        if chunks is None:
            chunks = self._encoded(source)
        part = source.matrix.parts[source.part]
        for piece in source.matrix.arrangement.written(chunks, part):
            self._file.append(piece.reshape(-1).view(torch.uint8), torch.uint8)

    def _encoded(self, wanted: Source) -> Iterator[Tensor]:
        """The wanted part, packed, some rows at a time."""
        matrix, largest = wanted.matrix, None
        found = self._edits.found.get(matrix.name)
        if found is None and matrix.format.needs_largest:
            largest = self._largest(matrix.name)

        def packed(first: int, rows: Tensor) -> Encoded:
            if found is None:
                wide = self._edits.smoothing.apply(matrix.name, rows, first).float()
                encoded = matrix.format.encode(wide, TORCH_TYPES[matrix.scale_type], largest=largest)
            else:
                encoded = found.rows(first, len(rows))
            return _packed(matrix, encoded)

        plain, begun = matrix.parts, set()
        for first, block in self._read(matrix.name):
            for parts in self._in_parts(packed, first, block):
                for name, chunk in parts.items():
                    if (
                        plain[name].shape or name not in begun
                    ):  # a part of the whole matrix comes with all rows
                        self._waiting.setdefault(Source(matrix, name), []).append(chunk)
                        begun.add(name)
                yield from self._waiting.pop(wanted, ())
        if found is not None:
            found.written()

    def _largest(self, name: str) -> float:
        """The largest magnitude of a matrix as it is stored."""

        def largest(first: int, rows: Tensor) -> float:
            low, high = self._edits.smoothing.apply(name, rows, first).float().aminmax()
            return max(-float(low), float(high))

        blocks = self._checkpoint.row_blocks(self._checkpoint.name_of(name), *self._buffers)
        return max(max(self._in_parts(largest, first, block)) for first, block in blocks)

    def _in_parts(self, work: Callable[[int, Tensor], T], first: int, block: Tensor) -> Iterator[T]:
        """``work`` on the rows of a block, whose first is row ``first`` of its matrix, a few on each thread."""
        step = max(1, ENCODED_AT_ONCE // (block.shape[1] * ROWS_TOGETHER)) * ROWS_TOGETHER
        starts = range(0, len(block), step)
        jobs = [self._encoders.submit(work, first + start, block[start : start + step]) for start in starts]
        for job in jobs:
            yield job.result()
        _give_back_freed()

    def _read(self, canonical: str) -> Iterator[tuple[int, Tensor]]:
        """Row blocks of a tensor, hashed on another thread."""
        name, buffers = self._checkpoint.name_of(canonical), self._buffers
        digest, hashing = hashlib.sha256(), deque[Future[None]]()
        for first, block in self._checkpoint.row_blocks(name, *buffers):
            flat = block.reshape(-1)
            hashing.append(self._hasher.submit(digest.update, flat.view(torch.uint8).numpy().data))
            yield first, block
            if len(hashing) == len(buffers) - 1:
                hashing.popleft().result()  # its buffer is the next one to be filled
        for job in hashing:
            job.result()
        self._hashes[canonical] = digest.hexdigest()

    def source_sha256(self) -> str:
        """Of all tensors' contents, whatever their order and their shards."""
        digest = hashlib.sha256()
        for canonical in sorted(self._hashes):
            name = self._checkpoint.name_of(canonical)
            dtype, shape = self._checkpoint.dtype_of(name), list(self._checkpoint.tensors[name].shape)
            digest.update(f"{canonical} {dtype} {shape} {self._hashes[canonical]}\n".encode())
        return digest.hexdigest()


def _packed(matrix: Matrix, encoded: Encoded) -> Encoded:
    """Encoded rows as the matrix's arrangement packs them.

    Raises:
        ExportError: a scale that its type does not hold.
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
    """Let glibc keep what quantizing frees for what it takes next.

    By default it gives most of it back at once, and every page is faulted in again for the next few rows.
    Other C libraries have no such options, and none to set.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def _give_back_freed() -> None:
    """Now and then, since aligned blocks leave holes that nothing fits into: an int4 export of a 9B held 2.4 GB."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """A cast is bound by memory; the other cores hash."""
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
