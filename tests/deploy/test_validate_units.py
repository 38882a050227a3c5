"""The parts of validate that need no model: gates, bands, intervals, and what is said while it works."""

import itertools
import json
import re
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from glm4_deploy import show
from glm4_deploy.thresholds import CACHE_SUFFIXES, PARITY, named_gate
from glm4_deploy.thresholds import GATES as NAMES
from glm4_deploy.validate.bands import BANDS, ORDER, arithmetic_of, find_culprit, is_out_of_band
from glm4_deploy.validate.drift import BlockError, Error, ErrorSum
from glm4_deploy.validate.gates import METRICS, PRECISION_ROWS, Check, load_gate
from glm4_deploy.validate.run import _open_questions
from glm4_deploy.validate.statistics import Estimate, perplexity, perplexity_ratio
from glm4_exporters.targets import PRECISIONS
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import RequestError


@pytest.fixture
def manifest(tiny_bundles):
    return read_manifest(tiny_bundles["ort"])


# Gates --------------------------------------------------------------------------------------------


def test_named_gates_have_every_precision_and_metric_and_grow_looser():
    gates = {name: named_gate(name) for name in NAMES}
    for row in PRECISION_ROWS:
        for metric, about in METRICS.items():
            limits = [gates[name][row][metric] for name in NAMES]
            assert limits == sorted(limits, reverse=about.at_least), (row, metric)
    for name in NAMES:  # a quantized cache costs something, and fp8 more than int8
        for precision in PRECISIONS:
            rows = [
                gates[name][precision + suffix]
                for suffix in ("", *(CACHE_SUFFIXES[c] for c in ("int8", "fp8")))
            ]
            assert rows[0]["kl_mean"] < rows[1]["kl_mean"] < rows[2]["kl_mean"]


def test_every_limit_has_its_reason_beside_it():
    text = files("glm4_deploy").joinpath("thresholds.toml").read_text("utf-8")
    assert set(PARITY) == set(PRECISIONS)
    for part in re.split(r"^(?=\[)", text, flags=re.M)[1:]:
        lines = [line for line in part.splitlines()[1:] if line and not line.startswith("#")]
        assert all("#" in line for line in lines) or part.startswith("[band"), (
            part
        )  # bands: one reason for all


def test_limits_follow_from_those_of_the_default_gate():
    strict, default, loose = (named_gate(name)["int8"] for name in NAMES)
    assert (strict["kl_mean"], default["kl_mean"], loose["kl_mean"]) == (5e-4, 1e-3, 3e-3)
    assert (strict["top1_agreement"], loose["top1_agreement"]) == (0.99, 0.94)
    assert default["kl_p99"] == 10 * default["kl_mean"]
    assert named_gate("default")["int8+kv-int8"]["perplexity_ratio"] == 1.003


def test_the_promised_limits_are_the_default_gates():
    gates = named_gate("default")
    rows = ("int8", "int8+kv-int8", "int8-sq")
    assert [gates[row]["perplexity_ratio"] for row in rows] == [1.001, 1.003, 1.01]


def test_a_file_extends_a_named_gate(tmp_path, manifest):
    path = tmp_path / "gate.toml"
    path.write_text('extends = "strict"\n[fp32]\nkl_mean = 0.5\n')
    own, strict = load_gate(str(path), manifest), load_gate("strict", manifest)
    assert own.limits == {**strict.limits, "kl_mean": 0.5}
    assert "label_agreement" not in own.limits  # another task's


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[fp23]\nkl_mean = 1", "limits for 'fp23'; the precisions are fp32, "),
        ("[fp32]\nkl_median = 1", "limits 'kl_median'; the metrics are perplexity_ratio, kl_mean,"),
        ("[fp32]\nkl_mean = 'low'", "kl_mean is 'low', but must be a number"),
        ("[fp32]\nkl_mean = true", "kl_mean is True"),
        ("[fp32]\nkl_mean = nan", "must be a number"),
        ("fp32 = 3", "must be a table"),
        ("[int8]\nkl_mean = 1", r"no limits for fp32; it has int8. Add \[fp32\]"),
        ('extends = "mild"', "extends 'mild'; it can extend strict, default, loose"),
        ("[fp32", "is not TOML"),
        ("[fp32]", r"has no limit for a metric of a causal-lm bundle; add a limit to \[fp32\]"),
    ],
)
def test_a_gate_that_says_something_else_is_refused(tmp_path, manifest, text, says):
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=says):
        load_gate(str(path), manifest)


