"""A model of one processor (SM) of a GPU that walks once through the attention kernel's machine code.

An instruction issues when its operands are ready, all warps of the block in step. Results come after the latencies
below. Loops run as often as :class:`glm4_plugins.launch.Share` says. The walk knows no contention in the second-level
cache, and no warp that runs ahead of the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.sass import Instruction, loops
from glm4_plugins.launch import Share


@dataclass(frozen=True)
class Gpu:
    """A device: rates per second, as measured; sizes in bytes.

    Attributes:
        copy: bytes of a device copy, read and written ones counted.
        products: operations of a large bfloat16 product.
        first_parameter: where the constant bank holds a kernel's first parameter.
    """

    name: str
    capability: int
    processors: int
    clock: float
    copy: float
    products: float
    registers: int
    shared_memory: int
    first_parameter: int


GPUS = {
    "H100": Gpu("H100", 90, 132, 1.755e9, 3.0e12, 790e12, 65536, 227 * 1024, 0x210),
    "H200": Gpu("H200", 90, 132, 1.755e9, 4.3e12, 790e12, 65536, 227 * 1024, 0x210),
}

# Two values that no source gives. With them the first kernel that was estimated takes the times that an audit of
# it had worked out by hand: 80, 96 and 28 % of the copy's rate at 8 x 8192, 8 x 32768 and 1 x 8192.
MEMORY_READ = 1.03  # rate of reading alone, to that of the copy
BARRIER = 22  # cycles

# Cycles from issue to first use, from published microbenchmarks of Hopper.
SECOND_LEVEL, MEMORY = 263, 479
LATENCIES = {
    "LDS": 29, "LDSM": 33, "SHFL": 24, "REDUX": 24, "MUFU": 18, "I2F": 14, "F2I": 14, "S2R": 20, "S2UR": 20,
    "R2UR": 12, "LDC": 38, "ULDC": 12, "ATOMG": SECOND_LEVEL, "HMMA": 33, "HGMMA": 33,
}  # fmt: skip
ARITHMETIC = 5
FENCE = SECOND_LEVEL  # until the second-level cache has every earlier store
SCHEDULERS = 4  # each issues one instruction of one warp a cycle
WARP = 32
SHARED_PORT = 128  # bytes per cycle of shared memory
PORT = 64  # bytes per cycle from the second-level cache to one processor
MMA_SYNC = 0.62  # of the products' rate, where warps multiply from registers on compute capability 9.0
CACHE = frozenset(("past_key", "past_value"))
NEW = frozenset(("key", "value"))


@dataclass(frozen=True)
class Work:
    """What one block does: how often loops run, and how many bytes all blocks together read of the cache."""

    share: Share
    cache_bytes: int
    tile_bytes: int
    piece_bytes: int


@dataclass
class Walk:
    """The time of one block, in cycles. ``parameters`` names the kernel's arguments by their offsets."""

    gpu: Gpu
    parameters: Mapping[int, str]
    warps: int
    work: Work
    code: Sequence[Instruction]
    now: float = 0.0
    tile_cycles: float = 0.0  # of one run of the loop over cached keys, if its data is there
    _first_copy: float | None = None
    _port: float = 0.0
    _tensor: float = 0.0
    _pieces_left: int | None = None
    _ready: dict[str, float] = field(default_factory=dict)
    _tags: dict[str, frozenset[str]] = field(default_factory=dict)  # parameters that a register came from

    def __post_init__(self) -> None:
        self._loops = loops(self.code)
        self._walk(0, len(self.code))
        self.now = max(self.now, self._tensor)

    def _walk(self, start: int, stop: int) -> None:
        i = start
        while i < stop:
            end = self._loops.get(i, stop)
            if end < stop:
                self._loop(i, end)
                i = end + 1
            else:
                self._issue(self.code[i])
                i += 1

    def _loop(self, start: int, end: int) -> None:
        runs, streams = self._runs(start, end)
        if runs:
            self._run_once(start, end)
        if runs > 1 or streams:
            begun = self.now
            self._run_once(start, end)
            cycles = self.now - begun  # in step by now: every other run takes as long
            self.now = begun + (runs - 1) * cycles
            if streams:
                self.tile_cycles = cycles
                self.now = max(self.now, self._arrival() + cycles)

    def _run_once(self, start: int, end: int) -> None:
        mine = self._loops.pop(start)
        self._walk(start, end + 1)
        self._loops[start] = mine

    def _runs(self, start: int, end: int) -> tuple[float, bool]:
        """How often a loop runs, and whether it is the one over the cache's tiles."""
        share = self.work.share
        copied, loaded = self._moved(start, end)
        multiplies = any(i.name in ("HMMA", "HGMMA") for i in self.code[start : end + 1])
        joins = "partials" in loaded and not multiplies
        if any(start < other <= end for other in self._loops):
            return (len(share.merges) if joins else 1), False
        if joins:
            return self._merge_runs(start, end), False
        if copied & CACHE:
            return share.tiles, bool(share.tiles)
        if copied & NEW:
            return share.new_tiles, False
        return (share.ragged if loaded & CACHE else 1), False

    def _moved(self, start: int, end: int) -> tuple[frozenset[str], frozenset[str]]:
        """The parameters from which a loop copies to shared memory, and from which it loads."""
        before = dict(self._tags)
        copied, loaded = frozenset[str](), frozenset[str]()
        for instruction in self.code[start : end + 1]:
            tags = self._tagged(instruction)
            if instruction.name in ("LDGSTS", "UTMALDG"):
                copied |= tags
            elif instruction.name == "LDG":
                loaded |= tags
        self._tags = before
        return copied, loaded

    def _merge_runs(self, start: int, end: int) -> int:
        """A loop that joins pieces takes several at once; a second one may take those that are left."""
        wide = sum(i.bytes for i in self.code[start : end + 1] if i.name == "LDG" and i.bytes == 16)
        at_once = max(round(wide * WARP * self.warps / self.work.piece_bytes), 1)
        pieces = self._pieces_left
        if pieces is None or at_once > 1:
            pieces = max(self.work.share.merges, default=0)
        self._pieces_left = pieces % at_once
        return pieces // at_once

    def _tagged(self, instruction: Instruction) -> frozenset[str]:
        """The parameters that the operands were computed from; noted for the registers written.

        A walk in program order passes code that a jump leads around, so a register may seem to come from more.
        """
        tags = frozenset(self.parameters[at] for at in instruction.constants if at in self.parameters)
        tags = tags.union(*(self._tags.get(register, frozenset()) for register in instruction.reads))
        loads = instruction.name in ("LDG", "LDS", "LDSM", "ATOMG")
        for register in instruction.writes:
            self._tags[register] = frozenset() if loads else tags
        return tags

    def _arrival(self) -> float:
        """When the last byte of the cache is here: by the memory's rate, or by the port of this processor."""
        share, per_cycle = self.work.share, self.gpu.copy * MEMORY_READ / self.gpu.clock
        mine = (share.tiles + share.ragged) * self.work.tile_bytes
        assert self._first_copy is not None
        return self._first_copy + MEMORY + max(self.work.cache_bytes / per_cycle, mine / PORT)

    def _issue(self, instruction: Instruction) -> None:
        tags = self._tagged(instruction)
        operands = max((self._ready.get(register, 0.0) for register in instruction.reads), default=0.0)
        self.now = max(self.now + self.warps / SCHEDULERS, operands)
        name, moved = instruction.name, instruction.bytes * WARP * self.warps
        done = self.now + LATENCIES.get(name, ARITHMETIC)
        if name in ("LDS", "LDSM", "STS", "STSM"):
            self._port = max(self._port, self.now) + moved / SHARED_PORT
            done = self._port + LATENCIES["LDS"]
        elif name in ("LDG", "LDGSTS", "UTMALDG") and tags & CACHE and "partials" not in tags:
            self._first_copy = self.now if self._first_copy is None else self._first_copy
            done = self.now + MEMORY if self.work.share.tiles else max(self.now + MEMORY, self._arrival())
        elif name in ("LDG", "LDGSTS"):
            self._port = max(self._port, self.now) + moved / PORT
            done = self._port + SECOND_LEVEL
        elif name in ("HMMA", "HGMMA"):
            self._tensor = max(self._tensor, self.now) + self._product_cycles(instruction)
            done = self._tensor + LATENCIES[name]
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            self.now = max(self.now, self._tensor)
        elif name == "BAR":
            self.now += BARRIER
        elif instruction.opcode.startswith("MEMBAR") and instruction.opcode.endswith("GPU"):
            self.now += FENCE
        for register in instruction.writes:
            self._ready[register] = done

    def _product_cycles(self, instruction: Instruction) -> float:
        """Of all warps: each multiplies 16 x 8 x 16 by HMMA; four together, say, 64 x 128 x 16 by HGMMA."""
        per_cycle = self.gpu.products / self.gpu.processors / self.gpu.clock
        if instruction.name == "HMMA":
            return 2 * 16 * 8 * 16 * self.warps / (per_cycle * MMA_SYNC)
        edges = [int(edge) for edge in instruction.opcode.split(".")[1].split("x")]
        return 2 * math.prod(edges) * (self.warps // 4) / per_cycle
