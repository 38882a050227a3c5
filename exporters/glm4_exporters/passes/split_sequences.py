"""SplitToSequence + SequenceAt -> Split, so that the graph has no sequence type."""

import onnx_ir as ir


class SplitSequences(ir.passes.InPlacePass):
    """Replace each SplitToSequence whose readers are all SequenceAt with constant positions."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type != "SplitToSequence":
                continue
            readers = [user for user, _ in node.outputs[0].uses()]
            positions = [_scalar(reader.inputs[1]) for reader in readers]
            count = len(_constant(node.inputs[1]).numpy())
            axis = node.attributes["axis"].as_int()
            split = ir.node(
                "Split",
                node.inputs,
                {"axis": axis},
                num_outputs=count,
                name=str(node.name).replace("ToSequence", ""),
            )
            for i, value in enumerate(split.outputs):
                value.name = f"{split.name}:{i}"
                value.type = readers[0].outputs[0].type
            graph.insert_before(node, split)
            for reader, position in zip(readers, positions, strict=True):
                ir.convenience.replace_all_uses_with(reader.outputs[0], split.outputs[position])
            graph.remove([*readers, node], safe=True)
            modified = True
        if modified:
            _remove_unread_constants(graph)
        return ir.passes.PassResult(model, modified)


def _constant(value: ir.Value | None) -> ir.TensorProtocol:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ValueError("SplitToSequence or SequenceAt with a size that is not constant")
    return tensor


def _scalar(value: ir.Value | None) -> int:
    return int(_constant(value).numpy().item())


def _remove_unread_constants(graph: ir.Graph) -> None:
    unread = [n for n in graph if n.op_type == "Constant" and not n.outputs[0].uses()]
    graph.remove(unread, safe=True)
