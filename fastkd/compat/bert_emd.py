"""BERT-EMD as its authors' script calls it: `transformer_loss` of bert_emd/emd_task_distill.py.

The layers' weights are global there, and set to uniform when the training begins. Here they belong to `transformer_loss`
itself, an instance of `TransformerLoss`: call its `reset()` where the script sets them, or make an instance of your own.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fastkd.losses.bert_emd import KINDS, BertEMDLoss


class TransformerLoss:
    """The released losses and weight update, quirks included: padding counts, but for scores <= -100, which count as 0; a
    step updates the weights after its losses; args.seperate=False then averages the weights of both kinds, even where only
    one of them was used and updated.

    Args:
        version: "head", the code since August 2021, whose weights are the inverse costs, and which ignores T; or "f99d98b",
            the paper's: softmax with temperature T, and a second softmax where args.add_softmax is true.

    Attributes:
        loss: The `fastkd.BertEMDLoss` of the running training, with its weights; None before the first call.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(use_att=True, use_rep=True, update_weight=True, seperate=False)
        >>> student_atts, teacher_atts = ([torch.randn(2, 2, 5, 5) for _ in range(n)] for n in (2, 4))
        >>> student_reps, teacher_reps = ([torch.randn(2, 5, 6) for _ in range(n)] for n in (3, 5))  # embeddings first
        >>> transformer_loss = fastkd.compat.bert_emd.TransformerLoss()
        >>> inputs = student_atts, teacher_atts, student_reps, teacher_reps
        >>> att_loss, rep_loss = transformer_loss(*inputs, "cpu", torch.nn.MSELoss(), args, global_step=0)
    """

    def __init__(self, version: Literal["head", "f99d98b"] = "head"):
        if version not in ("head", "f99d98b"):
            raise ValueError(f"version: expected 'head' or 'f99d98b', got {version!r}")
        self.version = version
        self.loss: BertEMDLoss | None = None

    def reset(self) -> None:
        """Forgets the weights; the next call begins with uniform ones."""
        self.loss = None

    def __call__(
        self, student_atts, teacher_atts, student_reps, teacher_reps, device, loss_mse, args, global_step, T=1
    ) -> tuple[Tensor, Tensor]:
        """(attention loss, hidden loss).

        Args:
            student_atts: N layers of scores before the softmax [B, H, S, S], the additive mask in them.
            teacher_atts: M layers.
            student_reps: N + 1 hidden states [B, S, D], the embedding layer's output first.
            teacher_reps: M + 1 hidden states.
            device: Where the losses are wanted.
            loss_mse: `torch.nn.MSELoss()`; no other loss is supported.
            args: An object with use_att, use_rep, update_weight and seperate; for "f99d98b" also add_softmax.
            global_step: Not used; the released code writes the weights to its log by it.
            T: The temperature of the weights in "f99d98b".
        """
        if not isinstance(loss_mse, nn.MSELoss) or loss_mse.reduction != "mean":
            raise ValueError(f"loss_mse: expected torch.nn.MSELoss(), the released script's, got {loss_mse!r}")
        used = [kind for kind, use in zip(KINDS, (args.use_att, args.use_rep), strict=True) if use]
        loss = self._loss(len(student_atts), len(teacher_atts), args, T, len(used) == 2, device)
        both = (
            *((student_atts, teacher_atts) if args.use_att else (None, None)),
            *((student_reps[1:], teacher_reps[1:]) if args.use_rep else (None, None)),
        )
        losses = loss(*both) if used else (torch.tensor(0), torch.tensor(0))
        if len(used) == 1 and not args.seperate and args.update_weight:
            _average(loss, self._second_softmax(args))
        zero = torch.tensor(0)  # as released for a kind that is not used
        return tuple(x.to(device) if kind in used else zero for kind, x in zip(KINDS, losses, strict=True))

    def _loss(self, n: int, m: int, args, T, both: bool, device) -> BertEMDLoss:
        if self.loss is None:
            self.loss = BertEMDLoss(n, m, weights="inverse_cost" if self.version == "head" else "softmax")
        loss = self.loss.to(device)
        if (loss.n_student, loss.n_teacher) != (n, m):
            raise ValueError(
                f"student_atts, teacher_atts: the weights are those of {loss.n_student} and {loss.n_teacher} layers, got "
                f"{n} and {m}; call reset() where another training begins"
            )
        # With one kind the average is taken afterwards, since it is taken with the other kind's old weights.
        loss.separate = bool(args.seperate) or not both
        loss.double_softmax = self._second_softmax(args) and (both or bool(args.seperate))
        loss.temperature = float(T) if self.version == "f99d98b" else 1.0
        return loss.train(bool(args.update_weight))

    def _second_softmax(self, args) -> bool:
        return self.version == "f99d98b" and bool(args.add_softmax)


@torch.no_grad()
def _average(loss: BertEMDLoss, second_softmax: bool) -> None:
    for side in ("student", "teacher"):
        weights = [getattr(loss, f"{kind}_{side}_weight") for kind in KINDS]
        mean = torch.stack(weights).mean(0)
        for weight in weights:
            weight.copy_(mean.softmax(0) if second_softmax else mean)


transformer_loss = TransformerLoss()
