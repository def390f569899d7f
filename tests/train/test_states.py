"""The capture of hidden states and of queries, keys, values leaves every family's outputs what SDPA makes them."""

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModel, T5EncoderModel

from fastkd.train import states

SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 34, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GROUPS = {"num_key_value_heads": 2, "head_dim": 4}
RECORDED = {
    "bert": {}, "roberta": {}, "distilbert": {}, "electra": {}, "albert": {}, "gpt2": {},
    "gpt2 by layer": {"scale_attn_by_inverse_layer_idx": True}, "gpt2 unscaled": {"scale_attn_weights": False},
    "llama": GROUPS, "mistral": GROUPS, "qwen2": GROUPS, "qwen3": GROUPS, "gpt_neox": {}, "phi": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "granite": {**GROUPS, "attention_multiplier": 0.1},
    "gemma": GROUPS, "gemma2 uncapped": {**GROUPS, "attn_logit_softcapping": None, "query_pre_attn_scalar": 9},
    "gemma3_text": {**GROUPS, "query_pre_attn_scalar": 9}, "phi3": GROUPS, "xlm-roberta": {},
    "smollm3": {**GROUPS, "no_rope_layer_interval": 2},
}  # fmt: skip
NO_INTERFACE = "does not go through transformers' attention interface"
REFUSED = {
    "gemma2": (GROUPS, "caps them by a tanh"), "gpt_oss": ({**GROUPS, "num_local_experts": 2}, "adds attention sinks"),
    "t5": ({"d_model": 16, "d_kv": 4, "num_heads": 4}, "an encoder-decoder"),
    "t5 encoder": ({"d_model": 16, "d_kv": 4, "num_heads": 4}, "adds a bias by position"),
    "bart": ({"d_model": 16, "decoder_attention_heads": 4, "encoder_attention_heads": 4}, "an encoder-decoder"),
    "mamba": ({}, "0 attention layers can be read of its 3 layers"), "falcon": ({"alibi": True}, NO_INTERFACE),
    "mpnet": ({}, NO_INTERFACE), "deberta-v2": ({}, NO_INTERFACE), "bloom": ({}, NO_INTERFACE),
    "mpt": ({"d_model": 16, "n_heads": 4}, NO_INTERFACE),
}  # fmt: skip


def random_model(name, options):
    """Of any family, with weights large enough for a wrong scale to be seen."""
    config = AutoConfig.for_model(name.split()[0], **SIZES, **options)
    torch.manual_seed(0)
    model = (T5EncoderModel if "encoder" in name else AutoModel.from_config)(config).eval()
    for x in model.parameters():
        if x.dim() > 1:
            torch.nn.init.normal_(x, std=0.3)
    return model


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
    if family not in tiny.DECODERS:  # a causal mask hides right padding anyway
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
    if family in tiny.DECODERS:
        real = real & torch.ones(tiny.LENGTH, tiny.LENGTH).tril().bool()
    if family == "modernbert":
        return _local_layers(recorded, eager, real)
    for layer in (0, 3):
        _same_probabilities(recorded[layer], eager[layer], real, inputs["attention_mask"])


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_scores_are_the_models_own(name):
    """However a model scales them: softmaxed under the mask they are what eager attention returns."""
    model, inputs = random_model(name, RECORDED[name]), tiny.padded()
    states.record_attention(model)
    before = states._recorder.set(recorder := states._Recorder(range(9)))
    model(**inputs)
    states._recorder.reset(before)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"][:, None, None, :] == 1
    if states.is_causal(model):
        real = real & torch.ones(tiny.LENGTH, tiny.LENGTH).tril().bool()
    assert len(eager) == recorder.calls == states.depth(model)
    for layer, probabilities in enumerate(eager):
        _same_probabilities(recorder.kept[layer], probabilities, real, inputs["attention_mask"])


@pytest.mark.parametrize("name", REFUSED)
def test_other_scores_are_refused_before_a_step_has_run(name):
    options, reason = REFUSED[name]
    model = random_model(name, options).train()
    before, random = model.config._attn_implementation, torch.get_rng_state()
    with pytest.raises(ValueError, match=reason):
        states.record_attention(model)
    assert model.config._attn_implementation == before
    assert model.training and torch.equal(torch.get_rng_state(), random)


def test_queries_that_were_scaled_before_the_call_are_recorded_as_projected():
    """OPT scales its queries itself and passes 1; MiniLMv2 relates the queries, whatever their scores are scaled by."""
    model, inputs = random_model("opt", RECORDED["opt"]), tiny.padded()
    seen = []
    attention = next(x for x in model.modules() if hasattr(x, "q_proj"))
    attention.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    states.record_attention(model)
    seen.clear()
    before = states._recorder.set(recorder := states._Recorder([0]))
    model(**inputs)
    states._recorder.reset(before)
    q = recorder.kept[0].q
    assert recorder.kept[0].scale == 0.5  # 1/√4
    torch.testing.assert_close(q.transpose(1, 2).flatten(2), seen[0], rtol=1e-6, atol=1e-6)


def _local_layers(recorded, eager, real):
    _same_probabilities(recorded[0], eager[0], real, real[:, 0, 0].long())  # layer 0 is global


def _same_probabilities(qkv, probabilities, real, mask):
    q, k, _ = qkv.normalized()
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
            sum(x.square().sum() for layer in read.qkv.values() for x in layer[:3])
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
