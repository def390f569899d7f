"""GLMD (Tan et al., Findings of ACL 2023): distils a language model through its token predictions alone.

Stage "tokens", T = 15, over all real positions (pre-training, then the task's cloze prompts):
    L = T² / (B·S) · Σ over real positions of KL(softmax(z_t / T) ‖ softmax(z_s / T))
Stage "soft", T = 1, afterwards: L = mean over examples of -Σ_c softmax(g_t)_c log softmax(g_s)_c, g the task's logits.
The student may have a subset of the teacher's vocabulary; the teacher is then renormalised over it.

No position is shifted, so the first stage is the same for masked, autoregressive and cloze models. The task's logits g come
from a classifier, or from a cloze prompt by cloze_scores (answers of one token) or answer_scores (of several).
"""

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd import checks, deprecation, functional, reductions
from fastkd.checks import Backend
from fastkd.deprecation import renamed

Stage = Literal["tokens", "soft"]
SoftKind = Literal["soft_ce", "forward_kl", "mse"]


class GLMDLoss(nn.Module):
    """GLMD: T² KL(softmax(z_t / T) ‖ softmax(z_s / T)) over all real positions, divided by B·S.

    Args:
        temperature: T of the stage "tokens".
        vocab: A `VocabMap`: the student's vocabulary is this subset of the teacher's.
        normalize: "positions" divides by B·S, padding included, as released; "tokens" by the number of real tokens.
        teacher_tokens: With `vocab`, "kept" renormalises the teacher over the kept tokens, as released; "all" keeps its
            distribution over the whole vocabulary, where a dropped token has its stand-in's logit in the student.
        top_n: Compare only the teacher's n most likely tokens (an int, or a float fraction of the vocabulary), renormalised,
            and add a penalty: the mean of the positive differences between the student's other logits and its lowest
            logit among those n.
        teacher_min: With top_n, compare all tokens without the penalty, the teacher's logits below its n-th set to its lowest.
        mse: The mean squared difference of the logits instead of the KL.
        stage: "tokens" or "soft"; also an argument of each call.
        soft_kind: The divergence of the stage "soft": "soft_ce" (without T²), "forward_kl" (with T²), or "mse" (mean over B·C).
        soft_temperature: T of the stage "soft".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.GLMDLoss()
        >>> student_logits, teacher_logits = torch.randn(2, 8, 100, requires_grad=True), torch.randn(2, 8, 100)
        >>> loss(student_logits, teacher_logits, torch.ones(2, 8)).backward()
    """

    @renamed(teacher_words="teacher_tokens", stage={"words": "tokens"})
    def __init__(
        self,
        temperature: float = 15.0,
        *,
        vocab=None,
        normalize: Literal["positions", "tokens"] = "positions",
        teacher_tokens: Literal["kept", "all"] = "kept",
        top_n: int | float | None = None,
        teacher_min: bool = False,
        mse: bool = False,
        stage: Stage = "tokens",
        soft_kind: SoftKind = "soft_ce",
        soft_temperature: float = 1.0,
        backend: Backend = "auto",
    ):
        super().__init__()
        checks.positive("temperature", temperature)
        checks.positive("soft_temperature", soft_temperature)
        checks.one_of("normalize", normalize, ("positions", "tokens"))
        checks.one_of("teacher_tokens", teacher_tokens, ("kept", "all"))
        checks.one_of("stage", stage, get_args(Stage))
        checks.one_of("soft_kind", soft_kind, get_args(SoftKind))
        if top_n is not None:
            checks.positive("top_n", top_n)
        if teacher_min and top_n is None:
            raise ValueError("teacher_min: needs top_n, the number of teacher logits to keep; pass it too")
        if mse and top_n is not None:
            raise ValueError("top_n: belongs to the KL and cannot be combined with mse=True; pass one of them")
        self.temperature, self.soft_temperature = float(temperature), float(soft_temperature)
        self.teacher_tokens = teacher_tokens
        if vocab is not None and not hasattr(vocab, "slice_head"):
            raise ValueError(
                f"vocab: expected a VocabMap, got {checks.describe(vocab)}; make one with VocabMap(kept_ids, original_size)"
            )
        if vocab is not None and teacher_tokens == "all" and not vocab.has_stand_ins:
            raise ValueError(
                "teacher_tokens: 'all' needs a stand-in for each dropped token; pass VocabMap a replacement"
            )
        self.vocab, self.normalize, self.stage, self.soft_kind = vocab, normalize, stage, soft_kind
        self.top_n, self.teacher_min, self.mse, self.backend = top_n, teacher_min, mse, backend

    @renamed(stage={"words": "tokens"})
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | functional.TopK,
        mask: Tensor | None = None,
        stage: Stage | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_logits: [B, S, V], with `vocab` [B, S, K] in the order of its kept ids; in the stage "soft" [B, C].
            teacher_logits: [B, S, V], in the stage "soft" [B, C]. In the stage "tokens" also a `fastkd.TopK` over the student's
                vocabulary, with log-probabilities at the module's temperature.
            mask: [B, S], 1 = real token; in the stage "soft" [B].
            stage: "tokens" or "soft". None: the module's.
        """
        stage = self.stage if stage is None else stage
        checks.one_of("stage", stage, get_args(Stage))
        if stage == "soft":
            return self._soft(student_logits, teacher_logits, mask)
        checks.tensor("student_logits", student_logits, "[..., V]")
        if isinstance(teacher_logits, functional.TopK):
            self._check_sparse()
            return self._all_tokens(student_logits, teacher_logits, mask)
        checks.tensor("teacher_logits", teacher_logits, "[..., V]")
        if self.vocab is not None:
            self.vocab.check_student("student_logits", student_logits)
            if self.teacher_tokens == "all":
                student_logits = self.vocab.expand(student_logits)
                teacher_logits = teacher_logits[..., : self.vocab.original_size]
            else:
                teacher_logits = self.vocab.slice_logits(teacher_logits)
        checks.same_shape(
            "student_logits",
            student_logits,
            "teacher_logits",
            teacher_logits,
            "for a smaller vocabulary of the student, pass GLMDLoss a vocab",
        )
        if self.top_n is None:
            return self._all_tokens(student_logits, teacher_logits, mask)
        return self._top_tokens(student_logits, teacher_logits, mask)

    if TYPE_CHECKING:
        __call__ = forward

    @renamed(memory=("recompute_logits", deprecation.recompute_logits))
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
        recompute_logits: bool = False,
        **shape,
    ) -> Tensor:
        """The stage "tokens" from hidden states and heads; the logits are never all in memory. See `fastkd.linear_divergence`.

        Args:
            student_hidden: [B, S, Ds].
            student_head: [V, Ds], with `vocab` [K, Ds].
            teacher_hidden: [B, S, Dt].
            teacher_head: [V, Dt].
            student_bias, teacher_bias: [V].
            mask: [B, S], 1 = real token.
            recompute_logits: Compute the logits again in the backward: less memory, more time.
            shape: logit_scale and logit_softcap, as for `fastkd.linear_divergence`.

        Returns:
            A scalar.
        """
        if self.top_n is not None:
            raise ValueError("top_n: needs all logits of a row; call the loss with logits instead of from_hidden")
        value = functional.linear_divergence(
            student_hidden, student_head, teacher_hidden, teacher_head, student_bias=student_bias,
            teacher_bias=teacher_bias, vocab=self.vocab, teacher_tokens=self.teacher_tokens, recompute_logits=recompute_logits,
            mask=mask, **self._kind(), **shape,
        )  # fmt: skip
        everything = self.vocab is not None and self.teacher_tokens == "all"
        size = self.vocab.original_size if everything else student_head.shape[0]
        return value / self._denominator(student_hidden, size)

    def _check_sparse(self) -> None:
        asked = {"vocab": self.vocab, "top_n": self.top_n, "mse": self.mse or None}
        for name in (name for name, x in asked.items() if x is not None):
            raise ValueError(f"{name}: needs all logits of the teacher, and teacher_logits is a TopK; leave {name} out")

    def _kind(self) -> dict:
        kind = "mse" if self.mse else "forward_kl"
        reduction = "sum" if self.normalize == "positions" else "mean"
        return {"kind": kind, "temperature": self.temperature, "reduction": reduction, "backend": self.backend}

    def _denominator(self, rows: Tensor, vocab_size: int) -> int:
        """The divisor that remains after the reduction of _kind."""
        positions = max(rows.shape[:-1].numel(), 1) if self.normalize == "positions" else 1
        return positions * (vocab_size if self.mse else 1)

    def _all_tokens(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        value = functional.divergence(student, teacher, mask=mask, **self._kind())
        return value / self._denominator(student, student.shape[-1])

    def _top_tokens(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:  # a padded row may hold NaN, which must not reach the minimum's gradient
            keep = reductions.as_bool(mask)[..., None]
            student, teacher = student.masked_fill(~keep, 0), teacher.masked_fill(~keep, 0)
        size = student.shape[-1]
        n = min(max(int(self.top_n * size) if isinstance(self.top_n, float) else self.top_n, 1), size)
        top, tokens = teacher.topk(n, -1)  # [B, S, n]
        if self.teacher_min:
            lowest = teacher.amin(-1, keepdim=True)
            return self._all_tokens(student, torch.where(teacher < top[..., -1:], lowest, teacher), mask)
        chosen = student.gather(-1, tokens)  # [B, S, n]
        return self._all_tokens(chosen, top, mask) + _excess(student, chosen, tokens)

    def _soft(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        checks.tensor("student_logits", student, "[B, C]")
        value = functional.divergence(
            student, teacher, mask=mask, kind=self.soft_kind, temperature=self.soft_temperature,
            t_squared=self.soft_kind == "forward_kl", backend=self.backend,
        )  # fmt: skip
        return value / student.shape[-1] if self.soft_kind == "mse" else value

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize!r}, stage={self.stage!r}"


@renamed(words="tokens")
def cloze_scores(logits: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """The task's logits from a cloze prompt with answers of one token, for the stage "soft".

    Args:
        logits: [B, S, V].
        positions: [B], the position of the blank in each prompt.
        tokens: [C], the token id of each answer; the student's ids with a VocabMap (vocab.encode).

    Returns:
        [B, C].
    """
    checks.tensor("logits", logits, "[B, S, V]")
    checks.integers("positions", positions, "[B]")
    checks.integers("tokens", tokens, "[C]")
    checks.indices_in_range("positions", positions, logits.shape[1], "positions of logits")
    checks.indices_in_range("tokens", tokens, logits.shape[2], "vocabulary")
    return logits[torch.arange(len(logits), device=logits.device), positions][:, tokens]


def answer_scores(logits: Tensor, targets: Tensor, mask: Tensor, length_penalty: float = 0.0) -> Tensor:
    """The task's logits from a cloze prompt with answers of several tokens, for the stage "soft".

    Σ log softmax(logits)[target] over the answer's tokens / (number of tokens) ** length_penalty

    Args:
        logits: [B, C, S, V], of the prompt filled with each of C answers.
        targets: [B, C, S], token ids.
        mask: [B, C, S], 1 = token of the answer.
        length_penalty: 0 sums, 1 averages.

    Returns:
        [B, C].
    """
    checks.tensor("logits", logits, "[B, C, S, V]")
    checks.integers("targets", targets, "[B, C, S]")
    checks.mask("targets", targets, logits.shape[:-1], "[B, C, S]")
    checks.mask("mask", mask, logits.shape[:-1], "[B, C, S]")
    keep = reductions.as_bool(mask)
    targets = targets.masked_fill(~keep, 0)
    checks.indices_in_range("targets", targets, logits.shape[-1], "vocabulary")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    of_tokens = logits.masked_fill(~keep[..., None], 0).to(dtype).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    total = torch.where(keep, of_tokens, 0).sum(-1)  # [B, C]
    return total / keep.sum(-1).clamp_min(1) ** length_penalty if length_penalty else total


def _excess(student: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
    """Mean of the positive differences (the student's other logits - its lowest chosen logit); 0 if none is positive."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    over = student.to(dtype) - chosen.to(dtype).amin(-1, keepdim=True)  # [B, S, V]
    counts = torch.ones_like(over, dtype=torch.bool).scatter(-1, tokens, False) & (over > 0)
    return torch.where(counts, over, 0).sum() / counts.sum().clamp_min(1)
