"""Any model with causal or bidirectional attention: every method that makes sense for it, without a list of names."""

import copy

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from test_heads import losses, trained, weights
from test_methods import METHODS, pair, spelled
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, BertModel, logging

from fastkd.train import states
from fastkd.train.batch import Batch
from fastkd.train.methods import Setup, Side, build, refusal
from fastkd.train.student import from_layers
from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_error()
MORE = (*tiny.MORE_DECODERS, *tiny.MORE_ENCODERS)
READS_ATTENTION = ("bert_emd", "tinybert", "minilm", "minilmv2")


def sensible(family: str) -> list[str]:
    readable = family not in tiny.OWN_ATTENTION
    causal = family in tiny.DECODERS
    return [name for name in METHODS if refusal(name, causal) is None and (readable or name not in READS_ATTENTION)]


def together(family: str, task: str) -> str:
    """All methods of this family and task in one loss."""
    return " + ".join(spelled(name) for name in sensible(family) if task in METHODS[name].tasks)


def of_words(family: str) -> str:
    return "causal_lm" if family in tiny.DECODERS else "masked_lm"


def first_step(student, teacher, method: str, task: str, data=None) -> tuple[dict, dict]:
    """The terms, and the gradients of the student's parameters."""
    data = data or tiny.dataset(task)
    torch.manual_seed(0)
    built = build(method, Setup(Side.of(student), Side.of(teacher), task, data)).train()
    inputs = {key: torch.tensor(data[key][:]) for key in ("input_ids", "attention_mask")}
    sides = []
    for side, model in (("teacher", teacher), ("student", student)):
        layers = built.attention(side)
        if layers:
            states.record_attention(model)
        with torch.set_grad_enabled(side == "student"):
            sides.append(states.read(model.eval(), inputs, hidden=built.levels(side), layers=layers))
    labels = torch.tensor(data["labels"][:])
    batch = Batch(task, *sides[::-1], inputs["attention_mask"], labels, torch.arange(len(labels)))
    terms = built(batch)
    student.zero_grad()
    sum(term.value * term.weight for term in terms.values()).backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: term.value for name, term in terms.items()}, grads


@pytest.mark.parametrize("family", MORE)
@pytest.mark.parametrize("task", ["sentence", "words"])
def test_losses_and_gradients_are_finite(family, task):
    task = of_words(family) if task == "words" else "classification"
    terms, grads = first_step(*pair(family, task)[::-1], together(family, task), task)
    assert {name.partition("/")[0] for name in terms} == {n for n in sensible(family) if task in METHODS[n].tasks}
    assert all(value.isfinite() and value > 0 for value in terms.values()), terms
    assert len(grads) > 10 and all(x.isfinite().all() for x in grads.values())


def check_both_paths(method: str, family: str, folder) -> None:
    task = of_words(family)
    fast, products = trained(method, family, folder / "fast", True, task=task)
    slow, made = trained(method, family, folder / "slow", False, task=task)
    assert products == [0, 0] and made[0] == 3
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-5)
    start = torch.cat([p.detach().flatten() for p in pair(family, task)[1].parameters()])
    ours, theirs = (weights(trainer)[: len(start)] for trainer in (fast, slow))
    assert (ours - theirs).norm() < 1e-5 * (theirs - start).norm()


@pytest.mark.parametrize("family", MORE)
def test_without_logits_as_with_them(family, tmp_path):
    names = [name for name in ("kd", "distilbert", "glmd", "skew_kl", "minilm") if name in sensible(family)]
    check_both_paths(" + ".join(map(spelled, names)), family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for f in MORE for n in sensible(f) if of_words(f) in METHODS[n].tasks]
)
def test_every_method_without_logits_as_with_them(name, family, tmp_path):
    check_both_paths(spelled(name), family, tmp_path)


def as_family(model, family: str, **options):
    """The same weights under another name."""
    config = {**model.config.to_dict(), **options}
    del config["model_type"]
    other = type(tiny.model(family, "causal_lm" if "CausalLM" in type(model).__name__ else "classification"))
    made = other(AutoConfig.for_model(family, **config))
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_the_same_weights_as_llama_and_as_mistral(task):
    """Mistral without a window is Llama: the same terms and gradients to the bit, whatever the method."""
    of_llama = pair("llama", task)
    of_mistral = [as_family(model, "mistral", sliding_window=None) for model in of_llama]
    found = []
    for teacher, student in (of_llama, of_mistral):
        found.append(first_step(student, teacher, together("llama", task), task))
        side = Side.of(student)
        with pytest.raises(ValueError, match="codir makes no sense for a model with causal attention"):
            build("codir", Setup(side, side, task, range(8)))
    for ours, theirs in zip(*found, strict=True):  # terms, gradients
        assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], x) for name, x in ours.items())


