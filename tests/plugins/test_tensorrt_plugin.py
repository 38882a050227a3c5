"""The TensorRT plugins, in NVIDIA's own registry and by NVIDIA's own code, without a GPU."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import tensorrt_without_gpu

from glm4_plugins.launch import (
    PLUGIN_ATTRIBUTES,
    PLUGIN_INPUTS,
    PLUGIN_OUTPUTS,
    PLUGIN_SCALES,
    IntegerMath,
    KernelShape,
    choices,
    counters_shape,
    grid,
    partials_shape,
)

pytestmark = pytest.mark.skipif(
    tensorrt_without_gpu.missing() is not None, reason=str(tensorrt_without_gpu.missing())
)

NAME = "PartialRopeGqaAttention"
HEADS, KV_HEADS, HEAD_DIM, CAPACITY, BATCH, CAPABILITY, PROCESSORS = 32, 2, 128, 4096, 8, 90, 114
ATTRIBUTES = dict(
    num_heads=HEADS,
    kv_num_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    rotary_embedding_dim=HEAD_DIM // 2,
    scale=repr(HEAD_DIM**-0.5),
    max_batch=BATCH,
    compute_capability=CAPABILITY,
    processors=PROCESSORS,
    tiles=0,
    phase=0,
)
LIMITS = dict(batch=(1, BATCH), sequence=(1, 512))
POINTS = [dict(batch=b, sequence=s) for b, s in ((1, 1), (8, 1), (1, 2), (3, 9), (1, 512), (8, 511))]


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Calls a function of tensorrt_without_gpu in a process where TensorRT is loaded."""
    folder = tmp_path_factory.mktemp("tensorrt")
    tensorrt_without_gpu.build(folder)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda name, *args: pool.submit(getattr(tensorrt_without_gpu, name), folder, *args).result()


