"""The transport solver for NumPy arrays, with the signatures of `ot.emd` (POT) and `pyemd.emd_with_flow`.

Each call solves one problem; `fastkd.transport` has batches, gradients and GPUs.
"""

import torch

from fastkd.functional.transport import transport

try:
    from fastkd import _C
except ImportError:  # not built, or built for another Python: a wheel's module is for one, its operations are for all
    _C = None

LARGEST = 2**15  # rows and columns

_WRONG = {
    1: "M: costs must be finite",
    2: "a, b: masses must be finite and >= 0",
    3: "a and b must have the same total mass; divide each by its sum",
    4: "the solver did not finish; please report this problem",
}


def solver():
    """The compiled function (a [N], b [M], cost [N, M]) -> (flow, u, v, status, pivots); None where it is not built."""
    return None if _C is None else _C.emd


def _solve(a, b, cost):
    import numpy as np  # fastkd itself needs torch alone

    cost = np.asarray(cost, dtype=np.float64)
    if cost.ndim != 2:
        raise ValueError(f"M: expected a cost matrix [N, M], got shape {list(cost.shape)}")
    a, b = (
        np.full(extent, 1.0 / extent) if x is None or len(x) == 0 else np.asarray(x, dtype=np.float64)
        for x, extent in zip((a, b), cost.shape, strict=True)
    )
    if _C is None:
        plan = transport(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (cost, a, b)))
        return cost, *(x.numpy() for x in (plan.flow, plan.u, plan.v))
    flow, u, v, status, _ = _C.emd(a, b, cost)
    if status:
        raise ValueError(_WRONG[status])
    return cost, flow, u, v


def emd(a, b, M, log=False):
    """Exact optimal transport between NumPy arrays, with the signature of `ot.emd` (POT).

    Args:
        a: [N], masses. None or empty: uniform.
        b: [M], masses of the same total. None or empty: uniform.
        M: [N, M], costs.
        log: Also return a dict with `cost` and the duals `u` and `v` (u_i + v_j <= M_ij, with equality where mass flows).

    Returns:
        The optimal flow [N, M], or (flow, dict) with log=True.

    Example:
        >>> import numpy
        >>> fastkd.emd(None, None, numpy.array([[0.0, 1.0], [1.0, 0.0]]))
        array([[0.5, 0. ],
               [0. , 0.5]])
    """
    cost, flow, u, v = _solve(a, b, M)
    if not log:
        return flow
    return flow, {"cost": float((flow * cost).sum()), "u": u, "v": v, "warning": None, "result_code": 1}


def emd_with_flow(first_histogram, second_histogram, distance_matrix):
    """The earth mover's distance between two histograms, with the signature of `pyemd.emd_with_flow`.

    Args:
        first_histogram: [N], masses.
        second_histogram: [N], masses of the same total.
        distance_matrix: [N, N], costs.

    Returns:
        (distance, flow as nested lists).

    Example:
        >>> fastkd.emd_with_flow([1.0, 0.0], [0.0, 1.0], [[0.0, 3.0], [3.0, 0.0]])
        (3.0, [[0.0, 1.0], [0.0, 0.0]])
    """
    cost, flow, _, _ = _solve(first_histogram, second_histogram, distance_matrix)
    return float((flow * cost).sum()), flow.tolist()
