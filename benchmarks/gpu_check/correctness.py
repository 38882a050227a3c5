"""The attention kernel against float64, with everything that must be written or must not be read poisoned."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from glm4_deploy.thresholds import GPU_CHECK
from glm4_plugins.launch import Tiles
from glm4_plugins.operator import AttentionAttributes
from glm4_plugins.torch_kernel import Workspace, kernel_shape, launch_attention

LIMITS = GPU_CHECK
REPEATS = 20
POISON = 119  # of an int8 cache, which has no NaN
LARGEST = 4.0  # magnitude that an int8 cache's scale reaches; inputs have unit variance


@dataclass(frozen=True)
class Case:
    """``pasts`` and ``lengths`` per sequence; the width is the longest of ``lengths``. ``quantized``: an int8 cache."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    pasts: tuple[int, ...]
    lengths: tuple[int, ...]
    quantized: bool = False

    @property
    def name(self) -> str:
        """As ``bfloat16-32x2x128-7999,0+1,1``, with ``-int8`` behind."""
        pasts, lengths = (",".join(map(str, counts)) for counts in (self.pasts, self.lengths))
        heads = f"{self.heads}x{self.kv_heads}x{self.head_dim}"
        return f"{self.dtype}-{heads}-{pasts}+{lengths}{'-int8' * self.quantized}"


