"""BERT-EMD (Li et al., EMNLP 2020): every student layer learns from every teacher layer, as much as transport says.

beta · (theta · (attention + hidden) + embedding) + prediction, in one stage. The student's hidden states pass through one
projection, which is trained and then dropped. The layers' weights are learned state: they move after each step.
"""

import torch
from torch import nn

from fastkd.losses.bert_emd import BertEMDLoss
from fastkd.losses.projection import Projection

from .base import Method, Setup, Term, same_heads


class BertEMD(Method):
    """projection="identity" starts it at the identity (equal widths only), which a student made of the teacher's layers
    likes better than the authors' random start. prediction: the soft cross entropy is a mean over classes too."""

    hidden = True

    def __init__(
        self,
        setup: Setup,
        beta: float = 0.01,
        theta: float = 1.0,
        temperature: float = 1.0,
        weights: str = "inverse_cost",
        emd_temperature: float = 1.0,
        separate: bool = False,
        heads: str | None = None,
        projection: str = "random",
    ):
        super().__init__(setup)
        same_heads(setup, "bert_emd", heads)
        self.beta, self.theta, self.temperature = beta, theta, temperature
        self.projection = Projection(setup.student.width, setup.teacher.width)
        if projection == "identity":
            if setup.student.width != setup.teacher.width:
                raise ValueError("bert_emd: projection='identity' needs equal widths of student and teacher")
            with torch.no_grad():
                nn.init.eye_(self.projection.linear[0].weight)
                nn.init.zeros_(self.projection.linear[0].bias)
        elif projection != "random":
            raise ValueError(f"bert_emd: projection must be 'random' or 'identity', got {projection!r}")
        self.loss = BertEMDLoss(
            setup.student.layers, setup.teacher.layers, weights=weights, temperature=emd_temperature, separate=separate,
            causal=setup.student.causal, heads=heads,
        )  # fmt: skip

    def attention(self, side):
        return range(getattr(self.setup, side).layers)

    def forward(self, batch):
        self.loss.train(self.training and batch.advance)
        student = self.projection(list(batch.student.hidden))
        teacher = list(batch.teacher.hidden)
        attention, hidden = self.loss(
            [(q, k) for q, k, _ in self.qkv(batch, "student")], [(q, k) for q, k, _ in self.qkv(batch, "teacher")],
            student[1:], teacher[1:], batch.mask,
        )  # fmt: skip
        embedding = self.loss.embedding_loss(student[0], teacher[0], batch.mask)
        prediction = batch.soft(self.temperature, "soft_ce")
        if self.setup.task != "regression":
            prediction = prediction / batch.predictions().student.shape[-1]
        return {
            "attention": Term(attention, self.beta * self.theta),
            "hidden": Term(hidden, self.beta * self.theta),
            "embedding": Term(embedding, self.beta),
            "prediction": Term(prediction, 1.0),
        }
