"""VocabMap: kept ids, replacements of dropped ones, slices and their cache, files, and shrunk models."""

import copy
import json
import pickle

import pytest
import torch

from cases import randn
from fastkd import vocab as vocab_module
from fastkd.vocab import VocabMap

COUNTS = torch.tensor([5, 0, 9, 9, 1, 7, 0, 3, 9, 2])


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_always_kept_first_then_the_most_frequent_ties_by_id():
    vocab = VocabMap.from_counts(COUNTS, 6, multiple_of=1, always_keep=[6, 4, 1, 5])
    assert vocab.kept_ids.tolist() == [5, 4, 1, 6, 2, 3]
    assert len(vocab) == 6 and vocab.original_size == 10
    assert vocab.kept.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("total", "size", "multiple_of", "kept"),
    [
        (30524, 0.5, 128, 15360),  # GLMD's
        (1000, 0.25, 128, 256),
        (1000, 300, 128, 384),
        (1000, 256, 128, 256),
        (100, 0.9, 128, 100),
        (1000, 7, 1, 7),
    ],
)
def test_size_is_rounded_up_to_the_multiple(total, size, multiple_of, kept):
    assert len(VocabMap.from_counts(torch.arange(total), size, multiple_of=multiple_of)) == kept


def test_counts_may_be_a_list_or_floats():
    for counts in (COUNTS.tolist(), COUNTS.float(), COUNTS.int()):
        assert VocabMap.from_counts(counts, 3, multiple_of=1).kept_ids.tolist() == [2, 3, 8]


@pytest.mark.parametrize("method", ["decoder", "cosine", "euclidean"])
def test_a_dropped_id_becomes_the_nearest_kept_id(method):
    table = randn(10, 4, seed=1, dtype=torch.float32)
    vocab = VocabMap.from_counts(COUNTS, 4, multiple_of=1, embeddings=table, method=method)
    for i in range(10):
        if vocab.kept[i]:
            assert vocab.kept_ids[vocab.encode(i)] == i
            continue
        nearness = {
            "decoder": lambda k, i=i: table[i] @ table[k],
            "cosine": lambda k, i=i: torch.cosine_similarity(table[i], table[k], dim=0),
            "euclidean": lambda k, i=i: -(table[i] - table[k]).square().sum(),
        }[method]
        best = max(vocab.kept_ids.tolist(), key=nearness)
        assert vocab.kept_ids[vocab.encode(i)] == best


def test_the_methods_differ_and_decoder_is_the_default():
    table = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.9, 0.3]])  # dot: the long one; euclidean and cosine: the first
    stand_ins = {
        method: VocabMap.from_counts([5, 4, 0], 2, multiple_of=1, embeddings=table, method=method).encode(2)
        for method in ("decoder", "cosine", "euclidean", None)
    }
    assert stand_ins == {"decoder": 1, "cosine": 0, "euclidean": 0, None: 1}


def test_all_dropped_tokens_as_one_id_which_is_kept():
    vocab = VocabMap.from_counts(COUNTS, 3, multiple_of=1, unk_id=6)
    assert vocab.kept_ids.tolist() == [6, 2, 3]
    assert vocab.encode([0, 2, 6, 9]) == [0, 1, 0, 0]


# -- encode ------------------------------------------------------------------------------------------------------------


def test_encode_keeps_shape_dtype_and_ignored_labels():
    vocab = VocabMap([7, 2, 5], 10, replacement=2)
    ids = torch.tensor([[7, 2], [9, -100]], dtype=torch.int32)
    new = vocab.encode(ids)
    assert new.dtype == torch.int32 and new.tolist() == [[0, 1], [1, -100]]
    assert vocab.encode(5) == 2 and vocab.encode([5, 0]) == [2, 1]
    per_id = VocabMap([7, 2, 5], 10, replacement=torch.tensor([7, 7, 0, 5, 5, 0, 5, 0, 2, 2]))
    assert per_id.encode(list(range(10))) == [0, 0, 1, 2, 2, 2, 2, 0, 1, 1]
    assert torch.equal(vocab.encode(torch.zeros(0, 3, dtype=torch.int64)), torch.zeros(0, 3, dtype=torch.int64))


