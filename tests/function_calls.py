"""Valid calls of every public function and loss, and many wrong ones: `python tests/function_calls.py SEED STEP FROM TO`, as
raw_op_calls.py does it for the compiled ops. A call must end in an exception that a caller can expect, or in a result."""

import inspect
import itertools
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from raw_op_calls import BF16, FLOAT8, ids, layers, mask, normal, tensors, wrong_values

# isort: split
import fastkd  # after raw_op_calls, which loads the library that FASTKD_LIBRARY names
from fastkd import TopK, functional
from fastkd.functional import CostAttention

CLASSES = torch.arange(9) % 3
LABELS = CLASSES, CLASSES.argsort(stable=True), torch.tensor([0, 3, 6, 9])


def _logits(**more) -> dict:
    return {
        "student_logits": normal(3, 5).requires_grad_(),
        "teacher_logits": normal(3, 5),
        "mask": mask(3),
        "temperature": 2.0,
        **more,
    }


def _linear(**more) -> dict:
    student = {"student_hidden": normal(3, 4).requires_grad_(), "student_head": normal(7, 4), "student_bias": normal(7)}
    teacher = {"teacher_hidden": normal(3, 6), "teacher_head": normal(7, 6), "teacher_bias": normal(7)}
    return {**student, **teacher, "mask": mask(3), "labels": ids(3, below=7), "weights": torch.rand(3), **more}


def _topk(size: int) -> TopK:
    return TopK(ids(3, 2, below=size), normal(3, 2).log_softmax(-1) - 0.1, True)


def _bank(**more) -> dict:
    return {
        "query": normal(3, 5).requires_grad_(),
        "bank": normal(9, 5),
        "index": ids(3, 4, below=9),
        "n_data": 9,
        "temperature": 0.1,
        **more,
    }


def _sides(*shape: int, names=("student_hidden", "teacher_hidden")) -> dict:
    return {
        names[0]: [y.requires_grad_() for y in layers(torch.float32, 2, *shape)],
        names[1]: layers(torch.float32, 2, *shape),
    }


def _qkv() -> dict:
    return {side: tuple(layers(torch.float32, 3, 2, 2, 5, 4)) for side in ("student_qkv", "teacher_qkv")}


