"""What one decoded token of the demo bundle costs, in things that are counted and not timed.

Where a change adds work on purpose, the tables here change with it, and the review sees by how much.
"""

import gc
import statistics
import sys
import tracemalloc
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from cpu_operators import CPU_TARGET

import glm4_runtime
from glm4_plugins.block_product import OPERATOR
from glm4_plugins.operator import OP_TYPE as ATTENTION
from glm4_runtime import SamplingParams, Session
from glm4_runtime.bundle import read_manifest

# ONNX Runtime's optimised graph: of each layer, and once.
LAYER = {
    "MatMulNBits": 6,  # q, k, v, o_proj, gate_up, down
    "GroupQueryAttention": 1,
    "RMSNormalization": 2,  # after attention, after the MLP
    "SkipSimplifiedLayerNormalization": 2,  # before the MLP, before the next layer: each adds the residual too
    "Split": 1,  # gate and up
    "QuickGelu": 1,  # SiLU of gate
    "Mul": 1,  # times up
}
ONCE = {
    "GatherBlockQuantized": 1,  # embedding
    "RMSNormalization": 1,  # before the first layer
    "GatherND": 1,  # the positions that get logits
    "Unsqueeze": 1,  # their indices
    "MatMulNBits": 1,  # head
    # seqlens_k and total_sequence_length, a few numbers, for all layers
    "Shape": 1, "Cast": 1, "Sub": 1, "Add": 2, "ReduceMax": 1, "Squeeze": 1,
}  # fmt: skip

# Of target cpu, whose product is its bias and gate as well, and whose attention takes the lengths as they are.
CPU_LAYER = {name: LAYER[name] for name in ("RMSNormalization", "SkipSimplifiedLayerNormalization")}
CPU_LAYER |= {OPERATOR: LAYER["MatMulNBits"], ATTENTION: 1}
CPU_ONCE = {
    name: ONCE[name] for name in ("GatherBlockQuantized", "RMSNormalization", "GatherND", "Unsqueeze")
}
CPU_ONCE |= {OPERATOR: 1}
TABLES = {"int8": (LAYER, ONCE), "int4": (LAYER, ONCE), "cpu": (CPU_LAYER, CPU_ONCE)}

# Calls that our own code makes per token, into Python and into C; those within NumPy and ONNX Runtime aren't ours.
# Counted with Python 3.11; later versions make fewer, since their comprehensions are no calls.
SLACK = 1.1  # a call more is no fault; one for each slot, layer or number is
CALLS = {
    "decode_block": 43,
    "decode": 46,
    "decode, four slots": 82,
    "generate": 93,
    "generate, sampling": 125,
}
# Most memory that a token takes on top of what the step before left: so many rows of logits, and small objects.
# Not of sampling, whose arrays are of another length for each token, so that NumPy's caches of small blocks fill for long.
ROWS = {
    "decode_block": 0,  # logits stay where they are
    "decode": 1,  # the caller's own copy
    "decode, four slots": 4,
    "generate": 3,  # the log-probability: exp of the row, and its sum in float64
}
SMALL = 2048
KEPT = 16  # bytes per token, fewer than any object has: nothing is kept of it


@pytest.fixture
def session(demo_quantized):
    with Session.open(demo_quantized["int8"], max_batch_size=4, threads=1) as opened:
        for slot in range(4):
            opened.prefill(slot, [5, 6, 7])
        yield opened


def generated(session, **params):
    session.release(3)
    tokens = session.generate([5, 6, 7], SamplingParams(max_tokens=240, ignore_eos=True, **params))
    return lambda: next(tokens)


STEPS = {
    "decode_block": lambda session: lambda: session.decode_block({0: 9}),
    "decode": lambda session: lambda: session.decode({0: 9}),
    "decode, four slots": lambda session: lambda: session.decode({0: 9, 1: 10, 2: 11, 3: 12}),
    "generate": generated,
    "generate, sampling": lambda session: generated(session, temperature=0.7, top_k=20, seed=1),
}


@pytest.fixture
def step(session, kind):
    """A function that makes one token, past what only the first ones cost."""
    made = STEPS[kind](session)
    for _ in range(3):
        made()
    return made


