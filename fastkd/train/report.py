"""The report of a run: pictures, the numbers as JSON, and one HTML page that carries everything inside."""

import base64
import html
import importlib.metadata
import json
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from fastkd import atomic_write

from . import metrics, plots
from .batch import WORD_TASKS
from .callbacks import latency
from .states import forget_attention
from .trainer import arguments_of

STYLE = """
:root { --ink:#1f2933; --soft:#616e7c; --line:#e4e7eb; --warm:#e8743b; --deep:#334e68 }
* { box-sizing:border-box } body { margin:0; background:#f5f7fa; color:var(--ink); font:16px/1.55 system-ui,sans-serif }
main { max-width:1080px; margin:0 auto; padding:48px 24px 80px }
h1 { font-size:30px; margin:0 0 4px; letter-spacing:-.01em } h2 { font-size:19px; margin:0 0 12px }
p.lead { color:var(--soft); margin:0 0 28px } section { background:#fff; border:1px solid var(--line); border-radius:10px;
padding:24px 26px; margin:0 0 22px } img { width:100%; display:block }
p.note { color:var(--soft); font-size:14px; margin:10px 0 0 }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(180px,1fr)); gap:14px; margin:0 0 22px }
.card { background:#fff; border:1px solid var(--line); border-radius:10px; padding:18px 20px }
.card b { display:block; font-size:27px; letter-spacing:-.02em } .card span { color:var(--soft); font-size:14px }
.card.warm b { color:var(--warm) } table { border-collapse:collapse; width:100%; font-size:15px }
th { text-align:left; color:var(--soft); font-weight:500 }
th,td { padding:7px 10px 7px 0; border-bottom:1px solid var(--line) }
td.n,th.n { text-align:right; font-variant-numeric:tabular-nums }
pre { background:#f5f7fa; border-radius:8px; padding:14px 16px;
overflow:auto; font-size:13px; margin:0 } details summary { cursor:pointer; color:var(--deep); margin-bottom:10px }
"""


def measure(models: dict, trainer, data=None, batch_size: int = 16, test=None) -> list[dict]:
    """For each model: the metric on `data` (None: the trainer's own, or else `test`), its size, its latency on the first
    rows, and under "test" the metric on `test`."""
    data = next((x for x in (data, trainer.eval_dataset, test) if x is not None), None)
    if data is None:
        return []
    columns = [
        c
        for c in data.column_names
        if c in ("input_ids", "position_ids", "attention_mask", "labels", "token_type_ids", "example_id", "blank")
    ]
    sample = trainer.data_collator(
        [{c: row[c] for c in columns} for row in data.select(range(min(batch_size, len(data))))]
    )
    found = {}
    for name, model in models.items():
        forget_attention(model)
        found[name] = evaluated(model.to(trainer.args.device), trainer, data)
    metric = next(m for m in metrics.SHOWN if all(m in measured for measured in found.values()))
    rows, latencies = [], {}  # one latency per architecture: two models of one differ by noise only
    for name, network in models.items():
        accepted = arguments_of(network)
        inputs = {k: v.to(trainer.args.device) for k, v in sample.items() if k in accepted and k != "labels"}
        measured = found[name]
        parameters = sum(p.numel() for p in network.parameters())
        architecture = (type(network), parameters)
        if architecture not in latencies:
            latencies[architecture] = latency(network, inputs)
        bytes_ = sum(p.numel() * p.element_size() for p in network.parameters())
        rows.append({
            "name": name, "metric_name": metric, "metric": measured[metric], "parameters": parameters, "bytes": bytes_,
            "latency": latencies[architecture], "all": {k: v for k, v in measured.items() if isinstance(v, float)},
        })  # fmt: skip
        if test is not None:
            rows[-1]["test"] = (measured if data is test else evaluated(network, trainer, test))[metric]
    return rows


def evaluated(model, trainer, data) -> dict[str, float]:
    """`trainer`'s metrics of this model, or its perplexity where there are none."""
    measured = {k.removeprefix("eval_"): v for k, v in trainer.evaluate_other(model, data).items()}
    if trainer.task in WORD_TASKS:
        measured["perplexity"] = float(torch.tensor(measured["loss"]).exp())
    return measured


def table(rows: list[dict]) -> list[list[str]]:
    """A heading and a line per row of `measure`; a metric may be a pair, the mean and the standard deviation over seeds."""
    metric = metric_of(rows)
    tested = "test" in rows[0]

    def shown(value) -> str:
        form = "{:.2%}" if metric in metrics.SHARES else "{:.4f}"
        parts = value if isinstance(value, tuple) else (value,)
        return " ± ".join(map(form.format, parts)).replace("% ±", " ±")

    lines = [["model", metric, *([f"test {metric}"] if tested else []), "parameters", "weights", "latency per example"]]
    for row in rows:
        values = [row["metric"], *([row["test"]] if tested else [])]
        sizes = f"{row['parameters']:,}", f"{row['bytes'] / 1e6:.1f} MB", f"{row['latency']:.2f} ms"
        lines.append([row["name"], *map(shown, values), *sizes])
    return lines


def print_table(rows: list[dict]) -> None:
    if not rows:
        return
    (name, *others), *lines = table(rows)
    shown = Table(name, *(Column(other, justify="right") for other in others))
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)


