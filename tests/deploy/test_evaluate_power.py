"""``eval`` finds faults of a known size, and calls chance by its name."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from text_task import TEXT, write_text_task

pytest.importorskip("lm_eval", reason="needs the extra eval")

from benchmarks.noise import LAYER, noise_sizes, noisy_copy
from glm4_deploy.cli import cli
from glm4_deploy.evaluate.statistics import paired_difference
from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
KL = (0.02, 0.05, 0.1)
ITEMS = 800

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results.json of the checkpoint in fp32 for two targets, and with a fault of each size."""
    folder = tmp_path_factory.mktemp("power")
    bundles = {"fp32": DEMO, "native": DEMO}
    tokenizer, text = Tokenizer.from_folder(DEMO), TEXT.read_text("utf-8")
    texts = [tokenizer.encode(text[at : at + 500]) for at in range(0, len(text), len(text) // 16)]
    for kl, size in noise_sizes(DEMO, texts, KL).items():
        bundles[f"kl-{kl}"] = noisy_copy(DEMO, folder / f"checkpoint-{kl}", LAYER, size)
    for label, checkpoint in bundles.items():
        target = "native" if label == "native" else "ort"
        export(checkpoint, folder / label, ExportOptions(target=target, precision="fp32", parity=False))
    output, task = folder / "out", write_text_task(folder, ITEMS)
    found = CliRunner().invoke(
        cli,
        [
            "eval",
            *(f"{label}={folder / label}" for label in bundles),
            "--tasks",
            str(task),
            "--items",
            str(ITEMS),
            "--output",
            str(output),
        ],
    )
    assert found.exit_code == 0, found.output
    print(found.output)
    return json.loads((output / "results.json").read_text("utf-8"))


@pytest.mark.parametrize("kl", KL)
def test_a_fault_of_known_size_is_found(results, kl):
    row = next(
        row for row in results["rows"] if row["engine"] == f"kl-{kl}" and row["task"] == "held_out_text"
    )
    assert row["nats_change"]["estimate"]["value"] < 0
    assert row["nats_change"]["p"] < 0.01


def test_other_bits_of_the_same_quality_are_no_difference(results):
    """Over 200 halves of the items, at most 5 % are called a difference at p < 0.05."""
    found = {name: [] for name in ("score", "nats")}
    chance = np.random.default_rng(0)
    answers = [item["answers"] for task in results["items"].values() for item in task]
    for _ in range(200):
        half = chance.choice(len(answers), len(answers) // 2, replace=False)
        for name, ps in found.items():
            first, other = ([answers[place][label][name] for place in half] for label in ("fp32", "native"))
            ps.append(paired_difference(first, other).p)
    assert all(sum(p < 0.05 for p in ps) <= 10 for ps in found.values())


def test_halves_of_the_items_do_not_make_a_difference(results):
    """The same engine on the same items, answers shuffled between two engines that differ by chance alone."""
    chance = np.random.default_rng(1)
    pairs = [
        (item["answers"]["fp32"], item["answers"]["kl-0.02"])
        for task in results["items"].values()
        for item in task
    ]
    alarms = {"score": 0, "nats": 0}
    for _ in range(200):
        swapped = [
            pair if keep else pair[::-1]
            for pair, keep in zip(pairs, chance.random(len(pairs)) < 0.5, strict=True)
        ]
        for name in alarms:
            alarms[name] += (
                paired_difference([a[name] for a, _ in swapped], [b[name] for _, b in swapped]).p < 0.05
            )
    assert all(count <= 18 for count in alarms.values())  # 5 % of 200, and three standard deviations
