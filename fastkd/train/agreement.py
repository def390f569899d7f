"""Whether teacher and student speak of the same things: labels by name, vocabularies by token."""

import re

import numpy as np
import torch
from torch import Tensor

from .batch import VOCABULARY_TASKS
from .states import is_causal

FEWEST = 20  # validation rows; of fewer, chance cannot be told from skill
_UNNAMED = re.compile(r"label_\d+")


def check_model(side: str, model, task: str) -> None:
    """Raise before training if `model`, the "student" or the "teacher", is of a kind that cannot be trained or read here."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{side}: {kind} is an encoder-decoder, which fastkd does not distil; choose an encoder or a decoder"
        )
    if getattr(config, "output_attentions", False):
        raise ValueError(
            f"{side}: its configuration asks for output_attentions, which SDPA answers with nothing; set it to False "
            "(fastkd reads queries and keys itself), or load the model with attn_implementation='eager' elsewhere"
        )
    if task == "causal_lm" and not is_causal(model):
        raise ValueError(
            f"{side}: causal_lm predicts each next token, and {kind} sees it, since its attention is bidirectional; choose "
            "task='masked_lm', or load the model as a decoder (is_decoder=True)"
        )


def check_pair(student, teacher, task: str, ids: Tensor | None = None) -> None:
    """Raise before training if the two outputs cannot be compared. ids: of `teacher_tokens`."""
    if task == "embedding":
        return
    if task in VOCABULARY_TASKS:
        sizes = student.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
        if ids is None and sizes[0] != sizes[1]:
            raise ValueError(
                f"vocabulary: the student has {sizes[0]} tokens and the teacher {sizes[1]}; predictions of tokens can only be "
                "compared over one vocabulary. Pass teacher_tokens=fastkd.train.agreement.teacher_tokens(student's tokenizer, "
                "teacher's), which finds every token of the student's among the teacher's, or use models of one tokenizer"
            )
        if ids is not None and (len(ids) > sizes[0] or int(ids.max()) >= sizes[1]):
            raise ValueError(
                f"teacher_tokens: names {len(ids)} of the student's {sizes[0]} tokens, and teacher's ids up to "
                f"{int(ids.max())} of {sizes[1]}; they belong to other models"
            )
    elif task == "regression" and teacher.config.num_labels != 1:
        raise ValueError(
            f"teacher: has {teacher.config.num_labels} outputs, and regression is about one number; choose a teacher of one "
            "output, or the task classification"
        )
    elif student.config.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"labels: the student has {student.config.num_labels} outputs and the teacher {teacher.config.num_labels}; "
            "make the student from the teacher, or give both the same labels"
        )


def teacher_labels(student, teacher) -> Tensor | None:
    """The teacher's column for each of the student's labels, by name; None where the orders agree or names say nothing."""
    ours, theirs = (_names(model.config.id2label) for model in (student, teacher))
    if ours == theirs or None in (label_names(model.config.id2label) for model in (student, teacher)):
        return None
    if sorted(ours) != sorted(theirs):
        raise ValueError(
            f"labels: the student's are {', '.join(ours)} and the teacher's {', '.join(theirs)}; rename them (id2label in "
            "config.json) so that each label has one name"
        )
    return torch.tensor([theirs.index(name) for name in ours])


def label_names(id2label: dict) -> list[str] | None:
    """What a model calls its outputs, in order; None where its names say nothing (LABEL_0)."""
    if any(_UNNAMED.fullmatch(name) for name in _names(id2label)):
        return None
    return [str(id2label[i]) for i in sorted(id2label, key=int)]


def check_teacher(trainer) -> None:
    """Raise where the teacher is no better than chance on the validation set, of which a class's share does not matter."""
    data = trainer.eval_dataset
    if data is None or trainer.task not in ("classification", "token_classification", "cloze"):
        return
    classes = set(np.hstack(data["labels"][:]).tolist()) - {-100}
    if len(classes) < 2 or len(data) < FEWEST:
        return
    found = trainer.evaluate_other(trainer.teacher)["eval_balanced_accuracy"]
    if found <= 1 / len(classes):
        raise RuntimeError(
            f"teacher: its balanced accuracy on the validation set is {found:.1%}, and chance is {1 / len(classes):.1%}, so "
            "there is nothing to learn from it. Fine-tune it on this task first, and check "
            "label_column and its id2label; pass --allow_weak_teacher to distil it all the same"
        )


def _names(id2label: dict) -> list[str]:
    return [str(id2label[i]).strip().lower() for i in sorted(id2label, key=int)]


def teacher_tokens(student, teacher) -> Tensor | None:
    """The teacher's id of each of the student's tokens, by name, from both tokenizers; None where they are the same.

    A student of `fastkd vocab` has a part of the teacher's tokens under ids of its own. Ids behind the last token, by which
    models pad their embeddings, are in neither vocabulary: they are left out, not compared.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if student is teacher or ours == theirs:
        return None
    missing = [token for token in ours if token not in theirs]
    if missing:
        raise ValueError(
            f"tokenizer: the student's has {len(ours)} tokens and the teacher's {len(theirs)}, and {len(missing)} of the "
            f"student's are unknown to the teacher, for example {missing[0]!r}; student and teacher must share one "
            "tokenizer, or the student's must be a part of the teacher's, as `fastkd vocab` makes it"
        )
    if sorted(ours.values()) != list(range(len(ours))):
        raise ValueError("tokenizer: the student's ids have gaps, so its tokens cannot be found among the teacher's")
    ids = torch.empty(len(ours), dtype=torch.long)
    for token, i in ours.items():
        ids[i] = theirs[token]
    return ids


def unknown_share(tokens, unknown_id: int | None) -> float:
    """How much of a data set's text a vocabulary does not know."""
    rows = tokens["input_ids"]
    total = sum(map(len, rows))
    return 0.0 if unknown_id is None or not total else sum(list(row).count(unknown_id) for row in rows) / total
