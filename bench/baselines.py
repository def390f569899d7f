"""Who we are compared with, each doing the same job on the same inputs. What cannot run is `Absent`, with a reason.

`eager` is the fast, idiomatic PyTorch that a careful user writes, `compile` is torch.compile of that (for layer_cost of
the form that it fuses best), `authors` is the way the paper's released code goes about it, written by us: materialised
copies, host loops and host syncs.
Functions take (tensors, options), plain dicts, so that Dynamo reads them.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from fastkd.bench.cases.case import Case, Inputs
from fastkd.bench.peers import MORE


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
    """A rival that has no row, and why."""

    name: str
    reason: str


# divergence -------------------------------------------------------------------------------------------------------


def divergence_of(s, t, kind: str, temperature: float):
    """The mean over rows [N, V], times T² except for mse; torch ops only, nothing computed twice."""
    if kind == "mse":
        return F.mse_loss(s, t, reduction="sum") / s.shape[0]
    factor, s, t = temperature**2, s / temperature, t / temperature
    if kind == "tvd":
        return (s.softmax(-1) - t.softmax(-1)).abs().sum(-1).mean() * (0.5 * factor)
    if kind == "soft_ce":
        return F.cross_entropy(s, t.softmax(-1)) * factor
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)  # [N, V]
    if kind == "forward_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * factor
    if kind == "reverse_kl":
        return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * factor
    if kind == "skew_kl":  # alpha 0.1
        log_m = torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9))
        return F.kl_div(log_m, log_p, log_target=True, reduction="batchmean") * factor
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)  # jsd, beta 0.5
    to_p = F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
    return (to_p + F.kl_div(log_m, log_q, log_target=True, reduction="batchmean")) * (0.5 * factor)


def eager_divergence(x: dict, options: dict):
    if "teacher" in x:
        return divergence_of(x["student"], x["teacher"], options["kind"], options["temperature"])
    temperature, log_p = options["temperature"], x["log_probs"]
    log_q = (x["student"] / temperature).log_softmax(-1).gather(-1, x["indices"])  # [N, K]
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    if options["tail"]:
        rest_p, rest_q = (torch.log1p(-log.exp().sum(-1)) for log in (log_p, log_q))
        rows = rows + rest_p.exp() * (rest_p - rest_q)
    return rows.mean() * temperature**2


def authors_divergence(x: dict, options: dict):
    """GLMKD: logits to fp32, both multiplied by the mask, probabilities as target, one loss per entry, summed last."""
    temperature = options["temperature"]
    mask = x["student"].new_ones(x["student"].shape[0], 1, dtype=torch.float32)
    s, t = x["student"].float() * mask, x["teacher"].float() * mask
    entries = F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="none")
    return (entries.sum(-1) * mask.squeeze(-1)).mean() * temperature**2


# gram -------------------------------------------------------------------------------------------------------------


def pearson(a, b):
    """1 - mean correlation of the rows [G, m]; eps is added to the product of the norms, as FCD does."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)).mean()


def eager_gram(x: dict, options: dict):
    s, t = F.normalize(x["student"], dim=-1), F.normalize(x["teacher"], dim=-1)
    loss = pearson((s @ s.mT).flatten(1), (t @ t.mT).flatten(1))
    if options["grouping"] is None:
        return loss
    s, t = s.transpose(0, 1), t.transpose(0, 1)  # [N, B, D]
    groups = s.shape[0] if options["grouping"] == "position" else s.shape[1]
    return loss + pearson((s @ s.mT).reshape(groups, -1), (t @ t.mT).reshape(groups, -1))


def authors_gram(x: dict, options: dict):
    """FCD: the batch axis moved by a copy, and the [N, B, B] tensor viewed as B rows."""
    s, t = F.normalize(x["student"], dim=-1), F.normalize(x["teacher"], dim=-1)
    batch = s.shape[0]
    token = pearson(torch.bmm(s, s.mT).view(batch, -1), torch.bmm(t, t.mT).view(batch, -1))
    if options["grouping"] is None:
        return token
    s, t = s.permute(1, 0, 2).contiguous(), t.permute(1, 0, 2).contiguous()
    return token + pearson(torch.bmm(s, s.mT).view(batch, -1), torch.bmm(t, t.mT).view(batch, -1))


