"""The report of a run: pictures, the numbers as JSON, and one HTML page that carries everything inside."""

import base64
import html
import importlib.metadata
import json
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from sklearn.metrics import confusion_matrix

from fastkd import atomic_write

from . import metrics, plots
from .batch import LANGUAGE_TASKS
from .callbacks import latency
from .states import forget_attention
from .trainer import arguments_of

MOST_CLASSES = 20  # of a confusion table
STYLE = """
:root { --ink:#1f2933; --soft:#616e7c; --line:#e4e7eb; --warm:#e8743b; --deep:#334e68 }
* { box-sizing:border-box } body { margin:0; background:#f5f7fa; color:var(--ink); font:16px/1.55 system-ui,sans-serif }
main { max-width:1080px; margin:0 auto; padding:48px 24px 80px }
h1 { font-size:30px; margin:0 0 4px; letter-spacing:-.01em } h2 { font-size:19px; margin:0 0 12px }
p.lead { color:var(--soft); margin:0 0 28px } section { background:#fff; border:1px solid var(--line); border-radius:10px;
padding:24px 26px; margin:0 0 22px } .wide { overflow-x:auto } .wide img { width:100%; min-width:720px; display:block }
p.note { color:var(--soft); font-size:14px; margin:10px 0 0 }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(180px,1fr)); gap:14px; margin:0 0 22px }
.card { background:#fff; border:1px solid var(--line); border-radius:10px; padding:18px 20px }
.card b { display:block; font-size:27px; letter-spacing:-.02em } .card span { color:var(--soft); font-size:14px }
.card.warm b { color:var(--warm) } table { border-collapse:collapse; width:100%; font-size:15px }
th { text-align:left; color:var(--soft); font-weight:500 }
th,td { padding:7px 10px 7px 0; border-bottom:1px solid var(--line) }
td.n,th.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap; padding-left:10px }
td.right { font-weight:600; background:#f5f7fa }
@media (max-width:600px) { main { padding:24px 12px 40px } section { padding:16px 14px } }
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
        if "confusion" in measured:
            rows[-1]["confusion"] = measured["confusion"]
        if test is not None:
            rows[-1]["test"] = (measured if data is test else evaluated(network, trainer, test))[metric]
    return rows


def evaluated(model, trainer, data) -> dict:
    """`trainer`'s metrics of this model, or its perplexity where there are none. Of few classes also "confusion": their
    names, and for each label how often each class was predicted."""
    metrics, seen = trainer.compute_metrics, []
    if metrics is not None:
        trainer.compute_metrics = lambda outcome: seen.append(outcome) or metrics(outcome)
    try:
        measured = {k.removeprefix("eval_"): v for k, v in trainer.evaluate_other(model, data).items()}
    finally:
        trainer.compute_metrics = metrics
    names = trainer.model.config.id2label  # the student's order, which the teacher's predictions are in, too
    if seen and trainer.task == "classification" and len(names) <= MOST_CLASSES:
        counts = confusion_matrix(seen[0].label_ids, seen[0].predictions.argmax(-1), labels=sorted(names))
        measured["confusion"] = [str(names[i]) for i in sorted(names)], counts.tolist()
    if trainer.task in LANGUAGE_TASKS:
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
        shown.add_row(*map(escape, line))
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
) -> Path:
    """The page's path; `folder` is new or empty, and the report is there whole or not at all. histories: name -> Trainer's
    log_history; the last one's terms are drawn. models: name -> (model, tokenizer), saved beside the page."""
    with atomic_write.filling(Path(folder), "report") as scratch:
        for name, parts in (models or {}).items():
            for part in parts:
                part.save_pretrained(scratch / name)
        pictures = draw(scratch, rows, histories, maps, where)
        record = {
            "title": title, "models": rows, "histories": histories, "transport": maps, "config": config,
            "versions": versions(),
        }  # fmt: skip
        (scratch / "report.json").write_text(json.dumps(record, indent=1, default=str))
        (scratch / "index.html").write_text(_page(title, lead, rows, pictures, config))
    return Path(folder) / "index.html"