def test_without_stand_ins_a_dropped_id_is_refused():
    vocab = VocabMap([7, 2, 5], 10)
    assert vocab.encode([7, 2, 5, -100]) == [0, 1, 2, -100]
    with pytest.raises(ValueError, match="replacement"):
        vocab.encode([7, 3])
    with pytest.raises(ValueError, match="original vocabulary"):
        vocab.encode([10])


# -- slices ------------------------------------------------------------------------------------------------------------


def test_slices_come_in_rank_order_and_leave_padding_out():
    vocab = VocabMap([3, 0, 4], 5)
    logits = randn(2, 3, 8, seed=1)
    assert torch.equal(vocab.slice_logits(logits), logits[..., [3, 0, 4]])
    weight, bias = randn(8, 2, seed=2), randn(8, seed=3)
    rows, offsets = vocab.slice_head(weight, bias)
    assert rows.is_contiguous() and torch.equal(rows, weight[[3, 0, 4]]) and torch.equal(offsets, bias[[3, 0, 4]])
    assert vocab.slice_head(weight)[1] is None


def test_a_sliced_head_is_cached_until_the_head_changes():
    vocab = VocabMap([3, 0, 4], 5)
    weight, bias = randn(5, 2, seed=2), randn(5, seed=3)
    first = vocab.slice_head(weight, bias)
    again = vocab.slice_head(weight, bias)
    assert first[0] is again[0] and first[1] is again[1]
    assert vocab.slice_head(weight.detach())[0] is first[0]  # another view of the same numbers
    weight.mul_(2)
    assert torch.equal(vocab.slice_head(weight)[0], weight[[3, 0, 4]])
    other = randn(5, 2, seed=4)
    assert torch.equal(vocab.slice_head(other)[0], other[[3, 0, 4]])
    assert torch.equal(vocab.slice_head(other.bfloat16())[0], other.bfloat16()[[3, 0, 4]])
    assert torch.equal(vocab.slice_head(weight)[0], weight[[3, 0, 4]])


def test_a_new_head_at_a_freed_address_is_not_the_old_one():
    vocab = VocabMap([3, 0, 4], 5)
    for seed in range(50):
        weight = randn(5, 2, seed=seed)
        assert torch.equal(vocab.slice_head(weight)[0], weight[[3, 0, 4]])
        del weight
    parameter = torch.nn.Parameter(randn(5, 2, seed=1), requires_grad=False)
    vocab.slice_head(parameter)
    parameter.data = randn(5, 2, seed=2)
    assert torch.equal(vocab.slice_head(parameter)[0], parameter[[3, 0, 4]])


def test_slices_under_inference_mode_and_compile():
    vocab = VocabMap([3, 0, 4], 5)
    with torch.inference_mode():
        weight = randn(5, 2, seed=1)
        assert torch.equal(vocab.slice_head(weight)[0], weight[[3, 0, 4]])
    weight = randn(5, 2, seed=2)
    compiled = torch.compile(lambda w: vocab.slice_head(w)[0] * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(weight), weight[[3, 0, 4]] * 2)


def test_no_gradient_flows_into_a_slice():
    weight = randn(5, 2, seed=2).requires_grad_()
    assert not VocabMap([3, 0], 5).slice_head(weight)[0].requires_grad


def test_copies_pickles_and_moves_start_with_an_empty_cache():
    vocab = VocabMap([3, 0, 4], 5, replacement=3)
    weight = randn(5, 2, seed=2)
    vocab.slice_head(weight)
    for other in (copy.deepcopy(vocab), pickle.loads(pickle.dumps(vocab)), vocab.to("cpu")):
        assert torch.equal(other.slice_head(weight)[0], weight[[3, 0, 4]]) and other.encode([1, 4]) == [0, 2]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "folder/deeper", "map.json", "map.safetensors"])
