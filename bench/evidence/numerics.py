"""Writes the table of docs/numerics.md: how far the forward KL and its gradient are from float64 as the student nears its
teacher, in fastkd and in the usual ways. The student's logits are the teacher's plus normal noise, float32."""

import pathlib

import torch
from fastkd.bench.baselines import divergence as baseline

import fastkd

ROWS, TOKENS, SPREAD = 64, 32_000, 3.0
NOISE = (1.0, 0.1, 0.01, 0.001)
WAYS = {
    "fastkd": fastkd.divergence,
    "`log_softmax` and `F.kl_div`": lambda s, t: baseline.eager(s, t).mean(),
    "the same, logits stored in bfloat16": lambda s, t: baseline.eager(s.bfloat16().float(), t.bfloat16().float()).mean(),
}  # fmt: skip
BEGIN, END = "<!-- written by bench/evidence/numerics.py -->\n", "<!-- end -->\n"


def errors(noise: float) -> tuple[float, dict[str, tuple[float, float]]]:
    """The KL itself, and of each way the relative errors of the loss and of the gradient to the student's logits."""
    generator = torch.Generator().manual_seed(0)
    teacher = SPREAD * torch.randn(ROWS, TOKENS, generator=generator)
    student = (teacher + noise * torch.randn(ROWS, TOKENS, generator=generator)).requires_grad_()
    exact = fastkd.divergence(student.double(), teacher.double(), backend="reference")
    (wanted,) = torch.autograd.grad(exact, student)
    found = {}
    for name, loss in WAYS.items():
        value = loss(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        of_gradient = (gradient - wanted).norm() / wanted.norm()
        found[name] = abs(value.item() / exact.item() - 1), of_gradient.item()
    return exact.item(), found


def table() -> str:
    lines = ["| KL | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for noise in NOISE:
        kl, found = errors(noise)
        lines.append(f"| {kl:.0e} | " + " | ".join(f"{a:.0e} / {b:.0e}" for a, b in found.values()) + " |")
    return "\n".join(lines) + "\n"


def main(page: pathlib.Path) -> None:
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(before + BEGIN + "\n" + table() + "\n" + END + after)


if __name__ == "__main__":
    main(pathlib.Path(__file__).parents[2] / "docs/numerics.md")
