"""One micro-batch as a method sees it, and what its task asks of it."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import checks, functional
from fastkd.losses.kd import PredictionLoss, hard_cross_entropy, hard_cross_entropy_from_hidden

from . import embedding, heads
from .heads import Headless, Sparse, whole
from .states import States

LANGUAGE_TASKS = ("masked_lm", "causal_lm")
VOCABULARY_TASKS = (*LANGUAGE_TASKS, "cloze")
LABEL_FREE_TASKS = (*LANGUAGE_TASKS, "embedding")  # their data need no labels
NAMED_TASKS = ("classification", "multi_label", "token_classification")  # their labels are names
SENTENCE_TASKS = ("classification", "multi_label", "regression", "cloze")
PREDICTING_TASKS = ("classification", "multi_label", "regression", "token_classification", *VOCABULARY_TASKS)
TASKS = (*PREDICTING_TASKS, "embedding")


# What a term can be a mean over. A mean over "batches" weighs every micro-batch alike: the terms that couple its samples.
UNITS = ("examples", "labels", "tokens", "sequences", "positions", "pairs", "batches")


class Term(NamedTuple):
    """A part of the loss, how much it weighs, and which of UNITS it is a mean over. of_all_ranks: value is the same on every
    rank, a mean over the micro-batches of all of them; otherwise it is a mean over this rank's own."""

    value: Tensor
    weight: float
    over: str = "batches"
    of_all_ranks: bool = False


def count_units(task: str, mask: Tensor, labels: Tensor | None) -> Tensor:
    """How many of each of UNITS a micro-batch has: labels that count, real tokens, sequences of two real tokens or more (the
    others have no relations), positions of the padded batch, pairs of them within a sequence."""
    size, length = mask.shape
    labelled = 0 if labels is None else labelled_rows(task, labels, mask).sum()
    sequences = (mask.sum(1) > 1).sum()
    counts = (size, labelled, mask.sum(), sequences, size * length, size * length**2, 1)  # in the order of UNITS
    # torch.full, since a tensor made of Python's numbers would wait for the device.
    return torch.stack(
        [x.float() if isinstance(x, Tensor) else torch.full((), x, device=mask.device).float() for x in counts]
    )


def labelled_rows(task: str, labels: Tensor, mask: Tensor) -> Tensor:
    """Which of the task's predictions have a label that counts."""
    if task == "regression":
        return torch.ones_like(labels, dtype=torch.bool)
    if task == "causal_lm":
        return (labels[:, 1:] != -100) & (mask[:, 1:] != 0)
    return labels != -100


class Predictions(NamedTuple):
    """What the task asks both models: student and teacher [..., C], labels [...], and which rows count (None: all)."""

    student: Tensor | Headless
    teacher: Tensor | Headless | Sparse | None
    labels: Tensor | None
    mask: Tensor | None


