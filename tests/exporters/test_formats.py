"""Stored formats: how close their numbers lie to the weights, and how they are packed."""

from math import prod

import pytest
import torch

from glm4_exporters.formats import CODES, FORMATS, SCALES, Integers, require_format
from glm4_exporters.formats.arrangements import COLUMN_BLOCK, COLUMNS, ROWS, UNSIGNED, pack_pairs
from glm4_exporters.formats.float8 import FLOAT8_MAX, SCALE
from glm4_runtime.errors import ExportError


def weights(rows=48, width=320, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.03


INTEGERS = [name for name, form in FORMATS.items() if isinstance(form, Integers)]


def encoded(w, form, dtype=torch.bfloat16, importance=None):
    parts = form.encode(w, dtype, importance=importance)
    return parts[CODES], parts[SCALES]


def round_trip(w, form, dtype=torch.bfloat16, importance=None):
    return form.decode(form.encode(w, dtype, importance=importance), w.shape[1])


def error(w, form, importance=None, dtype=torch.bfloat16):
    difference = (round_trip(w, form, dtype, importance) - w) ** 2
    return float((difference if importance is None else difference * importance).sum())


def by_absmax(w, form):
    """Squared error of the plain method: the largest number stands at the block's largest |w|."""
    size = form.block or w.shape[1]
    w = torch.nn.functional.pad(w, (0, -w.shape[1] % size)).reshape(len(w), -1, size)
    step = w.abs().amax(-1, keepdim=True).clamp(min=1e-30) / form.largest
    return float(((w / step).round() * step - w).square().sum())


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("width", [320, 128, 96, 33, 1])
def test_each_number_is_within_its_step(name, width):
    form, w = FORMATS[name], weights(width=width)
    numbers, scales = encoded(w, form)
    assert numbers.shape == (48, form.stored_width(width))
    assert scales.shape == (48, form.blocks(width))
    assert bool((scales != 0).all() if form.signed_scales else (scales > 0).all())
    assert form.smallest <= int(numbers.min()) <= int(numbers.max()) <= form.largest
    assert bool((numbers[:, width:] == 0).all())
    found = round_trip(w, form)
    step = scales.float().abs().repeat_interleave(form.block or width, dim=1)[:, :width]
    inside = numbers[:, :width].abs() < form.largest
    assert bool(((found - w).abs() <= 0.5001 * step)[inside].all())


@pytest.mark.parametrize("name", INTEGERS)
def test_scales_beat_those_of_the_largest_weight(name):
    form = FORMATS[name]
    gain = 1.0 if form.bits == 8 else 0.95
    assert error(weights(), form, dtype=torch.float32) < gain * by_absmax(weights(), form)


def test_an_outlier_is_clipped_where_that_costs_less():
    w = weights(rows=16, width=32)
    w[:, 5] = 0.2
    assert error(w, FORMATS["int4"]) < 0.97 * by_absmax(w, FORMATS["int4"])


def test_channels_that_count_are_rounded_better():
    w, importance = weights(), torch.ones(320)
    importance[::16] = 1000.0
    form = Integers(4, 32, (1.0, 0.85))
    assert error(w, form, importance) < sum(
        float(((round_trip(w, form) - w) ** 2 * importance)[i].sum()) for i in range(48)
    )


def test_zeros_and_tiny_weights_keep_a_positive_scale():
    w = torch.zeros(2, 64)
    w[1] = 1e-20
    for dtype in (torch.bfloat16, torch.float16):
        numbers, scales = encoded(w, FORMATS["int4"], dtype)
        assert bool((scales > 0).all())
        assert bool((numbers[0] == 0).all())
        assert bool(torch.isfinite(scales).all())


def test_signed_scales_use_all_sixteen_numbers():
    w = weights()
    signed, form = FORMATS["int4-signed"], FORMATS["int4"]
    numbers, scales = encoded(w, signed)
    assert int(numbers.min()) == -8
    assert bool((scales < 0).any())
    assert error(w, signed) < 0.92 * error(w, form)


def packed(codes, form, arrangement):
    """The bytes of codes, a row at a time."""
    codes = torch.tensor(codes, dtype=torch.int8)
    part = form.parts(*codes.shape, "float16")[CODES]
    values = arrangement.pack(CODES, codes, part, form)
    assert values.numel() == arrangement.part(CODES, part, form).nbytes
    return values.view(torch.uint8).tolist()


def test_bytes_hold_two_numbers_the_first_in_the_low_half():
    form = Integers(bits=4, block=4, ranges=(1.0,))
    assert packed([[-7, 3, 0, 7]], form, UNSIGNED) == [[1 | 11 << 4, 8 | 15 << 4]]
    assert packed([[-7, 3, 0, 7]], form, ROWS) == [[9 | 3 << 4, 0 | 7 << 4]]
    wide = Integers(bits=8, block=4, ranges=(1.0,))
    assert packed([[-127, 0, 127, 5]], wide, UNSIGNED) == [[1, 128, 255, 133]]
    assert packed([[-127, 0, 127, 5]], wide, ROWS) == [[129, 0, 127, 5]]


def test_columns_are_the_transpose_of_rows():
    form, rows = FORMATS["int4"], 6
    parts = form.encode(weights(rows, width=COLUMN_BLOCK + 32), torch.bfloat16)
    plain = form.parts(rows, COLUMN_BLOCK + 32, "bfloat16")
    for name, part in plain.items():
        chunks = [COLUMNS.pack(name, parts[name][i : i + 2], part, form) for i in range(0, rows, 2)]
        written = torch.cat([piece.reshape(-1) for piece in COLUMNS.written(chunks, part)])
        turned = parts[name][:, : part.shape[1]].t().contiguous()
        expected = pack_pairs(turned) if name == CODES else turned
        assert torch.equal(written, expected.reshape(-1))
        assert COLUMNS.part(name, part, form).shape == turned.shape


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_what_its_parts_say(name):
    form, w = FORMATS[name], weights(rows=8)
    parts = form.encode(w, torch.bfloat16, largest=float(w.abs().max()))
    plain = form.parts(8, 320, "bfloat16")
    assert list(parts) == list(plain)
    for part, said in plain.items():
        exact = parts[part][:, : said.shape[1]] if len(said.shape) == 2 else parts[part]
        assert exact.numel() == prod(said.shape)
        assert said.scaled_by is None or said.scaled_by in plain
    assert float((form.decode(parts, 320) - w).norm() / w.norm()) < (0.03 if form.bits == 8 else 0.15)
    assert form.bits_per_weight() == {"int8": 8.125, "int4": 4.5, "int4-signed": 4.5, "int4-fine": 5.0, "int4-fine-signed": 5.0, "int4-wide": 4.25, "int4-wide-signed": 4.25, "nvfp4": 8.5, "nvfp4-w4a4": 8.5, "mxfp8": 8.5}.get(name, 8.0)  # fmt: skip


def test_fp8_values_are_within_half_a_step():
    form = FORMATS["fp8"]
    values = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)) * 7
    parts = form.encode(values, torch.float32, largest=float(values.abs().max()))
    assert parts[CODES].float().abs().max() == FLOAT8_MAX
    scale = float(parts[SCALE])
    normal = values.abs() > scale * 2.0**-6  # below, the steps are of one size
    off = (form.decode(parts, 4096) - values).abs()
    assert (off[normal] <= values[normal].abs() * 2.0**-4).all()  # 3 bits after the first
    assert (off[~normal] <= scale * 2.0**-10).all()
    assert form.encode(torch.zeros(1, 2), torch.float16, largest=0.0)[SCALE] > 0  # a scale of zero is refused
    # Beyond the range it saturates, where the cast alone gives NaN.
    assert form.encode(torch.tensor([[1e9]]), torch.float32, largest=1.0)[CODES].float() == FLOAT8_MAX


def test_an_unknown_format_is_answered_with_the_known_ones():
    with pytest.raises(
        ExportError,
        match="unknown format 'int3'; the formats are int8, int8-channel, int8-sq, int4, int4-fine, int4-wide, int4-signed",
    ):
        require_format("int3")
