"""Graphs that anybody wrote, with hashes that fit: refused in one line before a runtime opens them."""

import dataclasses
import json
import shutil
import time

import numpy as np
import onnx
import pytest
from bundles import rehash
from onnx import TensorProto, helper, numpy_helper

from glm4_runtime import BundleError, Session
from glm4_runtime.bundle import read_manifest, write_manifest
from glm4_runtime.bundle.graph_checks import check_graph
from glm4_runtime.bundle.graph_io import graph_io
from glm4_runtime.bundle.onnx_file import Tensor, read_graph

INT64 = TensorProto.INT64
HUGE = 2**33  # elements of 4 bytes: 32 GiB


def constant(name, values, dtype=np.int64):
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def node(operator, inputs, output="forged", domain="", **attributes):
    return helper.make_node(operator, inputs, [output] if isinstance(output, str) else output, domain=domain, **attributes)  # fmt: skip


def refusal(folder):
    """The line that an opening is refused with, which takes neither seconds nor memory."""
    began = time.process_time()
    with pytest.raises(BundleError) as caught:
        Session.open(folder)
    assert time.process_time() - began < 5
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 500
    return message


@pytest.fixture
def forge(tmp_path, tiny_bundles):
    """A function that changes the graph of a copy of a bundle, and makes its hashes fit."""

    def forged(change, target="native"):
        folder = shutil.copytree(tiny_bundles[target], tmp_path / "forged")
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return rehash(folder)

    return forged


# What a graph of ours is ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "cpu"])
def test_exported_graphs_pass(demo_quantized, name):
    check_graph(demo_quantized[name], read_manifest(demo_quantized[name]))


def test_what_is_read_is_what_onnx_reads(tiny_bundle):
    graph, model = read_graph(tiny_bundle / "model.onnx"), onnx.load(tiny_bundle / "model.onnx", load_external_data=False)  # fmt: skip
    manifest = read_manifest(tiny_bundle)
    assert (graph.inputs, graph.outputs) == (manifest.inputs, manifest.outputs)
    assert graph.opsets == {entry.domain: entry.version for entry in model.opset_import}
    assert [(n.domain, n.operator, [*n.inputs], [*n.outputs]) for n in graph.nodes] == [
        (n.domain, n.op_type, [*n.input], [*n.output]) for n in model.graph.node
    ]
    for ours, theirs in zip(graph.nodes, model.graph.node, strict=True):
        for attribute in theirs.attribute:
            found, wanted = (
                ours.attributes[attribute.name],
                helper.get_attribute_value(attribute),
            )
            if isinstance(found, Tensor):
                assert found.data == wanted.raw_data
            else:
                assert found == (wanted.decode() if isinstance(wanted, bytes) else tuple(wanted) if isinstance(wanted, list) else wanted)  # fmt: skip
    for tensor in model.graph.initializer:
        found = graph.initializers[tensor.name]
        assert (found.shape, found.data) == (tuple(tensor.dims), tensor.raw_data)
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert (found.location, str(found.offset)) == (place.get("location"), place.get("offset", "0"))
        if place:
            assert found.nbytes == int(place["length"])


# Inputs and outputs ---------------------------------------------------------------------------------


def more_inputs(model):
    model.graph.input.append(helper.make_tensor_value_info("adapter_ids", INT64, ["batch"]))


def more_outputs(model):
    model.graph.output.append(helper.make_tensor_value_info("model.norm.weight", TensorProto.FLOAT, [64]))


def fewer_outputs(model):
    del model.graph.output[-1]


