"""The kernel again and again: a thousand launches on uneven lengths, and two layers in one CUDA graph."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.correctness import Case, Inputs
from glm4_plugins.launch import Tiles
from glm4_plugins.torch_kernel import Workspace, kernel_shape, launch_attention

LAUNCHES, REPLAYS = 1000, 100
# Lengths that no block size divides: blocks take pieces of several sequences, and a last one joins them.
UNEVEN = (
    Case("bfloat16", 32, 2, 128, (8191, 1, 4097, 63, 2049, 0, 129, 6000), (1,) * 8),
    Case("bfloat16", 32, 2, 128, (777, 0, 30), (513, 67, 200)),
)
STEP = Case("bfloat16", 32, 2, 128, (4095, 17, 1000, 333), (1,) * 4)


def launches(case: Case, tiles: Tiles, count: int = LAUNCHES, device: str = "cuda") -> dict[str, Any]:
    """Launch ``count`` times on the same inputs over poisoned outputs: every bit is that of the first launch."""
    inputs = Inputs.random(case, device)
    shape = kernel_shape(inputs.tensors["query"], inputs.tensors["past_key"], inputs.attributes)
    workspace = Workspace.make(shape, tiles, torch.device(device))
    start = {name: inputs.tensors[name] for name in ("past_key", "past_value")}
    caches = {name: tensor.clone() for name, tensor in start.items()}
    out = torch.empty_like(inputs.tensors["query"])
    first: list[Tensor] = []
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(count):
        out.fill_(torch.nan)
        workspace.partials.fill_(torch.nan)
        for name, tensor in caches.items():
            tensor.copy_(start[name])
        launch_attention(
            **(inputs.tensors | caches),
            attributes=inputs.attributes,
            tiles=tiles,
            workspace=workspace,
            out=out,
        )
        found = [_bits(tensor) for tensor in (out, *caches.values())]
        first = first or [tensor.clone() for tensor in found]
        differing += sum((a != b).any() for a, b in zip(found, first, strict=True)) > 0
    clean = not workspace.counters.any()
    return asdict(case) | dict(
        launches=count, differing=int(differing), counters_zero=clean, ok=clean and not int(differing)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)  # NaN is not equal to itself


def layers_in_a_graph(tiles: Tiles, replays: int = REPLAYS) -> dict[str, Any]:
    """Two layers of one step, which share counters and scratch, captured once and replayed: bits of plain launches."""
    layers = [Inputs.random(STEP, "cuda", seed) for seed in (0, 1)]
    first = layers[0]
    shape = kernel_shape(first.tensors["query"], first.tensors["past_key"], first.attributes)
    workspace = Workspace.make(shape, tiles, torch.device("cuda"))
    outs = [torch.empty_like(first.tensors["query"]) for _ in layers]

    def step() -> None:
        for inputs, out in zip(layers, outs, strict=True):
            launch_attention(
                **inputs.tensors, attributes=inputs.attributes, tiles=tiles, workspace=workspace, out=out
            )

    step()
    torch.cuda.synchronize()
    plain = [out.clone() for out in outs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    differing = 0
    for _ in range(replays):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        differing += not all(torch.equal(out, wanted) for out, wanted in zip(outs, plain, strict=True))
    clean = not workspace.counters.any()
    return asdict(STEP) | dict(
        layers=2, replays=replays, differing=differing, counters_zero=clean, ok=clean and not differing
    )