def write(
    folder,
    *,
    title: str,
    rows: list[dict],
    histories: dict,
    maps: list[dict],
    config: dict,
    lead: str = "",
    where: str = "validation",
    models: dict | None = None,
    tokenizer=None,
) -> Path:
    """The page's path; `folder` is new or empty, and the report is there whole or not at all. histories: name -> Trainer's
    log_history; the last one's terms are drawn. models: name -> model, saved beside the page with the tokenizer."""
    with atomic_write.filling(Path(folder), "report") as scratch:
        for name, model in (models or {}).items():
            model.save_pretrained(scratch / name)
            tokenizer.save_pretrained(scratch / name)
        pictures = draw(scratch, rows, histories, maps, where)
        record = {
            "title": title, "models": rows, "histories": histories, "transport": maps, "config": config,
            "versions": versions(),
        }  # fmt: skip
        (scratch / "report.json").write_text(json.dumps(record, indent=1, default=str))
        (scratch / "index.html").write_text(_page(title, lead, rows, pictures, config))
    return Path(folder) / "index.html"


def draw(folder: Path, rows: list[dict], histories: dict, maps: list[dict], where: str) -> list[tuple[str, Path, str]]:
    """(heading, picture, note) of everything that there is something to draw of."""
    metric = metric_of(rows)
    last = list(histories.values())[-1]
    pictures = []
    if rows:
        pictures.append(("Quality, size, speed", plots.comparison(rows, metric, where, folder / "comparison.png"), ""))
        pictures.append(("What it costs", plots.tradeoff(rows, metric, folder / "tradeoff.png"), ""))
        known = where == "validation" and "teacher" not in histories
        teacher = next((row["metric"] for row in rows if known and row["name"] == "teacher"), None)
        pictures.append(("While training", plots.progress(histories, metric, teacher, folder / "progress.png"), ""))
    note = "Light: as logged. Orange: smoothed. The factor after each name is its weight in the loss."
    pictures.append(("Terms of the loss", plots.terms(last, folder / "terms.png"), note))
    note = (
        "Each cell is the share of mass that a student layer receives from a teacher layer in the optimal transport of "
        "each step, averaged over the steps since the log before; a row's sum is its layer's weight, drawn on the right."
    )
    pictures.append(
        ("Which teacher layer teaches which student layer", plots.transport(maps, folder / "transport.png"), note)
    )
    return [picture for picture in pictures if picture[1] is not None]


def paired_gain(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Points of accuracy that `after` is above `before`, and half of the 95 % interval; both say which of the same rows are
    classified correctly."""
    change = 100 * (after.double() - before.double())  # [N]
    return float(change.mean()), float(1.96 * change.std() / len(change) ** 0.5)


def verdict(gain: tuple[float, float], rows: int) -> str:
    """What a gain means, in one sentence."""
    points, half = gain
    text = f"Distilled against alone: {points:+.1f} points ± {half:.1f} (95 %, paired over {rows:,} test rows)"
    if abs(points) <= half:
        return f"{text}: within the noise of this test set, so no difference is shown."
    return f"{text}: {'a gain' if points > 0 else 'a loss'} beyond the noise of this test set, for one seed."


def metric_of(rows: list[dict]) -> str:
    return rows[0]["metric_name"] if rows else "accuracy"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in ("torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy"):
        found[package] = importlib.metadata.version(package)
    import fastkd

    return {"fastkd": fastkd.__version__, **found, "threads": str(torch.get_num_threads())}


def _page(title: str, lead: str, rows: list[dict], pictures: list, config: dict) -> str:
    metric = metric_of(rows)
    sections = "".join(
        f"<section><h2>{html.escape(head)}</h2><img alt='{html.escape(head)}' src='{_inline(path)}'>"
        + (f"<p class=note>{html.escape(note)}</p>" if note else "") + "</section>"
        for head, path, note in pictures
    )  # fmt: skip
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><main><h1>{html.escape(title)}</h1>"
        f"<p class=lead>{html.escape(lead or 'A distillation with fastkd.')}</p>"
        f"{_cards(rows, metric)}{_table(rows)}"
        f"{sections}<section><h2>Configuration and versions</h2><details><summary>Options that differ from the defaults"
        f"</summary><pre>{html.escape(json.dumps(config, indent=2, default=str))}</pre></details>"
        f"<pre>{html.escape('  '.join(f'{k} {v}' for k, v in versions().items()))}</pre></section></main></html>"
    )


def _cards(rows: list[dict], metric: str) -> str:
    if len(rows) < 2:
        return ""
    teacher, student = rows[0], rows[-1]
    form = "{:.1%}" if metric in metrics.SHARES else "{:.3f}"
    cards = [
        ("warm", form.format(student["metric"]), f"{metric}; the teacher's is {form.format(teacher['metric'])}"),
        (
            "",
            f"{teacher['parameters'] / student['parameters']:.2f}× smaller",
            f"{student['parameters'] / 1e6:.1f} M parameters",
        ),
        ("", f"{teacher['latency'] / student['latency']:.2f}× faster", f"{student['latency']:.2f} ms per example"),
    ]
    if "gain" in student:
        points, half = student["gain"]
        clear = abs(points) > half
        note = "" if clear else ": within noise"
        cards.append(
            ("warm" if clear else "", f"{points:+.1f} ± {half:.1f}", f"points against {rows[1]['name']}{note}")
        )
    return (
        "<div class=cards>"
        + "".join(f"<div class='card {k}'><b>{b}</b><span>{s}</span></div>" for k, b, s in cards)
        + "</div>"
    )


def _table(rows: list[dict]) -> str:
    if not rows:
        return ""
    head, *lines = table(rows)
    cells = "".join("<tr><td>" + "<td class=n>".join(map(html.escape, line)) for line in lines)
    return f"<section><table><tr><th>{'<th class=n>'.join(head)}{cells}</table></section>"


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
