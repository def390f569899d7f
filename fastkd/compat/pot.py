"""POT's exact solvers, `ot.emd` and `ot.emd2`, on fastkd's: the same signatures, results and gradients.

For NumPy arrays and torch tensors. POT itself solves what is left: other array libraries, sparse costs, integer masses, a
warm start by `potentials_init`, a limit `numItermax` below its default, and problems that have no solution, about which it
warns. `numThreads` and `processes` do nothing, as in POT.
"""

import numpy as np
import torch
from ot.lp._network_simplex import center_ot_dual
from ot.lp._network_simplex import emd as pot_emd
from ot.lp._network_simplex import emd2 as pot_emd2
from torch import Tensor

from fastkd import functional

DEFAULT_LIMIT = 100_000  # of numItermax


def emd(
    a, b, M, numItermax=DEFAULT_LIMIT, log=False, center_dual=True, numThreads=1, check_marginals=True,
    potentials_init=None,
):  # fmt: skip
    """The optimal transport plan, with the signature of `ot.emd`.

    Args:
        a: [N], masses of the rows. None or empty: uniform.
        b: [M], masses of the columns, scaled to the total of `a`. None or empty: uniform.
        M: [N, M], costs.
        numItermax: POT's limit. fastkd's solver always ends with the optimum; below the default POT solves.
        log: Also return a dict of cost, u, v, warning and result_code.
        center_dual: Shift the duals so that both sides contribute equally to the cost.
        numThreads: Does nothing, as in POT.
        check_marginals: Raise AssertionError where the totals differ.
        potentials_init: POT's warm start; POT solves.

    Returns:
        The plan [N, M] in the type of `a`, or (plan, dict) with log=True.

    Example:
        >>> fastkd.compat.pot.emd([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]])
        array([[0.5, 0. ],
               [0. , 0.5]])
    """
    problem = _Problem(a, b, M, numItermax, check_marginals, potentials_init)
    if problem.batched or not problem.solve(center_dual):
        return pot_emd(a, b, M, numItermax, log, center_dual, numThreads, check_marginals, potentials_init)
    plan = problem.like(problem.flow[0])
    return (plan, problem.log(0, float(problem.value[0].detach()))) if log else plan


def emd2(
    a, b, M, processes=1, numItermax=DEFAULT_LIMIT, log=False, return_matrix=False, center_dual=True, numThreads=1,
    check_marginals=True, potentials_init=None,
):  # fmt: skip
    """The optimal transport cost, with the signature of `ot.emd2`; differentiable for torch tensors.

    Args:
        a: [N], masses of the rows. None or empty: uniform.
        b: [M], masses of the columns, or [M, K] for K problems that share `a` and `M`. None or empty: uniform.
        M: [N, M], costs.
        processes: Does nothing, as in POT.
        numItermax: As for `emd`.
        log: Also return a dict, as `emd` does.
        return_matrix: Also return that dict, with the plan as its "G".
        center_dual: As for `emd`.
        numThreads: Does nothing, as in POT.
        check_marginals: As for `emd`.
        potentials_init: POT's warm start; POT solves.

    Returns:
        The cost, or [cost, dict]; with K problems a list of them. The gradient is the plan (to `M`) and the duals, each
        less its mean (to `a` and `b`).

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 3.0]], requires_grad=True)
        >>> value = fastkd.compat.pot.emd2(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]), cost)
        >>> value.backward()
        >>> value.item(), cost.grad.tolist()
        (1.0, [[0.0, 0.5], [0.5, 0.0]])
    """
    problem = _Problem(a, b, M, numItermax, check_marginals, potentials_init)
    if not problem.solve(center_dual):
        return pot_emd2(
            a, b, M, processes, numItermax, log, return_matrix, center_dual, numThreads, check_marginals, potentials_init
        )  # fmt: skip
    results = []
    for k in range(len(problem.value)):
        cost = problem.like(problem.value[k])
        details = problem.log(k, cost)
        if return_matrix:
            details["G"] = problem.like(problem.flow[k])
        results.append([cost, details] if log or return_matrix else cost)
    return results if problem.batched else results[0]


class _Problem:
    """One cost matrix, and one or several columns of masses, as POT reads them; `solve` says whether fastkd can."""

    def __init__(self, a, b, M, limit, check_marginals, potentials_init):
        a, b, M = (np.array(x) if isinstance(x, list) else x for x in (a, b, M))
        self.batched = False
        self.inputs = None
        given = [x for x in (a, b) if x is not None and len(x)]
        self.type_as = [*given, *(x for x in (a, b) if x is not None), M][0]
        kinds = {type(x) for x in (a, b, M) if x is not None}
        if len(kinds) > 1 or limit < DEFAULT_LIMIT or potentials_init is not None:
            return
        if not _dense_floats(M, 2) or not _floating(self.type_as):
            return
        uniform = [None if x is None or not len(x) else x for x in (a, b)]
        a, b = (_uniform(n, M) if x is None else x for x, n in zip(uniform, M.shape, strict=True))
        self.batched = b.ndim == 2
        if not (_dense_floats(a, 1) and _dense_floats(b, 1 + self.batched)):
            return
        assert (len(a), len(b)) == tuple(M.shape), "Dimension mismatch, check dimensions of M with a and b"
        a, b, M = (x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x)) for x in (a, b, M))
        if check_marginals:
            totals = [x.detach().double().sum(0).cpu().numpy() for x in (a, b)]
            np.testing.assert_almost_equal(*totals, err_msg="a and b vector must have the same sum", decimal=6)
        self.inputs = a.double(), b.double(), M.double()

    def solve(self, center_dual: bool) -> bool:
        if self.inputs is None:
            return False
        a, b, M = self.inputs
        masses = b.T if self.batched else b[None]  # [K, M]
        with torch.no_grad():
            scaled = masses * (a.sum() / masses.sum(-1, keepdim=True))
        masses = masses + (scaled - masses).detach()  # POT's gradient is that of the scaled masses
        if not _solvable(a.detach(), scaled, M.detach()):
            return False
        count = len(masses)
        plan = functional.transport(M.expand(count, *M.shape), a.expand(count, -1), masses)
        self.value, self.flow, self.u, self.v = plan.value, plan.flow, plan.u, plan.v
        if center_dual or bool((a == 0).any() | (scaled == 0).any()):
            a = a.detach()
            pairs = [center_ot_dual(u, v, a, b) for u, v, b in zip(self.u, self.v, scaled, strict=True)]
            self.u, self.v = ([pair[side] for pair in pairs] for side in (0, 1))
        return True

    def like(self, x: Tensor):
        """A result in the type and dtype of the masses."""
        if isinstance(self.type_as, Tensor):
            return x.to(self.type_as.device, self.type_as.dtype)
        return x.numpy().astype(self.type_as.dtype)

    def log(self, k: int, cost) -> dict:
        duals = {"u": self.like(self.u[k]), "v": self.like(self.v[k])}
        return {"cost": cost, **duals, "warning": None, "result_code": 1}


def _dense_floats(x, axes: int) -> bool:
    if isinstance(x, Tensor):
        return x.layout == torch.strided and x.is_floating_point() and x.dim() == axes
    return isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating) and x.ndim == axes


def _floating(x) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else np.issubdtype(x.dtype, np.floating)


def _uniform(n: int, like):
    return like.new_full((n,), 1.0 / n) if isinstance(like, Tensor) else np.full(n, 1.0 / n)


def _solvable(a: Tensor, b: Tensor, M: Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in (a, b, M)) and bool((a >= 0).all() & (b >= 0).all())
