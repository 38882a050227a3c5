"""Numbers of quantized checkpoints in the formats of the targets: exact, or refused in one line."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from quantized_folders import mutated, write_quantized

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.formats.arrangements import PANELS
from glm4_exporters.formats.base import CODES, SCALES
from glm4_exporters.formats.brought import ZEROS, Brought
from glm4_exporters.formats.brought_float4 import BroughtFloat4
from glm4_exporters.sources.bits import unpack as unpack_words
from glm4_exporters.sources.fitting import keep_form
from glm4_exporters.sources.kept import KeptMatrix
from glm4_exporters.targets import TARGETS
from glm4_plugins.block_product import unpack_codes
from glm4_runtime.errors import Glm4Error

DATA = Path(__file__).parents[1] / "data" / "quantized"
FOLDERS = sorted(path for path in DATA.iterdir() if path.is_dir() and path.name != "original")
KEEPING = ("cpu", "ort", "native", "tensorrt-rtx")
REFUSED = {  # by target: parts of the names of folders
    "cpu": ("act-order", "fp8"),
    "ort": ("act-order", "fp8"),
    "native": ("act-order",),
    "tensorrt-rtx": ("act-order",),
}


def kept_values(checkpoint, target):
    """By name: the values that each kept matrix stands for in the target's format, and whether its scales have two levels."""
    form = keep_form(checkpoint, target, None)
    for name, own in form.formats.items():
        view = checkpoint.views.by_name.get(checkpoint.name_of(name))
        if not isinstance(own, Brought):
            continue
        matrix = KeptMatrix(view, own, checkpoint.read_stored)
        blocks = [matrix.rows(first, len(block)) for first, block in matrix.blocks()]
        for parts in blocks:
            if target == "cpu":
                parts = through_panels(parts, own, view.header.shape[1])
            yield view.header.name, own.decode(parts, view.header.shape[1]), isinstance(own, BroughtFloat4)


def through_panels(parts, form, width):
    """The parts after they were packed in panels, and read back by the operator's own meaning."""
    rows = len(parts[CODES])
    plain = form.parts(rows, width, "bfloat16")
    packed = {name: PANELS.pack(name, parts[name], plain[name], form) for name in plain}
    codes = torch.from_numpy(unpack_codes(packed[CODES].numpy(), form.bits)[:rows])
    found = {CODES: codes.to(torch.int8)}
    for name in (SCALES, ZEROS):
        if name in packed:
            found[name] = packed[name].transpose(1, 2).flatten(0, 1)[:rows]
    return found


def outcome(folder, target):
    """``exact``, or the message of the refusal."""
    try:
        with Checkpoint.load(folder) as checkpoint:
            count = 0
            for name, values, two_levels in kept_values(checkpoint, target):
                wanted = checkpoint.read(name)
                # compressed-tensors divides by NVFP4's second scale; TensorRT multiplies by its inverse.
                off = 2**-22 if two_levels else 0.0
                assert ((values - wanted).abs() <= off * wanted.abs()).all(), (folder, target, name)
                count += 1
            assert count
    except Glm4Error as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) <= 500
        return said
    return "exact"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("target", KEEPING)
def test_every_folder_is_kept_exactly_or_refused(folder, target):
    refused = any(part in folder.name for part in REFUSED[target])
    assert (outcome(folder, target) != "exact") == refused


def mutations(tmp_path, count, seed):
    """Each changed folder for each target; returns how many were exact and how many refused."""
    found = Counter()
    for number in range(count):
        chance = random.Random(seed * 100_000 + number)
        folder = mutated(chance.choice(FOLDERS), tmp_path / str(number), chance)
        for target in TARGETS:
            found[outcome(folder, target) == "exact"] += 1
        shutil.rmtree(folder)
    return found


def test_changed_folders_are_kept_exactly_or_refused(tmp_path):
    found = mutations(tmp_path, 40, seed=11)
    assert min(found[True], found[False]) > 20


@pytest.mark.more
def test_500_changed_folders_are_kept_exactly_or_refused(tmp_path):
    found = mutations(tmp_path, 500, seed=12)
    assert min(found[True], found[False]) > 250


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1, 1), (3, 5)])
@pytest.mark.parametrize("bits", [4, 8])
def test_transposed_words_are_unpacked(shape, bits):
    words = torch.arange(shape[0] * shape[1] * 8, dtype=torch.int32).reshape(*shape[::-1], 8)[..., 0].t()
    assert torch.equal(
        unpack_words(words, bits), unpack_words(torch.tensor(words.tolist(), dtype=torch.int32), bits)
    )


def random_folders(tmp_path, seeds):
    kept = Counter()
    for seed in seeds:
        folder = tmp_path / str(seed)
        values = write_quantized(folder, seed)
        with Checkpoint.load(folder) as checkpoint:
            assert checkpoint.views.by_name.keys() <= values.keys()
            for name in checkpoint.tensors:
                assert torch.equal(checkpoint.read(name).float(), values[name]), (seed, name)
        for target in KEEPING:
            kept[target] += outcome(folder, target) == "exact"
        shutil.rmtree(folder)
    return kept


def test_random_shapes_and_groups(tmp_path):
    kept = random_folders(tmp_path, range(8))
    assert kept["native"] == kept["cpu"] == 8
    assert kept["ort"] >= 3  # no groups of 8, 24 and 40
    assert kept["tensorrt-rtx"] >= 2  # nor 8 bits with zero points


@pytest.mark.more
def test_200_random_shapes_and_groups(tmp_path):
    kept = random_folders(tmp_path, range(1000, 1200))
    assert kept["native"] == kept["cpu"] == 200