def tensors(activation="HALF", cache=None):
    """(type, dimensions) of the plugin's inputs, and of its outputs; ``cache`` is a quantized one's type."""
    kinds = dict(activation=activation, cache=cache or activation, int32="INT32", float32="FLOAT")
    tiles = choices(CAPABILITY, cache is not None, PROCESSORS)[0]
    scratch = partials_shape(KernelShape(HEADS, KV_HEADS, HEAD_DIM, 1.0, BATCH), tiles)
    tokens = ("batch", "sequence")
    shapes = dict(
        query=(*tokens, HEADS * HEAD_DIM),
        key=(*tokens, KV_HEADS * HEAD_DIM),
        value=(*tokens, KV_HEADS * HEAD_DIM),
        past_key=("batch", KV_HEADS, CAPACITY, HEAD_DIM),
        past_value=("batch", KV_HEADS, CAPACITY, HEAD_DIM),
        cos=(CAPACITY, HEAD_DIM // 4),
        sin=(CAPACITY, HEAD_DIM // 4),
        past_lengths=("batch",),
        query_lengths=("batch",),
        counters=counters_shape(tiles),
        key_scale=(KV_HEADS, HEAD_DIM),
        value_scale=(KV_HEADS, HEAD_DIM),
        partials=scratch,
    )
    shapes |= dict(
        attn_output=shapes["query"],
        present_key=shapes["past_key"],
        present_value=shapes["past_key"],
        present_counters=shapes["counters"],
    )
    inputs = PLUGIN_INPUTS | (PLUGIN_SCALES if cache else {})
    return [[(kinds[kind], shapes[name]) for name, kind in side.items()] for side in (inputs, PLUGIN_OUTPUTS)]


def explore(ask, name=NAME, activation="HALF", cache=None, all_tactics=False, **changed):
    inputs, outputs = tensors(activation, cache)
    return ask("explored", name, ATTRIBUTES | changed, inputs, outputs, LIMITS, POINTS, all_tactics)


@pytest.fixture(scope="module")
def facts(ask):
    return explore(ask, all_tactics=True)


def test_all_plugins_are_registered(ask):
    assert ask("registered") == {
        name: list(PLUGIN_ATTRIBUTES) for name in (NAME, NAME + "Int8", NAME + "Fp8")
    }


def test_shapes_types_and_aliases(facts):
    _, outputs = tensors()
    assert facts["types"] == [kind for kind, _ in outputs]
    for point, shapes in zip(POINTS, facts["shapes"], strict=True):
        assert shapes == [[point.get(d, d) for d in shape] for _, shape in outputs]
    names = list(PLUGIN_INPUTS)
    aliased = ("past_key", "past_value", "counters")
    assert facts["aliases"] == [-1, *(names.index(name) for name in aliased), -1]


def test_one_linear_combination_of_types(facts):
    inputs, outputs = tensors()
    assert facts["supported"] == [(kind, "LINEAR") for kind, _ in (*inputs, *outputs)]


def test_one_tactic_so_that_nothing_is_timed(facts):
    assert facts["tactics"] == [1]
    assert facts["launches"][0] == facts["launches"][1]


def check_launch(launch, shape, tiles):
    from glm4_plugins.compile import compile_kernel

    kernel = compile_kernel(shape, tiles, CAPABILITY)
    assert (launch["kernel"], launch["ptx"]) == (kernel.name, kernel.ptx)
    for point, parameters, sizes in zip(POINTS, launch["parameters"], launch["sizes"], strict=True):
        batch, sequence = point["batch"], point["sequence"]
        assert sizes == [batch, sequence, CAPACITY]
        assert parameters == dict(
            grid_x=grid(shape, tiles, batch, sequence, CAPACITY, IntegerMath()),
            grid_y=1,
            grid_z=1,
            block_x=32 * tiles.warps,
            block_y=1,
            block_z=1,
            shared_mem=kernel.shared_memory,
        )
    return kernel


SHAPE = KernelShape(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, BATCH)


def test_launches_fit_the_kernels_that_the_interpreter_tests(facts):
    kernel = check_launch(facts["launches"][1], SHAPE, choices(CAPABILITY, processors=PROCESSORS)[0])
    assert (
        len(PLUGIN_INPUTS) + len(facts["launches"][1]["sizes"][0]) + len(PLUGIN_OUTPUTS) == kernel.parameters
    )


def test_an_attribute_picks_blocks_below_48_kib(ask):
    offered = choices(CAPABILITY, processors=PROCESSORS)
    launch = explore(ask, tiles=-1)["launches"][0]
    assert check_launch(launch, SHAPE, offered[-1]).shared_memory <= 48 * 1024


@pytest.mark.parametrize(("cache", "converted"), [("INT8", "s8"), ("FP8", "e4m3")])
def test_bfloat16_and_a_quantized_cache(ask, cache, converted):
    facts = explore(ask, NAME + cache.capitalize(), "BF16", cache, phase=4)
    inputs, outputs = tensors("BF16", cache)
    assert facts["types"] == [kind for kind, _ in outputs]
    assert facts["supported"] == [(kind, "LINEAR") for kind, _ in (*inputs, *outputs)]
    assert facts["aliases"] == [-1, 3, 4, 9, -1]
    assert "bf16" in facts["launches"][0]["ptx"]
    assert converted in facts["launches"][0]["ptx"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(max_batch=4), "batch 8; the kernel is compiled for 4"),
        (dict(phase=2), "512 new tokens; a decode kernel takes 1"),
        (dict(rotary_embedding_dim=128), "turns half"),
        (dict(compute_capability=75), "no block sizes"),
        (dict(tiles=3), "3 choices"),
        (dict(tiles=-2), "3 choices"),
        (dict(name=NAME + "Fp8", cache="FP8", compute_capability=86), "no fp8 cache"),
        (dict(activation="FLOAT"), "fp16 and bf16"),
    ],
)
def test_what_the_plugin_refuses(ask, changed, message):
    with pytest.raises(ValueError, match=message):
        explore(ask, **changed)
