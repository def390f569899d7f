"""The capture of hidden states and of queries, keys, values leaves every family's outputs what SDPA makes them."""

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from fastkd.train import states


@pytest.mark.parametrize("family", tiny.MORE_FAMILIES)
def test_recording_changes_nothing_on_a_padded_batch(family):
    model = tiny.model(family, seed=2).eval()
    inputs = tiny.padded()
    assert model.config._attn_implementation == "sdpa"
    plain = model(**inputs, output_hidden_states=True)
    states.record_attention(model)
    read = states.read(model, inputs, hidden=True, layers=range(4))
    torch.testing.assert_close(read.logits, plain.logits, rtol=0, atol=0)
    assert len(read.hidden) == 5
    for ours, theirs in zip(read.hidden, plain.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    states.forget_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", tiny.MORE_FAMILIES)
def test_padding_stays_unseen(family):
    """Other ids under the padding change nothing for real tokens; without our mask function they would."""
    model = tiny.model(family, seed=2).eval()
    states.record_attention(model)
    inputs = tiny.padded()
    other = dict(inputs)
    noise = torch.randint(5, tiny.VOCAB, inputs["input_ids"].shape)
    other["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], noise)
    if family == "roberta":  # it counts positions by the padding id
        ids = torch.arange(inputs["input_ids"].shape[1]) + 2
        inputs["position_ids"] = other["position_ids"] = ids.expand_as(inputs["input_ids"])
    first, second = (states.read(model, x, hidden=True).hidden[-1] for x in (inputs, other))
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(first[real], second[real], rtol=0, atol=1e-6)
    blind = {key: x for key, x in other.items() if key != "attention_mask"}
    if family not in ("gpt2", "llama", "qwen2"):  # a causal mask hides right padding anyway
        unmasked = states.read(model, blind, hidden=True).hidden[-1]
        assert (unmasked[real] - first[real]).abs().max() > 1e-4


@pytest.mark.parametrize("family", tiny.MORE_FAMILIES)
def test_recorded_states_are_the_ones_that_attention_uses(family):
    """Scores of the recorded q and k, softmaxed under the mask, are eager attention's probabilities."""
    model = tiny.model(family, seed=2).eval()
    inputs = tiny.padded()
    states.record_attention(model)
    recorded = states.read(model, inputs, layers=[0, 3]).qkv
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"][:, None, None, :] == 1
    if family in ("gpt2", "llama", "qwen2"):
        real = real & torch.ones(tiny.LENGTH, tiny.LENGTH).tril().bool()
    if family == "modernbert":
        return _local_layers(recorded, eager, real)
    for layer in (0, 3):
        _same_probabilities(recorded[layer], eager[layer], real, inputs["attention_mask"])


def _local_layers(recorded, eager, real):
    _same_probabilities(recorded[0], eager[0], real, real[:, 0, 0].long())  # layer 0 is global


def _same_probabilities(qkv, probabilities, real, mask):
    q, k, _ = qkv
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~real, float("-inf"))
    rows = mask.bool()[:, None, :, None].expand_as(scores)
    torch.testing.assert_close(scores.softmax(-1)[rows], probabilities[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", tiny.MORE_FAMILIES)
def test_gradients_under_checkpointing_are_the_same(family):
    inputs = tiny.padded()
    found = []
    for checkpointed in (False, True):
        model = tiny.model(family, seed=3).train()
        states.record_attention(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
        read = states.read(model, inputs, hidden=True, layers=[0, 2])
        assert len(read.qkv) == 2
        loss = (
            sum(x.square().sum() for layer in read.qkv.values() for x in layer)
            + read.hidden[1].sum()
            + read.logits.sum()
        )
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_is_refused():
    model = tiny.model("bert").train()
    states.record_attention(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        states.read(model, tiny.padded(), layers=[0])


def test_a_capture_of_nothing_raises():
    model = tiny.model("bert")
    with pytest.raises(RuntimeError, match="no attention layer was seen"):
        states.read(model, tiny.padded(), layers=[0])


def test_a_missing_layer_raises_and_names_the_depth():
    model = tiny.model("bert")
    states.record_attention(model)
    with pytest.raises(RuntimeError, match=r"\[7\] were asked for, but only 4"):
        states.read(model, tiny.padded(), layers=[0, 7])


def test_other_attention_is_not_silently_replaced():
    model = tiny.model("bert")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        states.record_attention(model)


def test_two_models_record_side_by_side():
    teacher, student = tiny.model("bert", seed=1).eval(), tiny.model("bert", seed=2, layers=2).eval()
    for model in (teacher, student):
        states.record_attention(model)
    first = states.read(teacher, tiny.padded(), layers=[3])
    second = states.read(student, tiny.padded(), layers=[1])
    assert list(first.qkv) == [3] and list(second.qkv) == [1]
    model = tiny.model("bert", seed=1).eval()
    torch.testing.assert_close(model(**tiny.padded()).logits, first.logits, rtol=0, atol=0)
