"""Attention with a cache and padding, against transformers."""

import pytest
import torch
from reference_pairs import close, config_of, pair


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    ours, theirs = pair("Glm4ForCausalLM", config_of())
    ids, mask = torch.randint(1, 211, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    for row, count in ((1, 4), (2, 11)):
        place = slice(0, count) if side == "left" else slice(12 - count, 12)
        ids[row, place], mask[row, place] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        for arguments in (dict(), dict(position_ids=positions)):
            mine = ours(ids, attention_mask=mask, **arguments).logits
            other = theirs(ids, attention_mask=mask, **arguments).logits
            close(mine[mask.bool()], other[mask.bool()])


def test_cache_and_left_padding_step_by_step():
    ours, theirs = pair("Glm4ForCausalLM", config_of())
    ids = torch.randint(1, 211, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    mine = other = None
    with torch.inference_mode():
        for start, stop in ((0, 6), (6, 7), (7, 12)):
            arguments = dict(attention_mask=mask[:, :stop], use_cache=True)
            mine = ours(ids[:, start:stop], past_key_values=mine and mine.past_key_values, **arguments)
            other = theirs(ids[:, start:stop], past_key_values=other and other.past_key_values, **arguments)
            valid = mask[:, start:stop].bool()
            close(mine.logits[valid], other.logits[valid])
    assert mine.past_key_values.get_seq_length() == 12
    for (key, value), layer in zip(mine.past_key_values, other.past_key_values.layers, strict=True):
        close(key[0], layer.keys[0])
        close(value[0], layer.values[0])


def test_cache_position_is_explicit_position_ids():
    ours, _ = pair("Glm4ForCausalLM", config_of())
    ids = torch.randint(1, 211, (1, 9))
    with torch.inference_mode():
        past = ours(ids[:, :5], use_cache=True).past_key_values
        again = ours(ids[:, :5], use_cache=True).past_key_values
        by_cache = ours(ids[:, 5:], past_key_values=past, cache_position=torch.arange(5, 9)).logits
        by_position = ours(ids[:, 5:], past_key_values=again, position_ids=torch.arange(5, 9)[None]).logits
    torch.testing.assert_close(by_cache, by_position, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must be 9 \.\.\. 9"):
        ours(ids[:, :1], past_key_values=past, cache_position=torch.tensor([3]))
