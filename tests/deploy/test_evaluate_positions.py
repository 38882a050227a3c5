"""``eval --tasks glm4_positions``: perplexity by position in long texts, compared and gated by bucket."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from glm4_runtime import Session
from glm4_runtime.errors import GateError, Glm4Error
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving

pytest.importorskip("lm_eval", reason="needs the extra eval")

from glm4_deploy.cli import cli
from glm4_deploy.evaluate.positions import LongTexts, ask_positions, buckets_of, enough
from glm4_deploy.harness.model import BundleModel
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
HELD_OUT = DEMO.parent / "heldout.txt"
PREFIX = 2


@pytest.fixture
def run_eval(tmp_path):
    def run(*arguments, items=4, positions=512):
        output, limits = tmp_path / "out", ("--positions", positions, "--items", items, "--text", HELD_OUT)
        found = CliRunner().invoke(
            cli,
            ["eval", *map(str, ("--tasks", "glm4_positions", *limits, "--output", output, *arguments))],
        )
        results = output / "results.json"
        return found, json.loads(results.read_text("utf-8")) if results.exists() else None

    return run


@pytest.mark.parametrize(
    ("limit", "ends"),
    [
        (128, [64, 128]),
        (2048, [256, 512, 1024, 2048]),
        (2100, [256, 512, 1024, 2100]),
        (20_000, [1024, 2048, 4096, 8192, 20_000]),
        (32_768, [1024, 2048, 4096, 8192, 16_384, 32_768]),
        (131_072, [1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072]),
    ],
)
def test_buckets_double_up_to_the_limit(limit, ends):
    buckets = buckets_of(limit)
    assert [bucket.end for bucket in buckets] == ends
    assert [bucket.start for bucket in buckets] == [0, *ends[:-1]]


def test_names_of_buckets():
    names = [bucket.task for bucket in buckets_of(2048)]
    assert names == [f"glm4_positions_{each}" for each in ("0-256", "256-512", "512-1k", "1k-2k")]


@pytest.fixture
def texts():
    """Six documents of 600 random tokens, for 8 blocks in each bucket up to 512."""
    chance, buckets = np.random.default_rng(0), tuple(buckets_of(512))
    found = [[2040, 2041, *chance.integers(0, 2000, 598).tolist()] for _ in range(6)]
    return LongTexts(buckets, tuple(enough(found, buckets, 8)), PREFIX, Tokenizer.from_folder(DEMO))


def test_texts_end_where_no_bucket_needs_more_blocks(texts):
    """64-128 and 0-64 hold one block of each text, 128-256 two, 256-512 four."""
    assert [len(ids) for ids in texts.sequences] == [512, 512, 256, 256, 128, 128]
    assert [texts.count(bucket) for bucket in texts.buckets] == [6, 6, 8, 8]


def test_each_token_behind_the_prefix_is_in_one_block(texts):
    seen = np.zeros((len(texts.sequences), 512), int)
    for bucket in texts.buckets:
        for number, start, end in texts.blocks(bucket):
            seen[number, start:end] += 1
    for row, ids in zip(seen, texts.sequences, strict=True):
        assert row.tolist() == [0] * PREFIX + [1] * (len(ids) - PREFIX) + [0] * (512 - len(ids))


def test_a_block_has_the_mean_of_its_tokens(texts):
    """The token at position n has log-probability -n: a block's mean is that of its positions."""
    answers = ask_positions(texts, lambda ids: -np.arange(1.0, len(ids)), {}, lambda *_: None)
    assert answers["glm4_positions_256-512"].nats == [-287.5, -351.5, -415.5, -479.5] * 2
    assert answers["glm4_positions_0-64"].nats == [-(2 + 63) / 2] * 6
    assert answers["glm4_positions_64-128"].items[0].prompt.startswith("text 0, position 64: ")
    assert len({item.item for one in answers.values() for item in one.items}) == 28


@pytest.mark.parametrize("wrong", [lambda ids: np.zeros(len(ids)), lambda ids: np.full(len(ids) - 1, np.nan)])
def test_missing_numbers_are_an_error(texts, wrong):
    with pytest.raises(Glm4Error, match="missing or no numbers"):
        ask_positions(texts, wrong, {}, lambda *_: None)


def test_a_loss_at_late_positions_fails_its_bucket_alone(run_eval, demo_bundle, tmp_path, monkeypatch):
    """Half a nat per token is lost behind position 256: the gate fails for the last bucket and for no other."""
    plain, second = BundleModel.token_logprobs, tmp_path / "second"
    shutil.copytree(demo_bundle, second)
    manifest = second / "manifest.json"  # kept answers are those of equal manifests
    manifest.write_text(manifest.read_text("utf-8") + "\n", "utf-8")

    def losing(self, ids):
        found = plain(self, ids).copy()
        if self._folder == second:
            found[255:] -= 0.5  # of tokens at positions 256 and behind
        return found

    monkeypatch.setattr(BundleModel, "token_logprobs", losing)
    gate = ("--gate", "*/glm4_positions: -0.01 nats at p < 0.05")
    found, results = run_eval(f"a={demo_bundle}", f"b={second}", *gate, items=8)
    assert isinstance(found.exception, GateError)  # exit code 3
    assert {each["line"].split(":")[0]: each["failed"] for each in results["gates"]} == {
        "b, glm4_positions_0-64": False,
        "b, glm4_positions_64-128": False,
        "b, glm4_positions_128-256": False,
        "b, glm4_positions_256-512": True,
    }
    ratios = [each["b"] / each["a"] for each in results["perplexity_by_position"].values()]
    assert ratios == pytest.approx([1, 1, 1, np.exp(0.5)], rel=1e-4)
    assert "(+64.87 %)" in found.output


def test_all_kinds_of_engines_read_the_same(run_eval, demo_bundle, tmp_path):
    with serving(Session.open(demo_bundle), ServerOptions(port=0)) as server:
        found, results = run_eval(
            f"bundle={demo_bundle}", f"server={server.url}", "--reference", DEMO, items=2, positions=600
        )
    assert found.exit_code == 0, found.output
    for each in results["perplexity_by_position"].values():
        assert each["server"] == pytest.approx(each["reference"], rel=1e-4)
        assert each["bundle"] == pytest.approx(each["reference"], rel=1e-4)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Perplexity by position in a text" in page


def test_a_second_run_reads_nothing_again(run_eval, demo_bundle, monkeypatch):
    first = run_eval(demo_bundle)[1]
    monkeypatch.setattr(BundleModel, "token_logprobs", _must_not_read)
    second = run_eval(demo_bundle)[1]
    assert second["engines"][0]["kept_requests"] == len(
        {item["prompt"].split(",")[0] for task in first["items"].values() for item in task}
    )
    assert second["rows"] == first["rows"]


def test_short_documents_are_refused_before_the_work(run_eval, demo_bundle, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A short text. " * 10, "utf-8")
    found, _ = run_eval(demo_bundle, "--text", short)
    assert isinstance(found.exception, Glm4Error)
    assert "give longer documents" in str(found.exception)


def test_texts_and_tasks_together(run_eval, demo_bundle):
    """All tasks together are the harness's tasks: a mean of a token's log-probability is not added to them."""
    found, results = run_eval(f"a={demo_bundle}", "--tasks", "glm4_order,glm4_positions", "--words", "20")
    rows = {row["task"]: row for row in results["rows"]}
    assert found.exit_code == 0, found.output
    assert rows["all tasks"]["items"] == rows["glm4_order"]["items"] == 4
    assert rows["glm4_positions_0-64"]["score"] is None


def _must_not_read(*_):
    raise AssertionError("a kept text was read again")