@pytest.mark.parametrize("name", ["int8", "int4", CPU_TARGET])
def test_the_optimised_graph_holds_what_it_needs(tmp_path, demo_quantized, monkeypatch, name):
    """As the session itself has it optimised: what its options leave undone shows here too."""
    real, path = onnxruntime.SessionOptions, tmp_path / "optimised.onnx"

    def options():
        made = real()
        made.optimized_model_filepath = str(path)
        return made

    monkeypatch.setattr(onnxruntime, "SessionOptions", options)
    Session.open(demo_quantized[name]).close()
    graph = onnx.load(path, load_external_data=False).graph
    layers = read_manifest(demo_quantized[name]).model.num_layers
    each, once = TABLES[name]
    expected = Counter({kind: count * layers for kind, count in each.items()}) + Counter(once)
    assert Counter(node.op_type for node in graph.node) == expected
    # no activation and no weight changes its type in a step: a Cast is of a shape
    makers = {name: node.op_type for node in graph.node for name in node.output}
    assert {makers[node.input[0]] for node in graph.node if node.op_type == "Cast"} <= {"Shape"}


def calls(step):
    """How many calls the runtime makes in one step."""
    ours = glm4_runtime.__path__[0]
    count = 0

    def profile(frame, event, _):
        nonlocal count
        caller = {"call": frame.f_back, "c_call": frame}.get(event)
        count += caller is not None and caller.f_code.co_filename.startswith(ours)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("kind", CALLS)
def test_calls_per_token(step, kind):
    # the median, because a token that ends a character has more to decode
    found = statistics.median(calls(step) for _ in range(15))
    assert CALLS[kind] / 2 < found <= SLACK * CALLS[kind]


@pytest.fixture
def traced():
    gc.freeze()  # what is loaded so far need not be looked through again and again
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.unfreeze()


def allocated(step):
    """The most memory in use within a step, over what was in use before it."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    step()
    return tracemalloc.get_traced_memory()[1] - before


def growth(step, count):
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(count):
        step()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before


@pytest.mark.parametrize("kind", ROWS)
def test_memory_per_token(step, kind, session, traced):
    row = 4 * session.manifest.model.vocab_size
    assert statistics.median(allocated(step) for _ in range(15)) <= ROWS[kind] * row + SMALL
    # the least of five: caches fill in some windows, what is kept of every token shows in all
    assert min(growth(step, 40) for _ in range(5)) <= 40 * KEPT


def test_nothing_is_bound_anew_and_caches_are_bound_in_place(demo_quantized, monkeypatch):
    bound = {"bind_input": [], "bind_output": []}

    def recorded(name, real):
        def bind(binding, tensor, device, index, dtype, shape, address):
            bound[name].append((tensor, address))
            real(binding, tensor, device, index, dtype, shape, address)

        return bind

    for name in bound:
        monkeypatch.setattr(onnxruntime.IOBinding, name, recorded(name, getattr(onnxruntime.IOBinding, name)))
    with Session.open(demo_quantized["int8"]) as session:
        session.prefill(0, [5, 6, 7])
        session.decode({0: 8})
        past = {tensor[5:]: at for tensor, at in bound["bind_input"] if tensor.startswith("past_key_values")}
        present = {tensor[8:]: at for tensor, at in bound["bind_output"] if tensor.startswith("present")}
        assert past == present
        assert len(past) == 2 * session.manifest.model.num_layers == len(set(past.values()))
        before = {name: len(calls) for name, calls in bound.items()}
        logits = {session.decode_block({0: token})[1].ctypes.data for token in range(20)}
        assert {name: len(calls) for name, calls in bound.items()} == before
        assert len(logits) == 1


def test_one_row_of_logits_is_the_callers_own(session):
    """What is not allocated anew is copied where it is handed out."""
    first = session.decode({0: 9})[0]
    kept = first.copy()
    session.decode({0: 10})
    prompt = session.prefill(1, [9], logits="all")
    session.prefill(1, [10], logits="all")
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, session.decode_block({0: 11})[1])
    assert not np.shares_memory(prompt, session.prefill(1, [11]))
