"""A student whose vocabulary is a subset of the teacher's: input ids and predictions are mapped token by token."""

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastkd.train.agreement import teacher_tokens, unknown_share
from fastkd.train.trainer import DistillTrainer
from fastkd.vocab import VocabMap

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KEPT = torch.tensor([*range(10), *range(12, tiny.VOCAB, 2)])


def tokenizer(words):
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")))


def test_tokens_are_matched_by_name():
    teacher = tokenizer(["bad", "good", "film"])
    assert teacher_tokens(tokenizer(["bad", "good", "film"]), teacher) is None
    assert teacher_tokens(tokenizer(["good", "bad"]), teacher).tolist() == [0, 1, 2, 3, 4, 6, 5]
    with pytest.raises(ValueError, match="1 of the student's are unknown to the teacher, for example 'movie'"):
        teacher_tokens(tokenizer(["good", "movie"]), teacher)


def test_unknown_share():
    assert unknown_share({"input_ids": [[2, 1, 5, 3], [2, 6, 6, 3]]}, 1) == 1 / 8
    assert unknown_share({"input_ids": [[2, 5]]}, None) == 0


def trained(folder, student, teacher, task, of_teacher, **options):
    data = tiny.dataset(task, rows=8)
    ids = torch.tensor(data["input_ids"])
    data = data.remove_columns("input_ids").add_column("input_ids", (ids % len(KEPT)).tolist())
    if task in ("masked_lm", "causal_lm"):
        labels = torch.tensor(data["labels"])
        labels = torch.where(labels >= 0, labels % len(KEPT), labels)
        data = data.remove_columns("labels").add_column("labels", labels.tolist())
    args = tiny.arguments(folder, per_device_train_batch_size=4, learning_rate=0.0)
    trainer = DistillTrainer(
        student, teacher, "kd:alpha=1", task=task, args=args, train_dataset=data, teacher_tokens=of_teacher, **options
    )
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "term/kd/soft" in entry)["term/kd/soft"]


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "masked_lm"), ("gpt2", "causal_lm"), ("bert", "classification"), ("llama", "causal_lm")],
)
def test_a_student_equal_to_the_teacher_has_zero_loss(family, task, tmp_path):
    """The student is the teacher with a smaller vocabulary: mapped to it, both agree exactly."""
    teacher = tiny.model(family, task, seed=3)
    student = VocabMap(KEPT, tiny.VOCAB).shrink(teacher)
    assert trained(tmp_path / "mapped", student, teacher, task, KEPT) < 1e-10
    if task == "classification":
        shuffled = KEPT.flip(0)
        assert trained(tmp_path / "cached", student, teacher, task, KEPT, teacher_cache=tmp_path / "kept") < 1e-10
        assert trained(tmp_path / "shuffled", student, teacher, task, shuffled) > 1e-8
    else:
        with pytest.raises(
            ValueError, match=r"vocabulary: the student has \d+ tokens and the teacher 60; .*teacher_tokens"
        ):
            trained(tmp_path / "unmapped", student, teacher, task, None)


def test_padding_rows_of_the_head_are_ignored(tmp_path):
    """Models of one tokenizer, padded differently: ids without a token are not compared."""
    teacher = tiny.model("gpt2", "causal_lm", seed=3)
    student = tiny.model("gpt2", "causal_lm", seed=3)
    student.resize_token_embeddings(tiny.VOCAB + 4, mean_resizing=False)
    with torch.no_grad():
        student.get_output_embeddings().weight[-4:] = 1.0
    assert trained(tmp_path, student, teacher, "causal_lm", torch.arange(tiny.VOCAB)) < 1e-10


def test_a_vocabulary_of_another_model_is_refused(tmp_path):
    teacher, student = tiny.model("bert", "masked_lm"), tiny.model("bert", "masked_lm")
    with pytest.raises(ValueError, match=r"teacher_tokens: .* they belong to other models"):
        trained(tmp_path, student, teacher, "masked_lm", torch.arange(tiny.VOCAB + 1))
