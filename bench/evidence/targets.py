"""What fastkd set out to reach, and whether the committed rows reach it: C1–C6 on two CPU cores, G1–G15 on one GPU.

A target reads rows and nothing else. A missed one shows its reason from bench/results/<device>/why.json ({"C2": "…"}),
what would reach it included; a target without rows says so.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

from fastkd.bench import plots, report


def one_cache(rows: Sequence[dict]) -> list[dict]:
    """One cache state of each case, the one that is measured by default where there are both: a figure never mixes them."""
    states: dict[tuple, list[str]] = {}
    for row in rows:
        states.setdefault((row["stem"], row["case"]), []).append(row["cache"])
    chosen = {case: min(there, key=lambda cache: cache.startswith("cold")) for case, there in states.items()}
    return [row for row in rows if row["cache"] == chosen[row["stem"], row["case"]]]


class Rows:
    """Look-ups in the rows of a device; None where there is no such row."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = rows
        keys = ("stem", "case", "mode", "launch", "provider")
        self.by_key = {tuple(row[key] for key in keys): row for row in one_cache(rows)}

    def get(self, name: str, column: str, provider: str = "fastkd", mode: str = "both", launch: str = "plain"):
        """`name` is "stem case"."""
        row = self.by_key.get((*name.split(" "), mode, launch, provider))
        return plots.value(row, column) if row else None

    def over(self, name: str, rival: str, mode: str = "both", launch: str = "plain"):
        return self.get(name, "times_ours_median", rival, mode, launch)

    def of_gemms(self, name: str, mode: str = "both"):
        return quotient(self.get(name, "median_ms", mode=mode), self.get(name, "gemms_ms", mode=mode))

    def memory_of_eager(self, name: str):
        return quotient(self.get(name, "peak_extra_mib"), self.get(name, "peak_extra_mib", "eager"))

    def worst(self):
        return min((plots.value(row, "times_ours_median") for row in beside_eager(self.rows)), default=None)


def beside_eager(rows: Sequence[dict]) -> list[dict]:
    """Eager's rows, every mode, launch, cache state and size."""
    return [row for row in rows if row["provider"] == "eager" and plots.value(row, "times_ours_median")]


def listed(gpu: bool) -> set[tuple[str, str]]:
    """(stem, case) of everything that `fastkd bench`, with and without --scale, would measure on such a device."""
    from fastkd.bench.cases import case

    return {(found.stem, found.name) for scale in (False, True) for found in case.select(gpu=gpu, scale=scale)}


def coverage(rows: Sequence[dict]) -> str:
    """What a sentence about all rows speaks of, and what it cannot speak of."""
    modes: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        modes.setdefault((row["stem"], row["case"]), set()).add(row["mode"])
    everything = listed(any(row["cuda"] for row in rows))
    single = sum(len(there) == 1 for there in modes.values())
    return (
        f"{len(beside_eager(rows))} rows measured ({single} of {len(modes)} cases in one mode only); "
        f"{len(everything - set(modes))} of {len(everything)} listed cases have none"
    )


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


@dataclasses.dataclass(frozen=True)
class Target:
    """`reach` is what has to be at least (or with "≤" at most) so much; `stretch` likewise, 0 where there is none."""

    id: str
    claim: str
    measured: Callable
    reach: float
    stretch: float = 0.0
    sign: str = "≥"
    unit: str = "×"

    def met(self, value: float, limit: float | None = None) -> bool:
        limit = self.reach if limit is None else limit
        return value >= limit if self.sign == "≥" else value <= limit


LINEAR16, LINEAR32 = (f"linear_divergence forward_kl-1024x32000x768x1024-{d}" for d in ("bfloat16", "float32"))
FCD16, FCD32 = (f"gram fcd-32x128x384x768-{d}" for d in ("bfloat16", "float32"))
LAYERS = "layer_cost hidden-6x12x32x128x768-float32"
QUEUE32, QUEUE16 = (f"contrast info_nce-32x65536x128-{d}" for d in ("float32", "bfloat16"))
GATHER = "contrast nce-32x4096x128x262144-float32"
BATCH = "transport exact-384x12x24-float64"

