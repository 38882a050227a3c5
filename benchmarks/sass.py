"""The machine code of a compiled kernel: instructions, registers and loops, as ``nvdisasm`` prints them."""

import re
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*$")
_LABEL = re.compile(r"^(\.L_\w+):")
_REGISTER = re.compile(r"\b(U?R\d+)\b")
_CONSTANT = re.compile(r"c\[0x0\]\[(?:\w+\+)?0x([0-9a-f]+)\]")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
# Opcodes that write no register.
_SILENT = (
    "ST",
    "BRA",
    "BAR",
    "EXIT",
    "MEMBAR",
    "LDGSTS",
    "LDGDEPBAR",
    "DEPBAR",
    "RED.",
    "NOP",
    "CCTL",
    "WARP",
)
_WIDTHS = {"128": 4, "64": 2, "WIDE": 2}  # registers, by a part of the opcode


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: the predicate that it runs under, or None.
        writes, reads: names of general and uniform registers, as ``R4`` and ``UR4``.
        constants: byte offsets in the bank that holds a kernel's parameters.
        target: label of the instruction that it jumps to, or None.
        label: label in front of it, or None.
    """

    opcode: str
    guard: str | None
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    constants: tuple[int, ...]
    target: str | None
    label: str | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes that a load, a store or a copy moves per thread."""
        return 4 * _width(self.opcode)


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a listing with one kernel, in the order of their addresses."""
    found: list[Instruction] = []
    label = None
    for line in sass.splitlines():
        if mark := _LABEL.match(line):
            label = mark[1]
        elif parts := _LINE.match(line):
            found.append(_instruction(parts[2], parts[1], parts[3], label))
            label = None
    return found


def _width(opcode: str) -> int:
    parts = opcode.split(".")
    if parts[0] == "LDSM":
        return int(parts[-1]) if parts[-1].isdigit() else 1
    if parts[0] == "CS2R":
        return 2
    return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 1)


def _instruction(opcode: str, guard: str | None, operands: str, label: str | None) -> Instruction:
    names = [_REGISTER.findall(operand) for operand in operands.split(",")]
    silent = opcode.startswith(_SILENT)
    first = 0 if silent else next((i for i, found in enumerate(names) if found), 0)
    written = [] if silent else names[first]
    read = [register for operand in names[0 if silent else first + 1 :] for register in operand]
    writes = [name for register in written for name in _run(register, _width(opcode))]
    if opcode.startswith("HMMA"):
        writes = [name for register in written for name in _run(register, 4)]
        read = [name for register, n in zip(read, (4, 2, 4), strict=False) for name in _run(register, n)]
    target = _TARGET.search(operands) if opcode.startswith("BRA") else None
    constants = tuple(int(offset, 16) for offset in _CONSTANT.findall(operands))
    return Instruction(
        opcode, guard, tuple(writes), tuple(read), constants, target[1] if target else None, label
    )


def _run(register: str, count: int) -> list[str]:
    kind, number = register.rstrip("0123456789"), int(register.lstrip("UR"))
    return [f"{kind}{number + i}" for i in range(count)]


def loops(code: list[Instruction]) -> dict[int, int]:
    """Loops by jumps backward: index of the first instruction, and of the last jump to it.

    A jump to itself, with which a listing ends, is none.
    """
    places = {instruction.label: i for i, instruction in enumerate(code) if instruction.label}
    found: dict[int, int] = {}
    for i, instruction in enumerate(code):
        start = places.get(instruction.target) if instruction.target else None
        if start is not None and start < i:
            found[start] = max(i, found.get(start, 0))
    return found
