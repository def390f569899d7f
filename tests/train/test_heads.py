"""A language model without its head: the same losses, gradients and weights, and no product with the vocabulary."""

import copy

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from test_methods import pair, sensible, spelled
from transformers import AutoConfig, AutoModelForCausalLM, logging

from fastkd.train import heads, states
from fastkd.train.methods import METHODS
from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_error()


def language_task(name: str, family: str) -> str | None:
    task = "causal_lm" if family in tiny.DECODERS else "masked_lm"
    return task if task in METHODS[name].tasks else None


ON_TOKENS = [(name, family) for name, family in sensible() if language_task(name, family)]
EXTRA = [
    ("kd:alpha=0", "gpt2"), ("kd:alpha=1", "bert"), ("forward_kl:hard=0.5", "llama"), ("fcd:share=1 + kd", "bert"),
    ("glmd:top_n=5", "bert"), ("glmd:normalize='tokens'", "gpt2"), ("fcd:share=0", "gpt2"), ("tinybert:share=0", "bert"),
    ("minilm:share=0.5", "llama"),
]  # fmt: skip
FEATURES = ("fcd", "minilm", "minilmv2", "tinybert")  # as `spelled` has them, their first stage alone


def trained(method: str, family: str, folder, headless: bool, accumulation: int = 1, task=None, **options):
    """The trainer after three steps of plain SGD over rows of unequal lengths, and how often each side's head ran."""
    task = task or language_task(method.partition(":")[0].split(" ")[0], family)
    teacher, student = pair(family, task)
    args = tiny.arguments(
        folder, max_steps=3, optim="sgd", learning_rate=0.1, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = DistillTrainer(
        student, teacher, method, task=task, args=args, train_dataset=tiny.dataset(task), **options
    )
    assert None not in trainer._finish.values()
    if not headless:
        trainer._finish = dict.fromkeys(trainer._finish)
    products = count_products(student, teacher)
    trainer.train()
    return trainer, products


def count_products(*models) -> list[int]:
    """How often the head of each model makes logits from now on: its hook sees them wider than the model."""
    counts = [0] * len(models)

    def watch(i, wide):
        def hook(module, args, output):
            counts[i] += output.shape[-1] == wide

        return hook

    for i, model in enumerate(models):
        head = model.get_output_embeddings()
        head.register_forward_hook(watch(i, head.out_features))
    return counts


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in (*trainer.model.parameters(), *trainer.method.parameters())])


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def moved(trainer, others) -> float:
    """How much the final weights differ, as a part of how far they came."""
    _, start = pair(trainer.model.config.model_type, trainer.task)
    size = sum(p.numel() for p in start.parameters())
    start = torch.cat([p.detach().flatten() for p in start.parameters()])
    ours, theirs = weights(trainer)[:size], weights(others)[:size]
    return float((ours - theirs).norm() / (theirs - start).norm())


@pytest.mark.parametrize(("name", "family"), [(spelled(n), f) for n, f in ON_TOKENS] + EXTRA)
def test_the_same_weights_as_with_logits_and_no_product(name, family, tmp_path):
    fast, products = trained(name, family, tmp_path / "fast", True)
    slow, made = trained(name, family, tmp_path / "slow", False)
    assert products == [0, 0] and made[0] == 3
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-5)
    assert moved(fast, slow) < 1e-5


@pytest.mark.parametrize(
    ("name", "family"), [("kd", "bert"), ("kd", "gpt2"), ("distilbert", "gpt2"), ("fcd:share=0", "llama")]
)
def test_accumulation_changes_nothing(name, family, tmp_path):
    whole, _ = trained(name, family, tmp_path / "1", True)
    parts, _ = trained(name, family, tmp_path / "4", True, accumulation=4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert moved(parts, whole) < 1e-5


@pytest.mark.parametrize("name", FEATURES)
def test_features_make_no_logits_although_they_could_be_asked_for(name, tmp_path):
    trainer, _ = trained(spelled(name), "gpt2", tmp_path, True)
    assert not trainer.method.predicts("student", 0.0)
    inputs = {key: torch.tensor(tiny.dataset("causal_lm")[key][:]) for key in ("input_ids", "attention_mask")}
    assert trainer._teacher_states(inputs, None, 0.0).predictions is None


def test_evaluation_makes_logits_only_where_somebody_reads_them(tmp_path):
    trainer, products = trained("kd", "gpt2", tmp_path, True)
    data = tiny.dataset("causal_lm")
    with_logits = trainer.predict(data)
    assert products[0] == 1 and with_logits.predictions.shape == (8, tiny.LENGTH - 1, tiny.VOCAB)
    trainer.args.prediction_loss_only = True
    loss = trainer.evaluate(data)["eval_loss"]
    assert products[0] == 1 and loss == pytest.approx(with_logits.metrics["test_loss"], rel=1e-5)
    before = trainer.evaluate_other(trainer.teacher, data)["eval_loss"]
    trainer._finish = dict.fromkeys(trainer._finish)
    assert before == pytest.approx(trainer.evaluate_other(trainer.teacher, data)["eval_loss"], rel=1e-5)


def decoder(family: str, **options):
    config = tiny.config("llama").to_dict() | {"hidden_act": "silu", **options}
    del config["model_type"]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))