def test_a_saved_map_comes_back(tmp_path, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    for replacement in (None, 5):
        vocab = VocabMap([7, 2, 5], 10, replacement)
        written = vocab.save(tmp_path / name)
        assert written.exists()
        other = VocabMap.load(tmp_path / name)
        for buffer in ("kept_ids", "position_of", "kept"):
            assert torch.equal(getattr(other, buffer), getattr(vocab, buffer))
    assert other.encode([0, 7]) == [2, 0]


def test_without_safetensors_it_is_json(tmp_path, monkeypatch):
    monkeypatch.setattr(vocab_module.map.importlib.util, "find_spec", lambda name: None)
    path = VocabMap([7, 2, 5], 10, 5).save(tmp_path)
    assert path.suffix == ".json" and json.loads(path.read_text())["kept_ids"] == [7, 2, 5]
    assert VocabMap.load(tmp_path).encode([0, 7]) == [2, 0]


def test_the_newer_of_two_formats_is_not_shadowed_by_the_older(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    VocabMap([7, 2, 5], 10).save(tmp_path)
    monkeypatch.setattr(vocab_module.map.importlib.util, "find_spec", lambda name: None)
    VocabMap([1, 2], 10).save(tmp_path)
    assert VocabMap.load(tmp_path).kept_ids.tolist() == [1, 2]


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_map\.json"):
        VocabMap.load(tmp_path)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([], 10), "kept_ids"),
        (([1.0, 2.0], 10), "kept_ids"),
        (([1, 10], 10), "kept_ids"),
        (([1, -1], 10), "kept_ids"),
        (([1, 2, 1], 10), "once, but 1 occur"),
        (([1, 2], 10, 3), "replacement"),
        (([1, 2], 10, 11), "replacement"),
        (([1, 2], 3, [0, 0, 0]), "replacement"),
    ],
)
def test_mistakes_in_the_constructor(arguments, named):
    with pytest.raises(ValueError, match=named):
        VocabMap(*arguments)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": 1.5}, "size"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"always_keep": [10]}, "always_keep"),
        ({"size": 2, "always_keep": [1, 2, 3]}, "always_keep"),
        ({"method": "nearest"}, "method"),
        ({"method": "unk"}, "unk_id"),
        ({"method": "cosine"}, "embeddings"),
        ({"embeddings": torch.zeros(9, 2)}, "embeddings"),
    ],
)
def test_mistakes_in_from_counts(options, named):
    with pytest.raises(ValueError, match=named):
        VocabMap.from_counts(COUNTS, **({"size": 5, "multiple_of": 1} | options))


def test_mistakes_in_slices():
    vocab = VocabMap([3, 0, 4], 5)
    with pytest.raises(ValueError, match="teacher_logits"):
        vocab.slice_logits(randn(2, 4))
    with pytest.raises(ValueError, match="weight"):
        vocab.slice_head(randn(4, 2))


# -- smaller models ----------------------------------------------------------------------------------------------------

VOCABULARY = 40
KEPT = [7, 3, 0, 1, 2, 39, 12, 20]


def tiny(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "bert": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 39, "eos_token_id": 39},
        "bart": {
            "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        },
    }  # fmt: skip
    sizes["roberta"] = sizes["llama"] = sizes["tied_llama"] = sizes["classifier"] = sizes["bert"]
    config, model, extra = {
        "bert": ("BertConfig", "BertForMaskedLM", {}),
        "roberta": ("RobertaConfig", "RobertaForMaskedLM", {}),
        "classifier": ("BertConfig", "BertForSequenceClassification", {}),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": False}),
        "tied_llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
        "bart": ("BartConfig", "BartForConditionalGeneration", {}),
    }[kind]
    config = getattr(transformers, config)(vocab_size=VOCABULARY, **sizes[kind], **extra)
    model = getattr(transformers, model)(config).eval()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:  # a bias that starts at 0 would prove nothing
        if "bias" in name:
            torch.nn.init.normal_(x)
    return model


