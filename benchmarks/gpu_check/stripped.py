"""The plugin's PTX, stripped of what Triton adds, launched by the driver as TensorRT would launch it."""

import ctypes
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.correctness import LIMITS, Case, Inputs, exact
from benchmarks.gpu_check.driver import Driver, DriverError
from glm4_plugins.compile import CompiledKernel, compile_kernel
from glm4_plugins.launch import PLUGIN_INPUTS, PLUGIN_OUTPUTS, SIZES, IntegerMath, Tiles, grid
from glm4_plugins.torch_kernel import Workspace, kernel_shape, launch_attention

POINTER, INT32 = 8, 4  # bytes of a parameter
FREE_SHARED = 48 * 1024  # bytes that a launch may use without the attribute

# Two of the released models' heads; a prefill, a decode step, and uneven lengths.
CASES = (
    Case("float16", 32, 2, 128, (999, 3, 0), (501, 500, 1)),
    Case("bfloat16", 32, 2, 128, (8000, 1, 700), (1, 1, 1)),
    Case("float16", 48, 8, 128, (4001,), (1,)),
    Case("bfloat16", 48, 2, 128, (0,), (700,)),
)


def arguments(tensors: dict[str, Tensor], sizes: tuple[int, int, int]) -> list[Any]:
    """A kernel's arguments as TensorRT passes them: inputs, batch, sequence and capacity, outputs."""
    inputs = [ctypes.c_void_p(tensors[name].data_ptr()) for name in PLUGIN_INPUTS]
    outputs = [ctypes.c_void_p(tensors[name].data_ptr()) for name in PLUGIN_OUTPUTS]
    return [*inputs, *map(ctypes.c_int32, sizes), *outputs]


def expected_sizes() -> list[int]:
    """Bytes of each parameter that TensorRT passes."""
    return [POINTER] * len(PLUGIN_INPUTS) + [INT32] * len(SIZES) + [POINTER] * len(PLUGIN_OUTPUTS)


def launched(
    driver: Driver,
    kernel: CompiledKernel,
    tensors: dict[str, Tensor],
    blocks: int,
    stream: int,
    attribute: bool,
) -> dict[str, Any]:
    """Load, ask for the parameters, and launch; what the driver refuses is told in its words."""
    module, function = driver.load(kernel.ptx, kernel.name)
    try:
        found = driver.parameter_sizes(function)
        record: dict[str, Any] = dict(parameters=len(found), parameters_right=found == expected_sizes())
        query, past = tensors["query"], tensors["past_key"]
        given = arguments(tensors, (query.shape[0], query.shape[1], past.shape[2]))
        try:
            if attribute:
                driver.allow_shared(function, kernel.shared_memory)
            driver.launch(function, blocks, kernel.warps, kernel.shared_memory, stream, given)
        except DriverError as error:
            return record | dict(refused=str(error))
        return record | dict(refused=None)
    finally:
        driver.unload(module)


def plugin_tensors(inputs: Inputs, workspace: Workspace) -> dict[str, Tensor]:
    """Inputs and outputs by the plugin's names, caches and counters one buffer each for both."""
    copies = {name: inputs.tensors[name].clone() for name in ("past_key", "past_value")}
    return (
        inputs.tensors
        | copies
        | dict(
            counters=workspace.counters,
            attn_output=torch.full_like(inputs.tensors["query"], torch.nan),
            present_key=copies["past_key"],
            present_value=copies["past_value"],
            present_counters=workspace.counters,
            partials=workspace.partials,
        )
    )


def check(
    case: Case,
    tiles: Tiles,
    capability: int,
    attribute: bool,
    driver: Driver,
    compiled: Callable[..., CompiledKernel] = compile_kernel,
) -> dict[str, Any]:
    """The stripped kernel against float64 and against Triton's own launch of the same source.

    Args:
        attribute: ask for shared memory before the launch, as TensorRT may or may not. Without it the driver must
            refuse what needs more than 48 KiB, and run the rest.
    """
    inputs = Inputs.random(case, "cuda")
    shape = kernel_shape(inputs.tensors["query"], inputs.tensors["past_key"], inputs.attributes)
    kernel = compiled(shape, tiles, capability)
    workspace = Workspace.make(shape, tiles, torch.device("cuda"))
    tensors = plugin_tensors(inputs, workspace)
    query, past = tensors["query"], tensors["past_key"]
    blocks = grid(shape, tiles, query.shape[0], query.shape[1], past.shape[2], IntegerMath())
    torch.cuda.synchronize()
    record = launched(driver, kernel, tensors, blocks, torch.cuda.current_stream().cuda_stream, attribute)
    torch.cuda.synchronize()
    needs = kernel.shared_memory > FREE_SHARED
    record |= asdict(case) | dict(shared_memory=kernel.shared_memory, attribute=attribute)
    if record["refused"] is not None:
        return record | dict(ok=record["parameters_right"] and needs and not attribute)
    found = tensors["attn_output"]
    error = max(
        float((found[b, :new] - exact(inputs, b)[0]).abs().max()) for b, new in enumerate(case.lengths) if new
    )
    twin = {name: inputs.tensors[name].clone() for name in ("past_key", "past_value")}
    out = torch.full_like(query, torch.nan)
    launch_attention(
        **(inputs.tensors | twin),
        attributes=inputs.attributes,
        tiles=tiles,
        workspace=Workspace.make(shape, tiles, torch.device("cuda")),
        out=out,
    )
    right = record["parameters_right"] and error <= LIMITS[case.dtype] and not workspace.counters.any()
    return record | dict(max_error=error, bits_of_triton=torch.equal(found, out), ok=bool(right))
