"""A language model without its head: its forward ends in hidden states, and a loss makes of them what it needs of the logits,
block by block (functional.linear_divergence).

During a forward the output embedding returns its input instead of the product. The model's own forward runs, so wrappers,
gradient checkpointing, transforms and final norms stay as they are. What a family does to its logits afterwards, a scale or
a soft cap, is read from its configuration, and `find` compares once, on a few tokens, with the model's own logits.
"""

import contextlib
import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import functional

logger = logging.getLogger(__name__)


class Finish(NamedTuple):
    """What becomes of x = hidden @ weight.T + bias: softcap · tanh(scale · x / softcap), or scale · x without a cap."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Headless:
    """Logits [..., V] that were not made: hidden states [..., D], the head's weight [V, D] and bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    finish: Finish

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], len(self.weight))

    def __getitem__(self, rows) -> "Headless":
        return replace(self, hidden=self.hidden[rows])

    def of(self, tokens: Tensor | slice) -> "Headless":
        """Over these tokens of the vocabulary only."""
        bias = None if self.bias is None else self.bias[tokens]
        return replace(self, weight=self.weight[tokens], bias=bias)

    def logits(self) -> Tensor:
        x = F.linear(self.hidden, self.weight, self.bias) * self.finish.scale
        cap = self.finish.softcap
        return x if cap is None else cap * torch.tanh(x / cap)


@dataclass(frozen=True)
class Sparse:
    """Of logits [..., V] that nobody has, the log-probabilities of a few tokens."""

    topk: functional.TopK
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.topk.indices.shape[:-1], self.size)

    def __getitem__(self, rows) -> "Sparse":
        return replace(self, topk=functional.TopK(*(x[rows] if isinstance(x, Tensor) else x for x in self.topk)))


def whole(x: "Tensor | Headless | Sparse | None"):
    """As `fastkd.divergence` takes it: logits, or a TopK."""
    return x.logits() if isinstance(x, Headless) else x.topk if isinstance(x, Sparse) else x


def arguments(student: Headless, teacher: "Headless | Sparse") -> tuple[tuple, dict]:
    """What `from_hidden` of a loss takes of both sides."""
    if isinstance(teacher, Sparse):
        options = {
            "student_bias": student.bias,
            "logit_scale": student.finish.scale,
            "logit_softcap": student.finish.softcap,
        }
        return (student.hidden, student.weight, teacher.topk, None), options
    options = {"student_bias": student.bias, "teacher_bias": teacher.bias}
    scales, caps = zip(student.finish, teacher.finish, strict=True)
    if scales != (1.0, 1.0):
        options["logit_scale"] = scales
    if caps != (None, None):
        options["logit_softcap"] = caps
    return (student.hidden, student.weight, teacher.hidden, teacher.weight), options


class _Through(torch.autograd.Function):
    """Tensors as they are. DDP asks which parameters its output depends on, and finds the head's behind this."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


@contextlib.contextmanager
def in_eval_mode(model: nn.Module):
    """Meanwhile `model` is in eval mode; afterwards each of its modules is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def taken_off(model: nn.Module, finish: Finish):
    """Meanwhile a forward of `model`, which is not wrapped, makes no logits; yields the list that it appends Headless to."""
    head, taken = model.get_output_embeddings(), []

    def forward(hidden: Tensor) -> Tensor:
        tensors = [x for x in (hidden, head.weight, head.bias) if x is not None]
        if torch.is_autocast_enabled(hidden.device.type):  # as the product would have been
            tensors = [x.to(torch.get_autocast_dtype(hidden.device.type)) for x in tensors]
        hidden, weight, *bias = _Through.apply(*tensors)
        taken.append(Headless(hidden, weight, bias[0] if bias else None, finish))
        return hidden

    head.forward = forward
    try:
        yield taken
    finally:
        del head.forward


def find(model: nn.Module) -> Finish | None:
    """How `model` finishes its logits; None, and one line in the log, where its head cannot be taken off safely."""
    try:
        text = model.config.get_text_config()
        scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1)
        finish = Finish(float(scale), getattr(text, "final_logit_softcapping", None))
        with in_eval_mode(model):
            why_not = _compare(model, finish)
    except Exception as error:  # whatever a model's code makes of hidden states in the place of logits
        why_not = f"{type(error).__name__}: {error}"
    if why_not is None:
        return finish
    logger.warning("%s: all of its logits are made in each step, since %s", type(model).__name__, why_not)
    return None


def _compare(model: nn.Module, finish: Finish) -> str | None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its output embedding is no plain nn.Linear but {type(head).__name__}"
    ids = torch.arange(8, device=head.weight.device).view(2, 4) % len(head.weight)
    with torch.enable_grad():
        own = model(input_ids=ids, return_dict=True).logits
        with taken_off(model, finish) as taken:
            model(input_ids=ids, return_dict=True)
        if len(taken) != 1:
            return f"its forward calls its output embedding {len(taken)} times"
        made = taken[0].logits()
    allowed = 8 * torch.finfo(own.dtype).eps * own.detach().abs().max()
    if own.shape != made.shape or not bool(((own - made).detach().abs() <= allowed).all()):
        return "they are not its output embedding times what that is given, scaled and capped as the configuration says"
    if _parameters(own) != _parameters(made):
        return "a parameter behind its output embedding would not be trained"
    return None


def _parameters(x: Tensor) -> set[int]:
    """Which parameters x depends on, by identity."""
    found, seen, nodes = set(), set(), [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return found