def cases(scale: int) -> Iterator[Case]:
    """Both types and the released models' heads, at lengths around ``scale``, prefill and decode."""
    for dtype in LIMITS:
        for heads, kv_heads, head_dim in ((32, 2, 128), (48, 2, 128), (48, 8, 128), (4, 4, 64)):
            shape = (dtype, heads, kv_heads, head_dim)
            yield Case(*shape, (0,), (scale,))
            yield Case(*shape, (scale - 1, 3, 0), (scale // 2 + 1, scale // 2, 0))
            yield Case(*shape, (4 * scale + 1,), (1,))
            yield Case(*shape, (1, 8 * scale, 0, scale, scale + 1), (1, 1, 1, 0, 1))


def quantized_cases(scale: int) -> Iterator[Case]:
    """An int8 cache under the heads of the 9B and of Rumination, prefill and decode."""
    for dtype in LIMITS:
        for heads, kv_heads in ((32, 2), (48, 8)):
            shape = (dtype, heads, kv_heads, 128)
            yield Case(*shape, (scale - 1, 3, 0), (scale // 2 + 1, scale // 2, 0), True)
            yield Case(*shape, (1, 8 * scale, 0, scale, scale + 1), (1, 1, 1, 0, 1), True)


@dataclass
class Inputs:
    """The operator's tensors; caches are poisoned past each sequence's end.

    ``scales``: ``key_scale`` and ``value_scale`` [kv_heads, head_dim] float32 of an int8 cache, else empty.
    """

    tensors: dict[str, Tensor]
    attributes: AttentionAttributes
    scales: dict[str, Tensor] = field(default_factory=dict)

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
        scales: dict[str, Tensor] = {}
        for side in ("key", "value"):
            name, poison = f"past_{side}", torch.nan
            if case.quantized:
                shape = case.kv_heads, case.head_dim
                drawn = torch.rand(shape, generator=generator, device=device)
                scales[f"{side}_scale"] = scale = (1 + drawn) * LARGEST / 127
                tensors[name], poison = rounded(tensors[name].float(), scale), POISON
            for b, past in enumerate(case.pasts):
                tensors[name][b, :, past:] = poison
        attributes = AttentionAttributes(case.heads, case.kv_heads, half, case.head_dim**-0.5)
        return cls(tensors, attributes, scales)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` [..., H, S, D] in int8 under ``scale`` [H, D]."""
    return (x / scale[:, None]).round().clamp(-127, 127).to(torch.int8)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the pairs of the first dims of ``x`` [H, S, D], in float64."""
    turning, passing = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((pairs.flatten(-2), passing), -1)


def exact(inputs: Inputs, b: int, stored: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output [S, Hq * D] and the keys and values [Hkv, past + S, D] of one sequence, in float64.

    Args:
        stored: an int8 cache after the launch, whose numbers the output is computed from; the keys and values that
            are returned are those before rounding.
    """
    t, attributes = inputs.tensors, inputs.attributes
    past, new = int(t["past_lengths"][b]), int(t["query_lengths"][b])
    cos, sin = (t[name][past : past + new].double() for name in ("cos", "sin"))

    def heads(name: str, count: int) -> Tensor:
        return t[name][b, :new].double().unflatten(-1, (count, -1)).transpose(0, 1)

    def before(side: str) -> Tensor:
        cached = t[f"past_{side}"][b, :, :past].double()
        return cached * inputs.scales[f"{side}_scale"].double()[:, None] if inputs.scales else cached

    new_keys = rotated(heads("key", attributes.kv_num_heads), cos, sin)
    keys = wanted_keys = torch.cat((before("key"), new_keys), 1)
    values = wanted_values = torch.cat((before("value"), heads("value", attributes.kv_num_heads)), 1)
    if stored is not None:
        keys, values = (
            stored[f"past_{side}"][b, :, : past + new].double()
            * inputs.scales[f"{side}_scale"].double()[:, None]
            for side in ("key", "value")
        )
    query = rotated(heads("query", attributes.num_heads), cos, sin)
    group = attributes.num_heads // attributes.kv_num_heads
    outputs = []
    hidden = (
        torch.arange(past + new, device=keys.device) > past + torch.arange(new, device=keys.device)[:, None]
    )
    for head in range(attributes.num_heads):
        scores = (query[head] @ keys[head // group].T * attributes.scale).masked_fill(hidden, -torch.inf)
        outputs.append(scores.softmax(-1) @ values[head // group])
    return torch.stack(outputs, 1).flatten(1), wanted_keys, wanted_values


def check(case: Case, tiles: Tiles, device: str, repeats: int | None = None) -> dict[str, Any]:
    """Launch again and again over poisoned outputs: errors against float64, and whether the bits ever change."""
    inputs = Inputs.random(case, device)
    shape = kernel_shape(inputs.tensors["query"], inputs.tensors["past_key"], inputs.attributes)
    workspace = Workspace.make(shape, tiles, torch.device(device))
    outputs, caches = [], []
    for _ in range(repeats or (REPEATS if device == "cuda" else 2)):
        copies = {name: inputs.tensors[name].clone() for name in ("past_key", "past_value")}
        workspace.partials.fill_(torch.nan)
        out = torch.full_like(inputs.tensors["query"], torch.nan)
        launch_attention(
            **(inputs.tensors | copies | inputs.scales),
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
        expected, keys, values = exact(inputs, b, caches[0] if case.quantized else None)
        clean &= bool((outputs[0][b, new:] == 0).all())
        if new:
            error = max(error, float((outputs[0][b, :new] - expected).abs().max()))
        for side, theirs in (("key", keys), ("value", values)):
            ours = caches[0][f"past_{side}"][b]
            rest = ours[:, past + new :]
            clean &= bool((rest == POISON).all() if case.quantized else rest.isnan().all())
            if past + new:
                found = ours[:, : past + new].double()
                if case.quantized:  # in steps of the int8 numbers: half of one is what rounding may cost
                    theirs = (theirs / inputs.scales[f"{side}_scale"].double()[:, None]).clamp(-127, 127)
                cache_error = max(cache_error, float((found - theirs).abs().max()))
    same = all(torch.equal(out, outputs[0]) for out in outputs)
    # of a step: half, and what a new key that is rounded to its type first may add
    allowed = 0.5 + 127 * LIMITS[case.dtype] / LARGEST if case.quantized else 4 * LIMITS[case.dtype]
    ok = clean and same and error <= LIMITS[case.dtype] and cache_error <= allowed
    return asdict(case) | dict(
        tiles=f"{tiles.block_m}x{tiles.block_n}/{tiles.decode_n}",
        max_error=error,
        cache_error=cache_error,
        repeatable=same,
        untouched=clean,
        ok=ok,
    )