SHAPED = {"gemma2": {"head_dim": 4, "final_logit_softcapping": 0.5}, "cohere": {"logit_scale": 0.25},
          "granite": {"logits_scaling": 3.0}}  # fmt: skip


@pytest.mark.parametrize("family", [*tiny.MORE_FAMILIES, *SHAPED])
def test_what_a_family_does_to_its_logits_is_known(family):
    task = "causal_lm" if family in (*tiny.DECODERS, *SHAPED) else "masked_lm"
    model = decoder(family, **SHAPED[family]) if family in SHAPED else tiny.model(family, task)
    model.eval()
    finish, inputs = heads.find(model), tiny.padded()
    read = states.read(model, inputs, finish=finish)
    assert isinstance(read.predictions, heads.Headless)
    torch.testing.assert_close(read.logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)


class Odd(torch.nn.Linear):
    pass


def spoil(model, how: str):
    """A head of another kind, or something done to the logits after it."""

    def afterwards(module, args, out):
        out.logits = 1.01 * out.logits if how == "a scale nobody knows of" else out.logits + model.late
        return out

    if how == "another module":
        model.lm_head.__class__ = Odd
        return
    model.late = torch.nn.Parameter(torch.zeros(()))
    model.register_forward_hook(afterwards)


@pytest.mark.parametrize("how", ["another module", "a scale nobody knows of", "a bias behind it"])
def test_a_head_that_cannot_be_taken_off_is_left_on(how, tmp_path, caplog):
    teacher, student = pair("llama", "causal_lm")
    spoil(student, how)
    before = copy.deepcopy(student.state_dict())
    args = tiny.arguments(tmp_path, max_steps=1)
    trainer = DistillTrainer(
        student, teacher, "kd", task="causal_lm", args=args, train_dataset=tiny.dataset("causal_lm")
    )
    assert trainer._finish == {"student": None, "teacher": None}
    assert len([r for r in caplog.records if "all of its logits are made" in r.message]) == 1
    assert all(torch.equal(x, student.state_dict()[name]) for name, x in before.items())
    trainer.train()


SHORTER = [  # how many of the teacher's four layers run
    ("minilmv2:relation_heads=4,share=1,teacher_layer=2", "bert", "masked_lm", 2),
    ("fcd:share=1,teacher_layer=2", "bert", "masked_lm", 2), ("fcd:share=1,teacher_layer=2", "llama", "causal_lm", 3),
    ("fcd:share=1", "bert", "masked_lm", 4), ("fcd:share=1,layers='uniform'", "bert", "masked_lm", 4),
    ("pkd:alpha=0", "bert", "classification", 2), ("pkd:alpha=0,strategy='last'", "bert", "classification", 3),
    ("pkd:alpha=0", "gpt2", "classification", 3), ("pkd", "bert", "classification", 4),
    ("fcd:share=1,teacher_layer=1 + minilmv2:relation_heads=4,teacher_layer=3", "bert", "masked_lm", 3),
    ("tinybert:share=1", "bert", "masked_lm", 4),
]  # fmt: skip


@pytest.mark.parametrize(("method", "family", "task", "depth"), SHORTER)
def test_layers_that_nobody_reads_do_not_run(method, family, task, depth, tmp_path):
    ends = []
    for whole in (False, True):
        teacher, student = pair(family, task)
        args, runs = tiny.arguments(tmp_path, optim="sgd", learning_rate=0.1), []
        torch.manual_seed(0)
        trainer = DistillTrainer(student, teacher, method, task=task, args=args, train_dataset=tiny.dataset(task))
        if whole:
            trainer._stop_after = None
        layers = teacher.get_submodule(states.layer_list(teacher))
        for layer in layers:
            layer.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        trainer.train()
        assert len(runs) == (4 if whole else depth)
        assert teacher.get_submodule(states.layer_list(teacher)) is layers and len(layers) == 4
        ends.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*ends)
