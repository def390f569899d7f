"""Cases that measure a claim rather than a kernel: a whole transport step, and accuracy where the usual ways lose it."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from fastkd.bench.cases import stems
from fastkd.bench.cases.case import CLAIMS, Case, Inputs, functional, normal, stem

FP32, BF16 = torch.float32, torch.bfloat16
COMMON = 3.0  # of the direction that all states share: a mean cosine of 9 / (9 + 1)
NEAR = 0.1  # of a logit's spread: a KL of about 5e-3 at temperature 2

# BERT-EMD's step: costs, their transport, and the gradients of the layers ------------------------------------------


def make_step(case: Case, generator) -> dict:
    made = stems.make_layers(case, generator)
    return {side: made[side] for side in ("students", "teachers")}


def ours_step(inputs: Inputs, backend: str) -> torch.Tensor:
    public = functional()
    costs = public.layer_costs(inputs["students"], inputs["teachers"], backend=backend)
    return public.transport(costs, backend="auto" if backend == "triton" else backend).value


def step_case(n: int, m: int, batch: int, length: int, d: int, dtype: torch.dtype, **more) -> Case:
    case = stems.layer_case(n, m, batch, length, d, dtype, **more)
    return dataclasses.replace(case, kind="emd_step", make=make_step, ours=ours_step, keep=())


# FCD on states that point the same way, as a transformer's do ------------------------------------------------------


def make_anisotropic(case: Case, generator) -> dict:
    made = stems.make_states(case, generator)
    return {name: x + COMMON * normal(x.shape[-1], generator=generator) for name, x in made.items()}


def anisotropic_case(batch: int, length: int, ds: int, dt: int, dtype: torch.dtype, **more) -> Case:
    case = stems.gram_case("fcd", batch, length, ds, dt, dtype, **more)
    return dataclasses.replace(case, kind="fcd_anisotropic", make=make_anisotropic)


# A vocabulary: a student that has nearly arrived, and one that kept half of the words ------------------------------


def make_near(case: Case, generator) -> dict:
    made = stems.make_hidden(case, generator)
    head = made["teacher_head"]
    moved = head + NEAR * normal(*head.shape, generator=generator, scale=2.0 * head.shape[1] ** -0.5)
    return {**made, "student_hidden": made["teacher_hidden"].clone(), "student_head": moved}


def near_case(rows: int, vocabulary: int, d: int, dtype: torch.dtype, **more) -> Case:
    case = stems.linear_case("forward_kl", rows, vocabulary, d, d, dtype, **more)
    return dataclasses.replace(case, kind="near_convergence", make=make_near)


def make_subset(case: Case, generator) -> dict:
    """The teacher has twice as many words; `kept` of them are the student's, sliced once and for all."""
    made, words = stems.make_hidden(case, generator), case.shape["V"]
    head = normal(2 * words, case.shape["Dt"], generator=generator, scale=2.0 * case.shape["Dt"] ** -0.5)
    kept = torch.randperm(2 * words, generator=generator)[:words].sort().values
    return {**made, "teacher_head": head[kept], "full_head": head, "kept": kept}


def full_logits(case: Case):
    """All of the teacher's logits, of which the kept ones are picked; then the same divergence."""

    def run(x, options):
        student, teacher = (
            F.linear(x["student_hidden"], x["student_head"]),
            F.linear(x["teacher_hidden"], x["full_head"]),
        )
        return functional().divergence(student, teacher[:, x["kept"]], **options)

    return run


def subset_case(rows: int, words: int, ds: int, dt: int, dtype: torch.dtype, **more) -> Case:
    case = stems.linear_case("forward_kl", rows, words, ds, dt, dtype, **more)
    return dataclasses.replace(case, kind="subset", make=make_subset)


@stem("layer_cost", CLAIMS)
def layer_claims() -> Iterator[Case]:
    yield step_case(6, 12, 32, 128, 768, FP32, goal="15x the authors' step on a GPU")


@stem("gram", CLAIMS)
def gram_claims() -> Iterator[Case]:
    yield anisotropic_case(16, 128, 768, 768, BF16, goal="a fiftieth of eager's gradient error")


@stem("linear_divergence", CLAIMS)
def linear_claims() -> Iterator[Case]:
    yield near_case(256, 8192, 256, BF16, goal="a tenth of eager's gradient error")
    yield subset_case(512, 16384, 512, 512, BF16, goal="0.82 of the time with all of the teacher's logits")
