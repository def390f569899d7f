"""MiniLMv2 (Wang et al., 2021): Q-Q, K-K and V-V relations of one layer, re-split into common heads; then fine-tuning.
The student's last layer learns from the teacher's last, or from `teacher_layer` (1-based): for a large teacher the authors
take one above its middle, 21 of 24.

Args:
    teacher_layer: The teacher's layer, counted from 1. None: its last.
"""

from fastkd.losses.minilm import MiniLMv2Loss

from .base import Method, Setup, Term, advise_layers, layer_number, same_relation_heads


class MiniLMv2(Method):
    features_only, stages = True, ("relations", "task")

    def __init__(self, setup: Setup, relation_heads: int = 48, teacher_layer: int | None = None, share: float = 0.5):
        super().__init__(setup, share)
        same_relation_heads(setup, "minilmv2", relation_heads)
        self.teacher_layer = layer_number("minilmv2", teacher_layer, setup.teacher.layers)
        advise_layers(setup, "minilmv2", [(setup.student.layers, self.teacher_layer)])
        self.loss = MiniLMv2Loss(relation_heads, causal=setup.student.causal)

    def attention(self, side):
        return [self.setup.student.layers - 1 if side == "student" else self.teacher_layer - 1]

    def forward(self, batch):
        if self.stage(batch.progress) == "task":
            return batch.fine_tune()
        # No score q·kᵀ is compared, so the queries stay as they were projected.
        (student,), (teacher,) = self.recorded(batch, "student"), self.recorded(batch, "teacher")
        return {"relations": Term(self.loss(student[:3], teacher[:3], batch.mask), 1.0, "tokens")}
