"""CoDIR (Sun et al., EMNLP 2020): a sentence's states in the student against its own in the teacher, among other
sentences. (1 - beta) CE + beta T² KL + crd · contrast.

Fine-tuning (classification): among sentences of other labels. Pre-training (masked_lm): there are no labels, and
neighbours are what is hard to tell apart: those of the batch ("in_batch", the default), or the 2 `window` nearest in the
corpus ("window"). "uniform" is all other sentences, in either stage.

Student layers 1 … N, teacher layers 1, 3, 5, …, concatenated; "official" takes [CLS] and two-sided NCE against the bank,
"paper" the mean over tokens and InfoNCE. The released code adds `crd_weight` to *sums* over a batch of B; the weight here
is relative to their means, so it is the released one divided by B.
"""

import torch

from .base import Method, Setup, Term


class CoDIR(Method):
    hidden = True

    def __init__(
        self,
        setup: Setup,
        beta: float = 0.5,
        temperature: float = 2.0,
        crd: float = 0.1,
        preset: str = "official",
        feat_dim: int = 128,
        nce_k: int = 100,
        nce_t: float = 0.07,
        nce_m: float = 0.5,
        negatives: str | None = None,
        window: int = 0,
    ):
        super().__init__(setup)
        from fastkd.losses.codir import CoDIRLoss

        if negatives is None and setup.task == "masked_lm":
            negatives = "window" if window else "in_batch"
        if negatives == "label" and setup.labels is None:
            raise ValueError(f"codir: negatives=label needs labels, and the task {setup.task} has none; see in_batch")
        self.beta, self.temperature, self.crd = beta, temperature, crd
        widths = (
            setup.student.width * setup.student.layers,
            setup.teacher.width * len(range(0, setup.teacher.layers, 2)),
        )
        options = {"feat_dim": feat_dim, "nce_k": nce_k, "nce_t": nce_t, "nce_m": nce_m, "preset": preset}
        self.loss = CoDIRLoss(*widths, setup.n_data, negatives=negatives, window=window, **options)
        if setup.labels is not None:
            self.loss.set_labels(setup.labels)
        self.seen: list[tuple] = []

    def forward(self, batch):
        if batch.ids is None:
            raise ValueError("codir: needs to know which example is which; the batch lost its example_id")
        student = self.loss.pooled("student", batch.student.hidden[1:], batch.mask)
        teacher = self.loss.pooled("teacher", batch.teacher.hidden[1::2], batch.mask)
        whole_step = batch.advance and not self.seen
        self.loss.train(self.training and whole_step)
        contrast = self.loss(student, teacher, batch.ids)
        if self.training and not whole_step:
            self._remember(student, teacher, batch)
        return {
            "hard": Term(batch.hard(), 1 - self.beta),
            "soft": Term(batch.soft(self.temperature), self.beta),
            "contrast": Term(contrast.squeeze(), self.crd),
        }

    @torch.no_grad()
    def _remember(self, student, teacher, batch) -> None:
        """Under accumulation the bank moves once, with all examples of the step, when its last micro-batch is done."""
        self.seen.append((student.detach(), teacher.detach(), batch.ids))
        if batch.advance:
            self.loss.train()(*(torch.cat(parts) for parts in zip(*self.seen, strict=True)))
            self.seen.clear()
