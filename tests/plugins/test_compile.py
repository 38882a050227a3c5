"""The kernel compiled for GPUs that are not here: what it costs, and how it is called."""

import math
import re

import pytest

from glm4_plugins.launch import (
    CAPABILITIES,
    LEVELS,
    PLUGIN_INPUTS,
    PLUGIN_OUTPUTS,
    PLUGIN_SCALES,
    SIZES,
    IntegerMath,
    KernelShape,
    choices,
    constants,
    grid,
    joins,
    partials_shape,
    share,
    unsupported,
)

pytest.importorskip("triton", reason="needs the plugins extra")

from glm4_plugins.compile import compile_kernel, signature, without_hidden_parameters

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
UNASKED = 48 * KIB
REGISTERS = 65536

# heads, kv heads, head_dim, type: the released models, and the ends of what the kernel takes
NINE_B = (32, 2, 128, "fp16")
OTHERS = {
    "9B-bf16": (32, 2, 128, "bf16"),
    "32B": (48, 2, 128, "fp16"),
    "Rumination": (48, 8, 128, "bf16"),
    "ungrouped": (8, 8, 128, "fp16"),
    "narrow": (4, 2, 64, "fp16"),
    "narrow-ungrouped": (4, 4, 64, "bf16"),
}


def shape(heads, kv_heads, head_dim, dtype, quantized=False, phase="shared"):
    return KernelShape(heads, kv_heads, head_dim, head_dim**-0.5, 64, dtype, quantized, phase)


def check(kernel_shape, capability, all_tiles):
    tensors = len(PLUGIN_INPUTS) + len(PLUGIN_OUTPUTS) + len(PLUGIN_SCALES) * kernel_shape.quantized_cache
    for tiles in all_tiles:
        kernel = compile_kernel(kernel_shape, tiles, capability)
        entry = re.search(r"\.entry\s+(\w+)\(([^)]*)\)", kernel.ptx)
        assert entry[1] == kernel.name
        parameters = entry[2].split(",")
        assert len(parameters) == kernel.parameters == tensors + len(SIZES)
        assert sum(".u64" in parameter for parameter in parameters) == tensors
        assert kernel.ptx.count(".entry") == 1
        assert "debug" not in kernel.ptx
        assert ".py" not in kernel.ptx
        assert kernel.shared_memory <= SHARED_MEMORY[capability]
        assert kernel.registers * 32 * kernel.warps <= REGISTERS
        assert kernel.spilled == 0, (tiles, kernel.spilled)
        if tiles == choices(capability, kernel_shape.quantized_cache)[-1]:
            assert kernel.shared_memory <= UNASKED


@pytest.mark.parametrize("quantized", [False, True])
def test_the_tables_are_in_the_kernels_own_order(quantized):
    from glm4_plugins.kernels import partial_rope_gqa_attention

    kernel_shape = shape(*NINE_B, quantized=quantized)
    arguments = [*signature(kernel_shape), *constants(kernel_shape, choices(90)[0])]
    assert arguments == list(partial_rope_gqa_attention.arg_names)


def test_the_9b_compiles():
    check(shape(*NINE_B), 90, choices(90)[:1])


@pytest.mark.more
def test_the_9b_compiles_in_other_blocks():
    check(shape(*NINE_B), 90, choices(90)[1:])


@pytest.mark.more
@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != 90])
def test_the_9b_compiles_everywhere(capability):
    check(shape(*NINE_B), capability, choices(capability))


@pytest.mark.more
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_int8_cache_compiles(capability):
    check(shape(*NINE_B, quantized=True), capability, choices(capability, True))


@pytest.mark.more
@pytest.mark.parametrize("model", OTHERS)
def test_other_heads_compile(model):
    check(shape(*OTHERS[model]), 90, choices(90)[:1])


@pytest.mark.parametrize(
    ("phase", "large_products", "counts"),
    [("prefill", True, True), ("decode", False, True), ("extend", True, True), ("prompt", True, False)],
)
def test_kernels_of_one_phase(phase, large_products, counts):
    alone = compile_kernel(shape(*NINE_B, phase=phase), choices(90)[0], 90)
    assert alone.parameters == len(PLUGIN_INPUTS) + len(SIZES) + len(PLUGIN_OUTPUTS)
    assert ("wgmma.mma_async" in alone.ptx) == large_products
    assert ("atom" in alone.ptx) == counts


@pytest.mark.parametrize("phase", ["decode", "prompt"])
def test_loads_are_wide_and_asynchronous(phase):
    kernel = compile_kernel(shape(*NINE_B, phase=phase), choices(90)[0], 90)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global\s+\[[^]]+\],\s*\[[^]]+\],\s*(0x\w+|\d+)", kernel.ptx)
    assert copies
    assert {int(size, 0) for size in copies} == {16}


PTX = """.target sm_90a
.visible .entry f(
	.param .u64 .ptr .global .align 16 f_param_0,
	.param .u32 f_param_1,
	.param .u64 .ptr .global .align 1 f_param_2,
	.param .u64 .ptr .global .align 1 f_param_3
)
{
	ld.param.u64 	%rd1, [f_param_0];
	ld.param.u32 	%r1, [f_param_1];
	ret;
}
"""