def test_a_check_holds_a_metric_from_its_own_side():
    assert Check("kl_mean", 0.1, 0.1).passed
    assert not Check("kl_mean", 0.11, 0.1).passed
    assert Check("top1_agreement", 0.99, 0.99).passed
    assert not Check("top1_agreement", 0.98, 0.99).passed
    assert not Check("kl_mean", float("nan"), 0.1).passed
    assert not Check("top1_agreement", float("inf"), 0.99).passed
    assert Check("kl_mean", None, 0.1).passed
    assert not Check("kl_mean", None, 0.1).measured
    assert "must be at least 0.99" in Check("top1_agreement", 0.98, 0.99).line


def test_a_perplexity_below_the_references_is_called_chance():
    report = SimpleNamespace(comparisons=[SimpleNamespace(ratio=Estimate(0.9213, 0.9, 0.95))], checks=())
    (note,) = _open_questions(report)
    assert "7.87 % below the reference's: chance and no gain" in note
    assert "chance and no gain" in Check("perplexity_ratio", 0.9213, 1.001).line  # of JUnit
    report.comparisons[0].ratio = Estimate(1.002, 1.0, 1.003)
    assert _open_questions(report) == []


# Bands --------------------------------------------------------------------------------------------


def block(layer, name, arithmetic, drift, local, worst=0.0):
    fine = Error(drift, 1.0, drift)
    return BlockError(layer, name, (), arithmetic, fine, None if local is None else Error(local, 1.0, worst))


def test_bands_grow_with_the_coarseness_of_the_numbers():
    for finer, coarser in itertools.pairwise(ORDER):
        assert BANDS[finer].local < BANDS[coarser].local < BANDS[coarser].worst
        assert BANDS[finer].drift < BANDS[coarser].drift


def test_the_culprit_is_the_first_that_is_wrong_by_itself():
    blocks = [
        block(0, "qk", "int8", 0.01, 0.01),
        block(0, "o_proj", "int8", 0.9, 0.5),
        block(1, "qk", "int8", 0.9, 0.9),
    ]
    assert find_culprit(blocks).error is blocks[1]
    assert [is_out_of_band(one) for one in blocks] == [False, True, True]


def test_one_bad_position_is_enough():
    blocks = [block(0, "qk", "float16", 0.001, 0.001, worst=0.9)]
    assert "at its worst position" in find_culprit(blocks).why


def test_a_norm_in_an_int8_bundle_is_held_to_its_own_arithmetic():
    blocks = [block(0, "input_layernorm", "float32", 0.01, 0.01)]
    assert find_culprit(blocks).error.block == "input_layernorm"


@pytest.mark.parametrize("bits", [8, 4])
def test_our_own_product_computes_with_its_numbers_and_not_with_its_scales_type(bits):
    node = onnx.helper.make_node(
        "BlockQuantizedMatMul", ["x", "w", "scales"], ["y"], domain="glm4", bits=bits
    )
    types = {"x": onnx.TensorProto.FLOAT, "w": onnx.TensorProto.UINT8, "scales": onnx.TensorProto.BFLOAT16}
    assert arithmetic_of([node], types) == f"int{bits}"


@pytest.mark.parametrize(("stored", "expected"), [("FLOAT8E4M3FN", "fp8"), ("INT8", "int8-sq")])
def test_a_product_of_rounded_inputs_is_of_what_they_are_rounded_to(stored, expected):
    nodes = [onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])]
    assert arithmetic_of(nodes, {"zero": getattr(onnx.TensorProto, stored)}) == expected


