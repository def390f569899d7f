"""What is measured: a module per stem with its `AXES` (kind -> letter -> word), `case(kind, *sizes, dtype=…)` and two lists:
`CASES`, and `ON_GPU`, what a CPU would take minutes for."""

from fastkd.bench.cases import contrast, divergence, gram, layer_cost, linear_divergence, relation, transport
from fastkd.bench.cases.case import Case

STEMS = {
    "divergence": divergence, "gram": gram, "relation": relation, "layer_cost": layer_cost, "transport": transport,
    "contrast": contrast, "linear_divergence": linear_divergence,
}  # fmt: skip


def listed(stem: str, gpu: bool = False) -> list[Case]:
    """On a GPU those with a goal come first: there, time may run out."""
    module = STEMS[stem]
    found = [*module.CASES, *(module.ON_GPU if gpu else [])]
    return sorted(found, key=lambda case: not case.goals) if gpu else found


def targets() -> dict[str, Case]:
    """Those that a GPU's targets are about, by the target's name."""
    found = {case.target: case for stem in STEMS for case in listed(stem, gpu=True) if case.target}
    return dict(sorted(found.items(), key=lambda item: int(item[0].split()[0][1:])))


def select(stems=(), name="", dtype="", quick=False, gpu=False, of=()) -> list[Case]:
    """The cases whose stem is named, whose name contains `name`, and whose target is one `of` these."""
    return [
        case for stem in stems or STEMS for case in listed(stem, gpu)
        if name in case.name and (not dtype or case.dtype_text == dtype) and (case.quick or not quick)
        and (not of or case.target.split(" ")[0] in of)
    ]  # fmt: skip
