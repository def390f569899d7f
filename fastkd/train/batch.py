"""One micro-batch as a method sees it, and what its task asks of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import functional
from fastkd.losses.kd import PredictionLoss, hard_cross_entropy

from .states import States

TASKS = ("classification", "regression", "masked_lm", "causal_lm", "cloze")
WORD_TASKS = ("masked_lm", "causal_lm")
SENTENCE_TASKS = ("classification", "regression", "cloze")


# What a term can be a mean over. A mean over "batches" weighs every micro-batch alike: the terms that couple its samples.
UNITS = ("examples", "labels", "tokens", "sequences", "positions", "pairs", "batches")


class Term(NamedTuple):
    """A part of the loss, how much it weighs, and which of UNITS it is a mean over."""

    value: Tensor
    weight: float
    over: str = "batches"


def count_units(task: str, mask: Tensor, labels: Tensor | None) -> Tensor:
    """How many of each of UNITS a micro-batch has: labels that count, real tokens, sequences of two real tokens or more (the
    others have no relations), positions of the padded batch, pairs of them within a sequence."""
    size, length = mask.shape
    labelled = mask.new_zeros(()) if labels is None else labelled_rows(task, labels, mask).sum()
    of_mask = labelled, mask.sum(), (mask.sum(1) > 1).sum()
    rest = mask.new_tensor([size * length, size * length**2, 1], dtype=torch.float)
    return torch.cat([rest.new_tensor([size]), torch.stack(of_mask).float(), rest])


def labelled_rows(task: str, labels: Tensor, mask: Tensor) -> Tensor:
    """Which of the task's predictions have a label that counts."""
    if task == "regression":
        return torch.ones_like(labels, dtype=torch.bool)
    if task == "causal_lm":
        return (labels[:, 1:] != -100) & (mask[:, 1:] != 0)
    return labels != -100


class Predictions(NamedTuple):
    """What the task asks both models: student and teacher [..., C], labels [...], and which rows count (None: all)."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    mask: Tensor | None


@dataclass
class Batch:
    """mask [B, S] has 1 on real tokens. ids [B]: the examples' numbers in the training set. answers [C]: in cloze, the
    token that stands for each class; blank [B]: where its mask token is. progress: the share of training that is done.
    advance: whether learned state (layer weights, banks) moves after this micro-batch. shares: by how much a mean over each
    of UNITS counts in the mean over the whole step, 1 where this batch is the step."""

    task: str
    student: States
    teacher: States | None
    mask: Tensor
    labels: Tensor | None = None
    ids: Tensor | None = None
    answers: Tensor | None = None
    blank: Tensor | None = None
    progress: float = 0.0
    advance: bool = True
    shares: dict[str, Tensor] | None = None

    def of_step(self, term: Term) -> Tensor:
        """What the term adds to its mean over the whole step, without its weight."""
        return term.value if self.shares is None else term.value * self.shares[term.over]

    def predictions(self) -> Predictions:
        """A class per sentence, or a word per token; a decoder's position i is asked for token i + 1."""
        student = self.task_logits(self.student)
        teacher = None if self.teacher is None else self.task_logits(self.teacher)
        if self.task == "causal_lm":
            labels = None if self.labels is None else self.labels[:, 1:]
            return Predictions(student, teacher, labels, self.mask[:, 1:])
        return Predictions(student, teacher, self.labels, None)

    def task_logits(self, states: States) -> Tensor:
        logits = states.logits
        if self.task == "causal_lm":
            return logits[:, :-1]
        if self.task == "cloze":
            at_blank = logits.take_along_dim(self.blank[:, None, None], 1).squeeze(1)  # [B, V]
            return at_blank[:, self.answers]  # [B, C]
        return logits

    def hard(self) -> Tensor:
        """The task's own loss, against the labels."""
        asked = self.predictions()
        if asked.labels is None:
            raise ValueError("labels: this term needs them, and the data set has none; choose --label-column")
        if self.task == "regression":
            return F.mse_loss(asked.student.float().squeeze(-1), asked.labels.float())
        return hard_cross_entropy(asked.student, asked.labels, asked.mask, -100)

    def soft(self, loss: PredictionLoss, every_token: bool = False) -> Tensor:
        """The same against the teacher; in regression, the squared distance of the two outputs. every_token: on all real
        tokens, whether they have a label or not."""
        if every_token:
            return loss.soft_term(self.student.logits, self.teacher.logits, mask=self.mask)
        asked = self.predictions()
        if self.task == "regression":
            return functional.divergence(asked.student, asked.teacher, kind="mse") / self.classes()
        labels = asked.labels if self.task in WORD_TASKS else None
        return loss.soft_term(asked.student, asked.teacher, labels, asked.mask)

    def distil(
        self, loss: PredictionLoss, name: str = "soft", *, scale: float = 1.0, every_token: bool = False
    ) -> dict[str, Term]:
        """The terms of `loss` on what the task asks both models: `name` against the teacher, "hard" against the labels."""
        terms = {}
        if loss.soft:
            over = "tokens" if every_token else "labels" if self.task in WORD_TASKS else "examples"
            terms[name] = Term(self.soft(loss, every_token), scale * loss.soft, over)
        return terms | (self.fine_tune(scale * loss.hard) if loss.hard else {})

    def fine_tune(self, weight: float = 1.0) -> dict[str, Term]:
        """The task's own loss as the one term."""
        return {"hard": Term(self.hard(), weight, "labels")}

    def classes(self) -> int:
        """How many numbers the task asks for in each row."""
        return self.task_logits(self.student).shape[-1]

    def numbers(self) -> Tensor:
        """The examples' numbers in the training set, [B]."""
        if self.ids is None:
            raise ValueError("example_id: the method needs to know which example is which, and the batch has none")
        return self.ids
