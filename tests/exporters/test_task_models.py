"""Arguments, outputs and losses of each task's model, against transformers."""

import pytest
import torch
from reference_pairs import close, config_of, pair


def test_inputs_embeds_hidden_states_and_attentions():
    ours, theirs = pair("Glm4ForCausalLM", config_of())
    embeds = torch.randn(2, 7, 64)
    asked = dict(inputs_embeds=embeds, output_hidden_states=True, output_attentions=True)
    with torch.inference_mode():
        mine, other = ours(**asked), theirs(**asked)
    assert len(mine.hidden_states) == len(other.hidden_states) == 4
    for name in ("hidden_states", "attentions"):
        for a, b in zip(getattr(mine, name), getattr(other, name), strict=True):
            close(a, b)
    assert not ours.model.layers[0]._forward_hooks


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 5])])
def test_logits_to_keep(keep):
    ours, theirs = pair("Glm4ForCausalLM", config_of())
    ids = torch.randint(1, 211, (2, 8))
    with torch.inference_mode():
        close(ours(ids, logits_to_keep=keep).logits, theirs(ids, logits_to_keep=keep).logits)


def test_use_cache_false_returns_none_and_legacy_tuples_are_taken():
    ours, _ = pair("Glm4ForCausalLM", config_of())
    ids = torch.randint(1, 211, (1, 6))
    with torch.inference_mode():
        assert ours(ids, use_cache=False).past_key_values is None
        whole = ours(ids).logits
        past = tuple(ours(ids[:, :4]).past_key_values)
        close(ours(ids[:, 4:], past_key_values=past).logits, whole[:, 4:])


def test_arguments_that_do_not_fit_are_refused():
    ours, _ = pair("Glm4ForCausalLM", config_of())
    ids = torch.randint(1, 211, (1, 6))
    for arguments, message in (
        (dict(), "exactly one"),
        (dict(input_ids=ids, inputs_embeds=torch.zeros(1, 6, 64)), "exactly one"),
        (dict(input_ids=ids, attention_mask=torch.ones(1, 5)), "attention_mask"),
        (dict(input_ids=ids, labels=ids, logits_to_keep=1), "drop logits_to_keep"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**arguments)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("problem", "labels", "count"),
    [
        ("single_label_classification", torch.tensor([2, 0]), 3),
        ("multi_label_classification", torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), 3),
        ("regression", torch.tensor([0.5, -1.0]), 1),
    ],
)
def test_sequence_classification(problem, labels, count, side):
    settings = config_of(num_labels=count, problem_type=problem)
    ours, theirs = pair("Glm4ForSequenceClassification", settings)
    ids, mask = torch.randint(1, 211, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    place = slice(0, 4) if side == "left" else slice(5, 9)
    ids[1, place], mask[1, place] = 0, 0
    mine, other = (model(ids, attention_mask=mask, labels=labels) for model in (ours, theirs))
    close(mine.logits, other.logits)
    close(mine.loss, other.loss)
    mine.loss.backward()
    other.loss.backward()
    close(ours.score.weight.grad, theirs.score.weight.grad)


def test_sequence_classification_needs_a_pad_token_for_a_batch():
    ours, _ = pair("Glm4ForSequenceClassification", config_of(num_labels=2, pad_token_id=None))
    with pytest.raises(ValueError, match="pad_token_id"):
        ours(torch.randint(1, 211, (2, 4)))


def test_token_classification():
    ours, theirs = pair("Glm4ForTokenClassification", config_of(num_labels=5))
    ids, labels = torch.randint(1, 211, (2, 9)), torch.randint(0, 5, (2, 9))
    labels[0, 0] = -100
    mine, other = ours(ids, labels=labels), theirs(ids, labels=labels)
    close(mine.logits, other.logits)
    close(mine.loss, other.loss)
    assert mine.past_key_values is None


def test_base_model():
    ours, theirs = pair("Glm4Model", config_of())
    ids = torch.randint(1, 211, (2, 9))
    with torch.inference_mode():
        close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