def draw(
    folder: Path, rows: list[dict], histories: dict, maps: list[dict], where: str
) -> list[tuple[str, Path, str, str]]:
    """(heading, picture, what it shows in words, note) of everything that there is something to draw of."""
    metric = metric_of(rows)
    last = list(histories.values())[-1]
    pictures = []
    if rows:
        comparison = plots.comparison(rows, metric, where, folder / "comparison.png")
        shows = f"Bars of the {metric}, the parameters and the latency of each model: the numbers of the table above."
        pictures.append(("Quality, size, speed", comparison, shows, ""))
        shows = f"The {metric} of each model against its parameters, and against its latency."
        pictures.append(("What it costs", plots.tradeoff(rows, metric, folder / "tradeoff.png"), shows, ""))
        known = where == "validation" and "teacher" not in histories
        teacher = next((row["metric"] for row in rows if known and row["name"] == "teacher"), None)
        progress = plots.progress(histories, metric, teacher, folder / "progress.png")
        ends = (f"{name} {_ends(history, f'eval_{metric}')}" for name, history in histories.items())
        shows = f"The {metric} at each evaluation, from the first to the last: {', '.join(ends)}."
        pictures.append(("While training", progress, shows, ""))
    note = "Light: as logged. Orange: smoothed. The factor after each name is its weight in the loss."
    names = sorted({key for entry in last for key in entry if key.startswith("term/")})
    shows = (
        "From the first step that was logged to the last: "
        + ", ".join(f"{x[5:]} {_ends(last, x)}" for x in names)
        + "."
    )
    pictures.append(("Terms of the loss", plots.terms(last, folder / "terms.png"), shows, note))
    note = (
        "Each cell is the share of mass that a student layer receives from a teacher layer in the optimal transport of "
        "each step, averaged over the steps since the log before; a row's sum is its layer's weight, drawn on the right."
    )
    transport = plots.transport(maps, folder / "transport.png")
    shows = (
        "Student layers against teacher layers at the start, in the middle and at the end; report.json has the numbers."
    )
    pictures.append(("Which teacher layer teaches which student layer", transport, shows, note))
    return [picture for picture in pictures if picture[1] is not None]


def _ends(history: list[dict], key: str) -> str:
    values = [entry[key] for entry in history if key in entry]
    return f"{values[0]:.4g} to {values[-1]:.4g}" if values else "never"


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
        f"<section><h2>{html.escape(head)}</h2><div class=wide><img alt='{html.escape(shows)}' src='{_inline(path)}'></div>"
        + (f"<p class=note>{html.escape(note)}</p>" if note else "") + "</section>"
        for head, path, shows, note in pictures
    )  # fmt: skip
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><main><h1>{html.escape(title)}</h1>"
        f"<p class=lead>{html.escape(lead or 'A distillation with fastkd.')}</p>"
        f"{_cards(rows, metric)}{_table(rows)}{_confusion(rows)}"
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
        + "".join(
            f"<div class='card {k}'><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>" for k, b, s in cards
        )
        + "</div>"
    )


def _table(rows: list[dict]) -> str:
    if not rows:
        return ""
    head, *lines = ([html.escape(cell) for cell in line] for line in table(rows))
    cells = "".join("<tr><td>" + "<td class=n>".join(line) for line in lines)
    return f"<section><div class=wide><table><tr><th>{'<th class=n>'.join(head)}{cells}</table></div></section>"


def _confusion(rows: list[dict]) -> str:
    """The last model's classes: a row per label, a column per prediction."""
    names, counts = rows[-1].get("confusion", (None, None)) if rows else (None, None)
    if not names:
        return ""
    head = "".join(f"<th class=n>{html.escape(name)}" for name in names)
    cells = "".join(
        f"<tr><td>{html.escape(name)}" + "".join(f"<td class='{'n right' if i == j else 'n'}'>{n:,}" for j, n in enumerate(line))
        for i, (name, line) in enumerate(zip(names, counts, strict=True))
    )  # fmt: skip
    return (
        f"<section><h2>What the {html.escape(rows[-1]['name'])} takes for what</h2><div class=wide><table>"
        f"<tr><th>label \\ prediction{head}{cells}</table></div></section>"
    )


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