CPU = (
    Target("C1", "linear KL bf16, loss and gradients, over eager", lambda r: r.over(LINEAR16, "eager"), 3.0, 4.0),
    Target("C1", "… over torch.compile", lambda r: r.over(LINEAR16, "compile"), 1.7, 2.2),
    Target("C1", "… of its four bare GEMMs", lambda r: r.of_gemms(LINEAR16), 1.25, 0, "≤"),
    Target("C1b", "linear KL fp32 over eager", lambda r: r.over(LINEAR32, "eager"), 1.8),
    Target("C1b", "… over torch.compile", lambda r: r.over(LINEAR32, "compile"), 1.2, 1.25),
    Target("C1b", "… of its four bare GEMMs", lambda r: r.of_gemms(LINEAR32), 1.15, 1.1, "≤"),
    Target("C1c", "linear KL bf16: peak extra memory of eager's", lambda r: r.memory_of_eager(LINEAR16), 0.2, 0.05, "≤"),
    Target("C2", "FCD bf16 over eager", lambda r: r.over(FCD16, "eager"), 7.0),
    Target("C2", "… over torch.compile", lambda r: r.over(FCD16, "compile"), 3.5),
    Target("C2b", "FCD fp32 over eager", lambda r: r.over(FCD32, "eager"), 3.2),
    Target("C2b", "… over torch.compile", lambda r: r.over(FCD32, "compile"), 2.2),
    Target("C2b", "… of its six bare GEMMs", lambda r: r.of_gemms(FCD32), 1.0, 0, "≤"),
    Target("C3", "layer costs and backward over the authors' loop", lambda r: r.over(LAYERS, "authors"), 10.0, 25.0),
    Target("C3", "… over torch.compile", lambda r: r.over(LAYERS, "compile"), 2.2),
    Target("C3", "layer costs alone, of one read of the layers",
           lambda r: quotient(r.get(LAYERS, "median_ms", mode="forward"), r.get(LAYERS, "floor_ms", mode="forward")),
           1.25, 0, "≤"),
    Target("C3", "costs and backward, of one read of the layers",
           lambda r: quotient(r.get(LAYERS, "median_ms"), r.get(LAYERS, "floor_ms", mode="forward")), 2.75, 0, "≤"),
    Target("C3b", "384 exact plans 12×24 over a loop of ot.emd", lambda r: r.over(BATCH, "authors", "forward"), 10.0),
    Target("C4", "queue InfoNCE fp32 over eager", lambda r: r.over(QUEUE32, "eager"), 4.0),
    Target("C4", "… of its bare GEMMs", lambda r: r.of_gemms(QUEUE32), 0.75, 0, "≤"),
    Target("C4", "queue in bf16 over eager on one in fp32 (two cases)",
           lambda r: quotient(r.get(QUEUE32, "median_ms", "eager"), r.get(QUEUE16, "median_ms")), 10.0),
    Target("C5", "CoDIR's gather over the authors' way", lambda r: r.over(GATHER, "authors"), 10.0),
    Target("C5", "… share of its floor", lambda r: r.get(GATHER, "floor_share"), 0.65, unit="%"),
    Target("C6", "the worst over eager", Rows.worst, 0.95),
)  # fmt: skip

