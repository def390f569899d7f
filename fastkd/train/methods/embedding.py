"""Sentence embeddings: the student's vector of a text learns the teacher's, by cosine, by mean squared difference, or by
contrast among the batch. Where their widths differ, a linear map to the teacher's is learned too, and dropped afterwards."""

from fastkd.losses.embedding import EmbeddingLoss
from fastkd.losses.projection import Projection

from .base import Method, Setup, Term


class Embedding(Method):
    one_shape = True  # the contrast couples the batch

    def __init__(self, setup: Setup, cosine=1.0, mse=0.0, contrast=0.0, temperature=0.05):
        super().__init__(setup)
        self.loss = EmbeddingLoss(cosine, mse, contrast, temperature=temperature)
        self.weights = {name: weight for name, weight in self.loss.weights.items() if weight}
        options = {"temperature": temperature, "process_group": setup.process_group}
        self.losses = {
            name: EmbeddingLoss(*(float(name == other) for other in self.loss.weights), **options)
            for name in self.weights
        }
        widths = setup.student.width, setup.teacher.width
        self.projection = None if widths[0] == widths[1] else Projection(*widths)

    def forward(self, batch):
        student, teacher, *_ = batch.predictions()  # [B, D]
        student = student if self.projection is None else self.projection(student)
        over = {"cosine": ("examples", False), "mse": ("examples", False), "contrast": ("batches", True)}
        return {
            name: Term(loss(student, teacher), self.weights[name], *over[name]) for name, loss in self.losses.items()
        }
