"""Compile-time shapes, block sizes and the grid of the attention kernel.

Needs no Triton, torch or TensorRT. All three ways to launch the kernel use this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

PHASES = {"shared": 0, "prefill": 1, "decode": 2, "extend": 3, "prompt": 4}
"""Which branches a kernel has: ``shared`` all three, ``prefill`` extend and prompt, the others the one of that name.

``shared`` and ``prefill`` are right for every S, and so are the last two, more slowly; ``decode`` takes few tokens.
"""

# The inputs and outputs of a plugin in order, each with the kind of its elements.
PLUGIN_INPUTS = {
    "query": "activation", "key": "activation", "value": "activation", "past_key": "cache", "past_value": "cache",
    "cos": "activation", "sin": "activation", "past_lengths": "int32", "query_lengths": "int32",
    "counters": "int32",
}  # fmt: skip
PLUGIN_SCALES = {"key_scale": "float32", "value_scale": "float32"}
"""Only with an int8 or fp8 cache, behind the other inputs: [kv_num_heads, head_dim]."""
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
    "scale": str,  # as decimal text: TensorRT's plugins have only doubles, ONNX's attributes only floats
    "max_batch": int,  # the largest of any profile
    "compute_capability": int,  # 90 is 9.0
    "processors": int,  # streaming multiprocessors of the GPU
    "tiles": int,  # which of choices(); 0 is the first, -1 the last
    "phase": int,  # a value of PHASES
}

QUANTIZED = {"int8": ("i8", 80), "fp8": ("fp8e4nv", 89)}
"""Types of a quantized cache: Triton's name, and the oldest compute capability that converts them."""

HEAD_DIMS = (64, 128)
MAX_GROUP = 32
MIN_DOT = 16  # the smallest edge of a tensor-core product
EXTEND_TOKENS = 256  # up to this many new tokens per sequence, all blocks share the earlier keys
LEVELS = 2  # levels of joining the pieces of a head
JOIN_REGISTERS = 64  # registers of a thread for pieces that are loaded at once


@dataclass(frozen=True)
class KernelShape:
    """The compile-time facts of a kernel: the attention's shape, and the largest batch.

    ``dtype`` is the type of activations (``fp16`` or ``bf16``). The cache has this type, or a quantized type of
    QUANTIZED.
    """

    num_heads: int
    kv_num_heads: int
    head_dim: int
    scale: float
    max_batch: int
    dtype: str = "fp16"
    quantized_cache: bool = False
    phase: str = "shared"
    quantized_dtype: str = "int8"

    def __post_init__(self) -> None:
        if self.quantized_dtype not in QUANTIZED:
            raise ValueError(f"unknown cache type {self.quantized_dtype!r}; there are {', '.join(QUANTIZED)}")
        if self.phase not in PHASES:
            raise ValueError(f"unknown phase {self.phase!r}; there are {', '.join(PHASES)}")

    @property
    def group(self) -> int:
        return self.num_heads // self.kv_num_heads

    @property
    def rows(self) -> int:
        """Rows (token, head of the group) in a block of the decode branch."""
        return max(MIN_DOT, power_of_two(self.group))

    @property
    def decode_tokens(self) -> int:
        """The largest sequence length for the decode branch."""
        return self.rows // self.group


@dataclass(frozen=True)
class Tiles:
    """One choice of block sizes. Every choice is correct for every shape."""

    block_m: int
    block_n: int
    stages: int
    extend_n: int
    extend_stages: int
    decode_n: int
    decode_stages: int
    warps: int
    blocks: int = 0
    min_tiles: int = 1


# Number of streaming multiprocessors by compute capability, for exports without the GPU: the number of the largest product.
_PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}

# Block sizes that compile without spills and fit the shared memory of a block. A block has 163 KiB on 8.0, 227 KiB on 9.0
# and 10.0, and 99 KiB on 8.6, 8.9 and 12.0. Only 9.0 and 10.0 multiply from shared memory. The others keep operands in registers, so
# their blocks are narrower. The last choice of each list needs less than 48 KiB, which every launch may use.
_WIDE = Tiles(128, 128, 2, 64, 4, 64, 5, 8)
_TALL = Tiles(128, 64, 3, 64, 3, 64, 5, 8)
_NARROW = Tiles(128, 32, 3, 16, 3, 64, 3, 8)
_SMALL = Tiles(64, 32, 2, 16, 2, 32, 3, 4)
_TALL_QUANTIZED = Tiles(128, 64, 3, 32, 4, 128, 4, 8)
_SQUARE = Tiles(64, 64, 2, 32, 3, 128, 3, 8)
_LEAST = Tiles(64, 16, 2, 16, 2, 32, 3, 8)
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
    90: (_TALL_QUANTIZED, _SQUARE, _LEAST),
    100: (_TALL_QUANTIZED, _SQUARE, _LEAST),
    120: (_SQUARE, _LEAST),
}
CAPABILITIES = tuple(_CHOICES)


