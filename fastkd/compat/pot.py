"""POT's exact solvers, `ot.emd` and `ot.emd2`, on fastkd's solver: POT's own functions around another network simplex.

So every keyword, array library and gradient is POT's. `fastkd.patch("pot")` replaces the solver inside POT, so that whatever
calls `ot.emd` or `ot.emd2` uses it, also by names that were imported before. POT's solver goes on to solve what is left: a
limit `numItermax` below its default, a warm start by `potentials_init`, sparse costs, and problems without a solution, about
which it warns.
"""

import functools
import types

import numpy as np
from ot.lp import _network_simplex as originals
from ot.lp.emd_wrap import emd_c as pot_emd_c

from fastkd import emd_numpy

DEFAULT_LIMIT = 100_000  # of numItermax; fastkd's solver always goes on to the optimum
OPTIMAL = 1  # POT's result code


def emd_c(a, b, M, max_iter, numThreads, alpha_init=None, beta_init=None):
    """`ot.lp.emd_wrap.emd_c`: (plan [N, M], cost, u [N], v [M], result code).

    Args:
        a: [N], masses of the rows, float64.
        b: [M], masses of the columns.
        M: [N, M], costs.
        max_iter: POT's limit.
        numThreads: Does nothing, as in POT.
        alpha_init: Potentials to start from, or None.
        beta_init: Potentials to start from, or None.
    """
    ours = emd_numpy.solver() if max_iter >= DEFAULT_LIMIT and alpha_init is None else None
    if ours is not None and min(M.shape) > 0 and max(M.shape) <= emd_numpy.LARGEST:
        plan, u, v, status, _ = ours(a, b, M)
        if status == 0:
            return plan, float(np.vdot(plan, M)), u, v, OPTIMAL
    return pot_emd_c(a, b, M, max_iter, numThreads, alpha_init, beta_init)


def _with_our_solver(function):
    """POT's function, in whose body `emd_c` is ours."""
    names = {**function.__globals__, "emd_c": emd_c}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    return functools.update_wrapper(copy, function)


emd = _with_our_solver(originals.emd)
emd2 = _with_our_solver(originals.emd2)
