"""MiniLM (Wang et al., 2020): the last layer's attention distributions and value relations, by KL; then fine-tuning."""

from fastkd.losses.minilm import MiniLMLoss

from .base import Method, Setup, Term, advise_layers, same_heads


class MiniLM(Method):
    features_only, stages = True, ("relations", "task")

    def __init__(self, setup: Setup, share: float = 0.5):
        super().__init__(setup, share)
        same_heads(setup, "minilm")
        advise_layers(setup, "minilm", [(setup.student.layers, setup.teacher.layers)])
        self.loss = MiniLMLoss(causal=setup.student.causal)

    def attention(self, side):
        return [getattr(self.setup, side).layers - 1]

    def forward(self, batch):
        if self.stage(batch.progress) == "task":
            return batch.fine_tune()
        (student,), (teacher,) = self.qkv(batch, "student"), self.qkv(batch, "teacher")
        return {"relations": Term(self.loss(student, teacher, batch.mask), 1.0, "tokens")}
