"""Drop-ins: a package's own loss and the one of that name in fastkd.compat, as two peers that do the same job.

`make(case, module)` is called with the package's module and with fastkd's, and gives what `peers` says; where the original is
a script and no package, `make(case)` gives fastkd's alone, and the bench's "authors" stand for the script.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from fastkd.bench import baselines
from fastkd.bench.cases import contrast
from fastkd.bench.cases.case import Case, Inputs

TRL_BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def both(name: str, package: str, original: str, make: Callable, needs_gpu: bool = False) -> list[tuple]:
    """The original, and "compat <name>". needs_gpu: whether the original does."""
    ours = f"fastkd.compat.{'pot' if package == 'ot' else package.removesuffix('_kernel')}"
    sides = ((name, original, needs_gpu), (f"compat {name}", ours, False))
    return [(who, package, gpu, partial(_with_module, make, module)) for who, module, gpu in sides]


def _with_module(make: Callable, module: str, case: Case):
    return make(case, importlib.import_module(module))


# Of logits --------------------------------------------------------------------------------------------------------


def trl_logits(case: Case, module):
    """GKDTrainer's loss."""
    if case.kind not in TRL_BETAS:
        return f"TRL has no {case.kind}"
    loss = getattr(module, "GKDTrainer", module).generalized_jsd_loss

    def run(x, options):
        temperature, labels = options["temperature"], torch.zeros(x["student"].shape[:-1], dtype=torch.long)
        sides = x["student"], x["teacher"], labels.to(x["student"].device)
        return loss(*sides, beta=TRL_BETAS[case.kind], temperature=temperature) * temperature**2

    return run


def liger_divergence(case: Case, module):
    """Liger-Kernel takes log-probabilities or probabilities: the softmaxes before it are ours to make."""
    before = torch.softmax if case.kind == "tvd" else torch.log_softmax
    if case.kind == "forward_kl":
        loss = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    elif case.kind == "jsd":
        loss = module.LigerJSD(beta=0.5)
    elif case.kind == "tvd":
        loss = module.LigerTVDLoss(reduction="batchmean")
    else:
        return f"Liger-Kernel has no {case.kind}"

    def run(x, options):
        temperature = options["temperature"]
        return loss(before(x["student"] / temperature, -1), before(x["teacher"] / temperature, -1)) * temperature**2

    return run


def torchdistill_kd(case: Case, module):
    """KDLoss without hard labels, which torchdistill does not multiply by T²."""
    if case.kind != "forward_kl":
        return f"torchdistill has no {case.kind}"
    temperature = case.options["temperature"]
    loss = module.KDLoss("logits", "output", "logits", "output", temperature, alpha=0)
    return lambda x, options: loss(*({"logits": {"output": x[s]}} for s in ("student", "teacher"))) * temperature**2


def textbrewer_kd(case: Case, module):
    if case.kind == "soft_ce":
        temperature = case.options["temperature"]
        return lambda x, options: module.kd_ce_loss(x["student"], x["teacher"], temperature) * temperature**2
    if case.kind == "mse":
        return lambda x, options: module.kd_mse_loss(x["student"], x["teacher"]) * x["student"].shape[-1]
    return f"TextBrewer has no {case.kind}"


def glmd(case: Case):
    """The divergences of GLMD's CustomLoss."""
    from fastkd.compat.glmd import CustomLoss

    loss = {"forward_kl": CustomLoss.kl_div, "soft_ce": CustomLoss.cross_entropy}.get(case.kind)
    if case.kind == "mse":
        return lambda x, options: CustomLoss.mse_loss(x["student"], x["teacher"]) * x["student"].shape[-1]
    if loss is None:
        return f"GLMD has no {case.kind}"
    temperature = case.options["temperature"]
    return lambda x, options: loss(x["student"] / temperature, x["teacher"] / temperature) * temperature**2


def distill_kl_div(case: Case, module):
    """Sentence Transformers' loss of scores; its similarity of pairs is the dot product."""
    temperature = case.options["temperature"]
    loss = module.DistillKLDivLoss(torch.nn.Identity(), temperature=temperature)
    return lambda x, options: loss.compute_loss_from_embeddings([x["query"], *x["candidates"]], x["teacher"])


# Of hidden states -------------------------------------------------------------------------------------------------


def trl_chunked(case: Case, module):
    """DistillationTrainer's loss, with the entropy that it logs."""
    kind = case.options["kind"]
    if kind not in TRL_BETAS:
        return f"TRL has no chunked {kind}"
    loss = getattr(module, "_chunked_divergence_loss", None) or module.chunked_divergence_loss

    def run(x, options):
        hidden, heads = (x["student_hidden"], x["teacher_hidden"]), (x["student_head"], x["teacher_head"])
        mask = torch.ones(len(hidden[0]), dtype=torch.long, device=hidden[0].device)
        temperature = options["temperature"]
        return loss(*hidden, *heads, mask, TRL_BETAS[kind], temperature=temperature)[0] * temperature**2

    return run