@pytest.mark.parametrize(("teacher", "student"), [("llama", "qwen3"), ("opt", "mistral"), ("electra", "deberta-v2")])
def test_teacher_and_student_of_two_families(teacher, student):
    task = of_words(student)
    names = [name for name in ("kd", "forward_kl", "fcd", "distilbert", "glmd", "codir") if name in sensible(student)]
    names = [name for name in names if task in METHODS[name].tasks]
    models = tiny.model(student, task, seed=3, layers=2), tiny.model(teacher, task, seed=4)
    terms, _ = first_step(*models, " + ".join(map(spelled, names)), task)
    assert all(value.isfinite() for value in terms.values()) and {n.partition("/")[0] for n in terms} == set(names)


@pytest.mark.parametrize("family", [*MORE, *tiny.MORE_FAMILIES])
def test_causal_or_not_is_asked_of_the_model(family):
    """Its attention says so; where no module says anything, as in DeBERTa, two tokens are asked, with the same answer."""
    model = tiny.model(family, of_words(family)).train()
    assert states.is_causal(model) == (family in tiny.DECODERS)
    model.set_attn_implementation("eager")  # which masks without these
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = None
    assert states.is_causal(model) == (family in tiny.DECODERS)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", READS_ATTENTION)
@pytest.mark.parametrize("family", tiny.OWN_ATTENTION)
def test_attention_that_cannot_be_read_is_told_in_one_sentence(family, name, tmp_path):
    teacher, student = pair(family, "classification")
    data = tiny.dataset("classification")
    with pytest.raises(ValueError, match="does not go through transformers' attention interface, so queries and keys"):
        DistillTrainer(student, teacher, spelled(name), args=tiny.arguments(tmp_path), train_dataset=data)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_an_encoder_decoder_is_refused_by_name(side, tmp_path):
    config = AutoConfig.for_model("t5", vocab_size=tiny.VOCAB, d_model=16, d_kv=4, num_heads=4, num_layers=2, d_ff=32)
    models = {"teacher": tiny.model("bert", "masked_lm"), "student": tiny.model("bert", "masked_lm")}
    models[side] = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match=f"{side}: T5ForConditionalGeneration is an encoder-decoder"):
        DistillTrainer(models["student"], models["teacher"], "kd", task="masked_lm", args=tiny.arguments(tmp_path))


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_next_token_is_no_task_of_a_bidirectional_model(with_teacher, tmp_path):
    teacher, student = pair("bert", "masked_lm")
    models = (student, teacher, "kd") if with_teacher else (student, None)
    with pytest.raises(
        ValueError,
        match="student: causal_lm predicts each next token, and BertForMaskedLM sees it, since its attention is bidirectional",
    ):
        DistillTrainer(*models, task="causal_lm", args=tiny.arguments(tmp_path))
    decoder = tiny.AUTO["causal_lm"].from_config(tiny.config("bert", is_decoder=True))
    DistillTrainer(decoder, None, task="causal_lm", args=tiny.arguments(tmp_path))


def test_layers_may_share_their_weights_or_differ():
    """ALBERT has one layer, which runs often; SmolLM3 has layers with and without rotary embeddings."""
    teacher, student = pair("albert", "masked_lm")
    assert (
        student.config.num_hidden_layers == 2
        and type(student) is AutoModelForMaskedLM._model_mapping[type(teacher.config)]
    )
    teacher, inputs = tiny.model("smollm3", "causal_lm").eval(), tiny.padded()
    lower = from_layers(teacher, [1, 2]).eval()
    assert lower.config.no_rope_layers == teacher.config.no_rope_layers[1:3]
    same = copy.deepcopy(teacher)
    same.model.layers = same.model.layers[1:3]
    torch.testing.assert_close(lower(**inputs).logits, same(**inputs).logits, rtol=0, atol=0)


def test_a_model_without_a_head_is_told_where_predictions_are_read(tmp_path):
    teacher, student = pair("bert", "classification")
    bare = BertModel(BertConfig(**teacher.config.to_dict()))
    args, data = tiny.arguments(tmp_path), tiny.dataset("classification")
    with pytest.raises(
        ValueError, match="BertModel: its forward returns no logits, since it is a model without a head"
    ):
        DistillTrainer(student, bare, "kd", args=args, train_dataset=data).train()
    DistillTrainer(
        student, bare, "fcd:share=1", args=args, train_dataset=data
    ).train()  # it reads none of the teacher's
