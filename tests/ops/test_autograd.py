"""How every public function behaves under PyTorch's autograd, beyond one backward: what kernels cannot do is an error that
names the function, the reference can do it, and tensors that were made under torch.inference_mode() are taken.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from fastkd.bench import baselines
from subjects import device_of
from torch.utils.checkpoint import checkpoint

import fastkd
from cases import randn, relative_error
from fastkd import backends, functional


@dataclass(frozen=True)
class Case:
    """call(student, others, backend) -> a tensor; others: every other tensor, the teacher first."""

    function: str  # as it is called in fastkd.functional
    variant: str
    stem: str
    inputs: Callable  # () -> (student, others), in float64 and on the CPU
    call: Callable
    only: tuple = ("cpu", "triton", "cuda")  # the kernels that it goes through

    def __str__(self):
        return "-".join(filter(None, (self.function, self.variant)))


def _pair(*shape, **more):
    """Student, teacher, and a tensor for each of `more`, which makes it."""
    return lambda: (randn(*shape, seed=1), (randn(*shape, seed=2), *(make() for make in more.values())))


def _mask(rows, columns=None):
    mask = torch.arange(rows * (columns or 1)) % 4 > 0
    return mask if columns is None else mask.reshape(rows, columns)


def _divergence(kind):
    def call(student, others, backend):
        return functional.divergence(student, others[0], kind=kind, temperature=2.0, mask=others[1], backend=backend)

    return Case("divergence", kind, "divergence", _pair(4, 5, mask=lambda: _mask(4)), call)


def _topk_inputs():
    log_probs = F.log_softmax(randn(4, 3, seed=2), -1)[:, :2]
    return randn(4, 5, seed=1), (torch.tensor([[0, 3], [1, 2], [4, 0], [2, 1]]), log_probs)


def _topk(student, others, backend):
    return functional.divergence(student, fastkd.TopK(*others, True), kind="jsd", backend=backend)


def _linear(variant, **options):
    def call(student, others, backend):
        teacher, head, mask, weights = others
        hidden, own = student[:4], student[4:]  # the head of the student is trained too
        return functional.linear_divergence(
            hidden, own, teacher, head, mask=mask, weights=weights, backend=backend, **options
        )

    more = {
        "head": lambda: randn(5, 3, seed=3),
        "mask": lambda: _mask(4),
        "weights": lambda: torch.arange(1.0, 5).double(),
    }

    def inputs():
        student, others = _pair(9, 3, **more)()
        return student, (others[0][:4], *others[1:])

    return Case("linear_divergence", variant, "linear_divergence", inputs, call)


def _gram(variant, **options):
    def call(student, others, backend):
        return functional.gram_correlation_loss(student, others[0], mask=others[1], backend=backend, **options)

    return Case("gram_correlation_loss", variant, "gram", _pair(3, 4, 3, mask=lambda: _mask(3, 4)), call)


def _relation(student, others, backend):
    return functional.relation_kl_loss([(student, student.sin())], [others[0]], mask=others[1], backend=backend)


def _transport(student, others, backend):
    teacher, a, b = others
    return functional.transport((student - teacher).square(), a, b, backend=backend).value


def _moved(student, others, backend):
    teacher, a, b = others
    return functional.transport_with_cost_attention((student - teacher).square(), a, b, backend=backend)[0].value


MASSES = {  # exact in bfloat16
    "a": lambda: torch.tensor([6, 10, 16], dtype=torch.float64).div(32).expand(2, 3),
    "b": lambda: torch.tensor([4, 8, 9, 11], dtype=torch.float64).div(32).expand(2, 4),
}


def _unit(*shape, seed):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


BANK = {"bank": lambda: _unit(9, 5, seed=4), "index": lambda: torch.arange(12).reshape(3, 4) * 5 % 9}


def _info_nce(gathered):
    def call(student, others, backend):
        key, bank, index = others
        return functional.info_nce_loss(
            student, key, bank, index if gathered else None, temperature=0.5, backend=backend
        )

    return Case("info_nce_loss", "gathered" if gathered else "shared", "contrast", _pair(3, 5, **BANK), call)


def _in_batch(student, others, backend):
    return functional.info_nce_loss(student, others[0], None, temperature=0.5, backend=backend)


NCE = {"n_data": 20, "temperature": 0.5}


def _nce(student, others, backend):
    return functional.nce_loss(student, *others[1:], z=10.0, backend=backend, **NCE)


def _nce_pair(student, others, backend):
    z = (torch.full((), 10.0, device=student.device), torch.full((), 12.0, device=student.device))
    banks = (others[1], others[1].flip(0))
    return functional.nce_pair_loss((student, student.sin()), banks, others[2], z=z, backend=backend, **NCE)[0]


CASES = [
    *(_divergence(kind) for kind in ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")),
    Case("divergence", "topk", "divergence", _topk_inputs, _topk),
    *(_linear(name, recompute_logits=name == "low", kind="jsd") for name in ("speed", "low")),
    _linear("rows", reduction="none"),
    _gram("token"),
    _gram("rows", level="sequence", pearson="row", reduction="none"),
    Case("relation_kl_loss", "", "relation", _pair(2, 1, 3, 2, mask=lambda: torch.tensor([[1, 1, 0], [1, 1, 1]])), _relation),
    Case(
        "layer_costs", "", "layer_cost", _pair(2, 3, 2, mask=lambda: _mask(2, 3)),
        lambda s, others, backend: functional.layer_costs([s, s.sin()], [others[0]], mask=others[1], backend=backend),
    ),
    Case(
        "attention_costs", "pairs", "layer_cost", _pair(2, 1, 3, 2),
        lambda s, others, backend: functional.attention_costs([(s, s.sin())], [(others[0],) * 2], backend=backend),
    ),
    Case(
        "attention_costs", "scores", "layer_cost", _pair(2, 1, 3, 3, mask=lambda: _mask(2, 3)),
        lambda s, others, backend: functional.attention_costs([s], [others[0]], mask=others[1], backend=backend),
    ),
    Case("transport", "", "transport", _pair(2, 3, 4, **MASSES), _transport),
    Case("transport_with_cost_attention", "", "transport", _pair(2, 3, 4, **MASSES), _moved),
    _info_nce(gathered=False),
    _info_nce(gathered=True),
    Case("info_nce_loss", "in_batch", "contrast", _pair(3, 5), _in_batch),
    Case("nce_loss", "", "contrast", _pair(3, 5, **BANK), _nce),
    Case("nce_pair_loss", "", "contrast", _pair(3, 5, **BANK), _nce_pair),
    Case(
        "unit_linear", "", "contrast", _pair(3, 5, bias=lambda: randn(3, seed=5)),
        lambda s, others, backend: functional.unit_linear(s, *others, backend=backend), only=("cpu",),
    ),
]  # fmt: skip
WITHOUT_GRADIENT = {"linear_entropy", "nce_partition", "sample_negatives", "update_bank"}


def _parameters(names):
    return [
        pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.gpu] if device_of(name) == "cuda" else [])
        for case in CASES
        for name in names
        if name == "reference"
        or (
            (name in case.only and name in backends.WRITTEN[case.stem])
            and (name != "cpu" or backends.UNAVAILABLE["cpu"] is None)
        )
    ]


on_kernels = pytest.mark.parametrize(("case", "backend"), _parameters(("cpu", "triton", "cuda")))
on_every_backend = pytest.mark.parametrize(("case", "backend"), _parameters(("cpu", "triton", "cuda", "reference")))
on_the_reference = pytest.mark.parametrize("case", CASES, ids=str)


def inputs(case, backend, dtype=torch.float32):
    def to(x):
        return x.to(device_of(backend), dtype if x.is_floating_point() else None)

    student, others = case.inputs()
    return to(student), tuple(map(to, others))


def loss_and_gradient(call, student):
    leaf = student.detach().clone().requires_grad_()
    out = call(leaf)
    out.backward(randn(*out.shape, seed=7).to(out) + 1.5)
    return out.detach(), leaf.grad


def test_every_public_function_is_here():
    functions = {name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))}
    assert {case.function for case in CASES} == functions - WITHOUT_GRADIENT


def test_every_function_of_autograd_has_the_base_that_refuses():
    def below(cls):
        return {x for sub in cls.__subclasses__() for x in {sub, *below(sub)}}

    ours = {cls for cls in below(torch.autograd.Function) if cls.__module__.startswith("fastkd.ops.")}
    kernels = ours - {cls for cls in ours if cls.__module__ == "fastkd.ops.vocab_parallel"}
    assert len(kernels) >= 12 and all(issubclass(cls, backends.Function) for cls in kernels)
    assert all(set(cls.function.split(" or ")) <= set(functional.__all__) for cls in kernels)


# ---- what kernels cannot do


@on_kernels
def test_a_second_derivative_is_refused(case, backend):
    student, others = inputs(case, backend)
    leaf = student.requires_grad_()
    loss = case.call(leaf, others, backend).sum()
    with pytest.raises(RuntimeError, match=rf"^.*{case.function}.*: .*second derivative.*backend='reference'"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)  # the graph is as good as before
    (again,) = torch.autograd.grad(loss, leaf)
    assert grad.norm() > 0 and torch.equal(grad, again) and not grad.requires_grad


def transformed(case, others, backend, student):
    """Each way to ask for a derivative or a batch without .backward()."""

    def call(x):
        return case.call(x, others, backend)

    def dual():
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(student, torch.ones_like(student)))

    return {
        "dual": dual,
        "jvp": lambda: torch.func.jvp(call, (student,), (torch.ones_like(student),)),
        "grad": lambda: torch.func.grad(lambda x: call(x).sum())(student),
        "vmap": lambda: torch.func.vmap(call)(torch.stack([student, student + 0.1])),
        "nested": lambda: torch.func.hessian(lambda x: call(x).sum())(student),
    }


@on_kernels
@pytest.mark.parametrize("way", ["dual", "jvp", "grad", "vmap", "nested"])
def test_forward_mode_and_transforms_are_refused(case, backend, way):
    student, others = inputs(case, backend)
    with pytest.raises(RuntimeError, match=rf"^.*{case.function}.*: .*torch.func.*backend='reference'"):
        transformed(case, others, backend, student)[way]()
    with forward_ad.dual_level():  # tensors without a tangent are as ever
        case.call(student, others, backend)


# ---- what the reference can do


@on_the_reference
def test_the_reference_has_every_derivative(case):
    """Forward and backward mode, and the second derivative, against finite differences."""
    student, others = inputs(case, "reference", torch.float64)
    call = lambda x: case.call(x, others, "reference")  # noqa: E731
    leaf = student.requires_grad_()
    torch.autograd.gradcheck(call, leaf, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(call, leaf, fast_mode=True)


@on_the_reference
def test_the_reference_takes_transforms(case):
    student, others = inputs(case, "reference", torch.float64)
    ways = transformed(case, others, "reference", student)
    leaf = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(case.call(leaf, others, "reference").sum(), leaf)
    torch.testing.assert_close(ways["grad"](), grad)
    torch.testing.assert_close(ways["jvp"]()[1].sum(), grad.sum())
    hessian = torch.autograd.functional.hessian(lambda x: case.call(x, others, "reference").sum(), student)
    torch.testing.assert_close(ways["nested"](), hessian)
    if case.stem == "transport":
        with pytest.raises(RuntimeError, match=r"transport: .* vmap; pass a batch of costs"):
            ways["vmap"]()
    else:
        expected = [case.call(x, others, "reference") for x in (student, student + 0.1)]
        torch.testing.assert_close(ways["vmap"](), torch.stack(expected))


def test_a_gradient_penalty_equals_the_textbook_formula():
    student, teacher = randn(3, 5, seed=1), randn(3, 5, seed=2)

    def penalised(kl):
        leaf = student.clone().requires_grad_()
        loss = kl(leaf)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(loss + grad.square().sum(), leaf)[0]

    expected = penalised(lambda s: baselines.divergence.eager(s, teacher).mean())
    found = penalised(lambda s: fastkd.divergence(s, teacher, backend="reference"))
    assert relative_error(found, expected) < 1e-12


def test_a_second_derivative_of_transport_in_the_masses():
    """Where all arcs of the basis carry mass, the flow is linear in the masses and the duals are in the cost."""
    cost, a, b = randn(2, 3, 4, seed=1).square(), *(make().clone() for make in MASSES.values())

    def value(cost, a, b):
        a, b = a - a.mean(-1, keepdim=True) + 1 / 3, b - b.mean(-1, keepdim=True) + 1 / 4
        return functional.transport(cost, a, b, backend="reference").value

    leaves = [x.requires_grad_() for x in (cost, a, b)]
    torch.autograd.gradgradcheck(value, leaves, eps=1e-7, atol=1e-5)
    mixed = torch.func.hessian(lambda c, a: value(c, a, b.detach()).sum(), argnums=(0, 1))(cost.detach(), a.detach())
    assert mixed[0][1].norm() > 0.1 and not mixed[0][0].any()


# ---- what must not be in the way


@on_every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(case, backend, reentrant):
    student, others = inputs(case, backend)
    expected = loss_and_gradient(lambda x: case.call(x, others, backend), student)
    found = loss_and_gradient(lambda x: checkpoint(case.call, x, others, backend, use_reentrant=reentrant), student)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def under_inference_mode(x):
    """A part of something larger, so that its memory does not begin where the tensor does."""
    with torch.inference_mode():
        return torch.stack([x, x])[1]


@on_every_backend
def test_everything_but_the_student_from_inference_mode(case, backend):
    student, others = inputs(case, backend)
    theirs = tuple(map(under_inference_mode, others))
    assert all(x.is_inference() for x in theirs)
    expected = loss_and_gradient(lambda x: case.call(x, others, backend), student)
    found = loss_and_gradient(lambda x: case.call(x, theirs, backend), student)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for x, own in zip(theirs, others, strict=True):
        assert x.is_inference() and torch.equal(x, own)


@on_every_backend
def test_all_in_inference_mode(case, backend):
    student, others = inputs(case, backend)
    with torch.inference_mode():
        inside = case.call(student.clone(), tuple(x.clone() for x in others), backend)
    outside = case.call(under_inference_mode(student), tuple(map(under_inference_mode, others)), backend)
    expected = case.call(student, others, backend)
    assert torch.equal(inside, expected) and torch.equal(outside, expected)