def test_hidden_parameters_are_dropped():
    dropped = without_hidden_parameters(PTX, 2)
    assert "f_param_1" in dropped
    assert "f_param_2" not in dropped
    assert dropped.count(".param") == PTX.count(".param") - 2


def test_hidden_parameters_that_are_read_are_refused():
    with pytest.raises(RuntimeError, match="reads f_param_2"):
        without_hidden_parameters(PTX.replace("ret;", "ld.param.u64 %rd2, [f_param_2]; ret;"), 2)


def test_an_unexpected_number_of_parameters_is_refused():
    with pytest.raises(RuntimeError, match="4 parameters; 3"):
        without_hidden_parameters(PTX, 3)


@pytest.mark.parametrize(
    ("changed", "rotary", "message"),
    [
        (dict(dtype="torch.float32"), 64, "fp16 and bf16"),
        (dict(head_dim=96), 48, "64 and 128"),
        (dict(), 128, "turns half"),
        (dict(num_heads=66), 64, "1 to 32"),
        (dict(scale=0.0), 64, "positive"),
    ],
)
def test_what_the_kernel_does_not_take(changed, rotary, message):
    plain = dict(num_heads=32, kv_num_heads=2, head_dim=128, scale=0.1, max_batch=4)
    assert unsupported(KernelShape(**plain), 64) is None
    assert message in unsupported(KernelShape(**plain | changed), rotary)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="80, 86, 89, 90, 100, 120"):
        choices(75)
    with pytest.raises(ValueError, match="shared, prefill, decode, extend, prompt"):
        shape(*NINE_B, phase="both")


def test_the_grid_covers_every_row_and_fills_the_gpu():
    tiles = choices(90)[0]
    nine = shape(*NINE_B)
    assert grid(nine, tiles, 3, 512, 4096, IntegerMath()) == 512 * 16 // tiles.block_m * 2 * 3
    assert grid(nine, tiles, 3, 257, 4096, IntegerMath()) == 33 * 2 * 3  # 4112 rows
    assert (
        grid(nine, tiles, 1, 9, 4096, IntegerMath()) == tiles.blocks
    )  # two blocks of rows, and all keys shared
    assert grid(nine, tiles, 1, 1, 131072, IntegerMath()) == tiles.blocks
    assert grid(nine, tiles, 1, 1, 256, IntegerMath()) == 2 * (
        256 // tiles.decode_n + 1
    )  # no more than tiles of keys
    assert grid(nine, choices(90, processors=114)[0], 1, 1, 131072, IntegerMath()) == 114


@pytest.mark.parametrize("processors", [114, 132, 144])
def test_one_sequence_of_8192_is_on_all_processors(processors):
    """No block has more tiles than an even share rounded up: on 132 processors 128 and 131 are busy."""
    tiles = choices(90, processors=processors)[0]
    for sequence, keys in ((1, tiles.decode_n), (8, tiles.extend_n)):
        part = share(shape(*NINE_B), tiles, [8192], sequence)
        all_tiles = 2 * (8192 // keys + (sequence > 1))
        assert part.blocks <= processors
        assert part.blocks == -(-all_tiles // -(-all_tiles // processors))
        if processors == 132:
            assert part.blocks >= 128


def test_pieces_are_joined_on_two_levels_at_most():
    for pieces in range(2, 1025):
        levels = joins(pieces)
        assert len(levels) <= LEVELS
        assert math.prod(levels) >= pieces
        assert levels[-1] <= 32
        assert sum(levels) <= pieces + 8


def test_scratch_is_for_the_branches_that_share_keys():
    tiles = choices(90)[0]
    sizes = {p: partials_shape(shape(*NINE_B, phase=p), tiles)[0] for p in ("decode", "prompt", "shared")}
    assert sizes["decode"] == 2 * 132 * 16 * 129
    assert sizes["shared"] == 2 * 132 * 128 * 129
    assert sizes["prompt"] == 1


def test_an_fp8_cache_needs_a_gpu_that_converts_it():
    plain = dict(num_heads=32, kv_num_heads=2, head_dim=128, scale=0.1, max_batch=4, quantized_cache=True)
    assert unsupported(KernelShape(**plain, quantized_dtype="fp8"), 64, 89) is None
    assert "89 and newer" in unsupported(KernelShape(**plain, quantized_dtype="fp8"), 64, 86)
    assert unsupported(KernelShape(**plain, quantized_dtype="int8"), 64, 80) is None
    with pytest.raises(ValueError, match="int8, fp8"):
        KernelShape(**plain, quantized_dtype="int4")


def test_constants_hold_what_the_kernel_relies_on():
    for capability in CAPABILITIES:
        for tiles in choices(capability):
            for heads, kv_heads, *_ in (NINE_B, *OTHERS.values()):
                values = constants(shape(heads, kv_heads, 128, "fp16"), tiles)
                assert values["ROWS"] >= values["GROUP"]
                assert values["DECODE_N"] % 16 == values["EXTEND_N"] % 16 == 0
                assert values["APPEND_N"] * values["GROUP"] >= values["BLOCK_M"]
                assert values["MAX_BATCH"] == 64