def choices(
    capability: int, quantized_cache: bool = False, processors: int | None = None
) -> tuple[Tiles, ...]:
    """The choices of block sizes for a compute capability such as 90; the preferred one first.

    ``processors``: the GPU's number of streaming multiprocessors; default: the largest product's.

    Raises:
        ValueError: a capability without block sizes.
    """
    table = _QUANTIZED_CHOICES if quantized_cache else _CHOICES
    if capability not in table:
        known = ", ".join(map(str, CAPABILITIES))
        raise ValueError(f"compute capability {capability} has no block sizes; those with some are {known}")
    return tuple(replace(tiles, blocks=processors or _PROCESSORS[capability]) for tiles in table[capability])


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def unsupported(shape: KernelShape, rotary_embedding_dim: int, capability: int | None = None) -> str | None:
    """Why there is no kernel for ``shape`` (on a compute capability, if given); None if there is one."""
    oldest = QUANTIZED[shape.quantized_dtype][1]
    if shape.quantized_cache and capability is not None and capability < oldest:
        return (
            f"compute capability {capability} has no {shape.quantized_dtype} cache; {oldest} and newer have"
        )
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
        APPEND_N=power_of_two(-(-tiles.block_m // shape.group)),
        MIN_TILES=tiles.min_tiles,
        EXTEND_TOKENS=EXTEND_TOKENS,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.stages,
        EXTEND_N=tiles.extend_n,
        EXTEND_STAGES=tiles.extend_stages,
        DECODE_N=tiles.decode_n,
        DECODE_STAGES=tiles.decode_stages,
        AT_ONCE=joined_at_once(shape, tiles),
    )


def joined_at_once(shape: KernelShape, tiles: Tiles) -> int:
    """Number of pieces that the joining block loads before it waits."""
    registers = -(-shape.rows * shape.head_dim // (32 * tiles.warps))
    return max(JOIN_REGISTERS // registers, 1)


class Arithmetic(Protocol):
    """The operations of a grid besides +, - and *, for integers or for TensorRT's symbolic integers."""

    def cdiv(self, a: Any, b: Any) -> Any: ...
    def minimum(self, a: Any, b: Any) -> Any: ...
    def less(self, a: Any, b: Any) -> Any: ...


class IntegerMath:
    """:class:`Arithmetic` on plain integers."""

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def minimum(self, a: int, b: int) -> int:
        return min(a, b)

    def less(self, a: int, b: int) -> int:
        return int(a < b)


def grid(shape: KernelShape, tiles: Tiles, batch: Any, sequence: Any, capacity: Any, on: Arithmetic) -> Any:
    """Number of blocks to launch; depends only on batch, sequence and capacity.

    It cannot depend on the lengths of the sequences; the decode branch shares their keys among all blocks.
    """
    heads = batch * shape.kv_num_heads
    rows = on.cdiv(sequence * shape.group, tiles.block_m)
    new = on.cdiv(sequence, tiles.extend_n)
    of_branch = {
        "decode": on.minimum((on.cdiv(capacity, tiles.decode_n) + 1) * heads, tiles.blocks),
        "extend": on.minimum((on.cdiv(capacity, tiles.extend_n) + new) * rows * heads, tiles.blocks),
        "prompt": rows * heads,
    }
    if shape.phase in of_branch:
        return of_branch[shape.phase]
    extending = on.less(sequence, EXTEND_TOKENS + 1)
    prefill = extending * of_branch["extend"] + (extending * -1 + 1) * of_branch["prompt"]
    if shape.phase == "prefill":
        return prefill
    decoding = on.less(sequence, shape.decode_tokens + 1)
    return decoding * of_branch["decode"] + (decoding * -1 + 1) * prefill


def partials_shape(shape: KernelShape, tiles: Tiles) -> tuple[int]:
    """Scratch memory of the branches that share keys, float32: two pieces per block, with a weight per row."""
    rows = {"decode": shape.rows, "prompt": 0}.get(shape.phase, max(shape.rows, tiles.block_m))
    return (max(2 * tiles.blocks * rows * (shape.head_dim + 1), 1),)


def counters_shape(tiles: Tiles) -> tuple[int]:
    """Shape of the counters, int32: one per piece and level of joining."""
    return (LEVELS * 2 * tiles.blocks,)


@dataclass(frozen=True)
class Share:
    """The work of the blocks of one launch, in tiles of keys.

    Attributes:
        phase: the branch that all blocks take.
        blocks: number of blocks with work.
        rows: rows (token, head of the group) per block.
        keys: keys per tile.
        tiles: whole tiles of cached keys of a block that also has the new tokens.
        ragged: incomplete tiles of cached keys, 0 or 1.
        new_tiles, mean_new_tiles: tiles of new keys: maximum of a block, and mean of all blocks.
        pieces: maximum number of pieces of a block; a piece belongs to one head of one sequence.
        merges: number of partial results that the last block of a head joins, per level; empty if none.
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


def branch(shape: KernelShape, sequence: int) -> str:
    """The branch of a launch with ``sequence`` new tokens."""
    if shape.phase in ("decode", "extend", "prompt"):
        return shape.phase
    if shape.phase == "shared" and sequence <= shape.decode_tokens:
        return "decode"
    return "extend" if sequence <= EXTEND_TOKENS else "prompt"


def share(shape: KernelShape, tiles: Tiles, pasts: Sequence[int], sequence: int) -> Share:
    """The division of a launch on caches of ``pasts`` keys. The same arithmetic as in the kernel, for estimates and
    tests."""
    phase = branch(shape, sequence)
    if phase != "prompt":
        return _split_share(replace(shape, phase=phase), tiles, pasts, sequence)
    rows, keys, heads = tiles.block_m, tiles.block_n, len(pasts) * shape.kv_num_heads
    ends = [
        min((row + rows - 1) // shape.group + 1, sequence) for row in range(0, sequence * shape.group, rows)
    ]
    new_tiles = [-(-end // keys) for end in ends]
    mean = sum(new_tiles) / len(new_tiles)
    blocks = len(ends) * heads
    ragged = int(any(past % keys for past in pasts))
    return Share(phase, blocks, rows, keys, max(pasts) // keys, ragged, max(new_tiles), mean, 1, ())


def _split_share(shape: KernelShape, tiles: Tiles, pasts: Sequence[int], sequence: int) -> Share:
    decoding = shape.phase == "decode"
    rows, keys = (shape.rows, tiles.decode_n) if decoding else (tiles.block_m, tiles.extend_n)
    items, size = tiles_of_items(shape, tiles, pasts, sequence)
    spans = blocks_of_items(shape, tiles, pasts, sequence)
    blocks = spans[-1][1] + 1
    pieces = max(sum(first <= block <= last for first, last in spans) for block in range(blocks))
    merges = joins(max(last - first + 1 for first, last in spans))
    at_once = joined_at_once(shape, tiles) if decoding else 1
    new = 0 if decoding else -(-sequence // keys)
    cached = min(size, max(items)) - new
    return Share(
        shape.phase, blocks, rows, keys, max(cached, 0), 0, new, new, pieces,
        tuple(-(-pieces // at_once) * at_once for pieces in merges),
    )  # fmt: skip


def tiles_of_items(
    shape: KernelShape, tiles: Tiles, pasts: Sequence[int], sequence: int
) -> tuple[list[int], int]:
    """Tiles of each item, in order, and tiles per block; every sequence has ``sequence`` new tokens."""
    decoding = shape.phase == "decode"
    keys = tiles.decode_n if decoding else tiles.extend_n
    new = 0 if decoding else -(-sequence // keys)
    rows = 1 if decoding else -(-sequence * shape.group // tiles.block_m)
    items = [max(-(-past // keys) + new, 1) for past in pasts for _ in range(shape.kv_num_heads * rows)]
    return items, max(-(-sum(items) // tiles.blocks), tiles.min_tiles)


def blocks_of_items(
    shape: KernelShape, tiles: Tiles, pasts: Sequence[int], sequence: int
) -> list[tuple[int, int]]:
    """The first and the last block that work on each item."""
    items, size = tiles_of_items(shape, tiles, pasts, sequence)
    return [
        ((end - own) // size, (end - 1) // size) for end, own in zip(accumulate(items), items, strict=True)
    ]


def joins(pieces: int) -> tuple[int, ...]:
    """Number of pieces joined on each level."""
    if pieces == 1:
        return ()
    if pieces <= 16:
        return (pieces,)
    group = 8 if pieces <= 64 else 16 if pieces <= 256 else 32
    return (group, -(-pieces // group))