# relation ---------------------------------------------------------------------------------------------------------


def eager_relation(x: dict, options: dict):
    total = 0.0
    for s, t in zip(x["student"], x["teacher"], strict=True):
        log_q, log_p = ((r @ r.mT * r.shape[-1] ** -0.5).log_softmax(-1).flatten(0, 2) for r in (s, t))  # [BHL, L]
        total = total + F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return total


def authors_relation(x: dict, options: dict):
    """GLMKD: scores divided after the product, probabilities as target, one loss per entry."""
    total = 0.0
    for s, t in zip(x["student"], x["teacher"], strict=True):
        scores = [torch.matmul(r, r.transpose(-1, -2)) / math.sqrt(r.shape[-1]) for r in (s, t)]
        entries = F.kl_div(F.log_softmax(scores[0], -1), F.softmax(scores[1], -1), reduction="none")
        total = total + entries.sum(-1).mean()
    return total


# layer_cost -------------------------------------------------------------------------------------------------------


def layers_of(x: dict) -> tuple:
    if "students" in x:
        return x["students"], x["teachers"]
    scores = []
    for side in ("student", "teacher"):
        pairs = zip(x[f"{side}_q"], x[f"{side}_k"], strict=True)
        scores.append([q @ k.mT * q.shape[-1] ** -0.5 for q, k in pairs])
    return scores[0], scores[1]


def eager_layer_cost(x: dict, options: dict):
    students, teachers = layers_of(x)
    costs = torch.stack([torch.stack([F.mse_loss(s, t) for t in teachers]) for s in students])  # [N, M]
    return (costs * x["flow"]).sum()


def stacked_layer_cost(x: dict, options: dict):
    """Vectorised over the teachers: slower than pairs in eager on a CPU, what Inductor fuses best."""
    students, teachers = layers_of(x)
    stacked = torch.stack(teachers).flatten(1)  # [M, numel]
    costs = torch.stack([(stacked - s.flatten()).square().mean(-1) for s in students])  # [N, M]
    return (costs * x["flow"]).sum()


def authors_matrix(x: dict):
    """BERT-EMD: a masked copy and an MSE per pair, each written into one matrix, twice."""
    students, teachers = layers_of(x)
    n, m = len(students), len(teachers)
    matrix = torch.zeros(n + m, n + m, device=students[0].device)
    for i, s in enumerate(students):
        for j, t in enumerate(teachers):
            if "student_q" in x:
                s, t = (torch.where(score <= -100, torch.zeros_like(score), score) for score in (s, t))
            matrix[i, n + j] = matrix[n + j, i] = F.mse_loss(s, t)
    return matrix


def authors_layer_cost(x: dict, options: dict):
    """That matrix, which then goes to the host for the solver; the flow is given here."""
    matrix, n = authors_matrix(x), len(layers_of(x)[0])
    matrix.detach().cpu().numpy().astype("float64")
    flow = torch.zeros_like(matrix)
    flow[:n, n:] = x["flow"]
    return (matrix * flow).sum()


# contrast ---------------------------------------------------------------------------------------------------------


