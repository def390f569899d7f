"""One micro-batch as a method sees it, and what its task asks of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastkd import functional
from fastkd.losses.kd import PredictionLoss, hard_cross_entropy

from .states import States

TASKS = ("classification", "regression", "masked_lm", "causal_lm", "cloze")
WORD_TASKS = ("masked_lm", "causal_lm")
SENTENCE_TASKS = ("classification", "regression", "cloze")


class Term(NamedTuple):
    """A part of the loss, and how much it weighs."""

    value: Tensor
    weight: float


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
    advance: whether learned state (layer weights, banks) moves after this micro-batch."""

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
            terms[name] = Term(self.soft(loss, every_token), scale * loss.soft)
        return terms | (self.fine_tune(scale * loss.hard) if loss.hard else {})

    def fine_tune(self, weight: float = 1.0) -> dict[str, Term]:
        """The task's own loss as the one term."""
        return {"hard": Term(self.hard(), weight)}

    def classes(self) -> int:
        """How many numbers the task asks for in each row."""
        return self.task_logits(self.student).shape[-1]

    def numbers(self) -> Tensor:
        """The examples' numbers in the training set, [B]."""
        if self.ids is None:
            raise ValueError("example_id: the method needs to know which example is which, and the batch has none")
        return self.ids
