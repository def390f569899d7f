"""GLMD (Tan et al., Findings of ACL 2023): a language model distilled by its word predictions alone.

Words, T = 15, on every real position of the sequence (pre-training, then the task's cloze prompts):
    L = T² / (B·S) · sum over real positions of KL(softmax(z_t / T) ‖ softmax(z_s / T))
Soft labels, T = 1, afterwards: L = mean over examples of -sum_c softmax(g_t)_c log softmax(g_s)_c, g the task's logits.
The student may have a part of the teacher's vocabulary: the teacher is then renormalised over that part.

The words stage asks for aligned logits only, so it is the same for masked, autoregressive and cloze models: no position is
shifted, all real ones count. g of the soft stage comes from a classifier, or from a cloze prompt by cloze_scores (answers
of one word) or answer_scores (of several).
"""

import torch
from torch import Tensor, nn

from fastkd import checks, functional, reductions

STAGES = ("words", "soft")
SOFT_KINDS = ("soft_ce", "forward_kl", "mse")


class GLMDLoss(nn.Module):
    """loss(student_logits [B, S, V], teacher_logits [B, S, V], mask [B, S]), the mask 1 for real tokens, used as given.

    vocab: a VocabMap; the student's logits are then [B, S, K] in its order, the teacher's stay [B, S, V].
    teacher_words: "kept" renormalises the teacher over the kept words, as released; "all" keeps its distribution over the
    whole vocabulary, where a dropped word has its stand-in's logit in the student.
    normalize: "positions" divides by B·S, padding included, as released; "tokens" by the number of real tokens.
    top_n (a count, or a fraction of the words): only the teacher's n most likely words, renormalised, and a penalty,
    the mean of the positive excesses of the student's other logits over its lowest among those n. With teacher_min, no
    penalty: all words are compared, the teacher's logits below its n-th set to its lowest.
    mse: the mean squared difference of the logits instead of the KL.
    stage: "words" or "soft"; an attribute, and an argument of each call. In "soft" the logits are [B, C], the mask [B],
    and soft_kind says how they are compared: "soft_ce" (no T²), "forward_kl" (with T²) or "mse" (mean over B·C).
    """

    def __init__(
        self,
        temperature: float = 15.0,
        *,
        vocab=None,
        normalize: str = "positions",
        teacher_words: str = "kept",
        top_n: int | float | None = None,
        teacher_min: bool = False,
        mse: bool = False,
        stage: str = "words",
        soft_kind: str = "soft_ce",
        soft_temperature: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__()
        checks.positive("temperature", temperature)
        checks.positive("soft_temperature", soft_temperature)
        checks.one_of("normalize", normalize, ("positions", "tokens"))
        checks.one_of("teacher_words", teacher_words, ("kept", "all"))
        checks.one_of("stage", stage, STAGES)
        checks.one_of("soft_kind", soft_kind, SOFT_KINDS)
        if top_n is not None:
            checks.positive("top_n", top_n)
        if teacher_min and top_n is None:
            raise ValueError("teacher_min: needs top_n, the number of teacher logits that keep their value")
        if mse and top_n is not None:
            raise ValueError("top_n: chooses words for the KL; it cannot be combined with mse=True")
        self.temperature, self.soft_temperature = float(temperature), float(soft_temperature)
        self.teacher_words = teacher_words
        if vocab is not None and not hasattr(vocab, "slice_head"):
            raise ValueError(
                f"vocab: expected a VocabMap, got {checks.describe(vocab)}; VocabMap(kept_ids, original_size) is one"
            )
        if vocab is not None and teacher_words == "all" and not vocab.has_stand_ins:
            raise ValueError("teacher_words: 'all' needs a stand-in for each dropped word; give VocabMap a replacement")
        self.vocab, self.normalize, self.stage, self.soft_kind = vocab, normalize, stage, soft_kind
        self.top_n, self.teacher_min, self.mse, self.backend = top_n, teacher_min, mse, backend

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, stage=None) -> Tensor:
        stage = self.stage if stage is None else stage
        checks.one_of("stage", stage, STAGES)
        if stage == "soft":
            return self._soft(student_logits, teacher_logits, mask)
        checks.tensor("student_logits", student_logits, "[..., V]")
        checks.tensor("teacher_logits", teacher_logits, "[..., V]")
        if self.vocab is not None:
            self.vocab.check_student("student_logits", student_logits)
            if self.teacher_words == "all":
                student_logits = self.vocab.expand(student_logits)
                teacher_logits = teacher_logits[..., : self.vocab.original_size]
            else:
                teacher_logits = self.vocab.slice_logits(teacher_logits)
        checks.same_shape(
            "student_logits",
            student_logits,
            "teacher_logits",
            teacher_logits,
            "a subset vocabulary: pass vocab=VocabMap",
        )
        if self.top_n is None:
            return self._words(student_logits, teacher_logits, mask)
        return self._top_words(student_logits, teacher_logits, mask)

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        memory: str = "speed",
        **shape,
    ) -> Tensor:
        """The words stage from hidden states [B, S, D] and LM heads [V, D], whose logits are never all in memory.

        shape: logit_scale and logit_softcap, as functional.linear_divergence has them.
        """
        if self.top_n is not None:
            raise ValueError(
                "top_n: needs the logits of a whole row at once; call the loss with logits, not from_hidden"
            )
        value = functional.linear_divergence(
            student_hidden, student_head, teacher_hidden, teacher_head, student_bias=student_bias,
            teacher_bias=teacher_bias, vocab=self.vocab, teacher_words=self.teacher_words, memory=memory, mask=mask,
            **self._kind(), **shape,
        )  # fmt: skip
        everything = self.vocab is not None and self.teacher_words == "all"
        words = self.vocab.original_size if everything else student_head.shape[0]
        return value / self._denominator(student_hidden, words)

    def _kind(self) -> dict:
        kind = "mse" if self.mse else "forward_kl"
        reduction = "sum" if self.normalize == "positions" else "mean"
        return {"kind": kind, "temperature": self.temperature, "reduction": reduction, "backend": self.backend}

    def _denominator(self, rows: Tensor, words: int) -> int:
        """What the reduction of _kind leaves to divide by."""
        positions = max(rows.shape[:-1].numel(), 1) if self.normalize == "positions" else 1
        return positions * (words if self.mse else 1)

    def _words(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        value = functional.divergence(student, teacher, mask=mask, **self._kind())
        return value / self._denominator(student, student.shape[-1])

    def _top_words(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:  # what a padded row holds, NaN too, must not reach the minimum's gradient
            keep = reductions.as_bool(mask)[..., None]
            student, teacher = student.masked_fill(~keep, 0), teacher.masked_fill(~keep, 0)
        size = student.shape[-1]
        n = min(max(int(self.top_n * size) if isinstance(self.top_n, float) else self.top_n, 1), size)
        top, words = teacher.topk(n, -1)  # [B, S, n]
        if self.teacher_min:
            lowest = teacher.amin(-1, keepdim=True)
            return self._words(student, torch.where(teacher < top[..., -1:], lowest, teacher), mask)
        chosen = student.gather(-1, words)  # [B, S, n]
        return self._words(chosen, top, mask) + _excess(student, chosen, words)

    def _soft(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        checks.tensor("student_logits", student, "[B, C]")
        value = functional.divergence(
            student, teacher, mask=mask, kind=self.soft_kind, temperature=self.soft_temperature,
            t_squared=self.soft_kind == "forward_kl", backend=self.backend,
        )  # fmt: skip
        return value / student.shape[-1] if self.soft_kind == "mse" else value

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize!r}, stage={self.stage!r}"


def cloze_scores(logits: Tensor, positions: Tensor, words: Tensor) -> Tensor:
    """The logits of a prompt's answers that are one word each: logits [B, S, V] at the blank positions [B], for the words
    [C] -> [B, C]; for the "soft" stage. With a VocabMap, words are the student's (vocab.encode)."""
    checks.tensor("logits", logits, "[B, S, V]")
    checks.integers("positions", positions, "[B]")
    checks.integers("words", words, "[C]")
    checks.indices_in_range("positions", positions, logits.shape[1], "positions of logits")
    checks.indices_in_range("words", words, logits.shape[2], "vocabulary")
    return logits[torch.arange(len(logits), device=logits.device), positions][:, words]


def answer_scores(logits: Tensor, targets: Tensor, mask: Tensor, length_penalty: float = 0.0) -> Tensor:
    """The same for answers of several words: the sum of log-probabilities of targets [B, C, S] under logits [B, C, S, V]
    where mask [B, C, S] is 1, over (number of words) ** length_penalty -> [B, C]."""
    checks.tensor("logits", logits, "[B, C, S, V]")
    checks.integers("targets", targets, "[B, C, S]")
    checks.mask("targets", targets, logits.shape[:-1], "[B, C, S]")
    checks.mask("mask", mask, logits.shape[:-1], "[B, C, S]")
    keep = reductions.as_bool(mask)
    targets = targets.masked_fill(~keep, 0)
    checks.indices_in_range("targets", targets, logits.shape[-1], "vocabulary")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    of_words = logits.masked_fill(~keep[..., None], 0).to(dtype).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    total = torch.where(keep, of_words, 0).sum(-1)  # [B, C]
    return total / keep.sum(-1).clamp_min(1) ** length_penalty if length_penalty else total


def _excess(student: Tensor, chosen: Tensor, words: Tensor) -> Tensor:
    """Mean of the positive ones among (the student's other logits - its lowest chosen one); 0 if none is positive."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    over = student.to(dtype) - chosen.to(dtype).amin(-1, keepdim=True)  # [B, S, V]
    counts = torch.ones_like(over, dtype=torch.bool).scatter(-1, words, False) & (over > 0)
    return torch.where(counts, over, 0).sum() / counts.sum().clamp_min(1)