def liger_linear(case: Case, module):
    """Its chunked loss without the hard-label part."""
    beta = TRL_BETAS.get(case.kind)
    if beta is None:
        return f"Liger-Kernel has no fused linear {case.kind}"
    temperature = case.options["temperature"]
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature
    )

    def run(x, options):
        labels = torch.zeros(x["student_hidden"].shape[0], dtype=torch.long, device=x["student_hidden"].device)
        sides = (x["student_hidden"], x["student_head"], x["teacher_hidden"], x["teacher_head"])
        value = loss(*sides, labels)
        return (value[0] if isinstance(value, tuple) else value) * temperature**2

    return run


def textbrewer_hidden(case: Case, module):
    if case.kind != "hidden" or (case.shape["N"], case.shape["M"]) != (1, 1):
        return "TextBrewer compares one layer with one layer"
    return lambda x, options: module.hid_mse_loss(x["students"][0], x["teachers"][0])


def fcd(case: Case):
    from fastkd.compat.fcd import FCDLoss

    loss = FCDLoss()
    return lambda x, options: loss(x["student"], x["teacher"])


def bert_emd(case: Case):
    """The loss of hidden states, whose layer weights stay uniform; the script's lists begin with the embeddings."""
    from fastkd.compat.bert_emd import TransformerLoss

    args = SimpleNamespace(use_att=False, use_rep=True, update_weight=False, seperate=False)
    loss = TransformerLoss()

    def run(x, options):
        layers = ([side[0], *side] for side in (x["students"], x["teachers"]))
        return loss([None] * len(x["students"]), [None] * len(x["teachers"]), *layers, x["students"][0].device,
                    torch.nn.MSELoss(), args, 0)[1]  # fmt: skip

    return run


# Contrast and transport -------------------------------------------------------------------------------------------


def multiple_negatives_ranking(case: Case, module):
    """Vectors of the case have unit length already, so that their dot product is the cosine."""
    from sentence_transformers.util import dot_score

    options = {"scale": 1 / case.options["temperature"], "similarity_fct": dot_score}
    loss = module.MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
    return lambda x, options: loss.compute_loss_from_embeddings([x["query"], x["positive"]], None)


def torchdistill_crd(case: Case, module):
    """The sum of both sides, whose memories and normalisers are the case's; the projections are torchdistill's models'."""
    (k, d, rows), options = (case.shape[axis] for axis in "KDn"), case.options
    loss = module.CRDLoss("norm", "empty", "norm", d, 2, k, rows, options["temperature"], options["momentum"])
    loss.params[2:4] = options["z"]

    def run(x, options):
        loss.memory_v1, loss.memory_v2 = x["bank_s"], x["bank_t"]
        student, teacher = baselines.contrast.projections(x)
        given = {"pos_idx": x["idx"], "contrast_idx": x["index"]}
        return loss({"norm": {"output": student}, "empty": {"input": given}}, {"norm": {"output": teacher}})[0] / 2

    return run


def codir(case: Case):
    """A training run makes its loss once, and so does this, for the tensors that it is called with."""
    from fastkd.compat.codir import CRDLoss

    made = {}

    def run(x, options):
        if made.get("of") is not x["f_s"]:
            made.update(of=x["f_s"], loss=contrast.step_module(Inputs(x, options, ()), CRDLoss))
        return made["loss"](x["f_s"], x["f_t"], x["idx"], x.get("index"))[0]

    return run


def pot(case: Case):
    from fastkd.compat.pot import emd

    return lambda x, options: baselines.transport.authors(x["cost"], x["a"], x["b"], emd=emd).value.sum()


SENTENCE = "sentence_transformers"
CODIR = ("compat codir", "", False, codir)
DROP_INS = {
    "divergence": [
        *both("liger", "liger_kernel", "liger_kernel.transformers", liger_divergence, needs_gpu=True),
        *both("trl", "trl", "trl.experimental.gkd.gkd_trainer", trl_logits),
        *both("torchdistill", "torchdistill", "torchdistill.losses.mid_level", torchdistill_kd),
        *both("textbrewer", "textbrewer", "textbrewer.losses", textbrewer_kd),
        ("compat glmd", "", False, glmd),
    ],
    ("divergence", "candidates"): both(
        "sentence-transformers", SENTENCE, f"{SENTENCE}.sentence_transformer.losses", distill_kl_div
    ),
    "linear_divergence": [
        *both("trl", "trl", "trl.trainer.distillation_trainer", trl_chunked),
        *both("liger", "liger_kernel", "liger_kernel.chunked_loss", liger_linear),
    ],
    ("gram", "fcd_official"): [("compat fcd", "", False, fcd)],
    "layer_cost": both("textbrewer", "textbrewer", "textbrewer.losses", textbrewer_hidden),
    ("layer_cost", "emd_step"): [("compat bert_emd", "", False, bert_emd)],
    "transport": [("compat pot", "ot", False, pot)],
    ("contrast", "in_batch"): both(
        "sentence-transformers", SENTENCE, f"{SENTENCE}.sentence_transformer.losses", multiple_negatives_ranking
    ),
    ("contrast", "codir_step"): [CODIR],
    ("contrast", "codir_step_given"): [
        CODIR, *both("torchdistill", "torchdistill", "torchdistill.losses.mid_level", torchdistill_crd)
    ],
}  # fmt: skip
