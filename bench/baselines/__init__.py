"""Who we are compared with, each doing the same job on the same inputs. What cannot run is `Absent`, with a reason.

One file per stem. There `eager` is the fast, idiomatic PyTorch that a careful user writes, and `authors` is the way the
paper's released code goes about it, written by us: materialised copies, host loops and host syncs. `eager` gives one value
per row; `authors` takes the arguments of the function of fastkd.functional that does the same job, and a mask counts as
there. Both are shared by the bench, the profiler and the tests. `*_case(tensors, options)` calls them with a case's plain
dicts, which Dynamo reads.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from fastkd.bench import peers
from fastkd.bench.baselines import contrast, divergence, gram, layer_cost, linear_divergence, relation, transport
from fastkd.bench.cases.case import Case, Inputs


@dataclasses.dataclass(frozen=True)
class Provider:
    """`call(inputs)` gives the loss. `served_by` names the implementation where the provider is ours."""

    name: str
    call: Callable
    served_by: str = ""
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastkd")


@dataclasses.dataclass(frozen=True)
class Absent:
    """A baseline or peer that has no row, and why."""

    name: str
    reason: str


NO_SOLVER = "PyTorch has no exact transport solver"
EAGER = {
    "divergence": divergence.eager_case,
    "gram": gram.eager_case,
    "relation": relation.eager_case,
    "layer_cost": layer_cost.eager_case,
    "contrast": contrast.eager_case,
    "linear_divergence": linear_divergence.eager_case,
    ("layer_cost", "emd_step"): None,
}
COMPILED = {**EAGER, "layer_cost": layer_cost.stacked_case}
NOT_RELEASED = "no paper here releases code for this kind"
AUTHORS = {
    ("divergence", "forward_kl"): divergence.authors_case,
    ("gram", "token"): gram.authors_case,
    ("gram", "fcd_official"): gram.authors_case,
    ("gram", "fcd"): "the released code groups by rows of view(B, -1): another number; see fcd_official",
    ("relation", "self"): relation.authors_case,
    ("layer_cost", "hidden"): layer_cost.authors_case,
    ("layer_cost", "attention"): layer_cost.authors_case,
    ("contrast", "nce"): contrast.authors_case,
    ("contrast", "codir_step"): contrast.authors_case,
    ("contrast", "codir_step_given"): contrast.authors_case,
    ("contrast", "in_batch"): NOT_RELEASED,
    ("contrast", "info_nce"): "CoDIR's released code is NCE, not InfoNCE; see nce. eager here is MoCo's way",
    ("linear_divergence", "forward_kl"): linear_divergence.authors_case,
}  # transport's is in peers.py, since it calls POT
RELEASED = {  # functions of fastkd.functional, and the authors' way of each
    "attention_costs": layer_cost.authors_attention,
    "divergence": divergence.authors,
    "gram_correlation_loss": gram.authors,
    "info_nce_loss": contrast.authors_info_nce,
    "layer_costs": layer_cost.authors,
    "linear_divergence": linear_divergence.authors,
    "nce_loss": contrast.authors_nce,
    "nce_pair_loss": contrast.authors_nce_pair,
    "relation_kl_loss": relation.authors,
    "transport": transport.authors,
    "transport_with_cost_attention": transport.authors_with_cost_attention,
}


def names() -> list[str]:
    """Every baseline and peer that some stem has."""
    return list(
        dict.fromkeys(["eager", "compile", "authors", *(name for more in peers.MORE.values() for name, *_ in more)])
    )


def bind(function: Callable) -> Callable:
    return lambda inputs: function(dict(inputs), inputs.options)


def compiled(function: Callable) -> Callable:
    """torch.compile with nothing left over from the case before, shapes static: its best case."""
    torch._dynamo.reset()
    return bind(torch.compile(function, dynamic=False))


def others(case: Case, device: torch.device) -> list:
    """Providers and Absents, in the order of the table."""
    found: list = []
    more = peers.MORE.get((case.stem, case.kind), peers.MORE.get(case.stem, ()))
    eager = EAGER.get((case.stem, case.kind), EAGER.get(case.stem))
    if eager is None:
        found += [Absent("eager", NO_SOLVER), Absent("compile", NO_SOLVER)]
    else:
        found += [Provider("eager", bind(eager)), Provider("compile", compiled(COMPILED[case.stem]))]
    authors = AUTHORS.get((case.stem, case.kind))
    if callable(authors):
        found.append(Provider("authors", bind(authors)))
    elif "authors" not in (name for name, *_ in more):
        found.append(Absent("authors", authors or NOT_RELEASED))
    for name, package, needs_gpu, make in more:
        if package and importlib.util.find_spec(package) is None:
            found.append(Absent(name, f"{package} is not installed"))
        elif needs_gpu and device.type != "cuda":
            found.append(Absent(name, f"its {case.stem} kernels are Triton and need a GPU"))
        else:
            try:
                made = make(case)
            except ImportError as error:  # of a package that it needs in turn
                made = f"{package} cannot be imported: {error}"
            found.append(Absent(name, made) if isinstance(made, str) else Provider(name, bind(made)))
    return found


def ours(case: Case, inputs: Inputs) -> list:
    """fastkd as `auto` dispatches it, and every other implementation that can run here; the rest with its reason."""
    from fastkd import backends
    from fastkd.ops import contrast

    key = next(iter(inputs.leaves))
    small = case.kind == "in_batch" and contrast.by_cross_entropy(inputs["query"], inputs["positive"])
    auto = "eager" if small else backends.choose(case.stem, "auto", key)
    found: list = [Provider("fastkd", lambda x: case.ours(x, "auto"), served_by=auto)]
    for name in ("cuda", "triton", "cpu"):
        why_not = backends.reason(case.stem, name, key)
        if why_not:
            found.append(Absent(f"fastkd:{name}", why_not))
        elif name != auto:
            found.append(Provider(f"fastkd:{name}", lambda x, name=name: case.ours(x, name), served_by=name))
    return found
