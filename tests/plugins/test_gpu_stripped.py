"""The plugin's stripped PTX through CUDA's driver, on a stand-in for libcuda: arguments, parameters, shared memory."""

import ctypes
import re
from types import SimpleNamespace

import pytest
import torch
from attention_cases import interpreter
from fake_driver import FakeLibrary

from benchmarks.gpu_check import endurance, stripped
from benchmarks.gpu_check.correctness import Case, Inputs, cases, check
from benchmarks.gpu_check.driver import Driver, DriverError
from glm4_plugins.compile import compile_kernel
from glm4_plugins.launch import PLUGIN_INPUTS, PLUGIN_OUTPUTS, SIZES, KernelShape, Tiles, choices


def kernel(shared=1024):
    return SimpleNamespace(ptx="// program", name="program", warps=8, shared_memory=shared)


def tensors():
    inputs = Inputs.random(next(iter(cases(5))), "cpu")
    rest = {name: torch.zeros(4) for name in ("counters", "partials", "attn_output")}
    named = inputs.tensors | rest
    return named | {name: torch.zeros(3) for name in PLUGIN_OUTPUTS if name not in named}


def test_arguments_lie_as_tensorrt_passes_them():
    library, given = FakeLibrary(stripped.expected_sizes()), tensors()
    record = stripped.launched(Driver(library), kernel(), given, 12, 5, attribute=True)
    assert record == dict(
        parameters=len(PLUGIN_INPUTS) + 3 + len(PLUGIN_OUTPUTS), parameters_right=True, refused=None
    )
    (launch,) = library.launches
    assert launch.sizes == [12, 1, 1, 256, 1, 1, 1024]
    assert launch.stream == 5
    batch, sequence, _ = given["query"].shape
    expected = [given[name].data_ptr() for name in PLUGIN_INPUTS]
    expected += [batch, sequence, given["past_key"].shape[2]]
    assert launch.values == expected + [given[name].data_ptr() for name in PLUGIN_OUTPUTS]
    assert library.open == 0


@pytest.mark.parametrize(
    ("shared", "attribute", "runs"), [(180224, False, False), (180224, True, True), (40000, False, True)]
)
def test_shared_memory_must_be_asked_for(shared, attribute, runs):
    library = FakeLibrary(stripped.expected_sizes())
    record = stripped.launched(Driver(library), kernel(shared), tensors(), 12, 0, attribute)
    assert record["refused"] == (None if runs else "cuLaunchKernel: CUDA_ERROR_INVALID_VALUE")
    assert (len(library.launches), library.open) == (int(runs), 0)


def test_a_parameter_too_many_is_seen():
    """As where one of Triton's own stayed: nothing is passed for it."""
    library = FakeLibrary([*stripped.expected_sizes(), 8])
    assert Driver(library).parameter_sizes(ctypes.c_void_p(88)) != stripped.expected_sizes()


def test_what_the_driver_refuses_is_told_by_its_name():
    driver = Driver(FakeLibrary([]))
    with pytest.raises(DriverError, match="cuModuleLoadData: CUDA_ERROR_INVALID_PTX"):
        driver.load("no program", "program")
    with pytest.raises(DriverError, match="cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"):
        driver.load("// program", "another")
    assert driver._library.open == 0


def test_the_compiled_plugin_has_the_parameters_that_are_passed():
    """The real stripped program declares as many, of these sizes."""
    pytest.importorskip("triton")
    made = compile_kernel(KernelShape(32, 2, 128, 128**-0.5, 1), choices(90)[-1], 90)
    declared = re.search(r"\.entry\s+\w+\(([^)]*)\)", made.ptx)[1].split(",")
    sizes = [8 if ".u64" in line or ".b64" in line else 4 for line in declared]
    assert sizes == stripped.expected_sizes()
    assert len(SIZES) == sizes.count(4)
    assert made.shared_memory <= stripped.FREE_SHARED


def test_the_cases_of_the_stripped_kernel_are_of_both_branches_and_types():
    assert {case.dtype for case in stripped.CASES} == {"float16", "bfloat16"}
    assert {max(case.lengths) == 1 for case in stripped.CASES} == {True, False}
    assert all(len({*case.lengths, *case.pasts}) > 1 for case in endurance.UNEVEN)


# The other checks of the kernel, by Triton's interpreter ------------------------------------------------

TILES = Tiles(32, 16, 1, 16, 1, 16, 1, 4, blocks=5, min_tiles=2)


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    with interpreter() as call:
        yield call


@pytest.mark.parametrize("lengths", [(1, 1), (19, 3)])
def test_an_int8_cache_is_checked(interpreted, lengths):
    case = Case("float16", 4, 2, 64, (33, 5), lengths, quantized=True)
    result = interpreted(check, case, TILES, "cpu")
    assert result["ok"], result
    assert result["cache_error"] >= 0.25  # in steps: numbers are rounded


def test_launches_again_and_again_have_the_same_bits(interpreted):
    case = Case("float16", 4, 2, 64, (70, 0, 3), (1, 1, 1))
    result = interpreted(endurance.launches, case, TILES, 3, "cpu")
    assert result["ok"], result
    assert (result["launches"], result["differing"]) == (3, 0)
