"""Random inputs of the attention operator, and the Triton kernel on them in a process that interprets it.

Triton decides when it is imported whether kernels are interpreted, so that process is not the tests' own.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from glm4_plugins.operator import AttentionAttributes


def tables(positions, rotary_dim):
    frequencies = 10000.0 ** (-np.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    angles = np.arange(positions)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def random_case(seed, batch, sequence, kv_heads, group, head_size, rotary_dim, pasts, lengths, slack=3):
    rng = np.random.default_rng(seed)
    capacity = max(pasts) + sequence + slack

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    cos, sin = tables(capacity, rotary_dim)
    return dict(
        query=normal(batch, sequence, kv_heads * group * head_size),
        key=normal(batch, sequence, kv_heads * head_size),
        value=normal(batch, sequence, kv_heads * head_size),
        past_key=normal(batch, kv_heads, capacity, head_size),
        past_value=normal(batch, kv_heads, capacity, head_size),
        cos=cos,
        sin=sin,
        past_lengths=np.array(pasts, np.int32),
        query_lengths=np.array(lengths, np.int32),
    ), AttentionAttributes(kv_heads * group, kv_heads, rotary_dim, head_size**-0.5)


def rounded(case, dtype):
    """The case with every value as ``dtype`` (a torch type's name) holds it, in float32."""
    import torch

    def once(array):
        return torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()

    return {name: array if array.dtype == np.int32 else once(array) for name, array in case.items()}


def teach_small_types(builder):
    """The interpreter holds bfloat16 as integers, and neither multiplies nor converts by their value.

    Its kernels run on float32 instead where that is exact: products, and small integers. Rounding to fp8 it does
    without the carry into the exponent, so that 31.9 becomes 16; torch does it here.
    """
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    round_to = builder.create_fp_to_fp

    def create_fp_to_fp(x, to, rounding_mode):
        if to.scalar != tl.float8e4nv or x.dtype.scalar != tl.float32:
            return round_to(x, to, rounding_mode)
        rounded = torch.from_numpy(np.array(x.data)).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), to.scalar)

    builder.create_fp_to_fp = create_fp_to_fp
    dot, convert = builder.create_dot, builder.create_si_to_fp

    def wide(handle):
        return builder.create_fp_ext(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def create_dot(a, b, d, *options):
        return dot(wide(a), wide(b), d, *options)

    def create_si_to_fp(x, to):
        if to.scalar != tl.bfloat16:
            return convert(x, to)
        return builder.create_fp_trunc(convert(x, tl.float32), tl.bfloat16)

    builder.create_dot, builder.create_si_to_fp = create_dot, create_si_to_fp


def run_blocks_in_order(builder, seed):
    """The interpreter runs blocks one after another: from now on in an order of its own, unless ``seed`` is None."""
    place = vars(builder).setdefault("placed_in_turn", builder.set_grid_idx)

    def set_grid_idx(x, y, z):
        order = np.random.default_rng(seed).permutation(builder.grid_dim[0])
        place(int(order[x]), y, z)

    builder.set_grid_idx = place if seed is None else set_grid_idx


def run_kernel(case, attributes, tiles, dtype, scales, phase, order=None):
    """In the interpreting process: attn_output, present_key, present_value, counters and partials after a launch."""
    import torch
    from triton.runtime.interpreter import interpreter_builder

    from glm4_plugins.torch_kernel import Workspace, kernel_shape, launch_attention

    if "create_dot" not in vars(interpreter_builder):
        teach_small_types(interpreter_builder)
    run_blocks_in_order(interpreter_builder, order)

    def tensor(name, array):
        if array.dtype == np.uint8:
            return torch.from_numpy(array.copy()).view(torch.float8_e4m3fn)
        keep = array.dtype in (np.int32, np.int8)
        return torch.from_numpy(array.copy()).to(None if keep else getattr(torch, dtype))

    tensors = {name: tensor(name, array) for name, array in case.items()}
    shape = kernel_shape(tensors["query"], tensors["past_key"], attributes, phase)
    workspace = Workspace.make(shape, tiles, torch.device("cpu"))
    workspace.partials.fill_(float("nan"))
    out = torch.full_like(tensors["query"], float("nan"))
    scale = {name: torch.from_numpy(array) for name, array in scales.items()}
    launch_attention(
        **tensors, attributes=attributes, tiles=tiles, workspace=workspace, out=out, phase=phase, **scale
    )
    results = (out, tensors["past_key"], tensors["past_value"], workspace.counters, workspace.partials)
    return [t.float().numpy() if t.dtype.is_floating_point else t.numpy() for t in results]


def run_with_guards(case, attributes, tiles, dtype, scales, phase):
    """In the interpreting process: attn_output and the caches after a launch, each with the rows around it.

    Every tensor that is written lies between guards of its own size, all of it 7, so that a write outside shows.
    """
    import torch

    from glm4_plugins.torch_kernel import Workspace, kernel_shape, launch_attention

    def guarded(array):
        memory = torch.full((3, *array.shape), 7, dtype=array.dtype)
        memory[1] = array
        return memory

    tensors = {
        name: torch.from_numpy(array).to(None if array.dtype == np.int32 else getattr(torch, dtype))
        for name, array in case.items()
    }
    memory = {name: guarded(tensors[name]) for name in ("past_key", "past_value")}
    memory["out"] = guarded(torch.zeros_like(tensors["query"]))
    shape = kernel_shape(tensors["query"], tensors["past_key"], attributes, phase)
    workspace = Workspace.make(shape, tiles, torch.device("cpu"))
    counters, partials = guarded(workspace.counters), guarded(workspace.partials)
    workspace = Workspace(counters[1], partials[1])
    inside = {name: whole[1] for name, whole in memory.items()}
    launch_attention(
        **tensors | {name: inside[name] for name in ("past_key", "past_value")},
        attributes=attributes, tiles=tiles, workspace=workspace, out=inside["out"], phase=phase, **scales,
    )  # fmt: skip
    found = [*memory.values(), counters, partials[[0, 2]]]
    return [t.float().numpy() if t.dtype.is_floating_point else t.numpy() for t in found]


def run_operator(case, attributes, dtype):
    """In the interpreting process: the torch operator's kernel for GPUs, and its plain one, on the CPU."""
    import torch
    from triton.runtime.interpreter import interpreter_builder

    from glm4_plugins import torch as operator

    if "create_dot" not in vars(interpreter_builder):
        teach_small_types(interpreter_builder)
    torch.cuda.get_device_capability = lambda _: (9, 0)
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=132)
    tensors = {
        name: None
        if a is None
        else torch.from_numpy(a).to(None if a.dtype == np.int32 else getattr(torch, dtype))
        for name, a in case.items()
    }
    given = {name: None if t is None else t.clone() for name, t in tensors.items()}
    by_kernel = operator.with_kernel(**tensors, **vars(attributes))
    plain = torch.ops.glm4.partial_rope_gqa_attention(**given, **vars(attributes))
    untouched = all(t is None or torch.equal(t, given[name]) for name, t in tensors.items())
    return [t.float().numpy() for t in by_kernel], [t.float().numpy() for t in plain], untouched


@contextmanager
def interpreter():
    """A function that calls another in a process of its own, where Triton interprets."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            pool.submit(os.getpid).result()  # the process starts now, with the variable set
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before

        yield lambda function, *arguments: pool.submit(function, *arguments).result()
