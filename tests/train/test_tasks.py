"""Embeddings, tokens with labels, sets of labels: what each task asks of the models, by hand, and how it is measured."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny

pytest.importorskip("transformers")
from datasets import ClassLabel, Dataset, Features, List, Value
from scipy.stats import spearmanr
from test_methods import METHODS, pair, spelled
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, logging

from fastkd.train import data, embedding, metrics, tokenisation
from fastkd.train.batch import Batch
from fastkd.train.methods import Setup, Side, build
from fastkd.train.states import States
from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_error()


def trainer_of(task, folder, method, teacher=None, student=None, **options):
    usual = pair("bert", task)
    args = tiny.arguments(folder, max_steps=6, learning_rate=1e-2, per_device_eval_batch_size=3)
    options = {"train_dataset": tiny.dataset(task), "eval_dataset": tiny.dataset(task, 7, seed=1), **options}
    return DistillTrainer(student or usual[1], teacher or usual[0], method, task=task, args=args, **options)


# Embeddings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", embedding.POOLINGS)
def test_pooling_leaves_padding_out(pooling, side):
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for row, real in enumerate((5, 2, 1)):
        whole = hidden[row, :real] if side == "right" else hidden[row, 5 - real :]
        wanted = {"mean": whole.mean(0), "cls": whole[0], "last": whole[-1]}[pooling]
        mask = torch.arange(5) < real if side == "right" else torch.arange(5) >= 5 - real
        found = embedding.pool(hidden[row : row + 1].bfloat16(), mask[None].long(), pooling)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0], wanted, rtol=1e-2, atol=1e-2)
    assert not embedding.pool(hidden, torch.zeros(3, 5), pooling).any()


@pytest.mark.parametrize("width", [16, 8])
def test_a_student_comes_near_its_teacher(width, tmp_path):
    """Of equal and of another width, which takes a projection; by length, so that rows come in another order."""
    teacher = pair("bert", "embedding")[0]
    student = tiny.model("bert", "embedding", layers=2, width=width)
    method = "embedding:mse=0.5,contrast=0.1,temperature=0.5 + fcd:weight=0.1"
    options = {name: tiny.dataset("embedding", 16) for name in ("train_dataset", "eval_dataset")}
    options["compute_metrics"] = metrics.of_task("embedding")
    trainer = trainer_of("embedding", tmp_path, method, teacher, student, **options)
    trainer.args.max_steps = 12
    trainer.args.train_sampling_strategy = "group_by_length"
    assert len(list(trainer.method.parameters())) == (0 if width == 16 else 2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert ("eval_cosine" in after) == (width == 16)
    assert after["eval_loss"] < before["eval_loss"] and after["eval_agreement"] > before["eval_agreement"]
    if width == 16:
        assert after["eval_loss"] == pytest.approx(1 - after["eval_cosine"], abs=1e-6)
    own = trainer.evaluate_other(trainer.teacher)
    assert own["eval_cosine"] == pytest.approx(1) and own["eval_agreement"] == pytest.approx(1)


@pytest.mark.parametrize("pooling", embedding.POOLINGS)
def test_what_is_evaluated_is_the_pooled_state(pooling, tmp_path):
    trainer = trainer_of("embedding", tmp_path, "embedding", pooling=pooling)
    rows = trainer.eval_dataset.with_format("torch")[:]
    student, teacher, numbers = trainer.predict(trainer.eval_dataset).predictions
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    for model, found in ((trainer.model, student), (trainer.teacher, teacher)):
        with torch.no_grad():
            wanted = embedding.pool(model.eval()(**inputs).last_hidden_state, inputs["attention_mask"], pooling)
        torch.testing.assert_close(torch.tensor(found), wanted[numbers], rtol=1e-4, atol=1e-5)


def test_embeddings_are_measured_whatever_order_they_come_in():
    rng = np.random.default_rng(0)
    student, teacher, scores = rng.normal(size=(10, 4)), rng.normal(size=(10, 4)), np.repeat(rng.normal(size=5), 2)

    def found(order, **changes):
        sides = (changes.get("student", student)[order], teacher[order], order)
        return metrics.of_embeddings(SimpleNamespace(predictions=sides, label_ids=scores[order]))

    straight = found(np.arange(10))
    assert found(rng.permutation(10)) == pytest.approx(straight)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    assert straight["cosine"] == pytest.approx(np.mean([cosine(a, b) for a, b in zip(student, teacher, strict=True)]))
    pairs = [cosine(student[i], student[i + 1]) for i in range(0, 10, 2)]
    assert straight["spearman"] == pytest.approx(spearmanr(pairs, scores[::2])[0])
    assert "cosine" not in found(np.arange(10), student=student[:, :3])
    outcome = SimpleNamespace(predictions=(teacher, teacher), label_ids=np.full(10, np.nan))
    assert metrics.of_embeddings(outcome) == pytest.approx({"cosine": 1, "agreement": 1})


@pytest.mark.parametrize("stated", [{"pooling_mode": "lasttoken"}, {"pooling_mode_lasttoken": True}])
def test_the_teachers_own_pooling_is_found(stated, tmp_path):
    embedding.write_pooling(tmp_path, "cls", True, 8, 32)
    read = lambda name: str(tmp_path / name) if (tmp_path / name).exists() else None  # noqa: E731
    assert embedding.read_pooling(read) == ("cls", True)
    (tmp_path / "1_Pooling/config.json").write_text(
        str({**stated, "pooling_mode_x": 1}).replace("'", '"').replace("True", "true")
    )
    assert embedding.read_pooling(read) == ("last", True)
    assert embedding.read_pooling(read, "mean") == ("mean", True)
    assert embedding.read_pooling(lambda name: None) == ("mean", False)
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(ValueError, match=r"pooling: the teacher's, .*max.* is none of mean, cls, last; choose one"):
        embedding.read_pooling(read)


MISTAKES = [
    ({"teacher": None, "method": None}, "the task embedding has no labels to fine-tune on"),
    ({"pooling": "max"}, "pooling: expected one of 'mean', 'cls', 'last', got 'max'"),
    ({"method": "kd"}, "kd makes no sense for the task embedding; it is for all but embedding"),
    ({"method": "embedding:cosine=0"}, "all have the weight 0"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_get_one_sentence(options, message, tmp_path):
    teacher, student = pair("bert", "embedding")
    options = {"teacher": teacher, "method": "embedding", **options}
    with pytest.raises(ValueError, match=message):
        DistillTrainer(
            student, task="embedding", args=tiny.arguments(tmp_path), train_dataset=tiny.dataset("embedding"), **options
        )


def test_a_model_with_a_head_has_no_embedding(tmp_path):
    teacher, student = pair("bert", "classification")
    with pytest.raises(ValueError, match="its forward returns no last_hidden_state, since it is a model with a head"):
        trainer_of("embedding", tmp_path, "embedding", teacher, student).train()


# Tokens, and sets of labels -----------------------------------------------------------------------------------------------


def batch_of(task: str, labels):
    """A batch with random float64 logits [2, 3, 4] of both models, or [2, 4] for sets of labels."""
    shape = (2, 3, 4) if task == "token_classification" else (2, 4)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    labels = None if labels is None else torch.tensor(labels)
    return Batch(task, States(student.requires_grad_()), States(teacher), mask, labels)


def terms_of(text: str, batch):
    side = Side("bert", 2, 16, 4, 4)
    return build(text, Setup(side, side, batch.task, range(2)))(batch)


@pytest.mark.parametrize("labels", [[[3, -100, 1], [-100, 2, -100]], None])
def test_kd_of_tokens_by_hand(labels):
    """On the labelled tokens; without labels on the real ones."""
    batch = batch_of("token_classification", labels)
    rows = [(0, 0), (0, 2), (1, 1)] if labels else [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    soft, hard = 0.0, 0.0
    for row, token in rows:
        s, t = batch.student.logits[row, token], batch.teacher.logits[row, token]
        soft = soft + 4 * F.kl_div((s / 2).log_softmax(0), (t / 2).softmax(0), reduction="sum") / len(rows)
        if labels:
            hard = hard - s.log_softmax(0)[labels[row][token]] / len(rows)
    found = terms_of("kd" if labels else "kd:alpha=1", batch)
    wanted = {"kd/soft": soft, "kd/hard": hard} if labels else {"kd/soft": soft}
    assert {name: term.over for name, term in found.items()} == dict.fromkeys(wanted, "labels" if labels else "tokens")
    check(found, wanted, batch)


def test_kd_of_sets_of_labels_by_hand():
    """Each label is a question of its own: binary cross-entropy, and the KL of two Bernoulli variables."""
    labels = [[1, 0, 1, 1], [0, 0, 1, 0]]
    batch = batch_of("multi_label", labels)
    s, t = batch.student.logits, batch.teacher.logits
    p, q = torch.sigmoid(t / 2), torch.sigmoid(s / 2)
    soft = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    hard = F.binary_cross_entropy_with_logits(s, torch.tensor(labels).double())
    check(terms_of("kd", batch), {"kd/soft": soft, "kd/hard": hard}, batch)
    assert torch.equal(batch.task_logits(), s)


def check(found, wanted, batch):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].value, value, rtol=1e-10, atol=1e-12)
        ours, theirs = (
            torch.autograd.grad(x, batch.student.logits, retain_graph=True)[0] for x in (found[name].value, value)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


NEW = [
    (name, task) for task in ("token_classification", "multi_label") for name in METHODS if task in METHODS[name].tasks
]


@pytest.mark.parametrize(("name", "task"), NEW)
def test_every_method_that_applies_trains(name, task, tmp_path):
    """Its loss falls, and what it predicts has a row for each token, or for each text."""
    trainer = trainer_of(task, tmp_path, spelled(name))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    found = trainer.predict(trainer.eval_dataset)
    assert (
        found.predictions.shape[-1] == 2
        and found.predictions.shape[:-1] == np.shape(trainer.eval_dataset["labels"][:])[: found.predictions.ndim - 1]
    )


@pytest.mark.parametrize("task", ["token_classification", "multi_label"])
def test_accumulation_changes_nothing(task, tmp_path):
    ends = []
    for parts in (1, 4):
        teacher, student = pair("bert", task)
        args = tiny.arguments(
            tmp_path,
            optim="sgd",
            learning_rate=1.0,
            gradient_accumulation_steps=parts,
            per_device_train_batch_size=8 // parts,
        )
        DistillTrainer(student, teacher, "kd", task=task, args=args, train_dataset=tiny.dataset(task)).train()
        ends.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    start = torch.cat([p.detach().flatten() for p in pair("bert", task)[1].parameters()])
    assert (ends[0] - ends[1]).norm() < 1e-5 * (ends[0] - start).norm()


ENTITIES = [
    ("O B-P I-P O", {("P", 1, 3)}),
    ("B-P B-P I-P", {("P", 0, 1), ("P", 1, 3)}),
    ("B-P I-L", {("P", 0, 1), ("L", 1, 2)}),  # as in conlleval, an I- of another type begins an entity
    ("I-P I-P O I-L", {("P", 0, 2), ("L", 3, 4)}),
    ("O O", set()),
    ("", set()),
]


@pytest.mark.parametrize(("tags", "found"), ENTITIES)
def test_entities(tags, found):
    assert metrics.entities(tags.split()) == found


def test_entities_of_all_short_sequences_as_conlleval_has_them():
    """start_of_chunk and end_of_chunk of Tjong Kim Sang's conlleval.pl (2000), for IOB tags."""
    for tags in itertools.product(["O", "B-P", "I-P", "B-L", "I-L"], repeat=4):
        found, start = set(), None
        for i, (before, now) in enumerate(itertools.pairwise(("O", *tags, "O"))):
            (last, _, last_kind), (prefix, _, kind) = before.partition("-"), now.partition("-")
            ends = last != "O" and (prefix in ("B", "O") or last_kind != kind)
            begins = prefix == "B" or (prefix == "I" and (last == "O" or last_kind != kind))
            if ends:
                found.add((last_kind, start, i))
            start = i if begins else start
        assert metrics.entities(list(tags)) == found, tags