def eager_contrast(x: dict, options: dict):
    if "labels" in x:
        return eager_step(x, options)
    if "bank" not in x and "positive" in x:
        logits = x["query"] @ x["positive"].mT / options["temperature"]
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    if "positive" in x:
        query, bank = x["query"], x["bank"]
        positive = (query * x["positive"]).sum(-1, keepdim=True)  # [B, 1]
        negative = (query.to(bank.dtype) @ bank.mT).to(query.dtype)  # [B, K]
        logits = torch.cat((positive, negative), 1) / options["temperature"]
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
    negatives = x["index"].shape[1] - 1
    noise, eps = negatives / options["n_data"], 1e-7
    loss = -negatives * (math.log(noise) - math.log(noise + eps)) * 2
    for query, bank in ((x["query_t"], x["bank_s"]), (x["query_s"], x["bank_t"])):
        scores = torch.einsum("bkd,bd->bk", bank[x["index"]], query)
        u = scores / options["temperature"] - (math.log(options["z"]) + math.log(noise + eps))
        loss = loss + (F.softplus(-u[:, 0]) + F.softplus(u[:, 1:]).sum(-1)).mean()
    return loss


def authors_contrast(x: dict, options: dict):
    """CoDIR: rows gathered into [B, K + 1, D], a bmm, exp over Z, two logarithms with their eps; no sampling here."""
    (batch, columns), eps = x["index"].shape, 1e-7
    noise, loss = (columns - 1) / options["n_data"], 0.0
    for query, bank in ((x["query_t"], x["bank_s"]), (x["query_s"], x["bank_t"])):
        rows = torch.index_select(bank, 0, x["index"].view(-1)).view(batch, columns, -1)
        p = torch.exp(torch.bmm(rows, query.view(batch, -1, 1)) / options["temperature"]) / options["z"]
        positive, negative = p.select(1, 0), p.narrow(1, 1, columns - 1)
        first = torch.log(positive / (positive + noise + eps))
        second = torch.log(torch.full_like(negative, noise) / (negative + noise + eps))
        loss = loss - (first.sum() + second.view(-1, 1).sum()) / batch
    return loss


def projections(x: dict) -> tuple:
    """CoDIR's Embed on either side: on the unit sphere, [B, D]."""
    sides = (F.linear(x[f"f_{side}"], x[f"weight_{side}"], x[f"bias_{side}"]) for side in "st")
    return tuple(v / v.pow(2).sum(1, keepdim=True).sqrt() for v in sides)


@torch.no_grad()
def move_rows(bank, idx, v, momentum: float) -> None:
    rows = bank.index_select(0, idx) * momentum + v * (1 - momentum)
    bank.index_copy_(0, idx, rows / rows.pow(2).sum(1, keepdim=True).sqrt())


def step_of(x: dict, options: dict, index, nce: Callable):
    v_s, v_t = projections(x)
    sides = {"query_s": v_s, "query_t": v_t, "bank_s": x["bank_s"], "bank_t": x["bank_t"], "index": index}
    loss = nce(sides, {**options, "n_data": x["bank_s"].shape[0]}) / 2
    for bank, v in ((x["bank_s"], v_s), (x["bank_t"], v_t)):
        move_rows(bank, x["idx"], v, options["momentum"])
    return loss


def eager_step(x: dict, options: dict):
    """Negatives drawn on the device, with replacement: a place among the ids by class that skips the own class."""
    if "index" in x:
        return step_of(x, options, x["index"], eager_contrast)
    own = x["labels"][x["idx"]]
    start, size = x["bounds"][own], x["bounds"][own + 1] - x["bounds"][own]  # [B]
    uniform = torch.rand(len(own), options["k"], device=own.device, dtype=torch.float64)
    place = (uniform * (x["order"].shape[0] - size)[:, None]).long()
    negatives = x["order"][place + torch.where(place >= start[:, None], size[:, None], 0)]  # [B, K]
    return step_of(x, options, torch.cat((x["idx"][:, None], negatives), 1), eager_contrast)


def authors_step(x: dict, options: dict):
    """CoDIR: numpy draws for one example after another, and a copy to the device."""
    if "index" in x:
        return step_of(x, options, x["index"], authors_contrast)
    pools = [ids.cpu().numpy() for ids in x["others"]]
    scarce = options["k"] >= min(map(len, pools))
    rows = [np.concatenate(([i], np.random.choice(pools[x["labels"][i]], options["k"], replace=scarce)))
            for i in x["idx"].tolist()]  # fmt: skip
    index = torch.from_numpy(np.stack(rows)).to(x["idx"].device)
    return step_of(x, options, index, authors_contrast)


