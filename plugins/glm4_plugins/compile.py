"""Compiles the kernel without a GPU: to PTX that TensorRT can launch, with its registers and memory."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4_plugins.launch import (
    PLUGIN_INPUTS,
    PLUGIN_OUTPUTS,
    PLUGIN_SCALES,
    QUANTIZED,
    SIZES,
    KernelShape,
    Tiles,
    constants,
)

# PTX ISA version. The driver that loads the engine assembles the PTX, so it must know this version. 8.7 belongs to
# CUDA 12.8; TensorRT 11 needs a driver of CUDA 13.
PTX_VERSION = 87


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for TensorRT, with the assembler's figures (bytes and registers per thread)."""

    name: str
    ptx: str
    parameters: int
    warps: int
    shared_memory: int
    registers: int
    spilled: int


def signature(shape: KernelShape) -> dict[str, str]:
    """Triton's type of each argument, in order; ``constexpr`` for arguments that a variant does not have."""
    cache = QUANTIZED[shape.quantized_dtype][0] if shape.quantized_cache else shape.dtype
    types = {"activation": shape.dtype, "cache": cache}
    types |= {"int32": "i32", "float32": "fp32"}

    def pointers(tensors: dict[str, str]) -> dict[str, str]:
        return {name: "*" + types[kind] for name, kind in tensors.items()}

    scales = pointers(PLUGIN_SCALES) if shape.quantized_cache else dict.fromkeys(PLUGIN_SCALES, "constexpr")
    return pointers(PLUGIN_INPUTS) | scales | dict.fromkeys(SIZES, "i32") | pointers(PLUGIN_OUTPUTS)


def compile_kernel(shape: KernelShape, tiles: Tiles, capability: int) -> CompiledKernel:
    """Compile for a compute capability such as 90; no GPU and no driver needed.

    Raises:
        RuntimeError: the kernel uses scratch memory of Triton's own, which TensorRT would not pass.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from glm4_plugins.kernels import partial_rope_gqa_attention

    types = signature(shape)
    compiled_in: dict[str, Any] = dict(constants(shape, tiles))
    compiled_in |= {name: None for name, kind in types.items() if kind == "constexpr"}
    names = [*types, *(name for name in compiled_in if name not in types)]
    # Buffers of TensorRT and torch are aligned to 256 bytes. With an alignment of 16, Triton loads 16 bytes at a
    # time.
    source = ASTSource(
        fn=partial_rope_gqa_attention,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in compiled_in.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "")[:1] == "*"
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.warps, "ptx_version": PTX_VERSION, "enable_fp_fusion": True},
    )
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError("the kernel uses Triton's scratch memory, which TensorRT does not pass")
    parameters = sum(kind != "constexpr" for kind in types.values())
    ptx = without_hidden_parameters(without_debug_information(compiled.asm["ptx"]), parameters)
    registers, spilled = assembled(ptx, capability)
    return CompiledKernel(
        metadata.name, ptx, parameters, metadata.num_warps, metadata.shared, registers, spilled
    )


def without_debug_information(ptx: str) -> str:
    """Remove line numbers and comments, which contain paths of this machine, so that the engine does not contain
    them."""
    ptx = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{[^}]*\}", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\s*(\.(loc|file)\b.*|\$L__tmp\d+:)$", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"[ \t]*//.*$", "", ptx, flags=re.MULTILINE)
    return re.sub(r"\n\s*\n", "\n", ptx)


def without_hidden_parameters(ptx: str, parameters: int) -> str:
    """Remove the parameters that Triton adds after the ``parameters`` of the source: pointers to its scratch memory.

    Raises:
        RuntimeError: one of them is read, or their number is not two.
    """
    entry = re.search(r"\.entry\s+\w+\(([^)]*)\)", ptx)
    declared = [line.strip() for line in entry[1].split(",")] if entry else []
    hidden = declared[parameters:]
    if entry is None or len(hidden) != 2:
        raise RuntimeError(
            f"Triton declared {len(declared)} parameters; {parameters} and its own two were expected"
        )
    for parameter in hidden:
        name = parameter.split()[-1]
        if len(re.findall(rf"\b{re.escape(name)}\b", ptx)) != 1:
            raise RuntimeError(f"the kernel reads {name}, a hidden parameter that TensorRT does not pass")
    kept = ",\n\t".join(declared[:parameters])
    return f"{ptx[: entry.start(1)]}\n\t{kept}\n{ptx[entry.end(1) :]}"


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes per thread, from Triton's assembler.

    Raises:
        RuntimeError: the assembler refuses the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = _assemble(ptx, capability, Path(folder, "kernel.cubin"))
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert registers is not None
    return int(registers[1]), sum(map(int, spills))


def disassembled(ptx: str, capability: int) -> str:
    """The machine code (SASS) of a kernel as text, from Triton's tools.

    Raises:
        RuntimeError: the assembler refuses the program.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        _assemble(ptx, capability, cubin)
        tool = knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def _assemble(ptx: str, capability: int, cubin: Path) -> str:
    """Write ``cubin``; returns the assembler's messages."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    source = cubin.with_suffix(".ptx")
    source.write_text(ptx)
    architecture = sm_arch_from_capability(capability)
    run = subprocess.run(
        [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", source, "-o", cubin],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"ptxas refuses the kernel: {run.stderr.strip().splitlines()[0]}")
    return run.stderr
