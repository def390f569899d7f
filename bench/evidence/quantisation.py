"""Distillation of a language model into itself with quantised weights, where student and teacher come so near to each other that
the digits of the loss count: float32 logits beside logits stored in bfloat16, fastkd beside eager PyTorch.

python -m fastkd.bench.evidence.quantisation MODEL TEXT              # MODEL: a folder; TEXT: the last rows of it are held out
python -m fastkd.bench.evidence.quantisation MODEL TEXT --summary    # the table and picture of what has been measured

The student has the teacher's weights, each Linear's rounded to --bits in the forward, symmetric, with a scale per output; its
gradient passes the rounding unchanged. KL(teacher ‖ student) of the held-out tokens is computed in float64. All losses start
alike and see the same batches. A row of quantisation.csv is one look; a loss that has its last one is not trained again.
"""

import argparse
import copy

import pandas as pd
import torch
import torch.nn.functional as F
from fastkd.bench import machine, plots
from fastkd.bench.evidence.language_model import rows_of
from torch import nn
from torch.nn.utils import parametrize

import fastkd

RESULTS = machine.ROOT / "bench/results/quality/quantisation.csv"
HELD_OUT, EVERY = 8, 10  # rows; steps between two looks


def eager(student, teacher):
    log_probs = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(*(x.flatten(0, -2) for x in log_probs), log_target=True, reduction="batchmean")


LOSSES = {"fastkd": fastkd.divergence, "eager": eager}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Rounded(nn.Module):
    """Weights rounded to whole multiples of a scale per row."""

    def __init__(self, bits: int):
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def forward(self, weight):
        scale = weight.detach().abs().amax(-1, keepdim=True) / self.most
        return weight + ((weight / scale).round() * scale - weight).detach()


def quantised(teacher: nn.Module, bits: int) -> nn.Module:
    student = copy.deepcopy(teacher).train()
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            parametrize.register_parametrization(module, "weight", Rounded(bits))
    return student


@torch.no_grad()
def distance(student, rows, of_teacher) -> float:
    """KL(teacher ‖ student) per token, in float64, from the teacher's logits of these rows."""
    pairs = (
        (student(row[None]).logits.double(), logits[None].double())
        for row, logits in zip(rows, of_teacher, strict=True)
    )
    return torch.stack([fastkd.divergence(*pair, backend="reference") for pair in pairs]).mean().item()


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    numbers = (("--bits", 4), ("--steps", 60), ("--batch", 2), ("--length", 64), ("--rate", 5e-5))
    for name, number in numbers:
        parser.add_argument(name, type=type(number), default=number)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    known = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=["bits", "rate", "loss", "step"])
    facts = machine.facts(torch.device("cpu"))
    names = [f"{loss} {dtype}" for loss in LOSSES for dtype in DTYPES]
    of_these = lambda rows: rows[(rows.bits == options.bits) & (rows.rate == options.rate)]  # noqa: E731
    done = of_these(known[known.step == options.steps])["loss"].tolist()
    for name in [] if options.summary else [name for name in names if name not in done]:
        loss, dtype = LOSSES[name.split()[0]], DTYPES[name.split()[1]]
        teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        _, data = rows_of(options.model, options.text, options.length)
        data = torch.tensor(data["input_ids"][:])
        student, held_out, looks = quantised(teacher, options.bits), data[-HELD_OUT:], []
        with torch.no_grad():
            truth = teacher(held_out).logits
        optimizer = torch.optim.AdamW(student.parameters(), lr=options.rate, weight_decay=0)
        for step in range(options.steps + 1):
            if step % EVERY == 0:
                look = {
                    "bits": options.bits,
                    "rate": options.rate,
                    "loss": name,
                    "step": step,
                    "kl": distance(student, held_out, truth),
                }
                looks.append(look | {key: facts[key] for key in ("device", "torch", "commit", "date")})
                print(looks[-1], flush=True)
            if step == options.steps:
                break
            rows = data[step * options.batch : (step + 1) * options.batch]
            with torch.no_grad():
                of_teacher = teacher(rows).logits.to(dtype)
            optimizer.zero_grad()
            loss(student(rows).logits.to(dtype), of_teacher).backward()
            optimizer.step()
        known = pd.concat([known, pd.DataFrame(looks)], ignore_index=True)
        known.to_csv(RESULTS, index=False, float_format="%.6g")
    rows = of_these(known)
    curves = rows.pivot(index="step", columns="loss", values="kl")
    print(curves.to_string(float_format="{:.3g}".format))
    plots.curves({name: (curves.index, curves[name]) for name in curves}, f"{options.bits}-bit weights learn from their own model",
                 ("step", "KL(teacher ‖ student) per held-out token"), rows.to_dict("records"),
                 RESULTS.with_name(f"quantisation_{options.bits}_bits.png"))  # fmt: skip


if __name__ == "__main__":
    main()