HEADS = "linear_divergence forward_kl-8192x128256x4096x4096-bfloat16"
LIGERS = "linear_divergence forward_kl-8192x128256x2048x4096-bfloat16"
ROWS32, ROWS128 = (f"divergence forward_kl-8192x{v}-bfloat16" for v in (32000, 128256))
RELATIONS = "relation self-64x16x512x64x3-bfloat16"
TOKENS, SMALL = "gram token-64x512x1024x1024-bfloat16", "gram fcd-32x128x768x768-bfloat16"
LAYERS16 = "layer_cost hidden-6x12x32x128x768-bfloat16"
PLANS = "transport exact-1024x12x24-float64"
QUEUE, WIDE = (f"contrast info_nce-{b}x65536x768-bfloat16" for b in (32, 256))
IN_BATCH = "contrast in_batch-32768x768-bfloat16"
STEP = "layer_cost emd_step-6x12x32x128x768-float32"
ANISOTROPIC = "gram fcd_anisotropic-16x128x768x768-bfloat16"
NEAR = "linear_divergence near_convergence-256x8192x256x256-bfloat16"
SUBSET = "linear_divergence subset-512x16384x512x512-bfloat16"
GRADIENTS_MIB = (8192 + 128256) * 4096 * 2 / 2**20  # of HEADS: nobody can do without them


def beyond_gradients(rows: Rows) -> float | None:
    peak = rows.get(HEADS, "peak_extra_mib")
    return None if peak is None else (peak - GRADIENTS_MIB) / 1024


def error_of_eager(name: str) -> Callable:
    return lambda rows: quotient(rows.get(name, "gradient_error"), rows.get(name, "eager_gradient_error"))


GPU = (
    Target("G1", "linear KL, two heads, of its four bare GEMMs", lambda r: r.of_gemms(HEADS), 1.25, 1.1, "≤"),
    Target("G1b", "… over eager", lambda r: r.over(HEADS, "eager"), 3.0, 4.0),
    Target("G1b", "… over torch.compile", lambda r: r.over(HEADS, "compile"), 2.0, 2.5),
    Target("G1b", "… over Liger-Kernel", lambda r: r.over(HEADS, "liger"), 1.5, 2.0),
    Target("G1c", "… over fp32 chunks under checkpointing", lambda r: r.over(HEADS, "trl-style"), 5.0, 10.0),
    Target("G1d", "student width 2048, of its four bare GEMMs", lambda r: r.of_gemms(LIGERS), 1.35, 1.15, "≤"),
    Target("G2", "GiB beyond the gradients, speed mode", beyond_gradients, 4.5, 2.5, "≤", " GiB"),
    Target("G2b", "FCD on anisotropic bf16 states: gradient error of eager's", error_of_eager(ANISOTROPIC), 0.02, 0.001, "≤"),
    Target("G3", "linear KL near convergence: gradient error of eager's", error_of_eager(NEAR), 0.1, 0.01, "≤"),
    Target("G4", "loss only, of its two bare GEMMs", lambda r: r.of_gemms(HEADS, "loss_only"), 1.3, 1.1, "≤"),
    Target("G5", "half the vocabulary, of the same with full logits",
           lambda r: quotient(1.0, r.over(SUBSET, "full logits")), 0.82, 0.75, "≤"),
    Target("G6", "KL of logits, V = 32 000: share of copy", lambda r: r.get(ROWS32, "floor_share"), 0.7, 0.85, unit="%"),
    Target("G6", "KL of logits, V = 128 256: share of copy", lambda r: r.get(ROWS128, "floor_share"), 0.5, 0.75, unit="%"),
    Target("G6b", "… over torch.compile", lambda r: r.over(ROWS128, "compile"), 2.0, 4.0),
    Target("G6b", "… over Liger-Kernel", lambda r: r.over(ROWS128, "liger"), 2.0, 4.0),
    Target("G7", "MiniLMv2 relations over eager", lambda r: r.over(RELATIONS, "eager"), 8.0, 20.0),
    Target("G7", "… over torch.compile", lambda r: r.over(RELATIONS, "compile"), 4.0, 8.0),
    Target("G7", "… peak extra memory of eager's", lambda r: r.memory_of_eager(RELATIONS), 0.05, 0, "≤"),
    Target("G8", "FCD tokens 64×512×1024: share of floor", lambda r: r.get(TOKENS, "floor_share"), 0.5, 0.71, unit="%"),
    Target("G8b", "… over eager", lambda r: r.over(TOKENS, "eager"), 4.0, 6.0),
    Target("G8b", "… over torch.compile", lambda r: r.over(TOKENS, "compile"), 2.0, 3.0),
    Target("G9", "FCD 32×128×768: launches", lambda r: r.get(SMALL, "launches"), 4, 2, "≤", ""),
    Target("G9", "… over eager", lambda r: r.over(SMALL, "eager"), 6.0, 12.0),
    Target("G9", "… over eager, both in a CUDA graph", lambda r: r.over(SMALL, "eager", launch="graph"), 2.5, 4.0),
    Target("G10", "costs, transport and backward over the authors' step", lambda r: r.over(STEP, "authors"), 15.0, 40.0),
    Target("G10b", "layer costs, share of copy",
           lambda r: r.get(LAYERS16, "floor_share", mode="forward"), 0.65, 0.85, unit="%"),
    Target("G10b", "their backward, share of copy",
           lambda r: r.get(LAYERS16, "floor_share", mode="backward"), 0.65, 0.85, unit="%"),
    Target("G11", "1024 exact plans 12×24 over a loop of ot.emd", lambda r: r.over(PLANS, "authors", "forward"), 3.0, 10.0),
    Target("G12", "queue InfoNCE, B = 32, D = 768: share of floor", lambda r: r.get(QUEUE, "floor_share"), 0.65, 0.85, unit="%"),
    Target("G12", "queue InfoNCE, B = 256, D = 768: share of floor", lambda r: r.get(WIDE, "floor_share"), 0.5, 0.71, unit="%"),
    Target("G12b", "… B = 32 over eager", lambda r: r.over(QUEUE, "eager"), 2.5, 4.0),
    Target("G12b", "… B = 32 over torch.compile", lambda r: r.over(QUEUE, "compile"), 1.8, 3.0),
    Target("G13", "in-batch contrast 32768² over Inf-CL's way", lambda r: r.over(IN_BATCH, "inf-cl-style"), 3.0, 5.0),
    Target("G13", "… over cut-cross-entropy", lambda r: r.over(IN_BATCH, "cut-cross-entropy"), 1.0, 1.3),
    Target("G14", "CoDIR's gather over the authors' way", lambda r: r.over(GATHER, "authors"), 8.0, 15.0),
    Target("G15", "the worst over eager", Rows.worst, 0.95),
)  # fmt: skip


