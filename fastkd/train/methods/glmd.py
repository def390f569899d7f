"""GLMD (Tan et al., Findings of ACL 2023): a language model distilled by its token predictions alone, T = 15, on every real
position; a cloze task adds a second stage on the task's soft labels at T = 1. No hard labels, no hidden states."""

from fastkd.losses.glmd import GLMDLoss

from .base import Method, Setup, Term


class GLMD(Method):
    stages, token_wise, one_shape, every_position = ("tokens", "soft"), True, True, True

    def __init__(
        self,
        setup: Setup,
        temperature: float = 15.0,
        normalize: str = "positions",
        top_n: float | None = None,
        soft_temperature: float = 1.0,
        share: float | None = None,
    ):
        super().__init__(setup, (0.5 if setup.task == "cloze" else 1.0) if share is None else share)
        self.loss = GLMDLoss(temperature, normalize=normalize, top_n=top_n, soft_temperature=soft_temperature)

    def forward(self, batch):
        if self.stage(batch.progress) == "soft" and self.setup.task == "cloze":
            asked = batch.predictions()
            return {"soft": Term(self.loss(asked.student, asked.teacher, stage="soft"), 1.0, "examples")}
        value = batch.on_tokens(self.loss, headless=self.loss.top_n is None)
        return {"tokens": Term(value, 1.0, self.loss.normalize)}
