"""A shrunk model of any family gives the same logits of kept tokens, and plain `from_pretrained` loads it."""

import pytest
import torch

from fastkd import VocabMap

transformers = pytest.importorskip("transformers")
VOCABULARY, PADDING = 60, 1
MOVED = [7, 3, 0, 1, 2, 4, 5, 39, 12, 20, 33]  # padding becomes 3
PLACED = [7, 1, 0, 3, 2, 4, 5, 39, 12, 20, 33]
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 34, "pad_token_id": PADDING, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
NARROW, GROUPS = {"embedding_size": 8}, {"num_key_value_heads": 2}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16}
FAMILIES = [
    ("BertForMaskedLM", {}), ("BertForMaskedLM", UNTIED), ("BertForSequenceClassification", {}),
    ("RobertaForMaskedLM", {}), ("RobertaForMaskedLM", UNTIED), ("RobertaForSequenceClassification", {}),
    ("XLMRobertaForMaskedLM", {}), ("MPNetForMaskedLM", {}), ("MPNetForMaskedLM", UNTIED),
    ("MPNetForSequenceClassification", {}), ("DistilBertForMaskedLM", {}), ("DistilBertForMaskedLM", UNTIED),
    ("AlbertForMaskedLM", NARROW), ("AlbertForMaskedLM", NARROW | UNTIED), ("ElectraForMaskedLM", NARROW),
    ("DebertaV2ForMaskedLM", {}), ("DebertaV2ForMaskedLM", {"legacy": False}),
    ("DebertaV2ForSequenceClassification", {}), ("ModernBertForMaskedLM", {}), ("MobileBertForMaskedLM", NARROW),
    ("GPT2LMHeadModel", {}), ("GPT2ForSequenceClassification", {}), ("LlamaForCausalLM", GROUPS | UNTIED),
    ("LlamaForCausalLM", GROUPS | TIED), ("OPTForCausalLM", OPT), ("OPTForCausalLM", OPT | {"word_embed_proj_dim": 8}),
]  # fmt: skip
every_family = pytest.mark.parametrize(("kind", "options"), FAMILIES)


def model_of(kind, options):
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**SIZES, **options)).eval()
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.3)
    return model


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@every_family
@pytest.mark.parametrize("inplace", [False, True])
def test_a_shrunk_model_gives_the_same_logits_after_saving(kind, options, inplace, tmp_path):
    model = model_of(kind, options)
    vocab = VocabMap(PLACED if "MPNet" in kind or inplace else MOVED, VOCABULARY)
    ids = torch.tensor([[7, 12, 20, 39, 33, 7], [3, 7, 12, 39, 1, 1], [20, 33, 1, 1, 1, 1]])
    mask = (ids != PADDING).long()
    wanted = logits(model, ids, mask)
    wanted = wanted[..., vocab.kept_ids] if wanted.shape[-1] == VOCABULARY else wanted
    model.base_model.get_input_embeddings().weight.requires_grad_(False)
    small = vocab.shrink(model, inplace=inplace)
    assert (small is model) == inplace and not small.training
    assert [x.requires_grad for x in small.parameters()].count(False) == 1
    assert small.config.vocab_size == small.get_input_embeddings().num_embeddings == len(vocab)
    assert small.config.pad_token_id == vocab.encode(PADDING)
    found = logits(small, vocab.encode(ids), mask)
    small.save_pretrained(tmp_path)
    loaded, report = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    again = logits(loaded.eval(), vocab.encode(ids), mask)
    rows = mask.bool() if wanted.dim() == 3 else slice(None)  # under padding nothing is defined
    torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[rows], found[rows], rtol=0, atol=0)


def test_a_padding_id_that_is_known_by_number_must_keep_its_place():
    counts = torch.arange(VOCABULARY)
    with pytest.raises(ValueError, match=r"its padding id 1 fixed, .* makes it 3; .*in_place=\[1\]"):
        VocabMap(MOVED, VOCABULARY).shrink(model_of("MPNetForMaskedLM", {}))
    vocab = VocabMap.from_counts(counts, 10, multiple_of=1, always_keep=[0, 2], in_place=[1])
    assert vocab.kept_ids.tolist() == [2, 1, 0, *range(59, 52, -1)]
    VocabMap.from_counts(counts, 12, multiple_of=1, always_keep=[0, 2, 3, 4, 5], in_place=[1]).shrink(
        model_of("MPNetForMaskedLM", {})
    )
    with pytest.raises(ValueError, match="in_place: id 30 cannot keep its number among 10"):
        VocabMap.from_counts(counts, 10, multiple_of=1, in_place=[30])


def test_positions_reach_as_far_as_before():
    """Padding moves far up, and every position of the longest text is still there."""
    model, kept = model_of("RobertaForMaskedLM", {}), [*range(2, 50), 0, 1]
    vocab, ids = VocabMap(kept, VOCABULARY), torch.full((1, 32), 7)
    found = logits(vocab.shrink(model), vocab.encode(ids), torch.ones_like(ids))
    torch.testing.assert_close(found, logits(model, ids, torch.ones_like(ids))[..., kept], rtol=1e-5, atol=1e-5)


def test_a_model_that_was_built_on_is_refused():
    model = model_of("BertForSequenceClassification", {})
    model.classifier = torch.nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"(?s)has other tensors: .*classifier"):
        VocabMap(MOVED, VOCABULARY).shrink(model)