def another_type(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def another_size(model):
    model.graph.input[4].type.tensor_type.shape.dim[3].dim_value = 17


def a_fixed_axis(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def no_shape(model):
    model.graph.input[0].type.tensor_type.ClearField("shape")


def a_sequence(model):
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1


def an_input_that_is_a_constant(model):
    model.graph.initializer.append(constant("past_lengths", [0], np.int32))


def another_opset(model):
    model.opset_import[0].version = 23


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (more_inputs, "has other inputs than the manifest: 1 too many (adapter_ids)"),
        (more_outputs, "has other outputs than the manifest: 1 too many (model.norm.weight)"),
        (fewer_outputs, "has other outputs than the manifest: 1 missing (present_key_values.1.value)"),
        (another_type, 'input_ids is "int32"'),
        (another_size, 'past_key_values.0.key is "float32" ["batch", 2, "capacity", 17]'),
        (a_fixed_axis, 'input_ids is "int64" [1, "sequence"] instead of'),
        (no_shape, "a shape is missing"),
        (a_sequence, "a tensor's type is missing"),
        (an_input_that_is_a_constant, "inputs that are constants too (past_lengths)"),
        (another_opset, "but the manifest says"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_inputs_and_outputs_are_the_manifests(forge, change, reason):
    assert reason in refusal(forge(change))


# Operators ------------------------------------------------------------------------------------------


def an_endless_loop(model):
    body = helper.make_graph(
        [node("Identity", ["go"], "on")],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )
    model.graph.initializer.append(constant("true", True, np.bool_))
    model.graph.node.append(node("Loop", ["", "true"], body=body))


def a_choice(model):
    empty = helper.make_graph([], "empty", [], [])
    model.graph.node.append(node("If", ["past_lengths"], then_branch=empty, else_branch=empty))


def a_function(model):
    body = [node("Identity", ["x"], "y")]
    model.functions.append(helper.make_function("ours", "F", ["x"], ["y"], body, [helper.make_opsetid("", 24)]))  # fmt: skip


def an_unknown_operator(model):
    model.graph.node.append(node("Tokenizer", ["input_ids"], domain="com.microsoft"))


def a_file_reader(model):
    model.graph.node.append(node("ReadFile", ["input_ids"], domain="ai.onnx.contrib"))


def a_standard_operator_of_no_use(model):
    model.graph.node.append(node("NonZero", ["input_ids"]))


def the_operator_of_another_dialect(model):
    model.graph.node.append(node("MatMulNBits", ["input_ids"], domain="com.microsoft"))


def a_sparse_tensor(model):
    model.graph.sparse_initializer.add()


def training(model):
    model.training_info.add()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (an_endless_loop, 'holds a graph in the attribute "body"'),
        (a_choice, 'holds a graph in the attribute "'),
        (a_function, "holds functions"),
        (an_unknown_operator, "does not have (com.microsoft.Tokenizer)"),
        (a_file_reader, "does not have (ai.onnx.contrib.ReadFile)"),
        (a_standard_operator_of_no_use, "does not have (ai.onnx.NonZero)"),
        (the_operator_of_another_dialect, "dialect native does not have (com.microsoft.MatMulNBits)"),
        (a_sparse_tensor, "holds sparse tensors"),
        (training, "holds training information"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_only_the_dialects_operators_run(forge, change, reason):
    assert reason in refusal(forge(change))


# What grows -----------------------------------------------------------------------------------------


def constant_of_shape(model):
    model.graph.initializer.append(constant("size", [HUGE]))
    model.graph.node.append(node("ConstantOfShape", ["size"]))


def expanded(model):
    model.graph.initializer.extend([constant("size", [HUGE]), constant("one", [1.0], np.float32)])
    model.graph.node.append(node("Expand", ["one", "size"]))


def expanded_from_an_input(model):
    model.graph.initializer.append(constant("size", [HUGE]))
    model.graph.node.append(node("Expand", ["past_lengths", "size"]))


def counted(model):
    model.graph.initializer.extend([constant("zero", 0), constant("one", 1), constant("many", HUGE)])
    model.graph.node.append(node("Range", ["zero", "many", "one"]))


def counted_from_an_input(model):
    model.graph.initializer.extend(
        [constant("zero", 0), constant("one", 1), constant("many", HUGE), constant("at", 0)]
    )
    model.graph.node.extend([
        node("Gather", ["input_ids", "at"], "row"), node("Gather", ["row", "at"], "id"),
        node("Add", ["id", "many"], "end"), node("Range", ["zero", "end", "one"]),
    ])  # fmt: skip


def counted_in_small_steps(model):
    model.graph.initializer.extend([constant("zero", 0.0, np.float32), constant("step", 1e-30, np.float32)])
    model.graph.node.extend([
        node("Shape", ["input_ids"], "sizes", start=0, end=1), node("Cast", ["sizes"], "float", to=1),
        node("Squeeze", ["float"], "end"), node("Range", ["zero", "end", "step"]),
    ])  # fmt: skip


def multiplied(model):
    model.graph.initializer.extend([
        constant("column", np.ones((100_000, 1)), np.float32), constant("row", np.ones((1, 100_000)), np.float32)
    ])  # fmt: skip
    model.graph.node.append(node("MatMul", ["column", "row"]))


def added(model):
    model.graph.initializer.extend([
        constant("column", np.ones((100_000, 1)), np.float32), constant("row", np.ones((1, 100_000)), np.float32)
    ])  # fmt: skip
    model.graph.node.append(node("Add", ["column", "row"]))


def computed_over_and_over(model):
    model.graph.node.extend(node("Cast", ["lm_head.weight"], f"c{i}", to=11) for i in range(1000))


def a_tensor_of_32_gib(model):
    model.graph.initializer.append(TensorProto(name="x", dims=[HUGE], data_type=TensorProto.FLOAT))


def a_constant_of_32_gib(model):
    model.graph.node.append(node("Constant", [], value=TensorProto(dims=[HUGE], data_type=TensorProto.FLOAT)))


def too_many_elements(model):
    model.graph.initializer.append(
        TensorProto(name="x", dims=[2**62] * 8, data_type=TensorProto.FLOAT, raw_data=b"1")
    )


def too_many_axes(model):
    model.graph.initializer.append(
        TensorProto(name="x", dims=[1] * 1_100_000, data_type=TensorProto.FLOAT, raw_data=b"1234")
    )


def nine_axes(model):
    model.graph.initializer.append(
        TensorProto(name="x", dims=[1] * 9, data_type=TensorProto.FLOAT, raw_data=b"1234")
    )


def a_negative_size(model):
    model.graph.initializer.append(
        TensorProto(name="x", dims=[-1, -1], data_type=TensorProto.FLOAT, raw_data=b"1234")
    )


def typed_data(model):
    model.graph.initializer.append(helper.make_tensor("x", TensorProto.FLOAT, [2], [1.0, 2.0]))


def strings(model):
    model.graph.initializer.append(helper.make_tensor("x", TensorProto.STRING, [1], ["a" * 1000]))


def many_nodes(model):
    model.graph.node.extend(node("Sigmoid", ["logits"], f"n{i}") for i in range(110_000))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (constant_of_shape, "does not have (ai.onnx.ConstantOfShape)"),
        (expanded, "computes ai.onnx.Expand from constants alone"),
        (expanded_from_an_input, "expands a tensor to a shape that is not an input's"),
        (counted, "computes ai.onnx.Range from constants alone"),
        (counted_from_an_input, "counts in a Range to a number that is no size of an input"),
        (counted_in_small_steps, "counts in a Range"),
        (multiplied, "computes ai.onnx.MatMul from constants alone"),
        (added, "computes ai.onnx.Add from constants alone"),
        (computed_over_and_over, "numbers from constants, too many"),
        (a_tensor_of_32_gib, f'gives "x" 0 bytes of data, but float32 [{HUGE}] takes {4 * HUGE}'),
        (a_constant_of_32_gib, "0 bytes of data, but"),
        (too_many_elements, 'gives "x" 1 bytes of data, but'),
        (too_many_axes, "has more than 1000000 fields"),
        (nine_axes, "has more than 8 numbers in a shape"),
        (a_negative_size, 'gives "x" the shape [-1, -1]'),
        (typed_data, "in another form than bytes"),
        (strings, "in another form than bytes"),
        (many_nodes, "nodes, but at most 100000 are read"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_nothing_grows(forge, change, reason):
    assert reason in refusal(forge(change))


def external(model, **entries):
    tensor = next(t for t in model.graph.initializer if t.name == "lm_head.weight")
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)


def read_often(model):
    tensor = next(t for t in model.graph.initializer if t.name == "lm_head.weight")
    for i in range(1000):
        model.graph.initializer.append(tensor)
        model.graph.initializer[-1].name = f"x{i}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: external(m, location="/etc/passwd"), 'from "/etc/passwd", which the manifest does not list'),
        (lambda m: external(m, location="../model.onnx.data"), "which the manifest does not list"),
        (lambda m: external(m, offset=str(10**18)), "but the file has"),
        (lambda m: external(m, offset="9" * 1000), "has a value of 1000 bytes"),
        (lambda m: external(m, offset="-4096"), "does not say where the data"),
        (lambda m: external(m, length="4"), '4 bytes of data, but float32 [320, 64] takes 81920'),
        (lambda m: external(m, length=""), "does not say where the data"),
        (read_often, "bytes of tensors from model.onnx.data, which has"),
    ],
    ids=["absolute", "parent", "beyond", "digits", "negative", "short", "no length", "often"],
)  # fmt: skip
def test_weights_lie_in_the_bundle(forge, change, reason):
    assert reason in refusal(forge(change))


LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.graph.input[0], "name", LONG),
        lambda m: setattr(m.graph.initializer[0], "name", LONG),
        lambda m: m.graph.node[5].input.append(LONG),
        lambda m: m.graph.node[5].output.append(LONG),
        lambda m: setattr(m.graph.node[5], "op_type", LONG),
        lambda m: setattr(m.graph.node[5], "domain", LONG),
        lambda m: setattr(m.graph.node[5], "name", LONG),
        lambda m: m.graph.node[5].attribute.append(helper.make_attribute(LONG, 1)),
        lambda m: m.graph.node[5].attribute.append(helper.make_attribute("a", LONG)),
        lambda m: m.opset_import.append(helper.make_opsetid(LONG, 1)),
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", LONG),
    ],
    ids=["input", "initializer", "node's input", "node's output", "operator", "domain", "node", "attribute", "text", "opset", "axis"],
)  # fmt: skip
def test_names_of_a_megabyte(forge, change):
    assert "of 1000000 bytes, but at most 512 are read" in refusal(forge(change))


