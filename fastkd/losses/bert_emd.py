"""BERT-EMD (Li et al., EMNLP 2020): every student layer learns from every teacher layer, as much as transport says.

Costs are mean squared differences, once between attention scores and once between hidden states. The earth mover's
distance between the student's and the teacher's layer weights under these costs is the loss; its flow is a constant.
Cost attention: after each step a layer's weight moves towards the layers that are cheap to match.
"""

import torch
from torch import Tensor, nn

from fastkd import checks, distributed, functional, reductions

KINDS = ("attention", "hidden")
# A layer whose weight reached 0 would be 0/0 in the next step. This is far below any weight seen in training.
SMALLEST_WEIGHT = 1e-8


class BertEMDLoss(nn.Module):
    """(attention_loss, hidden_loss) for N student and M teacher layers; embeddings are not among them.

    weights="inverse_cost" is the released code's rule since August 2021 (temperature has no effect), "softmax" the
    paper's, whose release put a second softmax on top (double_softmax). separate=False averages the weights of both
    kinds. cost="product_of_sums" reads the paper's unit cost literally; the code sums the products.
    Weights are learned state, in buffers; only calls in train mode move them, once each, after the losses.
    `.flows` holds the last flows [N, M] by kind, detached. With process_group, costs are those of the global batch.
    """

    def __init__(
        self,
        n_student: int,
        n_teacher: int,
        *,
        weights: str = "inverse_cost",
        temperature: float = 1.0,
        double_softmax: bool | None = None,
        separate: bool = False,
        cost: str = "sum_of_products",
        causal: bool = False,
        heads: str | None = None,
        process_group=None,
        backend: str = "auto",
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

    def forward(
        self,
        student_attn: list | None,
        teacher_attn: list | None,
        student_hidden: list[Tensor] | None,
        teacher_hidden: list[Tensor] | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """attn: scores [B,H,S,S] with the additive mask in them, or pairs (q, k) [B,H,S,d]; hidden: [B,S,D], student
        already projected; mask [B,S], 1 = real token. A kind that is None on both sides has loss 0."""
        costs = {}
        if self._given("attn", student_attn, teacher_attn):
            options = {"causal": self.causal, "heads": self.heads, "backend": self.backend}
            costs["attention"] = functional.attention_costs(student_attn, teacher_attn, mask=mask, **options)
        if self._given("hidden", student_hidden, teacher_hidden):
            costs["hidden"] = functional.layer_costs(student_hidden, teacher_hidden, mask=mask, backend=self.backend)
        if not costs:
            raise ValueError("student_attn and student_hidden: both are None; pass attention, hidden states, or both")

        for kind, cost in costs.items():
            if self.process_group is not None:
                count = _entries(student_attn[0]) if kind == "attention" else _tokens(student_hidden[0], mask)
                cost = distributed.mean_over_ranks(cost, cost.new_ones(()) * count, self.process_group)  # [N, M]
            costs[kind] = cost
        plan, moved = self._solve(list(costs), torch.stack([x.double() for x in costs.values()]))
        self.flows = dict(zip(costs, plan.flow.detach(), strict=True))
        losses = dict(zip(costs, plan.value.to(cost.dtype), strict=True))
        if self.training:
            self._keep(list(costs), moved)
        zero = next(iter(losses.values())).new_zeros(())
        return losses.get("attention", zero), losses.get("hidden", zero)

    def embedding_loss(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The paper's third term: mean squared difference of the (projected) embedding outputs [B, S, D]."""
        return functional.layer_costs([student], [teacher], mask=mask, backend=self.backend).squeeze()

    def _given(self, name: str, student: list | None, teacher: list | None) -> bool:
        if student is None and teacher is None:
            return False
        for side, layers, count in (("student", student, self.n_student), ("teacher", teacher, self.n_teacher)):
            checks.layers(f"{side}_{name}", layers)
            checks.layer_count(f"{side}_{name}", layers, count, "BertEMDLoss (embeddings not among them)")
        return True

    def _solve(self, kinds: list[str], costs: Tensor):
        """[P, N, M] -> the plans, and in train mode what the weights of both sides become."""
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
    def _keep(self, kinds: list[str], moved: list[Tensor]) -> None:
        for side, weights in zip(("student", "teacher"), moved, strict=True):
            for kind in kinds if self.separate else KINDS:  # not separate: one vector for both kinds, given or not
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
    weight = weight.clamp_min(SMALLEST_WEIGHT)  # a loaded state may hold a 0; a new tensor: the buffers will change
    return weight / weight.sum()