def test_nvfp4_is_known_by_its_scales_and_mxfp8_counts_as_fp8():
    """The graph has NVFP4's 4-bit floats as int8."""
    float8, int8, float16 = (getattr(onnx.TensorProto, name) for name in ("FLOAT8E4M3FN", "INT8", "FLOAT16"))
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["scales", "total"], ["wide"]),
        onnx.helper.make_node("DequantizeLinear", ["codes", "wide"], ["w"], axis=1, block_size=16),
    ]
    types = {"scales": float8, "codes": int8, "total": float16, "wide": float16, "w": float16}
    assert arithmetic_of(nodes, types) == "nvfp4"
    assert arithmetic_of(nodes[1:], types) == "int8"
    assert arithmetic_of(nodes[1:], types | {"codes": float8}) == "fp8"


def test_drift_is_held_to_the_coarsest_arithmetic_so_far():
    blocks = [block(0, "qk", "int8", 0.1, 0.01), block(0, "attention_residual", "float32", 0.1, 0.0)]
    assert find_culprit(blocks) is None
    assert find_culprit([*blocks, block(1, "mlp_residual", "float32", 0.5, 0.0)]).error.layer == 1


def test_nan_is_a_fault():
    assert "NaN" in find_culprit([block(0, "qk", "int4", 0.1, float("nan"))]).why
    assert find_culprit([block(None, "head", "int4", float("nan"), None)]).error.block == "head"


def test_errors_in_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(2, 75, 12)).astype(np.float32)
    found = wanted + 0.01 * rng.normal(size=wanted.shape).astype(np.float32)
    total = ErrorSum()
    for one, other in zip(wanted, found, strict=True):
        total.add(one, other)
    error = total.error()
    difference = np.linalg.norm(found - wanted)
    assert error.relative == pytest.approx(difference / np.linalg.norm(wanted), rel=1e-5)
    cosine = (wanted * found).sum() / np.linalg.norm(wanted) / np.linalg.norm(found)
    assert error.cosine == pytest.approx(cosine, rel=1e-6)
    each = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert error.worst == pytest.approx(each.max(), rel=1e-5)


# Intervals ----------------------------------------------------------------------------------------


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says():
    """Of 200 texts, whose tokens' differences depend on their neighbours, about 190 intervals hold the truth."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        noise = rng.normal(size=2002)
        difference = 0.01 + 0.05 * (noise[2:] + noise[1:-1] + noise[:-2])
        base = -rng.exponential(3, 2000)
        found = perplexity_ratio(
            [base[:700], base[700:]], [(base - difference)[:700], (base - difference)[700:]]
        )
        covered += found.low <= np.exp(0.01) <= found.high
    assert 180 <= covered <= 198


def test_pairing_takes_the_texts_own_difficulty_out():
    base = -np.random.default_rng(2).exponential(3, 1000)
    ratio, alone = perplexity_ratio([base], [base - 0.02]), perplexity([base])
    assert ratio.value == ratio.low == pytest.approx(np.exp(0.02))
    assert ratio.high == pytest.approx(np.exp(0.02))
    assert alone.high - alone.low > 0.1 * alone.value


def test_too_few_tokens_have_no_interval():
    found = perplexity([np.array([-1.0, -3.0])])
    assert found.value == pytest.approx(np.exp(2))
    assert found.low is found.high is None


def test_a_loss_beyond_floats_is_an_infinite_perplexity():
    assert perplexity([np.full(10, -1e4)]).value == np.inf


# What is said while it works ----------------------------------------------------------------------


def test_the_time_left_is_estimated(capsys, monkeypatch):
    now = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr(show.time, "monotonic", lambda: next(now))
    with show.shown_progress() as report:
        report("compare", 0, 100)
        report("compare", 25, 100)
        report("compare", 100, 100)
    assert capsys.readouterr().err.splitlines() == [
        "compare",
        "compare 25 %, about 2 min left",
        "compare 100 %",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert show.duration(seconds) == text


def test_the_corpus_is_mixed_and_whole():
    lines = files("glm4_deploy.validate").joinpath("corpus.jsonl").read_text("utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert set(kinds[:5]) == {"prose", "chinese", "code", "numbers", "chat"}  # a short run sees all of them
    assert sum(len(json.loads(line)["text"]) for line in lines) > 8000