# The model's numbers --------------------------------------------------------------------------------


def renumbered(folder, limits=(), **numbers):
    """The manifest with other numbers that agree with each other."""
    manifest = read_manifest(folder)
    model = dataclasses.replace(manifest.model, **numbers)
    keys = {"hidden_size": "hidden_size", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "num_layers": "num_hidden_layers",
            "vocab_size": "vocab_size", "head_dim": "head_dim"}  # fmt: skip
    config = {**manifest.config, **{keys[n]: v for n, v in numbers.items() if n in keys}}
    io = graph_io(manifest.task, model, manifest.kv_cache)
    made = dataclasses.replace(
        manifest,
        model=model,
        config=config,
        inputs=io.inputs,
        outputs=io.outputs,
        limits=dataclasses.replace(manifest.limits, **dict(limits)),
    )
    write_manifest(folder, made)
    return folder


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"num_layers": 3}, "2 missing (past_key_values.2.key"),
        ({"num_layers": 1}, "2 too many (past_key_values.1.key"),
        ({"num_layers": 999}, "1994 missing"),
        ({"vocab_size": 10**9}, "logits is"),
        ({"head_dim": 8}, "past_key_values.0.key is"),
        ({"num_kv_heads": 4}, "past_key_values.0.key is"),
        ({"hidden_size": 65}, "model.norm.weight of shape [64], but the manifest says hidden_size 65"),
        ({"max_positions": 2**31 - 1, "limits": {"max_seq_len": 2**31 - 1}}, "rotary.cos, but the manifest says"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_the_models_numbers_are_the_graphs(tmp_path, tiny_bundle, numbers, reason):
    folder = shutil.copytree(tiny_bundle, tmp_path / "renumbered")
    assert reason in refusal(renumbered(folder, **numbers))


def test_heads_are_those_of_the_attention(tmp_path, tiny_bundles):
    folder = shutil.copytree(tiny_bundles["ort"], tmp_path / "renumbered")
    said = refusal(renumbered(folder, num_heads=8))
    assert "attention of num_heads 4, but the manifest says 8" in said


# Bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 1000,
        b"\x3a\xff\xff\xff\xff\x0f",  # a graph of 4 GiB
        b"\x3b\x3c",  # a group
        b"\x3e\x00",  # a wire type that does not exist
        b"\x02\x00",  # field 0
        b"\x3a\x00" * 2,  # two graphs, which protobuf would merge
        b"\x38\x01",  # a number as the graph
        b"\x0a\x00" * 600_000,  # more than a million fields
        b"\x3a\x02\x2a\x00",  # a tensor without a type
        b"not a graph",
    ],
)
def test_what_is_no_graph(tmp_path, tiny_bundles, data):
    folder = shutil.copytree(tiny_bundles["native"], tmp_path / "bytes")
    (folder / "model.onnx").write_bytes(data)
    refusal(rehash(folder))


