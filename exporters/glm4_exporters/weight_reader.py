"""Reads tensors of safetensors files, whole or in blocks of rows into reused buffers."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from glm4_runtime.bundle.safetensors_file import PAGE, SafetensorsFile, TensorHeader
from glm4_runtime.errors import CheckpointError

if TYPE_CHECKING:  # torch loads with the first weight, not with the headers
    from torch import Tensor

ROWS_TOGETHER = 64  # blocks have a multiple of this many rows if the buffer allows
COMPARED = 8 << 20  # bytes

T = TypeVar("T")

# Further types of quantized checkpoints, beside DTYPES: safetensors' name and torch's.
TYPES = {"F8_E4M3": "float8_e4m3fn", "I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64"}


class WeightReader:
    """Reads tensors of open safetensors files, in their stored types."""

    def __init__(self, files: Iterable[SafetensorsFile]) -> None:
        self._files = {file.path: file for file in files}

    def read(self, header: TensorHeader) -> "Tensor":
        """Read a whole tensor of floats into new memory.

        Raises:
            CheckpointError: the file has changed, or a value is NaN or infinite.
        """
        tensor = self.read_stored(header)
        require_finite_rows(header, tensor, 0)
        return tensor

    def read_stored(self, header: TensorHeader) -> "Tensor":
        """Read a whole tensor of any type into new memory. Values are not checked."""
        import torch

        tensor = torch.empty(header.shape, dtype=getattr(torch, TYPES.get(header.dtype, header.dtype)))
        flat = tensor.reshape(-1).view(torch.uint8)
        self._files[header.file].read_into(flat.numpy().data, header.offset)
        return tensor

    def row_blocks(self, header: TensorHeader, *buffers: "Tensor") -> Iterator[tuple[int, "Tensor"]]:
        """Read a tensor of floats in blocks of rows, see :meth:`glm4_exporters.checkpoint.Checkpoint.row_blocks`."""
        import torch

        dtype: torch.dtype = getattr(torch, header.dtype)
        rows = header.shape[0]
        row_bytes = header.nbytes // rows
        step = _rows_of_a_block(header.name, row_bytes, buffers[0].numel())
        starts = zip(range(0, rows, step), itertools.cycle(buffers), strict=False)

        def read(first: int, buffer: "Tensor") -> tuple[int, "Tensor"]:
            count = min(step, rows - first)
            flat = self._read_through(header, buffer, first * row_bytes, count * row_bytes)
            return first, flat.view(dtype).view(count, *header.shape[1:])

        ahead = len(buffers) > 1 and step < rows
        for first, block in _one_ahead(read, starts) if ahead else itertools.starmap(read, starts):
            require_finite_rows(header, block, first)
            yield first, block

    def equal(self, one: TensorHeader, other: TensorHeader) -> bool:
        """Whether two tensors of one size have equal bytes."""
        for at in range(0, one.nbytes, COMPARED):
            size = min(COMPARED, one.nbytes - at)
            both = bytearray(size), bytearray(size)
            for header, data in zip((one, other), both, strict=True):
                self._files[header.file].read_into(memoryview(data), header.offset + at)
            if both[0] != both[1]:
                return False
        return True

    def _read_through(self, header: TensorHeader, buffer: "Tensor", at: int, count: int) -> "Tensor":
        """Read ``count`` bytes of a tensor from offset ``at``, in whole pages if alignment allows.

        Returns:
            A view into ``buffer``, uint8 [count].
        """
        file, offset = self._files[header.file], header.offset + at
        shift = offset % PAGE
        fits = buffer.data_ptr() % PAGE == 0 and shift % 8 == 0 and shift + count + PAGE <= buffer.numel()
        if not (fits and file.read_pages_into(buffer.numpy().data, offset - shift, shift + count)):
            shift = 0
            file.read_into(buffer[:count].numpy().data, offset)
        return buffer[shift : shift + count]


def _rows_of_a_block(name: str, row_bytes: int, room: int) -> int:
    """Number of rows that fit into a buffer of ``room`` bytes."""
    # Reads of whole pages may need one more page at each end. A large buffer keeps room for both.
    rows = (room - 2 * PAGE if room >= 64 * PAGE else room) // row_bytes
    if rows == 0:
        raise CheckpointError(f"a row of {name} takes {row_bytes} bytes, the buffer has {room}")
    return rows - (rows % ROWS_TOGETHER if rows > ROWS_TOGETHER else 0)


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


def require_finite_rows(header: TensorHeader, block: "Tensor", first_row: int) -> None:
    """Refuse NaN and infinity in a block of floats [rows, ...]. Minimum and maximum reveal both, and run at memory
    speed."""
    low, high = (float(value) for value in block.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return
    index = (~block.isfinite()).nonzero()[0].tolist()
    value = float(block[tuple(index)])
    index[0] += first_row
    raise CheckpointError(
        f"{header.file}: {header.name}{index} is {value}; the checkpoint is damaged, or training diverged"
    )
