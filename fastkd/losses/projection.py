"""The learned map from the student's width to the teacher's, trained beside the student and dropped afterwards."""

from torch import Tensor, nn

from fastkd import checks


class Projection(nn.Module):
    """Linear(ds, dt) with a bias on every level of a list: one for all of them (shared), or one per level.

    start: at random, as nn.Linear, or at the "identity", which needs equal widths.
    """

    def __init__(self, ds: int, dt: int, levels: int = 1, shared: bool = True, *, start: str = "random"):
        super().__init__()
        for name, number in (("ds", ds), ("dt", dt), ("levels", levels)):
            checks.positive(name, number)
        self.levels, self.shared = levels, shared
        self.linear = nn.ModuleList(nn.Linear(ds, dt) for _ in range(1 if shared else levels))
        checks.one_of("start", start, ("random", "identity"))
        if start == "identity" and ds != dt:
            raise ValueError(f"start: 'identity' needs equal widths of student and teacher, got {ds} and {dt}")
        for linear in self.linear if start == "identity" else ():
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """[B, S, ds] -> [B, S, dt], or a list of them; a shared projection takes a list of any length."""
        if isinstance(hidden, Tensor):
            return self([hidden])[0]
        checks.layers("hidden", hidden)
        if self.shared:
            return [self.linear[0](x) for x in hidden]
        checks.layer_count("hidden", hidden, self.levels, "Projection(levels=)")
        return [linear(x) for linear, x in zip(self.linear, hidden, strict=True)]
