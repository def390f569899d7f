"""The transport solver for NumPy, under the names and in the shapes of `ot.emd` (POT) and `pyemd.emd_with_flow`.

For a single problem, or code that already speaks one of the two; batches, gradients and GPUs: `fastkd.transport`.
"""

try:
    from fastkd import _C
except ImportError:  # not built: said when it is first needed
    _C = None

_WRONG = {
    1: "M: costs must be finite",
    2: "a, b: masses must be finite and >= 0",
    3: "a and b must have the same total mass; divide each by its sum",
    4: "the solver did not finish; please report this problem",
}


def _solve(a, b, cost):
    if _C is None:
        raise RuntimeError("fastkd.emd needs the C++ library; reinstall fastkd with a compiler and FASTKD_BUILD=cpu")
    import numpy as np  # fastkd itself needs torch alone

    cost = np.asarray(cost, dtype=np.float64)
    if cost.ndim != 2:
        raise ValueError(f"M: expected a cost matrix [N, M], got shape {list(cost.shape)}")
    a, b = (
        np.full(extent, 1.0 / extent) if x is None or len(x) == 0 else np.asarray(x, dtype=np.float64)
        for x, extent in zip((a, b), cost.shape, strict=True)
    )
    flow, u, v, status, _ = _C.emd(a, b, cost)
    if status:
        raise ValueError(_WRONG[status])
    return cost, flow, u, v


def emd(a, b, M, log=False):
    """The exact optimal flow [N, M] between masses a [N] and b [M] (uniform where None or empty) at costs M [N, M].

    Up to 64 x 64. log=True adds a dict with `cost` and the duals `u`, `v`: u_i + v_j <= M_ij, with equality where mass
    flows."""
    cost, flow, u, v = _solve(a, b, M)
    if not log:
        return flow
    return flow, {"cost": float((flow * cost).sum()), "u": u, "v": v, "warning": None, "result_code": 1}


def emd_with_flow(first_histogram, second_histogram, distance_matrix):
    """(value, flow as nested lists), as pyemd has it, for histograms of equal total over the same bins."""
    cost, flow, _, _ = _solve(first_histogram, second_histogram, distance_matrix)
    return float((flow * cost).sum()), flow.tolist()
