"""Checkpoint tensors into the bundle's one data file: read in row blocks, cast or quantized, hashed, written.

The file is the concatenation of the graph's weights in the graph's order, each at a multiple of 4096
bytes, so that a runtime can map it; a quantized matrix is its integers, then its scales. Memory is a fixed
set of buffers, whatever the model's size. The calling thread casts a block while others read the next, hash
the source, hash the file and write it; integers and fp8 numbers are made by as many threads as there are cores.
A matrix in fp8 is read twice, first for its largest magnitude.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir
import torch
from torch import Tensor

from glm4_exporters.checkpoint import ROWS_TOGETHER, Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.passes.builder import fixed
from glm4_exporters.passes.fp8_products import SCALE_SUFFIX, fp8_scale, fp8_values
from glm4_exporters.passes.quantize_weights import SCALES, Source
from glm4_exporters.quantize import blocks
from glm4_exporters.quantize.gptq import Rounded
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.reference import rotary_tables
from glm4_exporters.trace import ROTARY_COS, ROTARY_SIN
from glm4_runtime.bundle import FileEntry
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

ALIGNMENT = 4096
READ_BLOCK = 32 << 20
READ_BUFFERS = 4  # one is read into, one is cast, two wait for their hash
WRITE_BLOCK = 32 << 20
WRITE_BUFFERS = 4
TABLE_ROWS = 1 << 16
M_TRIM_THRESHOLD, KEPT = -1, 64 << 20  # glibc's malloc.h; bytes
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 2 << 20
QUANTIZED_AT_ONCE = 1 << 18  # numbers that one thread works on, in float32: a core's own cache holds them

T = TypeVar("T")

TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one of the graph's weights lies in the data file, in bytes."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    source: Source | None = None  # what it is made from, where it is part of a quantized matrix


@dataclass(frozen=True)
class Edits:
    """What is done to tensors before they are stored.

    Attributes:
        smoothing: multipliers per row and column.
        rounded: matrices whose numbers are found already, by name.
    """

    smoothing: Smoothing = field(default_factory=Smoothing)
    rounded: Mapping[str, Rounded] = field(default_factory=dict)


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
        source = value.meta.get("source")
        offset = places.setdefault(source or name, end)
        tensors.append(StoredTensor(name, value.dtype, shape, offset, nbytes, source))
        end = max(end, offset + -(-nbytes // ALIGNMENT) * ALIGNMENT)
    return tensors


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
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    with _one_torch_thread(), _AlignedFile(path) as file, _Writer(checkpoint, edits, file, dtypes) as writer:
        for tensor in tensors:
            if tensor.offset < file.position:
                continue  # another reader of what lies there already
            writer.write(tensor)
            file.pad()
            progress("write weights", tensor.offset + tensor.nbytes, total)
    progress("write weights", total, total)
    return WrittenWeights(FileEntry(file.sha256(), total), writer.source_sha256())


class _Writer:
    """Appends one tensor of a layout after the other."""

    def __init__(
        self, checkpoint: Checkpoint, edits: Edits, file: "_AlignedFile", dtypes: Mapping[str, ir.DataType]
    ) -> None:
        self._checkpoint, self._edits, self._file, self._dtypes = checkpoint, edits, file, dtypes
        self._buffers = [
            torch.frombuffer(mmap.mmap(-1, READ_BLOCK), dtype=torch.uint8) for _ in range(READ_BUFFERS)
        ]
        self._hasher = ThreadPoolExecutor(1, "hash source")
        self._quantizers = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "quantize")
        self._hashes: dict[str, str] = {}
        self._scales: list[Tensor] = []  # of the matrix whose integers were written last
        self._fp8_scales: dict[str, Tensor] = {}  # by their own name, until they are written

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for threads in (self._hasher, self._quantizers):
            threads.shutdown(wait=True, cancel_futures=True)

    def write(self, tensor: StoredTensor) -> None:
        if tensor.source is not None and tensor.source.part == SCALES:
            for scales in self._scales:
                self._file.append(scales.reshape(-1), scales.dtype)
            self._scales = []
        elif tensor.source is not None:
            self._write_codes(tensor.source, tensor)
        elif tensor.dtype == ir.DataType.FLOAT8E4M3FN:
            self._write_fp8(tensor.name)
        elif tensor.name in self._fp8_scales:
            self._file.append(self._fp8_scales.pop(tensor.name).reshape(1), TORCH_TYPES[tensor.dtype])
        elif tensor.name in (ROTARY_COS, ROTARY_SIN):
            for block in _table_blocks(self._checkpoint.config, tensor):
                self._file.append(block, TORCH_TYPES[tensor.dtype])
        else:
            name, dtype = self._checkpoint.name_of(tensor.name), TORCH_TYPES[tensor.dtype]
            for first, block in self._read(tensor.name):
                flat = self._edits.smoothing.apply(tensor.name, block, first).reshape(-1)
                _require_range(name, flat, dtype)
                self._file.append(flat, dtype)

    def _write_codes(self, source: Source, tensor: StoredTensor) -> None:
        """The integers of a matrix; its scales, which follow it in the file, are kept until then."""
        scheme, dtype = source.scheme, TORCH_TYPES[source.scale_type]
        layout = blocks.LAYOUTS[source.layout]
        found, limit = self._edits.rounded.get(source.tensor), torch.finfo(dtype).max

        def quantized(first: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            width = rows.shape[1]
            if found is None:
                wide = self._edits.smoothing.apply(source.tensor, rows, first).float()
                numbers, scales = blocks.quantize(wide, scheme, dtype)
            else:
                part = slice(first, first + len(rows))
                numbers, scales = found.numbers[part], found.scales[part].to(dtype)
            if not bool((scales.abs() <= limit).all()):
                raise ExportError(
                    f"a scale of tensor {source.tensor} is beyond {str(dtype)[6:]}'s {limit:g}; "
                    "export with --activations fp32"
                )
            # A product's operator reads whole blocks, the other two exactly the matrix.
            whole = numbers if len(tensor.shape) == 3 else numbers[:, :width]
            return layout.numbers(whole, scheme), layout.scales(scales)

        for first, block in self._read(source.tensor):
            for codes, scales in self._in_parts(quantized, first, block):
                self._scales.append(scales)
                self._file.append(codes.reshape(-1), torch.uint8)
        if found is not None:
            found.leave_to_files()

    def _write_fp8(self, name: str) -> None:
        """The numbers of a matrix; its one scale, which follows somewhere in the file, is kept until then."""
        scale_name = f"{name}{SCALE_SUFFIX}"
        scale_type = TORCH_TYPES[self._dtypes[scale_name]]

        def wide(first: int, rows: Tensor) -> Tensor:
            return self._edits.smoothing.apply(name, rows, first).float()

        def largest(first: int, rows: Tensor) -> float:
            low, high = wide(first, rows).aminmax()
            return max(-float(low), float(high))

        absmax = max(
            max(self._in_parts(largest, first, block))
            for first, block in self._checkpoint.row_blocks(self._checkpoint.name_of(name), *self._buffers)
        )
        stored = torch.tensor(fp8_scale(absmax)).to(scale_type)
        if not bool(stored.isfinite()):
            raise ExportError(
                f"tensor {name} holds {absmax:g}, whose fp8 scale is beyond {str(scale_type)[6:]}; "
                "export with --activations bf16"
            )
        self._fp8_scales[scale_name] = stored

        def numbers(first: int, rows: Tensor) -> Tensor:
            return fp8_values(wide(first, rows), float(stored)).view(torch.uint8)

        for first, block in self._read(name):
            for part in self._in_parts(numbers, first, block):
                self._file.append(part.reshape(-1), torch.uint8)

    def _in_parts(self, work: Callable[[int, Tensor], T], first: int, block: Tensor) -> Iterator[T]:
        """``work`` on the rows of a block, whose first is row ``first`` of its matrix, a few on each thread."""
        step = max(1, QUANTIZED_AT_ONCE // (block.shape[1] * ROWS_TOGETHER)) * ROWS_TOGETHER
        starts = range(0, len(block), step)
        jobs = [self._quantizers.submit(work, first + start, block[start : start + step]) for start in starts]
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
            header = self._checkpoint.tensors[self._checkpoint.name_of(canonical)]
            digest.update(
                f"{canonical} {header.dtype} {list(header.shape)} {self._hashes[canonical]}\n".encode()
            )
        return digest.hexdigest()


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


class _AlignedFile:
    """Appends to a file through page-aligned buffers that two threads hash and write.

    Written past the page cache where the file system allows it: a bundle is as large as the memory of the
    machine that makes it, and copying it through the cache costs a core.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._fd = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._fd = os.open(path, flags, 0o644)
        self._memory = [mmap.mmap(-1, WRITE_BLOCK) for _ in range(WRITE_BUFFERS)]
        self._views = [torch.frombuffer(m, dtype=torch.uint8) for m in self._memory]
        self._busy: list[list[Future[None]]] = [[] for _ in range(WRITE_BUFFERS)]
        self._current, self._fill, self._written = 0, 0, 0
        self._hash = hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("hash", "write")]

    def __enter__(self) -> "_AlignedFile":
        return self

    def append(self, flat: Tensor, dtype: torch.dtype) -> None:
        """Append the elements of a 1-D tensor, cast to ``dtype``."""
        done = 0
        while done < flat.numel():
            count = min(flat.numel() - done, (WRITE_BLOCK - self._fill) // dtype.itemsize)
            end = self._fill + count * dtype.itemsize
            self._views[self._current][self._fill : end].view(dtype).copy_(flat[done : done + count])
            done, self._fill = done + count, end
            if self._fill == WRITE_BLOCK:
                self._flush()

    def pad(self) -> None:
        """Fill with zeros to the next aligned offset."""
        end = -(-self._fill // ALIGNMENT) * ALIGNMENT
        self._views[self._current][self._fill : end].zero_()
        self._fill = end
        if self._fill == WRITE_BLOCK:
            self._flush()

    @property
    def position(self) -> int:
        """Bytes appended so far."""
        return self._written + self._fill

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _flush(self) -> None:
        chunk, at = memoryview(self._memory[self._current])[: self._fill], self._written
        jobs: list[Callable[[], None]] = [lambda: self._hash.update(chunk), lambda: self._write(chunk, at)]
        self._busy[self._current] = [
            thread.submit(job) for thread, job in zip(self._threads, jobs, strict=True)
        ]
        self._written += self._fill
        self._current, self._fill = (self._current + 1) % WRITE_BUFFERS, 0
        self._wait(self._current)

    def _wait(self, index: int) -> None:
        for job in self._busy[index]:
            job.result()
        self._busy[index] = []

    def _write(self, chunk: memoryview, at: int) -> None:
        while chunk:
            written = os.pwrite(self._fd, chunk, at)
            chunk, at = chunk[written:], at + written

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                for index in range(WRITE_BUFFERS):
                    self._wait(index)
                os.fsync(self._fd)
        finally:
            for thread in self._threads:
                thread.shutdown(wait=True, cancel_futures=True)
            os.close(self._fd)