# (arguments of the function), or of a loss (those of its constructor, those of its call)
VALID: dict[str, list[Callable[[], tuple[dict, ...]]]] = {
    "divergence": [
        lambda: (_logits(kind="jsd", t_squared=True, beta=0.3, labels=ids(3, below=5), ignore_index=0, reduction="mean", backend="auto"),),
        lambda: (_logits(kind="skew_kl", alpha=0.2, teacher_logits=_topk(5), reduction="none"),),
    ],
    "linear_divergence": [
        lambda: (_linear(hard_weight=0.5, recompute_logits=False, logit_scale=(1.5, 1.0), logit_softcap=30.0, num_valid=3),),
        lambda: (_linear(teacher_hidden=_topk(7), teacher_head=None, teacher_bias=None, recompute_logits=True, reduction="sum"),),
        lambda: (_linear(vocab=torch.arange(7), teacher_tokens="kept", teacher_head=normal(9, 6), teacher_bias=None),),
    ],
    "gram_correlation_loss": [
        lambda: ({**_sides(4, 5, 3), "level": {"token": 1.0, "sequence": 0.5}, "mask": mask(4, 5), "normalize": True, "eps": 1e-6},),
        lambda: ({**_sides(4, 5, 3), "level": "sequence", "grouping": "official", "pearson": "row", "reduction": "none"},),
    ],
    "layer_costs": [lambda: ({**_sides(2, 5, 3), "mask": mask(2, 5), "clamp": -0.5},)],
    "attention_costs": [
        lambda: ({"student_attention": [(normal(2, 2, 5, 3), normal(2, 2, 5, 3))], "teacher_attention": [(normal(2, 2, 5, 4), normal(2, 1, 5, 4))], "mask": mask(2, 5),
                  "causal": True, "scale": 0.5, "heads": "mean"},),
        lambda: (_sides(2, 2, 5, 5, names=("student_attention", "teacher_attention")),),
    ],
    "relation_kl_loss": [
        lambda: ({**_sides(2, 2, 5, 4, names=("student_relations", "teacher_relations")), "heads": 4, "mask": mask(2, 5), "causal": False, "temperature": 2.0, "reduction": "mean"},),
        lambda: ({"student_relations": [(normal(2, 2, 5, 4), normal(2, 2, 5, 4))], "teacher_relations": [(normal(2, 2, 5, 3), normal(2, 2, 5, 3))], "reduction": "none"},),
    ],
    "transport": [
        lambda: ({"cost": torch.rand(2, 3, 4), "a": torch.full((3,), 1 / 3), "b": torch.full((2, 4), 0.25),
                  "warm_start": functional.transport(torch.rand(2, 3, 4))},),
    ],
    "transport_with_cost_attention": [
        lambda: ({"cost": torch.rand(2, 3, 4), "a": torch.full((2, 3), 1 / 3), "b": torch.full((2, 4), 0.25), "attention": CostAttention()},),
    ],
    "info_nce_loss": [
        lambda: ({"query": normal(3, 5).requires_grad_(), "positive": normal(3, 5), "bank": normal(9, 5), "temperature": torch.tensor(0.1),
                  "exclude": (ids(3, below=9), torch.arange(9))},),
        lambda: ({"query": normal(3, 5), "positive": normal(3, 5), "bank": normal(9, 5).to(FLOAT8), "index": ids(3, 4, below=9), "temperature": 0.1,
                  "scale": torch.rand(9), "reduction": "none"},),
        lambda: ({"query": normal(3, 5).requires_grad_(), "positive": normal(3, 5).requires_grad_(), "bank": None},),
    ],
    "nce_loss": [lambda: (_bank(z=9.0),), lambda: (_bank(z=torch.tensor(9.0), bank=normal(9, 5).to(FLOAT8), scale=torch.rand(9)),)],
    "nce_pair_loss": [
        lambda: ({"queries": (normal(3, 5), normal(3, 5)), "banks": (normal(9, 5), normal(9, 5)), "index": ids(3, 4, below=9), "n_data": 9,
                  "temperature": 0.1, "z": (torch.zeros(()), torch.ones(()))},),
    ],
    "nce_partition": [lambda: (_bank(z=torch.zeros(())),)],
    "sample_negatives": [
        lambda: ({"index": ids(4, below=9), "count": 3, "state": torch.tensor([5, 1]), "n_data": 9, "labels": LABELS, "replacement": False},),
        lambda: ({"index": ids(4, below=9), "count": 3, "state": torch.tensor([5, 1]), "n_data": 9, "window": 2, "backend": "reference"},),
        lambda: ({"index": ids(4, below=9), "count": 3, "state": torch.tensor([5, 1]), "n_data": 9, "labels": LABELS, "backend": "reference"},),
    ],
    "unit_linear": [lambda: ({"x": normal(3, 5).requires_grad_(), "weight": normal(4, 5), "bias": normal(4)},)],
    "update_bank": [
        lambda: ({"bank": normal(9, 5), "index": ids(3, below=9), "rows": normal(3, 5), "momentum": 0.5},),
        lambda: ({"bank": normal(9, 5).to(FLOAT8), "index": ids(3, below=9), "rows": normal(3, 5, dtype=BF16), "momentum": 0.5, "scale": torch.rand(9)},),
    ],
    "FCDLoss": [lambda: ({"alpha": 1.0, "beta": 0.5, "gamma": 0.1, "K": 4}, {**_sides(4, 5, 3), "mask": mask(4, 5)})],
    "BertEMDLoss": [
        lambda: ({"n_student": 2, "n_teacher": 2, "weights": "softmax", "temperature": 2.0, "separate": True},
                 {"student_attention": None, "teacher_attention": None, **_sides(2, 5, 3), "mask": mask(2, 5)}),
    ],
    "CoDIRLoss": [
        lambda: ({"student_dim": 4, "teacher_dim": 6, "n_data": 9, "feat_dim": 8, "nce_k": 5, "nce_t": 0.1, "nce_m": 0.5},
                 {"student_hidden": normal(3, 4), "teacher_hidden": normal(3, 6), "idx": ids(3, below=9)}),
        lambda: ({"student_dim": 4, "teacher_dim": 6, "n_data": 9, "feat_dim": 8, "preset": "paper", "pool": "mean"},
                 {"student_hidden": normal(3, 5, 4), "teacher_hidden": normal(3, 5, 6), "idx": torch.zeros(3).long(), "contrast_idx": torch.zeros(3, 4).long(), "mask": mask(3, 5)}),
    ],
    "CRDLoss": [
        lambda: ({"opt": SimpleNamespace(s_dim=4, t_dim=6, n_data=9, feat_dim=8, nce_k=5, nce_t=0.1, nce_m=0.5)},
                 {"student_hidden": normal(3, 4), "teacher_hidden": normal(3, 6), "idx": ids(3, below=9)}),
    ],
    "GLMDLoss": [
        lambda: ({"temperature": 2.0, "top_n": 3}, {"student_logits": normal(2, 3, 5), "teacher_logits": normal(2, 3, 5), "mask": mask(2, 3)}),
        lambda: ({"stage": "soft"}, {"student_logits": normal(3, 5), "teacher_logits": normal(3, 5), "mask": mask(3)}),
    ],
    "HintonKDLoss": [
        lambda: ({"alpha": 0.5, "temperature": 2.0, "ignore_index": -100},
                 {"student_logits": normal(3, 5), "teacher_logits": normal(3, 5), "labels": ids(3, below=5), "mask": mask(3)}),
    ],
    "MiniLMLoss": [lambda: ({"causal": True}, {**_qkv(), "mask": mask(2, 5)})],
    "MiniLMv2Loss": [lambda: ({"relation_heads": 4}, {**_qkv(), "mask": mask(2, 5)})],
    "NegativeQueue": [lambda: ({"size": 7, "dim": 5, "temperature": 0.1}, {"query": normal(3, 5), "key": normal(3, 5), "ids": ids(3, below=9)})],
    "PKDLoss": [lambda: ({"strategy": "skip", "token": "last"}, {**_sides(2, 5, 3), "mask": mask(2, 5)})],
}  # fmt: skip