def test_every_truncation_is_refused(tmp_path, tiny_bundles):
    manifest = read_manifest(tiny_bundles["native"])
    data = (tiny_bundles["native"] / "model.onnx").read_bytes()
    for length in range(0, len(data), 997):
        (tmp_path / "model.onnx").write_bytes(data[:length])
        with pytest.raises(BundleError) as caught:
            check_graph(tmp_path, manifest)
        assert len(str(caught.value)) <= 500


def test_a_graph_of_more_than_16_mib(tmp_path, tiny_bundles):
    folder = shutil.copytree(tiny_bundles["native"], tmp_path / "large")
    with (folder / "model.onnx").open("ab") as file:
        file.truncate((16 << 20) + 1)
    assert "but at most 16777216 are read" in refusal(rehash(folder))


def test_an_unused_field_is_no_way_around(forge):
    """A second graph, appended to the file, is merged into the first by protobuf."""

    def two(model):
        other = onnx.ModelProto()
        other.graph.node.append(node("Loop", ["past_lengths"]))
        model.MergeFromString(other.SerializeToString())

    folder = forge(two)
    assert "ai.onnx.Loop" in refusal(folder)
    clean = forge_bytes(folder)
    assert "the graph is there twice" in refusal(clean)


def forge_bytes(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dialect"] == "native"
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    loop = onnx.ModelProto()
    loop.graph.node.append(model.graph.node.pop())
    data = model.SerializeToString() + loop.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    return rehash(folder)


def test_the_graph_that_an_engine_was_built_from(forge):
    """Its inputs are its own, its operators are not."""
    folder = forge(more_inputs)
    manifest = dataclasses.replace(read_manifest(folder), dialect="tensorrt-rtx", engine=object())
    check_graph(folder, manifest)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    a_standard_operator_of_no_use(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"the dialect native does not have \(ai.onnx.NonZero\)"):
        check_graph(folder, manifest)
