"""A static capacity of the cache."""

from graphs import lower, traced

from glm4_exporters.passes.fix_capacity import FixCapacity


def test_fix_capacity():
    model = lower(traced(), "native")
    assert FixCapacity(512)(model).modified
    shapes = [v.shape for v in (*model.graph.inputs, *model.graph.outputs) if "key_values" in v.name]
    assert len(shapes) == 8
    assert all(shape[2] == 512 for shape in shapes)
    assert not FixCapacity(512)(model).modified