def subject(name: str) -> Callable:
    return getattr(functional, name, None) or getattr(fastkd, name)


def wrong_calls(seed: int, step: int) -> Iterator[tuple[str, str, tuple[dict, ...]]]:
    """(function, what is wrong, arguments), as in raw_op_calls.py."""
    torch.manual_seed(seed)
    numbers = itertools.count()
    for name, calls in VALID.items():
        for build in calls:
            for part, given in enumerate(build()):
                for key in given:
                    for how, wrong in wrong_values(build()[part][key]):
                        if next(numbers) % step == 0:
                            args = build()
                            args[part][key] = wrong
                            yield name, f"{key} {how}", args
    rng = random.Random(seed)
    while True:
        name = rng.choice(list(VALID))
        args, said = rng.choice(VALID[name])(), []
        for given, key in rng.sample([(part, key) for part in args for key in part], 2):
            how, given[key] = rng.choice(list(wrong_values(given[key])))
            said.append(f"{key} {how}")
        yield name, ", ".join(said), args


def outcome(name: str, args: tuple[dict, ...]) -> str:
    """The class of the exception, or "a result"; a refusal of ours must say which argument it means."""
    call = subject(name)
    named = [
        call,
        *(getattr(functional, other) for other in functional.__all__ if other.islower()),
    ]  # a loss calls them
    parameters = {key for each in named for key in inspect.signature(each).parameters}
    try:
        for part in args:
            call = call(**part)
        for found in tensors(call):
            if found.requires_grad and found.is_floating_point():
                found.float().sum().backward(retain_graph=True)
        return "a result"
    except (ValueError, TypeError, RuntimeError) as error:
        end, frame = error, traceback.extract_tb(error.__traceback__)[-1]
    ours = (
        frame.filename.endswith(("fastkd/checks.py", "fastkd/reductions.py")) or "fastkd/functional/" in frame.filename
    )
    assert not (ours and type(end) is ValueError) or any(key in str(end) for key in parameters), end
    return type(end).__name__ + (" of our own" if ours else "")


def main(seed: int, step: int, first: int, last: int) -> None:
    torch.set_num_threads(1)
    for i, (name, wrong, args) in enumerate(itertools.islice(wrong_calls(seed, step), first, last), first):
        print(f"{i} {name}: {wrong}", end="", flush=True)
        print(f" -> {outcome(name, args)}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
