"""Whether teacher and student speak of the same things: labels by name, vocabularies by word."""

import re

import torch
from torch import Tensor

from .batch import WORD_TASKS

_UNNAMED = re.compile(r"label_\d+")


def check_pair(student, teacher, task: str) -> None:
    """Raise before training if the two outputs cannot be compared."""
    for side, model in (("teacher", teacher), ("student", student)):
        if getattr(model.config, "output_attentions", False):
            raise ValueError(
                f"{side}: its configuration asks for output_attentions, which SDPA answers with nothing; set it to False "
                "(fastkd reads queries and keys itself), or load the model with attn_implementation='eager' elsewhere"
            )
    if task in (*WORD_TASKS, "cloze"):
        sizes = student.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"vocabulary: the student has {sizes[0]} words and the teacher {sizes[1]}; word predictions can only be "
                "compared over one vocabulary. Use models of one tokenizer, and resize_token_embeddings where only the "
                "padding differs"
            )
    elif student.config.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"labels: the student has {student.config.num_labels} outputs and the teacher {teacher.config.num_labels}; "
            "make the student from the teacher, or give both the same labels"
        )


def teacher_labels(student, teacher) -> Tensor | None:
    """The teacher's column for each of the student's labels, by name; None where the orders agree or names say nothing."""
    ours, theirs = (_names(model.config.id2label) for model in (student, teacher))
    if ours == theirs or any(_UNNAMED.fullmatch(name) for name in ours + theirs):
        return None
    if sorted(ours) != sorted(theirs):
        raise ValueError(
            f"labels: the student's are {', '.join(ours)} and the teacher's {', '.join(theirs)}; rename them (id2label in "
            "config.json) so that each label has one name"
        )
    return torch.tensor([theirs.index(name) for name in ours])


def _names(id2label: dict) -> list[str]:
    return [str(id2label[i]).strip().lower() for i in sorted(id2label, key=int)]


def check_tokenizers(student, teacher) -> None:
    """Both models read the same ids, so both tokenizers must give every word the same id."""
    if student is teacher:
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = [word for word in ours if theirs.get(word) != ours[word]]
    example = (
        f", for example {differing[0]!r} is {ours[differing[0]]} and {theirs.get(differing[0])}" if differing else ""
    )
    raise ValueError(
        f"tokenizer: the student's has {len(ours)} words and the teacher's {len(theirs)}, and {len(differing)} of the "
        f"student's have another id{example}; student and teacher must share one tokenizer"
    )
