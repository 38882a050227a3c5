"""Every name that we use of TensorRT, Polygraphy and CUDA is one of the real packages, which need no GPU to be asked."""

import ast
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import foreign_names
import pytest
import tensorrt_without_gpu

SESSION = Path(foreign_names.ROOT / foreign_names.SESSION)
ENGINE_FILES = f"{foreign_names.SESSION}/engine_files.py"
WORKER = f"{foreign_names.EXPORTERS}/engine/worker.py"


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def kind(request):
    if request.param == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx")
    elif reason := tensorrt_without_gpu.missing():
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def ask(tmp_path_factory, kind):
    """Reads sources in a process of its own, where one TensorRT is loaded."""
    folder = tmp_path_factory.mktemp("tensorrt")
    if kind == "tensorrt":
        tensorrt_without_gpu.build(folder)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def answer(sources=None, function=foreign_names.problems_of):
            return pool.submit(function, kind, folder, sources).result()

        yield answer


def test_every_name_is_there(ask, kind):
    problems, checked = ask()
    assert problems == []
    used = {
        "deserialize_cuda_engine",
        "execute_async_v3",
        "build_serialized_network_to_stream",
        "ignore_mismatch",
    }
    used |= (
        {"is_stream_capturable", "get_engine_validity"} if kind == "tensorrt-rtx" else {"KernelLaunchParams"}
    )
    assert used <= set(checked)
    print(kind, version({"tensorrt": "tensorrt-cu13-bindings"}.get(kind, kind)), len(checked), "names")


def test_the_stand_ins_invent_no_name(ask):
    """Else the session's tests could pass by names that TensorRT does not have."""
    assert ask(function=foreign_names.invented_by_the_stand_ins) == []


def edited(file, old, new):
    source = (foreign_names.ROOT / file).read_text()
    assert source.count(old) == 1, old
    return {file: source.replace(old, new)}


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            ENGINE_FILES,
            "(engine.num_io_tensors):",
            "(engine.num_bindings):",
            "ICudaEngine has no num_bindings",
        ),
        (
            ENGINE_FILES,
            "Strategy.USER_MANAGED\n        return",
            "Strategy.MANUAL\n        return",
            "has no MANUAL",
        ),
        (
            ENGINE_FILES,
            "context.set_device_memory(",
            "context.set_memory(",
            "IExecutionContext has no set_memory",
        ),
        (
            WORKER,
            "ignore_mismatch=False",
            "ignore_mismatches=False",
            "set_timing_cache takes no ignore_mismatches",
        ),
        (WORKER, '"progress_monitor": monitor', '"progress": monitor', "CreateConfig takes no progress"),
        (
            WORKER,
            "CreateConfig, Profile",
            "CreateConfig, Profiles",
            "there is no polygraphy.backend.trt.Profiles",
        ),
        (WORKER, "writer.failure.strerror", "told.by_nobody", "what is told, that it has by_nobody"),
        (WORKER, "parser.get_error(", "parser.get_fault(", "OnnxParser has no get_fault"),
        (
            WORKER,
            "with config.get_timing_cache().serialize() as timings:",
            "from polygraphy.backend.trt.util import get_timing_cache_data\n        with x as timings:",
            "there is no polygraphy.backend.trt.util.get_timing_cache_data",
        ),
    ],
)
def test_a_name_that_is_not_there_is_found(ask, file, old, new, said):
    problems, _ = ask(edited(file, old, new))
    assert problems
    assert said in problems[0]
    assert {problem.partition(":")[0] for problem in problems} == {file}


def test_what_only_rtx_has_is_not_used_for_both(ask, kind):
    """As the runtime cache once was: where both kinds run, it is missed in one of them."""
    problems, _ = ask(edited(ENGINE_FILES, "class RtxEngines(Engines):", "class Others(Engines):"))
    if kind == "tensorrt-rtx":
        assert problems == []
    else:
        found = {problem.rpartition(" ")[2] for problem in problems}
        assert {
            "ComputeCapability",
            "get_engine_validity",
            "set_runtime_cache",
            "is_stream_capturable",
        } <= found


def test_what_the_plugin_uses(ask, kind):
    if kind == "tensorrt-rtx":
        pytest.skip("TensorRT-RTX takes no plugins")
    for old, new, said in (
        ("shared_mem=kernel", "shared_memory=kernel", "KernelLaunchParams takes no shared_memory"),
        ("trt.DataType.BF16:", "trt.DataType.BFLOAT16:", "DataType has no BFLOAT16"),
        ("trtp.from_shape_expr(", "trtp.from_shape(", "has no from_shape"),
        ('named["query"].like()', 'named["query"].alike()', "TensorDesc has no alike"),
    ):
        problems, _ = ask(edited(foreign_names.PLUGIN, old, new))
        assert len(problems) == 1, problems
        assert said in problems[0]


def test_every_name_of_cuda_is_there():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = set()
    for path in SESSION.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(text, str) and re.fullmatch(r"cuda[A-Z]\w+", text):
                names.add(text)
    members = {name for kind in vars(runtime).values() for name in getattr(kind, "__members__", ())}
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaMemcpyDeviceToDevice"} <= names
    assert {name for name in names if not hasattr(runtime, name) and name not in members} == set()
