"""The rounding of a quantized cache, in the graph that parity checks for an engine."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from checkpoints import tiny_config
from graphs import lower

from glm4_exporters.config import Glm4Config
from glm4_exporters.passes.round_cache import RoundCache
from glm4_exporters.quantize.kv_cache import CacheScales
from glm4_exporters.trace import trace


@pytest.mark.parametrize(("element", "limit"), [("int8", 127.0), ("float8e4m3fn", 448.0)])
def test_a_graph_rounds_keys_and_values_as_the_cache_would(element, limit):
    """Stored numbers are codes times scales; large ones saturate; nothing else of the graph changes."""
    config = Glm4Config.from_dict(tiny_config())
    rng = np.random.default_rng(3)
    scales = [CacheScales(*rng.uniform(0.5, 1.5, (2, 2, 16)).astype(np.float32) / limit) for _ in range(2)]
    outputs = {}
    for name, steps in (("plain", []), ("rounded", [RoundCache(scales, element)])):
        model = lower(trace(config, "causal-lm", "float32"), "native")
        draw = np.random.default_rng(5)
        for value in model.graph.initializers.values():
            if value.const_value is None:
                shape = [int(axis) for axis in value.shape]
                value.const_value = ir.tensor(draw.normal(0, 0.4, shape).astype(np.float32))
        for step in steps:
            assert step(model).modified
        session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        feed = {"input_ids": np.arange(6)[None], "query_lengths": np.array([6], np.int32)}
        feed |= {"past_lengths": np.zeros(1, np.int32), "logits_indices": np.arange(6)[None]}
        empty = np.zeros((1, 2, 6, 16), np.float32)
        feed |= {i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values.")}
        names = [o.name for o in session.get_outputs()]
        outputs[name] = dict(zip(names, session.run(names, feed), strict=True))
    for side, scale in (
        ("key", scales[0].key),
        ("value", scales[0].value),
    ):  # the first layer reads the same input
        wide, found = (
            outputs[name][f"present_key_values.0.{side}"] / scale[:, None] for name in ("plain", "rounded")
        )
        wanted = np.clip(wide, -limit - (element == "int8"), limit)
        wanted = (
            np.rint(wanted)
            if element == "int8"
            else torch.from_numpy(wanted).to(torch.float8_e4m3fn).float().numpy()
        )
        assert np.abs(wide).max() > limit
        off = np.abs(found - wanted) > 1e-3 * np.abs(wanted) + 1e-3
        assert off.mean() < 0.01  # a number half way between two may round to either
    assert np.abs(outputs["plain"]["logits"] - outputs["rounded"]["logits"]).max() > 1e-3