@dataclass
class Batch:
    """mask [B, S] has 1 on real tokens. ids [B]: the examples' numbers in the training set. answers [C]: in cloze, the
    token that stands for each class; blank [B]: where its mask token is. progress: the share of training that is done.
    advance: whether learned state (layer weights, banks) moves after this micro-batch. shares: by how much a mean over each
    of UNITS counts in the mean over the whole step, 1 where this batch is the step; shares_of_all_ranks: likewise a mean over the
    micro-batches of all ranks. pooling: of embedding, see `embedding.pool`."""

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
    shares_of_all_ranks: dict[str, Tensor] | None = None
    pooling: str = "mean"

    def of_step(self, term: Term) -> Tensor:
        """What the term adds to its mean over the whole step, without its weight."""
        shares = self.shares_of_all_ranks if term.of_all_ranks else self.shares
        return term.value if shares is None else term.value * shares[term.over]

    def predictions(self) -> Predictions:
        """A class per sentence or per token, or a token id per token, of which a decoder's position i is asked for token i + 1.
        In multi_label each of C labels is a question of its own, with the answers no and yes."""
        student = self._asked(self.student)
        teacher = None if self.teacher is None else self._asked(self.teacher)
        if self.task == "multi_label":  # whose logits are 0 and x: their softmax is the sigmoid of x
            student, teacher = (
                x if x is None else torch.stack([torch.zeros_like(x), x], -1) for x in (student, teacher)
            )
            return Predictions(student, teacher, None if self.labels is None else self.labels.long(), None)
        self._check_labels(student.shape[-1])
        if self.task == "causal_lm":
            labels = None if self.labels is None else self.labels[:, 1:]
            return Predictions(student, teacher, labels, self.mask[:, 1:])
        return Predictions(student, teacher, self.labels, self.mask if self.task == "token_classification" else None)

    def _check_labels(self, classes: int) -> None:
        if self.labels is None or self.task in ("regression", "embedding"):
            return
        outside = lambda: (self.labels != -100) & ((self.labels < 0) | (self.labels >= classes))  # noqa: E731
        try:
            checks.values("labels", self.labels, lambda: ~outside().any(), "out of range")
        except ValueError:
            hint = "number the classes from 0, or load the model with num_labels as many as there are"
            hint = "they are token ids of another vocabulary than the model's" if self.task in LANGUAGE_TASKS else hint
            wrong = self.labels[outside()][0].item()
            raise ValueError(f"labels: must lie in 0 to {classes - 1}, or be -100, got {wrong}; {hint}") from None

    def _asked(self, states: States) -> Tensor | Headless | Sparse | None:
        x = states.predictions
        if x is None:
            return None
        if self.task == "causal_lm":
            return x[:, :-1]
        if self.task == "cloze":
            at_blank = lambda x: x.take_along_dim(self.blank[:, None, None], 1).squeeze(1)  # noqa: E731 [B, V]
            if isinstance(x, Headless):
                return replace(x, hidden=at_blank(x.hidden)).of(self.answers).logits()
            return at_blank(x)[:, self.answers]  # [B, C]
        if self.task == "embedding":
            return embedding.pool(x, self.mask, self.pooling)  # [B, D]
        return x

    def task_logits(self) -> Tensor:
        """The student's logits for what the task asks, whole; in embedding, its embeddings."""
        return whole(self._asked(self.student))

    def outputs(self) -> dict[str, Tensor]:
        """What an evaluation has of the batch; in embedding also the teacher's embeddings and the examples' numbers, since rows
        come in the order of their lengths."""
        found = {"logits": self.task_logits()}
        if self.task == "embedding":
            found |= {"teacher": self._asked(self.teacher), **({} if self.ids is None else {"example_id": self.ids})}
        return found

    def hard(self) -> Tensor:
        """The task's own loss, against the labels; in embedding, how far the student's embeddings are from the teacher's."""
        student, teacher, labels, mask = self.predictions()
        if self.task == "embedding":
            return embedding.distance(student, teacher)
        if labels is None:
            raise ValueError(
                "labels: the task's own loss needs them, and the batch has none; give the data set a column 'labels', or choose "
                "a method without this term, for example kd:alpha=1"
            )
        if self.task == "regression":
            return F.mse_loss(student.float().squeeze(-1), labels.float())
        if not isinstance(student, Headless):
            return hard_cross_entropy(student, labels, mask, -100)
        scale, cap = student.finish
        shape = {"student_bias": student.bias, "logit_scale": scale, "logit_softcap": cap}
        return hard_cross_entropy_from_hidden(student.hidden, student.weight, labels, mask, -100, **shape)

    def distil(self, loss: PredictionLoss, name: str = "soft", *, scale: float = 1.0) -> dict[str, Term]:
        """The terms of `loss` on what the task asks both models: `name` against the teacher, "hard" against the labels. From
        hidden states both are made in one pass, and are one term."""
        if not loss.soft:
            return self.fine_tune(scale * loss.hard)
        asked = self.predictions()
        if isinstance(asked.student, Headless):
            both = f"{name} + hard" if loss.hard else name
            value = self.compared(loss, asked.student, asked.teacher, asked.mask, labels=asked.labels)
            return {both: Term(value, scale, "labels")}
        of_tokens = self.task in (*LANGUAGE_TASKS, "token_classification")
        if self.task == "regression":
            value = functional.divergence(asked.student, asked.teacher, kind="mse") / asked.student.shape[-1]
        else:
            value = loss.soft_term(asked.student, whole(asked.teacher), asked.labels if of_tokens else None, asked.mask)
        over = "examples" if not of_tokens else "tokens" if asked.labels is None else "labels"
        terms = {name: Term(value, scale * loss.soft, over)}
        return terms | (self.fine_tune(scale * loss.hard) if loss.hard else {})

    def on_tokens(self, loss: nn.Module, headless: bool = True) -> Tensor:
        """`loss` on the predictions of both models at every real token, whether it has a label or not."""
        return self.compared(loss, self.student.predictions, self.teacher.predictions, self.mask, headless)

    @staticmethod
    def compared(loss, student, teacher, mask, headless: bool = True, **labels) -> Tensor:
        """loss(student, teacher, mask=mask), from hidden states where both models ran without their heads."""
        if headless and isinstance(student, Headless):
            sides, options = heads.arguments(student, teacher)
            return loss.from_hidden(*sides, mask=mask, **options, **labels)
        return loss(whole(student), whole(teacher), mask=mask, **labels)

    def fine_tune(self, weight: float = 1.0) -> dict[str, Term]:
        """The task's own loss as the one term."""
        return {"hard": Term(self.hard(), weight, "labels")}

    def classes(self) -> int:
        """How many numbers the task asks for in each row."""
        return self.predictions().student.shape[-1]

    def numbers(self) -> Tensor:
        """The examples' numbers in the training set, [B]."""
        if self.ids is None:
            raise ValueError(
                "example_id: the method needs to know which example is which, and the batch has none; give the data set a "
                "column 'example_id' with 0, 1, 2, … to its length"
            )
        return self.ids
