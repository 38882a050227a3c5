"""How long attention takes: ours, and each of torch's backends on the same problem, in one run.

Calls are captured in a CUDA graph, so that no launch is timed on the host, and go through so many copies of
their tensors that none is still in the second-level cache when its turn comes again.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_check.correctness import Case, Inputs
from glm4_plugins.launch import Tiles
from glm4_plugins.torch_kernel import Workspace, kernel_shape, launch_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PREFILL_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DECODE_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DECODE_BATCHES = (1, 8, 32)
NINE_B = Case("bfloat16", 32, 2, 128, (), ())
TOUCHED = 512 * 2**20  # bytes that a round touches: ten times the second-level cache of an H100
REPLAYS = 11


def milliseconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median over rounds of the time per call, all calls of a round in one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times) / len(calls)


def copy_bandwidth() -> float:
    """Bytes per second of a device copy of 2 GiB, reading and writing counted."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds([lambda: target.copy_(source)]) * 1e-3)


def matmul_rate() -> float:
    """Operations per second of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (milliseconds([lambda: a @ b] * 4) * 1e-3)


def ours(problems: Sequence[Inputs], tiles: Tiles) -> list[Callable[[], Any]]:
    """One launch per problem, caches in place; RoPE and the append are part of it."""
    first = problems[0]
    shape = kernel_shape(first.tensors["query"], first.tensors["past_key"], first.attributes)
    workspace = Workspace.make(shape, tiles, first.tensors["query"].device)
    out = torch.empty_like(first.tensors["query"])

    def launch(inputs: Inputs) -> Callable[[], Any]:
        return lambda: launch_attention(
            **inputs.tensors, attributes=inputs.attributes, tiles=tiles, workspace=workspace, out=out
        )

    return [launch(inputs) for inputs in problems]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, passing = x.chunk(2, -1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((pairs.flatten(-2), passing), -1)


def torchs(
    problems: Sequence[Inputs], backend: SDPBackend, rotate: Callable[..., Tensor]
) -> list[Callable[[], Any]]:
    """RoPE, append and attention as a torch model does them, all sequences of one length."""
    past, new = (int(problems[0].tensors[name][0]) for name in ("past_lengths", "query_lengths"))

    def step(inputs: Inputs) -> Callable[[], Any]:
        t, attributes = inputs.tensors, inputs.attributes
        cos, sin = t["cos"][past : past + new], t["sin"][past : past + new]

        def run() -> Tensor:
            q = t["query"].unflatten(-1, (attributes.num_heads, -1)).transpose(1, 2)
            k, v = (
                t[name].unflatten(-1, (attributes.kv_num_heads, -1)).transpose(1, 2)
                for name in ("key", "value")
            )
            t["past_key"][:, :, past : past + new] = rotate(k, cos, sin)
            t["past_value"][:, :, past : past + new] = v
            keys, values = (t[name][:, :, : past + new] for name in ("past_key", "past_value"))
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    rotate(q, cos, sin),
                    keys,
                    values,
                    is_causal=new > 1,
                    scale=attributes.scale,
                    enable_gqa=True,
                )

        return run

    return [step(inputs) for inputs in problems]


def problems_of(case: Case) -> list[Inputs]:
    """Copies of a problem with valid caches, as many as fill TOUCHED."""
    first = Inputs.random(case, "cuda")
    for name in ("past_key", "past_value"):
        first.tensors[name].nan_to_num_()
    size = sum(tensor.nbytes for tensor in first.tensors.values())
    copies = min(64, -(-TOUCHED // size))
    return [first] + [
        replace(first, tensors={name: tensor.clone() for name, tensor in first.tensors.items()})
        for _ in range(copies - 1)
    ]


def compare(case: Case, choices: Sequence[Tiles]) -> dict[str, Any]:
    """Milliseconds of each choice of ours and each backend of torch; a refusal is kept in its own words."""
    problems = problems_of(case)
    torch._dynamo.reset()  # after some shapes torch gives up and runs RoPE eagerly, which would flatter us
    compiled = torch.compile(rotated, dynamic=False)
    record: dict[str, Any] = dict(ours={}, torch={}, refused={})
    attempts: list[tuple[str, str, Callable[[], list[Callable[[], Any]]]]] = [
        ("ours", f"{t.block_m}x{t.block_n}/{t.decode_n}", lambda t=t: ours(problems, t)) for t in choices
    ]
    attempts += [
        ("torch", name, lambda backend=backend: torchs(problems, backend, compiled))
        for name, backend in BACKENDS.items()
    ]
    for side, name, calls in attempts:
        try:
            record[side][name] = milliseconds(calls())
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            record["refused"][name] = str(error).strip().splitlines()[0]
            torch.cuda.synchronize()
    return record


def prefill_cases() -> list[Case]:
    return [replace(NINE_B, pasts=(0,), lengths=(length,)) for length in PREFILL_LENGTHS]


def first_cases() -> list[Case]:
    """What the estimates speak of: one long sequence, eight of them, and a long prompt."""
    decoding = ((8, 8192), (1, 8192), (8, 32768))
    steps = [replace(NINE_B, pasts=(n - 1,) * batch, lengths=(1,) * batch) for batch, n in decoding]
    return [*steps, replace(NINE_B, pasts=(0,), lengths=(8192,))]


def decode_cases() -> list[Case]:
    return [
        replace(NINE_B, pasts=(context - 1,) * batch, lengths=(1,) * batch)
        for batch in DECODE_BATCHES
        for context in DECODE_CONTEXTS
    ]


def measured(case: Case, choices: Sequence[Tiles], bandwidth: float, rate: float) -> dict[str, Any]:
    """:func:`compare`, with the ratios that the targets speak of."""
    past, new, batch = case.pasts[0], case.lengths[0], len(case.pasts)
    record = dict(batch=batch, past=past, new=new) | compare(case, choices)
    best_ours = min(record["ours"].values(), default=None)
    best_torch = min(record["torch"].values(), default=None)
    if best_ours:
        cache = batch * case.kv_heads * (past + new) * case.head_dim * 2 * 2
        pairs = batch * case.heads * (new * past + new * (new + 1) // 2)
        record["of_copy_bandwidth"] = cache / (best_ours * 1e-3) / bandwidth
        record["of_matmul_rate"] = 4 * pairs * case.head_dim / (best_ours * 1e-3) / rate
        record["to_best_torch"] = best_ours / best_torch if best_torch else None
    return record