def outcome_of(predicted, wanted, classes: int):
    predicted = np.array(predicted)
    return SimpleNamespace(predictions=np.eye(classes)[predicted], label_ids=np.array(wanted))


def test_tokens_are_measured_where_they_have_a_label():
    names = ["O", "B-P", "I-P"]
    outcome = outcome_of([[0, 1, 2, 0], [1, 0, 0, 2]], [[-100, 1, 2, 0], [1, 1, 0, -100]], 3)
    found = metrics.of_task("token_classification", names=names)(outcome)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["entity_f1"] == pytest.approx(2 * 2 / (2 + 3))  # P of row 0, first P of row 1; its second is missed
    assert found["macro_f1"] == pytest.approx((4 / 5 + 4 / 5 + 1) / 3)
    assert found["balanced_accuracy"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert "entity_f1" not in metrics.of_task("token_classification", names=["NOUN", "VERB", "O"])(outcome)


def test_sets_of_labels_are_measured():
    predictions, wanted = np.array([[1.0, -1, 2], [-1, -2, 3]]), np.array([[1, 0, 0], [0, 0, 1]])
    found = metrics.of_task("multi_label")(SimpleNamespace(predictions=predictions, label_ids=wanted))
    assert found == pytest.approx({"micro_f1": 4 / 5, "macro_f1": (1 + 0 + 2 / 3) / 3, "accuracy": 0.5})


# Data ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces():
    """A tokenizer of word pieces, with [CLS] and [SEP]."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "John", "Smith", "##son", "sleeps", "."]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    raw.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


def corpus_of(rows, text="tokens", label="ner_tags", pair=None):
    return data.Corpus(rows, None, text, pair, label)


@pytest.mark.parametrize(
    ("length", "labels"), [(12, [-100, 1, 2, -100, 0, 0, -100]), (4, [-100, 1, 2, -100]), (5, [-100, 1, 2, -100, -100])]
)
def test_a_label_is_on_the_first_piece_of_its_word(length, labels, pieces):
    rows = Dataset.from_dict({"tokens": [["John", "Smithson", "sleeps", "."]], "ner_tags": [[1, 2, 0, 0]]})
    tokens, whole = tokenisation.tokenise(rows, corpus_of(rows), pieces, "token_classification", length)
    assert tokens["labels"][:] == [labels] and len(tokens["input_ids"][0]) == len(labels) and whole == [7]
    batch = tokenisation.collator(pieces, "token_classification")(
        [
            tokens[0],
            {
                "input_ids": [2, 3],
                "attention_mask": [1, 1],
                "token_type_ids": [0, 0],
                "labels": [-100] * 2,
                "example_id": 1,
            },
        ]
    )
    assert batch["labels"][1].tolist() == [-100] * len(labels) and batch["example_id"].tolist() == [0, 1]


def test_labels_of_words_are_numbered_by_the_names_of_the_teachers_outputs():
    kind = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-P", "I-P"]))})
    words = {"tokens": [["a", "b"], ["c", "d"]]}
    for rows in (
        Dataset.from_dict({**words, "ner_tags": [[0, 1], [2, 0]]}, features=kind),
        Dataset.from_dict({**words, "ner_tags": [["O", "B-P"], ["I-P", "O"]]}),
    ):
        corpus = corpus_of(rows)
        corpus.found = sorted(set(data._flat(rows["ner_tags"][:])))
        data.number_classes(corpus, {0: "i-p", 1: "b-p", 2: "o"})
        assert corpus.train["ner_tags"][:] == [[2, 1], [0, 2]] and corpus.names == ["i-p", "b-p", "o"]


def test_the_texts_of_a_pair_follow_one_another(pieces):
    rows = Dataset.from_dict({"a": ["John", "."], "b": ["sleeps", "Smith"], "score": [3, 1]})
    corpus = corpus_of(rows, "a", "score", "b")
    tokens, _ = tokenisation.tokenise(rows, corpus, pieces, "embedding", 8)
    assert [ids[1] for ids in tokens["input_ids"]] == [4, 7, 8, 5]
    assert tokens["labels"][:] == [3.0, 3.0, 1.0, 1.0] and tokens["example_id"][:] == [0, 1, 2, 3]


def test_sets_of_labels_become_ones_and_zeros(pieces):
    rows = Dataset.from_dict({"text": ["John", ".", "Smith"], "label": [["joy", "fear"], [], ["fear"]]})
    corpus = corpus_of(rows, "text", "label")
    corpus.found = ["fear", "joy"]
    data.number_classes(corpus, {0: "joy", 1: "fear", 2: "anger"})
    tokens, whole = tokenisation.tokenise(corpus.train, corpus, pieces, "multi_label", 8)
    assert tokens["labels"][:] == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    lines = tokenisation.summary(corpus, {"train": tokens}, {"train": whole}, 8, "multi_label")
    assert "classes: joy 1, fear 2, anger 0" in lines
