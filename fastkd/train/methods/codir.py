"""CoDIR (Sun et al., EMNLP 2020): (1 - beta) CE + beta T² KL + crd · contrast of a sentence's states in the student, layers
1 … N, with its own in the teacher, layers 1, 3, 5, …, among other sentences. Those have other labels in classification; in
masked_lm they are those of the batch, or the 2 · `window` nearest in the corpus. The released code adds crd to *sums* over
a batch of B; here it weighs their means, so it is the released one divided by B.

Args:
    beta: Weight of the teacher's predictions, in [0, 1].
    crd: Weight of the contrast.
"""

from fastkd.losses.codir import CoDIRLoss
from fastkd.losses.kd import HintonKDLoss

from .base import Method, Setup, Term, has_labels, has_numbers


class CoDIR(Method):
    Loss, one_shape, soft_only = CoDIRLoss, True, "beta=1"

    def __init__(self, setup: Setup, beta: float = 0.5, temperature: float = 2.0, crd: float = 0.1, **options):
        super().__init__(setup)
        has_numbers(setup, "codir")
        self.read = {"student": range(1, setup.student.layers + 1), "teacher": range(1, setup.teacher.layers + 1, 2)}
        if setup.task == "masked_lm":
            options.setdefault("negatives", "window" if options.get("window") else "in_batch")
        self.crd, self.prediction = crd, HintonKDLoss(beta, temperature)
        widths = setup.student.width * setup.student.layers, setup.teacher.width * ((setup.teacher.layers + 1) // 2)
        self.loss = CoDIRLoss(*widths, setup.n_data, process_group=setup.process_group, **options)
        if has_labels(setup, "codir", options.get("negatives") == "label"):
            self.loss.set_labels(setup.labels)

    def forward(self, batch):
        sides = {"student": batch.student.hidden[1:], "teacher": batch.teacher.hidden[1::2]}
        vectors = [self.loss.pooled(side, layers, batch.mask) for side, layers in sides.items()]
        contrast = self.once_per_step(batch, *vectors, batch.numbers())
        return {**batch.distil(self.prediction), "contrast": Term(contrast.squeeze(), self.crd, "examples")}