def reasons(folder: pathlib.Path) -> dict[str, str]:
    path = folder / "why.json"
    return json.loads(path.read_text()) if path.exists() else {}


def shown(target: Target, value: float) -> str:
    return f"{value:.0%}" if target.unit == "%" else f"{report.number(value)}{target.unit}"


def line(target: Target, rows: Rows, why: dict[str, str]) -> str:
    value = target.measured(rows)
    asked = f"{target.sign} {shown(target, target.reach)}"
    more = f"{target.sign} {shown(target, target.stretch)}" if target.stretch else "–"
    if value is None:
        verdict, found = "not measured", "–"
    else:
        found = shown(target, value)
        verdict = "met" if target.met(value) else f"missed: {why.get(target.id, 'no reason given yet')}"
        verdict = "met, stretch too" if target.stretch and target.met(value, target.stretch) else verdict
    claim = target.claim + (f", of {coverage(rows.rows)}" if target.measured is Rows.worst else "")
    return f"| {target.id} | {claim} | {found} | {asked} | {more} | {verdict} |"


def table(rows: Sequence[dict], folder: pathlib.Path) -> list[str]:
    """The targets of this kind of device; nothing where none of them was measured."""
    kind = GPU if any(row["cuda"] for row in rows) else CPU
    found = Rows(rows)
    if all(target.measured(found) is None for target in kind):
        return []
    head = ["| | what | measured | asked | stretch | |", "|---|---|---|---|---|---|"]
    return head + [line(target, found, reasons(folder)) for target in kind]
