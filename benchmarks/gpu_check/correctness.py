"""The attention kernel against float64, with everything that must be written or must not be read set to NaN."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from glm4_plugins.launch import Tiles
from glm4_plugins.operator import AttentionAttributes
from glm4_plugins.torch_kernel import Workspace, attend, kernel_shape

# Largest error for inputs of unit variance: a few steps of the type at the outputs' size.
LIMITS = {"float16": 4e-3, "bfloat16": 3e-2}
REPEATS = 20


@dataclass(frozen=True)
class Case:
    """``pasts`` and ``lengths`` per sequence; the width is the longest of ``lengths``."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    pasts: tuple[int, ...]
    lengths: tuple[int, ...]


def cases(scale: int) -> Iterator[Case]:
    """Both types and the released models' heads, at lengths around ``scale``, prefill and decode."""
    for dtype in LIMITS:
        for heads, kv_heads, head_dim in ((32, 2, 128), (48, 2, 128), (48, 8, 128), (4, 4, 64)):
            shape = (dtype, heads, kv_heads, head_dim)
            yield Case(*shape, (0,), (scale,))
            yield Case(*shape, (scale - 1, 3, 0), (scale // 2 + 1, scale // 2, 0))
            yield Case(*shape, (4 * scale + 1,), (1,))
            yield Case(*shape, (1, 8 * scale, 0, scale, scale + 1), (1, 1, 1, 0, 1))


@dataclass
class Inputs:
    """The operator's tensors; caches hold NaN past each sequence's end."""

    tensors: dict[str, Tensor]
    attributes: AttentionAttributes

    @classmethod
    def random(cls, case: Case, device: str, seed: int = 0) -> "Inputs":
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        batch, sequence = len(case.lengths), max(case.lengths)
        capacity = max(case.pasts) + sequence

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        half = case.head_dim // 2
        angles = torch.outer(
            torch.arange(capacity, device=device),
            10000.0 ** (-torch.arange(0, half, 2, device=device) / half),
        )
        tensors = dict(
            query=normal(batch, sequence, case.heads * case.head_dim),
            key=normal(batch, sequence, case.kv_heads * case.head_dim),
            value=normal(batch, sequence, case.kv_heads * case.head_dim),
            past_key=normal(batch, case.kv_heads, capacity, case.head_dim),
            past_value=normal(batch, case.kv_heads, capacity, case.head_dim),
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
            past_lengths=torch.tensor(case.pasts, dtype=torch.int32, device=device),
            query_lengths=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        )
        for b, past in enumerate(case.pasts):
            tensors["past_key"][b, :, past:] = torch.nan
            tensors["past_value"][b, :, past:] = torch.nan
        attributes = AttentionAttributes(case.heads, case.kv_heads, half, case.head_dim**-0.5)
        return cls(tensors, attributes)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the pairs of the first dims of ``x`` [H, S, D], in float64."""
    turning, passing = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((pairs.flatten(-2), passing), -1)


def exact(inputs: Inputs, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output [S, Hq * D] and the keys and values [Hkv, past + S, D] of one sequence, in float64."""
    t, attributes = inputs.tensors, inputs.attributes
    past, new = int(t["past_lengths"][b]), int(t["query_lengths"][b])
    cos, sin = (t[name][past : past + new].double() for name in ("cos", "sin"))

    def heads(name: str, count: int) -> Tensor:
        return t[name][b, :new].double().unflatten(-1, (count, -1)).transpose(0, 1)

    keys = torch.cat(
        (t["past_key"][b, :, :past].double(), rotated(heads("key", attributes.kv_num_heads), cos, sin)), 1
    )
    values = torch.cat((t["past_value"][b, :, :past].double(), heads("value", attributes.kv_num_heads)), 1)
    query = rotated(heads("query", attributes.num_heads), cos, sin)
    group = attributes.num_heads // attributes.kv_num_heads
    outputs = []
    hidden = (
        torch.arange(past + new, device=keys.device) > past + torch.arange(new, device=keys.device)[:, None]
    )
    for head in range(attributes.num_heads):
        scores = (query[head] @ keys[head // group].T * attributes.scale).masked_fill(hidden, -torch.inf)
        outputs.append(scores.softmax(-1) @ values[head // group])
    return torch.stack(outputs, 1).flatten(1), keys, values


def check(case: Case, tiles: Tiles, device: str) -> dict[str, Any]:
    """Launch again and again over poisoned outputs: errors against float64, and whether the bits ever change."""
    inputs = Inputs.random(case, device)
    shape = kernel_shape(inputs.tensors["query"], inputs.tensors["past_key"], inputs.attributes)
    workspace = Workspace.make(shape, tiles, torch.device(device))
    outputs, caches = [], []
    for _ in range(REPEATS if device == "cuda" else 2):
        copies = {name: inputs.tensors[name].clone() for name in ("past_key", "past_value")}
        workspace.partials.fill_(torch.nan)
        out = torch.full_like(inputs.tensors["query"], torch.nan)
        attend(
            **(inputs.tensors | copies),
            attributes=inputs.attributes,
            tiles=tiles,
            workspace=workspace,
            out=out,
        )
        outputs.append(out)
        caches.append(copies)
    error = cache_error = 0.0
    clean = not workspace.counters.any()
    for b, (past, new) in enumerate(zip(case.pasts, case.lengths, strict=True)):
        expected, keys, values = exact(inputs, b)
        clean &= bool((outputs[0][b, new:] == 0).all())
        if new:
            error = max(error, float((outputs[0][b, :new] - expected).abs().max()))
        for name, theirs in (("past_key", keys), ("past_value", values)):
            ours = caches[0][name][b]
            clean &= bool(ours[:, past + new :].isnan().all())
            if past + new:
                cache_error = max(cache_error, float((ours[:, : past + new] - theirs).abs().max()))
    same = all(torch.equal(out, outputs[0]) for out in outputs)
    ok = clean and same and error <= LIMITS[case.dtype] and cache_error <= 4 * LIMITS[case.dtype]
    return asdict(case) | dict(
        tiles=f"{tiles.block_m}x{tiles.block_n}/{tiles.decode_n}",
        max_error=error,
        cache_error=cache_error,
        repeatable=same,
        untouched=clean,
        ok=ok,
    )