# linear_divergence ------------------------------------------------------------------------------------------------


def eager_linear(x: dict, options: dict):
    student = F.linear(x["student_hidden"], x["student_head"])
    teacher = F.linear(x["teacher_hidden"], x["teacher_head"])
    return divergence_of(student, teacher, options["kind"], options["temperature"])


def authors_linear(x: dict, options: dict):
    student = F.linear(x["student_hidden"], x["student_head"])
    teacher = F.linear(x["teacher_hidden"], x["teacher_head"])
    return authors_divergence({"student": student, "teacher": teacher}, options)


# The table --------------------------------------------------------------------------------------------------------

NO_SOLVER = "PyTorch has no exact transport solver"
EAGER = {
    "divergence": eager_divergence,
    "gram": eager_gram,
    "relation": eager_relation,
    "layer_cost": eager_layer_cost,
    "contrast": eager_contrast,
    "linear_divergence": eager_linear,
    ("layer_cost", "emd_step"): None,
}
COMPILED = {**EAGER, "layer_cost": stacked_layer_cost}
NOT_RELEASED = "no paper here releases code for this kind"
AUTHORS = {
    ("divergence", "forward_kl"): authors_divergence,
    ("gram", "token"): authors_gram,
    ("gram", "fcd_official"): authors_gram,
    ("gram", "fcd"): "the released code groups by rows of view(B, -1): another number; see fcd_official",
    ("relation", "self"): authors_relation,
    ("layer_cost", "hidden"): authors_layer_cost,
    ("layer_cost", "attention"): authors_layer_cost,
    ("contrast", "nce"): authors_contrast,
    ("contrast", "codir_step"): authors_step,
    ("contrast", "codir_step_given"): authors_step,
    ("contrast", "in_batch"): NOT_RELEASED,
    ("contrast", "info_nce"): "CoDIR's released code is NCE, not InfoNCE; see nce. eager here is MoCo's way",
    ("linear_divergence", "forward_kl"): authors_linear,
}  # transport's is in packages.py, since it calls POT


def names() -> list[str]:
    """Every rival that some stem has."""
    return list(dict.fromkeys(["eager", "compile", "authors", *(name for more in MORE.values() for name, *_ in more)]))


def bind(function: Callable) -> Callable:
    return lambda inputs: function(dict(inputs), inputs.options)


def compiled(function: Callable) -> Callable:
    """torch.compile with nothing left over from the case before, shapes static: its best case."""
    torch._dynamo.reset()
    return bind(torch.compile(function, dynamic=False))


def rivals(case: Case, device: torch.device) -> list:
    """Providers and Absents, in the order of the table."""
    found: list = []
    more = MORE.get((case.stem, case.kind), MORE.get(case.stem, ()))
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
            made = make(case)
            found.append(Absent(name, made) if isinstance(made, str) else Provider(name, bind(made)))
    return found


def ours(case: Case, inputs: Inputs, backends_wanted: tuple[str, ...] = ()) -> list:
    """fastkd as `auto` dispatches it, and every other implementation that can run here; the rest with its reason."""
    from fastkd import backends

    key = next(iter(inputs.leaves))
    auto = backends.choose(case.stem, "auto", key)
    found: list = [Provider("fastkd", lambda x: case.ours(x, "auto"), served_by=auto)]
    for name in ("cuda", "triton", "cpu"):
        why_not = backends.reason(case.stem, name, key)
        if why_not:
            found.append(Absent(f"fastkd:{name}", why_not))
        elif name != auto:
            found.append(Provider(f"fastkd:{name}", lambda x, name=name: case.ours(x, name), served_by=name))
    if "reference" in backends_wanted and auto != "reference":
        found.append(Provider("fastkd:reference", lambda x: case.ours(x, "reference"), served_by="reference"))
    return found