@pytest.mark.parametrize("kind", ["bert", "roberta", "classifier", "gpt2", "llama", "tied_llama", "bart"])
def test_a_shrunk_model_gives_the_same_logits_of_kept_tokens(kind):
    model, vocab = tiny(kind), VocabMap(KEPT, VOCABULARY, replacement=0)
    ids = torch.tensor([[7, 12, 20, 39], [3, 7, 7, 12]])
    with torch.no_grad():
        before = model(ids).logits
        small = vocab.shrink(model)
        after = small(vocab.encode(ids)).logits
        assert torch.equal(model(ids).logits, before)  # the given model stays as it is
    wanted = before if kind == "classifier" else before[..., vocab.kept_ids]
    assert torch.allclose(after, wanted, atol=1e-6)
    assert small.config.vocab_size == len(KEPT) and small.get_input_embeddings().weight.shape[0] == len(KEPT)
    assert model.config.vocab_size == VOCABULARY
    head, old_head = small.get_output_embeddings(), model.get_output_embeddings()
    if head is not None:
        tied = old_head.weight is model.get_input_embeddings().weight
        assert (head.weight is small.get_input_embeddings().weight) == tied


def test_robertas_positions_still_start_behind_the_padding(tmp_path):
    """They are counted from the padding id, which has moved; after loading, only the configuration says so."""
    for kept in ([7, 3, 0, 1, 2], [1, 7, 3, 0, 2]):  # padding (1) moves to 3, to 0
        model, vocab = tiny("roberta"), VocabMap(kept, VOCABULARY)
        small = vocab.shrink(model)
        small.save_pretrained(tmp_path)
        ids = torch.tensor([[7, 3, 7, 3, 2], [3, 7, 1, 1, 1]])
        mask = (ids != 1).long()
        with torch.no_grad():
            wanted = model(ids, attention_mask=mask).logits[..., kept]
            for other in (small, type(model).from_pretrained(tmp_path).eval()):
                assert torch.allclose(other(vocab.encode(ids), attention_mask=mask).logits, wanted, atol=1e-6)


def test_special_ids_follow_their_tokens():
    model, vocab = tiny("bart"), VocabMap(KEPT, VOCABULARY)  # bos 0, pad 1, eos 2
    small = vocab.shrink(model)
    for config in (small.config, small.generation_config):
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (2, 3, 4)
    assert small.config.decoder_start_token_id == 4 and small.get_input_embeddings().padding_idx == 3
    assert model.config.pad_token_id == 1


def test_a_shrunk_model_is_saved_and_loaded_by_transformers_alone(tmp_path):
    model, vocab = tiny("bert"), VocabMap(KEPT, VOCABULARY, replacement=0)
    small = vocab.shrink(model)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    ids = vocab.encode(torch.tensor([[7, 12, 20, 39]]))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, small(ids).logits)


def test_shrinking_in_place():
    model = tiny("gpt2")
    assert VocabMap(KEPT[:6], VOCABULARY).shrink(model, inplace=True) is model and model.config.vocab_size == 6


def test_a_map_that_only_reorders():
    model = tiny("gpt2")
    order = list(reversed(range(VOCABULARY)))
    with torch.no_grad():
        before = model(torch.tensor([[1, 2]])).logits
        after = VocabMap(order, VOCABULARY).shrink(model)(torch.tensor([[38, 37]])).logits
    assert torch.allclose(after, before[..., order], atol=1e-6)


def test_rows_that_pad_the_models_table_are_left_out():
    model = tiny("gpt2")
    with torch.no_grad():
        wanted = model(torch.tensor([[1, 2]])).logits[..., [1, 2, 30]]
    model.config.bos_token_id = model.config.eos_token_id = None
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    with torch.no_grad():
        small = VocabMap([1, 2, 30], 36).shrink(model)  # the model's last four rows are padding to this map
        assert torch.allclose(small(torch.tensor([[0, 1]])).logits, wanted, atol=1e-6)


def test_mistakes_in_shrink():
    with pytest.raises(ValueError, match="always_keep"):
        VocabMap([7, 3, 2], VOCABULARY).shrink(tiny("bart"))  # 0 and 1 are special
    with pytest.raises(ValueError, match="40 tokens"):
        VocabMap([7, 3, 2], 50).shrink(tiny("bert"))
