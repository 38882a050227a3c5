"""What a kernel is compiled for, which block sizes there are, and how large its grid is.

Nothing here needs Triton, torch or TensorRT; all three ways to launch the kernel go through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

PHASES = {"shared": 0, "prefill": 1, "decode": 2}
"""Which branches a kernel has. ``shared`` is right for every S; the others are for engines of one phase."""

# The kernel's tensors in order, each with the kind of its elements: what a plugin is given and what it gives.
PLUGIN_INPUTS = {
    "query": "activation", "key": "activation", "value": "activation", "past_key": "cache", "past_value": "cache",
    "cos": "activation", "sin": "activation", "past_lengths": "int32", "query_lengths": "int32",
    "counters": "int32",
}  # fmt: skip
PLUGIN_SCALES = {"key_scale": "float32", "value_scale": "float32"}
"""Only with an int8 cache, behind the other inputs: [kv_num_heads, head_dim]."""
SIZES = ("batch", "sequence", "capacity")
"""int32 arguments between inputs and outputs."""
PLUGIN_OUTPUTS = {
    "attn_output": "activation", "present_key": "cache", "present_value": "cache", "present_counters": "int32",
    "partials": "float32",
}  # fmt: skip
PLUGIN_ATTRIBUTES: dict[str, type] = {
    "num_heads": int,
    "kv_num_heads": int,
    "head_dim": int,
    "rotary_embedding_dim": int,
    "scale": str,  # decimal: TensorRT's plugins know doubles only, ONNX's attributes floats only
    "max_batch": int,  # the largest of any profile
    "compute_capability": int,  # 90 is 9.0
    "phase": int,  # a value of PHASES
}

HEAD_DIMS = (64, 128)
MAX_GROUP = 32
MIN_DOT = 16  # the smallest edge of a tensor-core product


@dataclass(frozen=True)
class KernelShape:
    """What stands fixed in a kernel: the attention's shape, and the largest batch.

    ``dtype`` is the activations' (``fp16`` or ``bf16``); the cache has it too, or int8.
    """

    num_heads: int
    kv_num_heads: int
    head_dim: int
    scale: float
    max_batch: int
    dtype: str = "fp16"
    quantized_cache: bool = False
    phase: str = "shared"

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"unknown phase {self.phase!r}; there are {', '.join(PHASES)}")

    @property
    def group(self) -> int:
        return self.num_heads // self.kv_num_heads

    @property
    def rows(self) -> int:
        """Rows (token, head of the group) that a block of the decode branch holds."""
        return max(MIN_DOT, power_of_two(self.group))

    @property
    def decode_tokens(self) -> int:
        """The largest sequence length that the decode branch takes."""
        return self.rows // self.group


@dataclass(frozen=True)
class Tiles:
    """Block sizes: one choice among those that are all right for every shape."""

    block_m: int
    block_n: int
    stages: int
    decode_n: int
    decode_stages: int
    warps: int
    decode_blocks: int = 0
    min_tiles: int = 4


# Streaming multiprocessors by compute capability; the decode branch shares its keys among so many blocks.
# Of a capability with several products it is the largest; any number is right, and these fill one wave.
_PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}

# What fits in registers without spilling, as compiled, and in the shared memory of a block: 163 KiB on 8.0,
# 227 on 9.0 and 10.0, 99 on 8.6, 8.9 and 12.0. Only 9.0 and 10.0 multiply from shared memory; the others
# hold their operands in registers, so their blocks are narrower. The last of each list stays below 48 KiB,
# which a launch may use without asking the driver for more.
_WIDE = Tiles(block_m=128, block_n=128, stages=2, decode_n=128, decode_stages=3, warps=8)
_TALL = Tiles(block_m=128, block_n=64, stages=3, decode_n=64, decode_stages=4, warps=8)
_NARROW = Tiles(block_m=128, block_n=32, stages=3, decode_n=64, decode_stages=3, warps=8)
_SQUARE = Tiles(block_m=64, block_n=64, stages=2, decode_n=64, decode_stages=3, warps=8)
_SMALL = Tiles(block_m=64, block_n=32, stages=2, decode_n=32, decode_stages=2, warps=4)
_LEAST = Tiles(block_m=64, block_n=16, stages=2, decode_n=32, decode_stages=2, warps=8)
_CHOICES: dict[int, tuple[Tiles, ...]] = {
    80: (_NARROW, _SMALL),
    86: (_NARROW, _SMALL),
    89: (_NARROW, _SMALL),
    90: (_WIDE, _TALL, _LEAST),
    100: (_TALL, _LEAST),
    120: (_NARROW, _SMALL),
}
_QUANTIZED_CHOICES: dict[int, tuple[Tiles, ...]] = {
    80: (_SQUARE, _LEAST),
    86: (_SQUARE, _LEAST),
    89: (_SQUARE, _LEAST),
    90: (_TALL, _SQUARE, _LEAST),
    100: (_TALL, _SQUARE, _LEAST),
    120: (_SQUARE, _LEAST),
}
CAPABILITIES = tuple(_CHOICES)


def choices(capability: int, quantized_cache: bool = False) -> tuple[Tiles, ...]:
    """The block sizes on offer for a compute capability such as 90, the one to try first in front.

    Raises:
        ValueError: a capability that has none.
    """
    table = _QUANTIZED_CHOICES if quantized_cache else _CHOICES
    if capability not in table:
        known = ", ".join(map(str, CAPABILITIES))
        raise ValueError(f"compute capability {capability} has no block sizes; those with some are {known}")
    return tuple(replace(tiles, decode_blocks=_PROCESSORS[capability]) for tiles in table[capability])


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def unsupported(shape: KernelShape, rotary_embedding_dim: int) -> str | None:
    """Why there is no kernel for ``shape``, in words, or None."""
    if shape.dtype not in ("fp16", "bf16"):
        return f"activations are {shape.dtype}; the kernel takes fp16 and bf16"
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim is {shape.head_dim}; the kernel takes {' and '.join(map(str, HEAD_DIMS))}"
    if 2 * rotary_embedding_dim != shape.head_dim:
        return f"rotary_embedding_dim is {rotary_embedding_dim}; the kernel turns half of head_dim {shape.head_dim}"
    if shape.num_heads % shape.kv_num_heads or shape.group > MAX_GROUP:
        return f"{shape.num_heads} heads to {shape.kv_num_heads}; the kernel takes 1 to {MAX_GROUP} to one"
    if shape.scale <= 0.0:
        return f"scale is {shape.scale}; the kernel takes positive ones"
    return None


def constants(shape: KernelShape, tiles: Tiles) -> dict[str, int | float]:
    """The kernel's compile-time arguments."""
    return dict(
        GROUP=shape.group,
        KV_HEADS=shape.kv_num_heads,
        HEAD_DIM=shape.head_dim,
        SCALE=shape.scale,
        MAX_BATCH=power_of_two(shape.max_batch),
        PHASE=PHASES[shape.phase],
        ROWS=shape.rows,
        NEW_N=MIN_DOT,
        APPEND_N=power_of_two(-(-tiles.block_m // shape.group)),
        MIN_TILES=tiles.min_tiles,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.stages,
        DECODE_N=tiles.decode_n,
        DECODE_STAGES=tiles.decode_stages,
    )


class Arithmetic(Protocol):
    """The operations that a grid needs beyond +, - and *, on integers or on TensorRT's symbolic ones."""

    def cdiv(self, a: Any, b: Any) -> Any: ...
    def minimum(self, a: Any, b: Any) -> Any: ...
    def less(self, a: Any, b: Any) -> Any: ...


class Integers:
    """:class:`Arithmetic` on plain integers."""

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def minimum(self, a: int, b: int) -> int:
        return min(a, b)

    def less(self, a: int, b: int) -> int:
        return int(a < b)


def grid(shape: KernelShape, tiles: Tiles, batch: Any, sequence: Any, capacity: Any, on: Arithmetic) -> Any:
    """How many blocks to launch: an expression of batch, sequence and capacity alone.

    It cannot know how long the sequences are; the decode branch shares their keys among whatever it gets.
    """
    heads = batch * shape.kv_num_heads
    prefill = on.cdiv(sequence * shape.group, tiles.block_m) * heads
    decode = on.minimum((on.cdiv(capacity, tiles.decode_n) + 1) * heads, tiles.decode_blocks)
    if shape.phase == "prefill":
        return prefill
    if shape.phase == "decode":
        return decode
    decoding = on.less(sequence, shape.decode_tokens + 1)
    return decoding * decode + (decoding * -1 + 1) * prefill


def partials_shape(shape: KernelShape, decode_blocks: int) -> tuple[int, int, int]:
    """The scratch of the decode branch, float32: two pieces a block; head_dim sums, a maximum and a total each."""
    return (2 * decode_blocks, shape.rows, shape.head_dim + 2)


@dataclass(frozen=True)
class Share:
    """What falls to the blocks of one launch, in tiles of keys.

    Attributes:
        phase: the branch that all blocks take.
        blocks: how many of them have work.
        rows: rows (token, head of the group) of a block.
        keys: keys of a tile.
        tiles: whole tiles of cached keys that a block walks over which also has the new tokens.
        ragged: tiles of cached keys that are not whole, 0 or 1.
        new_tiles, mean_new_tiles: tiles of new keys of the block with most of them, and of all blocks.
        pieces: the most pieces, each of one head of one sequence, that a block works on.
        merges: partial results that the last block of a head joins, a number for each level; empty if none.
    """

    phase: str
    blocks: int
    rows: int
    keys: int
    tiles: int
    ragged: int
    new_tiles: float
    mean_new_tiles: float
    pieces: int
    merges: tuple[int, ...]


def share(shape: KernelShape, tiles: Tiles, pasts: Sequence[int], sequence: int) -> Share:
    """How a launch on caches of ``pasts`` keys divides: the kernel's own arithmetic, for estimates and tests."""
    phase = shape.phase
    if phase == "shared":
        phase = "decode" if sequence <= shape.decode_tokens else "prefill"
    if phase == "decode":
        return _decode_share(shape, tiles, pasts)
    rows, keys, heads = tiles.block_m, tiles.block_n, len(pasts) * shape.kv_num_heads
    ends = [
        min((row + rows - 1) // shape.group + 1, sequence) for row in range(0, sequence * shape.group, rows)
    ]
    new_tiles = [-(-end // keys) for end in ends]
    mean = sum(new_tiles) / len(new_tiles)
    blocks = len(ends) * heads
    return Share(
        "prefill", blocks, rows, keys, max(pasts) // keys, _ragged(pasts, keys), max(new_tiles), mean, 1, ()
    )


def _decode_share(shape: KernelShape, tiles: Tiles, pasts: Sequence[int]) -> Share:
    ragged, whole = _ragged(pasts, tiles.decode_n), max(pasts) // tiles.decode_n
    _, size = _tiles_of_heads(shape, tiles, pasts)
    spans = blocks_of_heads(shape, tiles, pasts)
    blocks = spans[-1][1] + 1
    pieces = max(sum(first <= block <= last for first, last in spans) for block in range(blocks))
    merged = max(last - first + 1 for first, last in spans)
    most = max(min(size - 1 - ragged, whole), 0)
    merges = (merged,) if merged > 1 else ()
    return Share("decode", blocks, shape.rows, tiles.decode_n, most, ragged, 0, 0, pieces, merges)


def blocks_of_heads(shape: KernelShape, tiles: Tiles, pasts: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last block that work on each head of each sequence in the decode branch."""
    heads, size = _tiles_of_heads(shape, tiles, pasts)
    return [
        ((end - own) // size, (end - 1) // size) for end, own in zip(accumulate(heads), heads, strict=True)
    ]


def _tiles_of_heads(shape: KernelShape, tiles: Tiles, pasts: Sequence[int]) -> tuple[list[int], int]:
    """Tiles of each head, its new tokens' among them, and how many a block takes."""
    heads = [-(-past // tiles.decode_n) + 1 for past in pasts for _ in range(shape.kv_num_heads)]
    return heads, max(-(-sum(heads) // tiles.decode_blocks), tiles.min_tiles)


def _ragged(pasts: Sequence[int], keys: int) -> int:
    return int(any(past % keys for past in pasts))
