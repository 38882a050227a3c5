"""The operators that a session takes in each dialect are those that exports make: no more and no fewer."""

import itertools

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.architecture import EMBEDDING, expected_tensors
from glm4_exporters.cache_types import KV_CACHES, choose_cache
from glm4_exporters.config import TASKS, Glm4Config
from glm4_exporters.form import choose_form
from glm4_exporters.passes import model_passes
from glm4_exporters.passes import run as apply
from glm4_exporters.quantize.kv_cache import CacheScales
from glm4_exporters.quantize.recipe import Recipe
from glm4_exporters.targets import ACTIVATIONS, ONNX_RUNTIME, PRECISIONS, RECIPE_FORMATS, TARGETS
from glm4_runtime import Session
from glm4_runtime.bundle import AdapterSlots, read_manifest
from glm4_runtime.bundle.element_types import QUANTIZED_CACHES
from glm4_runtime.bundle.graph_checks import OPERATORS
from glm4_runtime.errors import ExportError

OPENED = [name for name, row in TARGETS.items() if row.runtime == ONNX_RUNTIME]
# What decides which operators a pass can use: whole blocks, the size of a head, a tied head, biases.
SHAPES = {
    "whole blocks": {"hidden_size": 128, "intermediate_size": 256},
    "heads of 12, parts of blocks": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True, "attention_bias": False},
}


def combinations(task):
    """What the command line offers for a task: target, precision, activations, KV cache, recipe's format."""
    caches = KV_CACHES if task == "causal-lm" else KV_CACHES[:1]
    plain = itertools.product(TARGETS, PRECISIONS, (None, *ACTIVATIONS), caches, (None,))
    mixed = itertools.product(TARGETS, ("int8",), (None,), caches[:1], RECIPE_FORMATS)
    return [*plain, *mixed]


def chosen_form(config, task, target, precision, activations, cache, recipe):
    own = Recipe({"*.mlp.down_proj.weight": recipe}) if recipe else None
    form = choose_form(config, task, target, precision, activations, own)
    return form.with_cache(choose_cache(config, task, form.target, form.activations, cache))


def graph_of(config, task, form, slots=None):
    """The graph that an export writes, without weights; what calibration finds is made up."""
    from glm4_exporters.trace import trace

    ones = np.ones((config.num_key_value_heads, config.head_dim), np.float32)
    scales = [CacheScales(ones, ones)] * config.num_hidden_layers if form.kv_cache in QUANTIZED_CACHES else []
    made_up = dict(cache_scales=scales, key_factors=[ones] * config.num_hidden_layers)
    steps = model_passes(form, norm_bits={}, input_scales=dict.fromkeys(form.rounded_inputs, 1.0), slots=slots, **made_up)  # fmt: skip
    return apply(trace(config, task, form.activations), steps).graph


def graphs_of(config, task, form):
    """The graph, and the graph that takes adapters, if the target has one."""
    yield graph_of(config, task, form)
    if form.target.name in OPENED and task == "causal-lm":
        shapes = {name: shape for name, shape in expected_tensors(config, task).items() if len(shape) == 2}
        matrices = {
            name.removesuffix(".weight"): shape for name, shape in shapes.items() if name != EMBEDDING
        }
        yield graph_of(config, task, form, AdapterSlots(2, 4, matrices, None))


def every_form(config, task, activations):
    """Each way in which the command line stores a model, once."""
    forms = []
    for combination in combinations(task):
        try:
            form = chosen_form(config, task, *combination)
        except ExportError:
            continue
        if form.activations in activations and form not in forms:
            forms.append(form)
    return forms


def test_the_table_has_the_operators_that_exports_make_and_no_others():
    found: dict = {dialect: set() for dialect in OPERATORS}
    graphs = 0
    for shape, overrides in SHAPES.items():
        config = Glm4Config.from_dict(tiny_config(num_hidden_layers=1, **overrides))
        whole = shape == "whole blocks"
        for task in TASKS[: 1 + whole]:  # the other tasks have fewer operators
            activations = ["float32"] + ["float16"] * (whole and task == "causal-lm")
            for form in every_form(config, task, activations):
                for made in graphs_of(config, task, form):
                    found[form.target.dialect] |= {(node.domain, node.op_type) for node in made}
                    graphs += 1
    assert graphs > 100
    assert found == OPERATORS


@pytest.mark.more
@pytest.mark.parametrize("task", TASKS)
def test_every_combination_opens(tmp_path, task):
    """Whatever the command line exports for ONNX Runtime, a session opens."""
    text = tmp_path / "text.ids"
    text.write_text(" ".join(str(5 + i % 300) for i in range(600)))
    opened = 0
    for i, overrides in enumerate(SHAPES.values()):
        source = write_checkpoint(tmp_path / f"checkpoint-{i}", tiny_config(**overrides), task=task)
        for combination in combinations(task):
            opened += _opens(source, tmp_path / "bundle", text, task, combination)
    assert opened > 50


def _opens(source, folder, text, task, combination):
    target, precision, activations, cache, recipe = combination
    if target not in OPENED:
        return False
    lines = folder.with_name("recipe.toml")
    lines.write_text(f'[tensors]\n"*.mlp.down_proj.weight" = "{recipe}"\n')
    needs_text = "int8-sq" in (precision, recipe)
    options = ExportOptions(
        target=target, precision=precision, activations=activations, kv_cache=cache, task=task, parity=False,
        calibration=str(text) if needs_text else None, recipe=str(lines) if recipe else None,
    )  # fmt: skip
    try:
        export(source, folder, options, force=True)
    except ExportError:
        return False
    if "CPUExecutionProvider" not in read_manifest(folder).providers:
        return False
    Session.open(folder).close()
    return True
