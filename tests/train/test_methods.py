"""Every method where it makes sense: it trains, its own terms matter, its student is a plain model. Elsewhere: refused."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from transformers import AutoConfig, logging

from fastkd.train import methods
from fastkd.train.batch import Batch
from fastkd.train.methods import METHODS, Setup, Side, Term, build, refusal
from fastkd.train.states import read, record_attention
from fastkd.train.student import from_config, from_layers
from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_error()
SMALL = {
    "minilmv2": "relation_heads=4", "codir": "nce_k=3,feat_dim=8", "embedding": "mse=0.5,contrast=0.1,temperature=0.5",
}  # fmt: skip
FEATURES_ONLY = {"fcd": "share=1", "minilm": "share=1", "minilmv2": "share=1", "tinybert": "share=1"}


def spelled(name: str) -> str:
    options = [table[name] for table in (SMALL, FEATURES_ONLY) if name in table]
    return f"{name}:{','.join(options)}" if options else name


def task_of(name: str, family: str) -> str:
    tasks = METHODS[name].tasks
    wanted = ("classification", "causal_lm") if family in tiny.DECODERS else ("classification", "masked_lm")
    return next(task for task in (*wanted, "embedding") if task in tasks)


def output_of(task: str) -> str:
    return "last_hidden_state" if task == "embedding" else "logits"


def sensible():
    for name in METHODS:
        for family in tiny.FAMILIES:
            if refusal(name, family in tiny.DECODERS) is None:
                yield name, family


def pair(family: str, task: str, noise: float = 0.05):
    """A teacher whose last word is not its first, and a student of two of its layers, some way off."""
    teacher = tiny.model(family, task, seed=1)
    generator = torch.Generator().manual_seed(5)
    for model, scale in ((teacher, 0.15), (student := from_layers(teacher, "every:2"), noise)):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return teacher, student


@pytest.mark.parametrize(("name", "family"), sensible())
def test_trains_and_exports(name, family, tmp_path):
    task = task_of(name, family)
    teacher, student = pair(family, task)
    args = tiny.arguments(tmp_path, max_steps=12, learning_rate=3e-3, logging_steps=1)
    trainer = DistillTrainer(student, teacher, spelled(name), task=task, args=args, train_dataset=tiny.dataset(task))
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses.isfinite().all() and losses[-3:].mean() < 0.98 * losses[:2].mean(), losses
    trainer.save_model(str(tmp_path / "student"))
    loaded, report = tiny.AUTO[task].from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    student.eval()
    theirs, ours = (model(**tiny.padded())[output_of(task)] for model in (loaded.eval(), student))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "student").num_hidden_layers == 2
    assert sorted(p.suffix for p in (tmp_path / "student").iterdir()) == [".json"] * (1 + (task == "causal_lm")) + [
        ".safetensors"
    ]


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].causal is not None])
def test_senseless_attention_is_refused_by_name(name):
    side = Side("any", 4, 16, 4, 4, causal=not METHODS[name].causal)
    kind = "bidirectional" if METHODS[name].causal else "causal"
    with pytest.raises(ValueError, match=f"{name} makes no sense for a model with {kind} attention: "):
        build(name, Setup(side, side, METHODS[name].tasks[0], range(8)))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("codir", "regression"), ("glmd", "classification"), ("forward_kl", "classification"), ("kd", "embedding"),
        ("bert_emd", "embedding"), ("embedding", "classification"), ("pkd", "token_classification"),
        ("codir", "multi_label"), ("distilbert", "token_classification"),
    ],
)  # fmt: skip
def test_senseless_tasks_are_refused_by_name(name, task):
    side = Side("any", 4, 16, 4, 4, causal=name == "forward_kl")
    with pytest.raises(ValueError, match=f"{name} makes no sense for the task {task}"):
        build(name, Setup(side, side, task, range(8)))


@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize("negatives", ["in_batch", "window,window=3", "uniform"])
def test_codir_without_labels_takes_two_steps(negatives, preset, tmp_path):
    """Pre-training: the contrast is there, moves the projections, and ids of the corpus are all that it needs."""
    teacher, student = pair("bert", "masked_lm")
    spelling = f"codir:nce_k=3,feat_dim=8,preset={preset},negatives={negatives}"
    args = tiny.arguments(tmp_path, max_steps=2, learning_rate=3e-3, logging_steps=1)
    trainer = DistillTrainer(
        student, teacher, spelling, task="masked_lm", args=args, train_dataset=tiny.dataset("masked_lm")
    )
    loss = trainer.method.methods["codir"].loss
    before = loss.embed_s.linear.weight.detach().clone()
    trainer.train()
    logged = [entry["term/codir/contrast"] for entry in trainer.state.log_history if "term/codir/contrast" in entry]
    assert len(logged) == 2 and all(value > 0 for value in logged)
    assert not torch.equal(loss.embed_s.linear.weight, before)
    with pytest.raises(ValueError, match="negatives=label needs labels"):
        build("codir:negatives=label", Setup(Side.of(student), Side.of(teacher), "masked_lm", range(8)))


# (method, term, names of student parameters that it must reach, and that it must not)
REACHES = [
    ("kd", "soft", "classifier.weight", None),
    ("kd", "hard", "classifier.weight", None),
    ("fcd", "token", "layer.1.output.dense.weight", "classifier.weight"),
    ("fcd", "sequence", "layer.1.output.dense.weight", "classifier.weight"),
    ("bert_emd", "attention", "layer.0.attention.self.query.weight", "classifier.weight"),
    ("bert_emd", "hidden", "layer.1.output.dense.weight", "classifier.weight"),
    ("bert_emd", "embedding", "embeddings.word_embeddings.weight", "layer.0.output.dense.weight"),
    ("bert_emd", "prediction", "classifier.weight", None),
    ("pkd", "patient", "layer.0.output.dense.weight", "layer.1.output.dense.weight"),
    ("tinybert", "attention", "layer.1.attention.self.key.weight", "layer.1.output.dense.weight"),
    ("tinybert", "hidden", "layer.1.output.dense.weight", "classifier.weight"),
    ("minilm", "relations", "layer.1.attention.self.value.weight", "layer.1.output.dense.weight"),
    ("minilmv2", "relations", "layer.1.attention.self.query.weight", "layer.1.output.dense.weight"),
    ("codir", "contrast", "layer.0.output.dense.weight", "classifier.weight"),
    ("glmd", "tokens", "embeddings.word_embeddings.weight", None),
    ("distilbert", "soft", "embeddings.word_embeddings.weight", None),
    ("distilbert", "cosine", "layer.1.output.dense.weight", "cls.predictions.transform.dense.weight"),
    ("embedding", "cosine", "layer.1.output.dense.weight", "pooler.dense.weight"),
    ("embedding", "mse", "layer.1.output.dense.weight", "pooler.dense.weight"),
    ("embedding", "contrast", "layer.1.output.dense.weight", "pooler.dense.weight"),
    ("forward_kl", "forward_kl", "wte.weight", None),
    ("reverse_kl", "reverse_kl", "wte.weight", None),
    ("jsd", "jsd", "wte.weight", None),
    ("skew_kl", "skew_kl", "wte.weight", None),
]


@pytest.mark.parametrize(("name", "term", "reached", "untouched"), REACHES)
def test_each_term_has_its_gradient(name, term, reached, untouched):
    family = "gpt2" if METHODS[name].causal else "bert"
    task = task_of(name, family)
    teacher, student = pair(family, task)
    rows = tiny.dataset(task)
    setup = Setup(Side.of(student), Side.of(teacher), task, rows)
    torch.manual_seed(0)
    method = build(spelled(name), setup).train()
    for model in (student, teacher):
        record_attention(model)
    inputs = {key: torch.tensor(rows[key][:]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher_states = read(teacher, inputs, hidden=True, layers=range(4), output=output_of(task))
    states = read(student, inputs, hidden=True, layers=range(2), output=output_of(task))
    labels = torch.tensor(rows["labels"][:]) if "labels" in rows.column_names else None
    batch = Batch(task, states, teacher_states, inputs["attention_mask"], labels, torch.arange(8))
    method(batch)[f"{name}/{term}"].value.backward()
    gradients = {key: p.grad for key, p in student.named_parameters()}
    (wanted,) = (g for key, g in gradients.items() if key.endswith(reached))
    assert wanted is not None and wanted.abs().max() > 1e-9
    if untouched is not None:
        (other,) = (g for key, g in gradients.items() if key.endswith(untouched))
        assert other is None or other.abs().max() == 0


@pytest.mark.parametrize(("name", "term"), [row[:2] for row in REACHES])
def test_each_term_changes_the_result(name, term, tmp_path, monkeypatch):
    """Two steps with the term at weight 0 end elsewhere than two steps with it."""
    family = "gpt2" if METHODS[name].causal else "bert"
    task = task_of(name, family)
    ends = []
    for muted in (False, True):
        teacher, student = pair(family, task)
        args = tiny.arguments(tmp_path, max_steps=2, optim="sgd", learning_rate=0.1)
        trainer = DistillTrainer(
            student, teacher, spelled(name), task=task, args=args, train_dataset=tiny.dataset(task)
        )
        if muted:
            forward = trainer.method.forward
            zeroed = lambda batch, forward=forward: {  # noqa: E731
                key: part._replace(weight=0.0) if key == f"{name}/{term}" else part
                for key, part in forward(batch).items()
            }
            monkeypatch.setattr(trainer.method, "forward", zeroed)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert (ends[0] - ends[1]).abs().max() > 1e-7


def test_codir_takes_the_first_real_token():
    """Which under left padding is not the first token."""
    side = Side("bert", 4, 16, 4, 4)
    method = build("codir:nce_k=3,feat_dim=8,negatives=uniform", Setup(side, side, "masked_lm", range(8))).eval()
    hidden, found = torch.randn(2, 5, 3, 6, 16, generator=torch.Generator().manual_seed(0)), []
    for shift in (0, 2):  # tokens of padding at the left
        student, teacher = (SimpleNamespace(hidden=tuple(x.roll(shift, 2))) for x in hidden)
        mask = torch.arange(6).ge(shift) & torch.arange(6).lt(4 + shift)
        batch = SimpleNamespace(
            student=student, teacher=teacher, mask=mask.expand(3, 6), numbers=lambda: torch.tensor([1, 4, 6]), advance=True,
            distil=lambda _: {},
        )  # fmt: skip
        torch.manual_seed(1)
        found.append(method.methods["codir"](batch)["contrast"].value)
    assert torch.equal(*found) and found[0] > 0


def test_methods_combine_with_weights(tmp_path):
    teacher, student = pair("bert", "classification")
    args = tiny.arguments(tmp_path)
    text = "fcd:weight=2,beta=0 + kd:weight=0.5,alpha=0.7"
    trainer = DistillTrainer(student, teacher, text, args=args, train_dataset=tiny.dataset("classification"))
    trainer.train()
    entry = trainer.state.log_history[0]
    weights = {key: value for key, value in entry.items() if key.startswith("weight/")}
    assert weights == pytest.approx({"weight/fcd/token": 2, "weight/kd/soft": 0.35, "weight/kd/hard": 0.15})
    total = sum(weight * entry[key.replace("weight/", "term/")] for key, weight in weights.items())
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kdd", "there is no 'kdd'; there are kd, fcd"),
        ("kd:temprature=3", "kd has no option temprature; it has weight, alpha, temperature"),
        ("kd + kd", "kd is named twice"),
        ("kd:weight=abc", "kd:weight: expected a finite number, got 'abc'"),
        (None, "a teacher was given, and method=None; name one"),
        ("fcd:share=half", "share: .* must lie in"),
        ("fcd:teacher_layer=9", "teacher_layer=9 is not among the teacher's layers 1 to 4"),
        ("kd:alpha", "expected option=value"),
        ("kd:alpha=2", r"alpha: must lie in \[0, 1\]"),
        ("fcd:layers=first", "layers must be 'last' or 'uniform'"),
        ("minilmv2", "relation_heads=48 does not divide the student's query width 16"),
        ("minilmv2:relation_heads=4,teacher_layer=9", "teacher_layer=9 is not among the teacher's layers 1 to 4"),
        ("fcd:share=2", "share: .* must lie in"),
    ],
)
def test_wrong_methods_get_one_sentence(text, message):
    student, teacher = Side("bert", 2, 16, 4, 4), Side("bert", 4, 16, 4, 4)
    with pytest.raises(ValueError, match=message):
        build(text, Setup(student, teacher, "classification", range(8)))


@pytest.mark.parametrize(
    ("name", "student", "message"),
    [
        ("tinybert", Side("bert", 3, 16, 4, 4), "needs a multiple of the student's layers in the teacher, got 3 and 4"),
        ("pkd", Side("bert", 2, 8, 4, 4), r"both widths must agree, got 8 \(student\) and 16 \(teacher\)"),
        ("minilm", Side("bert", 2, 16, 2, 2), "the student has 2 heads and the teacher 4; choose minilmv2"),
        ("bert_emd", Side("bert", 2, 16, 2, 2), "bert_emd:heads=mean"),
        (
            "kd",
            Side("gpt2", 2, 16, 4, 4, causal=True),
            r"the teacher \(bert\) is bidirectional and that of the student \(gpt2\) causal",
        ),
    ],
)
def test_unfitting_students_get_one_sentence(name, student, message):
    with pytest.raises(ValueError, match=message):
        build(name, Setup(student, Side("bert", 4, 16, 4, 4), "classification", range(8)))


ALL_OTHERS = "tinybert: the student's layers 0,1 learn from the teacher's layers 1,3, but begin as its layers 0,2 "
LAST_OTHER = "the student's layers 1 learn from the teacher's layers 3, but begin as its layers 2 "


@pytest.mark.parametrize(
    ("method", "layers", "advice"),
    [("tinybert", "0,2", ALL_OTHERS), ("tinybert", "1,3", None), ("tinybert", None, None),
     ("minilm", "0,2", "minilm: " + LAST_OTHER), ("minilm", "0,3", None), ("minilmv2:relation_heads=4", "0,2", LAST_OTHER),
     ("minilmv2:relation_heads=4,teacher_layer=3", "0,2", None), ("minilm of gpt2", "0,2", None)],
)  # fmt: skip
def test_methods_advise_on_the_layers_to_begin_with(tmp_path, caplog, method, layers, advice):
    method, _, family = method.partition(" of ")
    teacher = tiny.model(family or "bert", "classification", seed=1)
    student = from_layers(teacher, layers) if layers else from_config(teacher, "num_hidden_layers=2")
    data = tiny.dataset("classification")
    DistillTrainer(student, teacher, method, args=tiny.arguments(tmp_path), train_dataset=data)
    said = [record.message for record in caplog.records if record.name == "fastkd.train.methods.base"]
    assert len(said) == (advice is not None) and all(
        advice in message and "--student_layers 1,3" in message for message in said
    )


def test_a_third_party_adds_a_method(monkeypatch):
    class Theirs(methods.Method):
        def forward(self, batch):
            return {"own": Term(batch.hard(), 3.0)}

    class Entry:
        load = staticmethod(lambda: Theirs)

    monkeypatch.setattr(methods, "_third_parties", lambda: {"theirs": Entry})
    side = Side("bert", 2, 16, 4, 4)
    built = build("theirs:weight=2", Setup(side, side, "classification", range(8)))
    assert built.weights == {"theirs": 2.0} and isinstance(built.methods["theirs"], Theirs)


def test_a_method_is_registered_in_this_process(monkeypatch):
    monkeypatch.setattr(methods, "_registered", {})

    @methods.register("mine")
    class Mine(methods.Method):
        def forward(self, batch):
            return {"own": Term(batch.hard(), 3.0)}

    side = Side("bert", 2, 16, 4, 4)
    setup = Setup(side, side, "classification", range(8))
    assert isinstance(build("kd + mine:weight=2", setup).methods["mine"], Mine)
    with pytest.raises(ValueError, match="name: 'kd' is one of fastkd's own methods"):
        methods.register("kd")
    with pytest.raises(ValueError, match=r"there is no 'other'; there are .*, skew_kl, mine"):
        build("other", setup)


def test_the_table_lists_every_method():
    lines = methods.table().splitlines()
    assert len(lines) == len(METHODS) + 2
    page = Path(methods.__file__).parents[3] / "docs/trainer.md"
    assert methods.table() in page.read_text(), "docs/trainer.md: paste fastkd.train.methods.table()"
    assert "| `codir` | yes | – | classification, masked_lm |" in lines


def test_two_stages_hand_over(tmp_path):
    """Relations first, fine-tuning afterwards, at the declared share; the second stage asks nothing of the teacher."""
    teacher, student = pair("bert", "classification")
    args = tiny.arguments(tmp_path, max_steps=4)
    trainer = DistillTrainer(student, teacher, "fcd:share=0.5", args=args, train_dataset=tiny.dataset("classification"))
    before = copy.deepcopy(teacher.state_dict())
    trainer.train()
    stages = [
        sorted(k for k in entry if k.startswith("term/")) for entry in trainer.state.log_history if "loss" in entry
    ]
    assert stages == [["term/fcd/sequence", "term/fcd/token"]] * 2 + [["term/fcd/hard"]] * 2
    assert not trainer.method.needs_teacher(0.5) and trainer.method.needs_teacher(0.49)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_chooses_states_and_calls_losses(name):
    """Its formula is in fastkd.losses; a method is short, and computes nothing itself."""
    path = Path(methods.__file__).with_name(METHODS[name].where.split(":")[0] + ".py")
    text = path.read_text()
    assert text.startswith('"""') and len(text.split('"""', 2)[2].splitlines()) <= 30
    assert "functional" not in text and "import torch" not in text
