"""BERT-EMD (Li et al., EMNLP 2020): each student layer learns from each teacher layer, weighted by optimal transport.

The costs are mean squared differences, between attention scores and between hidden states. The loss is the earth mover's
distance between the layer weights of student and teacher under these costs; its flow is treated as a constant.
Cost attention: after each step, layers that are cheap to match get a larger weight.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastkd import checks, distributed, functional, reductions
from fastkd.checks import Backend
from fastkd.deprecation import renamed

KINDS = ("attention", "hidden")
# A layer with weight 0 would give 0 / 0 in the next step. This is far below any weight seen in training.
SMALLEST_WEIGHT = 1e-8


class BertEMDLoss(nn.Module):
    """BERT-EMD: (attention loss, hidden loss) of N student and M teacher layers, without the embedding layer.

    For either kind Σ_ij F_ij · cost_ij, with F the optimal flow between the layers' weights; see `fastkd.transport`,
    `fastkd.attention_costs` and `fastkd.layer_costs`. In train mode each call updates the weights once, after the losses.

    Args:
        n_student: N.
        n_teacher: M.
        weights: The update rule. "inverse_cost" is the released code's since August 2021, "softmax" the paper's.
        temperature: Temperature of "softmax"; "inverse_cost" has none.
        double_softmax: Apply a second softmax, as released with "softmax". None: True for "softmax".
        separate: Keep a weight per kind. False averages the weights of both kinds.
        cost: "sum_of_products" as in the released code, or "product_of_sums", the paper's formula taken literally.
        causal: Scores of later keys do not count.
        heads: "mean" averages attention scores over heads, where student and teacher differ in their number.
        process_group: The costs are then those of the batch of all its ranks.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Attributes:
        flows: The last flows [N, M] by kind ("attention", "hidden"), detached.
        attention_student_weight, attention_teacher_weight, hidden_student_weight, hidden_teacher_weight: The layers'
            weights, buffers in the state_dict.

    Example:
        >>> loss = fastkd.BertEMDLoss(2, 4)
        >>> student_hidden = [torch.randn(2, 8, 16, requires_grad=True) for _ in range(2)]
        >>> teacher_hidden = [torch.randn(2, 8, 16) for _ in range(4)]
        >>> attention_loss, hidden_loss = loss(None, None, student_hidden, teacher_hidden, torch.ones(2, 8))
        >>> hidden_loss.backward()
        >>> loss.flows["hidden"].shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        n_student: int,
        n_teacher: int,
        *,
        weights: Literal["inverse_cost", "softmax"] = "inverse_cost",
        temperature: float = 1.0,
        double_softmax: bool | None = None,
        separate: bool = False,
        cost: Literal["sum_of_products", "product_of_sums"] = "sum_of_products",
        causal: bool = False,
        heads: Literal["mean"] | None = None,
        process_group=None,
        backend: Backend = "auto",
    ):
        super().__init__()
        checks.count("n_student", n_student)
        checks.count("n_teacher", n_teacher)
        checks.one_of("weights", weights, ("inverse_cost", "softmax"))
        checks.one_of("cost", cost, ("sum_of_products", "product_of_sums"))
        checks.positive("temperature", temperature)
        if double_softmax and weights != "softmax":
            raise ValueError("double_softmax: belongs to weights='softmax'; leave it None with weights='inverse_cost'")
        self.n_student, self.n_teacher = n_student, n_teacher
        self.weights, self.temperature, self.separate, self.cost = weights, temperature, separate, cost
        self.double_softmax = weights == "softmax" if double_softmax is None else double_softmax
        self.causal, self.heads = causal, heads
        self.process_group, self.backend = process_group, backend
        for kind in KINDS:
            for side, count in (("student", n_student), ("teacher", n_teacher)):
                uniform = torch.full((count,), 1.0 / count, dtype=torch.float64)
                self.register_buffer(f"{kind}_{side}_weight", uniform)
        self.flows: dict[str, Tensor] = {}

    @renamed(student_attn="student_attention", teacher_attn="teacher_attention")
    def forward(
        self,
        student_attention: list | None,
        teacher_attention: list | None,
        student_hidden: list[Tensor] | None,
        teacher_hidden: list[Tensor] | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The losses (attention, hidden), two scalars. A kind that is None on both sides has loss 0.

        Args:
            student_attention: N layers of scores before the softmax [B, H, S, S], the additive mask in them; or of pairs
                (q, k) [B, H, S, d]. Attention probabilities are not scores.
            teacher_attention: M layers of the same kinds.
            student_hidden: N layers [B, S, D], already projected to the teacher's width; see `fastkd.Projection`.
            teacher_hidden: M layers [B, S, D].
            mask: [B, S], 1 = real token.
        """
        costs = {}
        if self._present("attention", student_attention, teacher_attention):
            options = {"causal": self.causal, "heads": self.heads, "backend": self.backend}
            costs["attention"] = functional.attention_costs(student_attention, teacher_attention, mask=mask, **options)
        if self._present("hidden", student_hidden, teacher_hidden):
            costs["hidden"] = functional.layer_costs(student_hidden, teacher_hidden, mask=mask, backend=self.backend)
        if not costs:
            raise ValueError("student_attention, student_hidden: both are None; pass attention, hidden states, or both")

        for kind, cost in costs.items():
            if self.process_group is not None:
                count = _entries(student_attention[0]) if kind == "attention" else _tokens(student_hidden[0], mask)
                cost = distributed.mean_over_ranks(cost, cost.new_ones(()) * count, self.process_group)  # [N, M]
            costs[kind] = cost
        plan, moved = self._solve(list(costs), torch.stack([x.double() for x in costs.values()]))
        self.flows = dict(zip(costs, plan.flow.detach(), strict=True))
        losses = dict(zip(costs, plan.value.to(cost.dtype), strict=True))
        if self.training:
            self._store(list(costs), moved)
        zero = next(iter(losses.values())).new_zeros(())
        return losses.get("attention", zero), losses.get("hidden", zero)

    if TYPE_CHECKING:
        __call__ = forward

    @renamed(student="student_hidden", teacher="teacher_hidden")
    def embedding_loss(self, student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The paper's third term: the mean squared difference of the embedding layers' outputs [B, S, D]."""
        return functional.layer_costs([student_hidden], [teacher_hidden], mask=mask, backend=self.backend).squeeze()

    def _present(self, name: str, student: list | None, teacher: list | None) -> bool:
        if student is None and teacher is None:
            return False
        for side, layers, count in (("student", student, self.n_student), ("teacher", teacher, self.n_teacher)):
            checks.layers(f"{side}_{name}", layers)
            checks.layer_count(f"{side}_{name}", layers, count, "BertEMDLoss (embeddings not among them)")
        return True

    def _solve(self, kinds: list[str], costs: Tensor):
        """The plans for costs [P, N, M], and in train mode the new weights of both sides."""
        a, b = (
            torch.stack([_above_zero(getattr(self, f"{kind}_{side}_weight").double()) for kind in kinds])
            for side in ("student", "teacher")
        )  # [P, N], [P, M]
        if not self.training:
            return functional.transport(costs, a, b, backend=self.backend), ()
        rule = functional.CostAttention(
            self.weights == "inverse_cost", float(self.temperature), self.cost == "product_of_sums", not self.separate,
            bool(self.double_softmax),
        )  # fmt: skip
        plan, *moved = functional.transport_with_cost_attention(costs, a, b, rule, backend=self.backend)
        return plan, moved

    @torch.no_grad()
    def _store(self, kinds: list[str], moved: list[Tensor]) -> None:
        for side, weights in zip(("student", "teacher"), moved, strict=True):
            for kind in (
                kinds if self.separate else KINDS
            ):  # not separate: one vector for both kinds, also for one that was None
                weight = weights[kinds.index(kind) if kind in kinds else 0]
                getattr(self, f"{kind}_{side}_weight").copy_(weight)

    def extra_repr(self) -> str:
        return (
            f"{self.n_student}, {self.n_teacher}, weights={self.weights!r}, temperature={self.temperature}, "
            f"double_softmax={self.double_softmax}, separate={self.separate}"
        )


def _entries(scores: Tensor | tuple[Tensor, Tensor]) -> int:
    query = scores if isinstance(scores, Tensor) else scores[0]  # [B, H, S, ...]
    return query.shape[0] * query.shape[2] ** 2


def _tokens(hidden: Tensor, mask: Tensor | None) -> int | Tensor:
    return hidden.shape[0] * hidden.shape[1] if mask is None else reductions.as_bool(mask).sum()


def _above_zero(weight: Tensor) -> Tensor:
    weight = weight.clamp_min(SMALLEST_WEIGHT)  # a loaded state may hold a 0; a copy, since the buffers change later
    return weight / weight.sum()
