"""What is kept of a run for its report, and what a person sees while it runs."""

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from .trainer import DistillTrainer


class Watch(TrainerCallback, ExportableState):
    """For methods that transport: the flows and the layers' weights that they used, each the mean over the steps since
    the log before. A single step would mislead: weights by inverse cost can swing from one step to the next.
    `.maps` is a list of {"step", "flows": {kind: [N][M]}, "weights": {kind: [N]}}; a row of a flow sums to its weight. They
    are saved in checkpoints."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer, self.maps = trainer, []
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"maps": self.maps}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault("Watch", self.state())
        self.maps = list(saved["attributes"]["maps"])

    def on_step_end(self, args, state, control, **kwargs):
        methods = {} if self.trainer.method is None else self.trainer.method.methods
        for method in methods.values():
            for kind, flow in getattr(getattr(method, "loss", None), "flows", {}).items():
                self._sums[kind] = self._sums.get(kind, 0) + flow.float()  # on the device; looked at when Trainer logs
        self._steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not self._sums:
            return
        flows = {kind: (total / self._steps).cpu() for kind, total in self._sums.items()}
        weights = {kind: flow.sum(1).tolist() for kind, flow in flows.items()}
        flows = {kind: flow.tolist() for kind, flow in flows.items()}
        self.maps.append({"step": state.global_step, "flows": flows, "weights": weights})
        self._sums, self._steps = {}, 0


class AtEachCheckpoint(TrainerCallback):
    """Calls a function when a checkpoint has been written."""

    def __init__(self, call):
        self.call = call

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.call()


class RichProgress(TrainerCallback):
    """A bar with the time left; at the end, one table of the terms: first value, last value, weight."""

    def __init__(self, title: str, console: Console | None = None):
        self.title, self.console = title, console or Console()
        self.bar, self.job = None, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=self.console, refresh_per_second=2)
        self.job = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.job, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        shown = {"loss": logs.get("loss"), "accuracy": logs.get("eval_accuracy")}
        note = "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
        if note:
            self.bar.update(self.job, note=note)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is None:
            return
        self.bar.stop()
        self.bar = None
        logs = [entry for entry in state.log_history if any(key.startswith("term/") for key in entry)]
        if logs:
            self.console.print(table_of_terms(logs))


def show_progress(trainer, title: str) -> RichProgress:
    """RichProgress in place of Trainer's own bar and of the dictionaries that it prints without one."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    progress = RichProgress(title)
    trainer.add_callback(progress)
    return progress


def table_of_terms(logs: list[dict]) -> Table:
    table = Table("term", "first", "last", "weight", title="Terms of the loss", title_justify="left")
    names = sorted({key[5:] for entry in logs for key in entry if key.startswith("term/")})
    for name in names:
        values = [entry[f"term/{name}"] for entry in logs if f"term/{name}" in entry]
        weights = [entry[f"weight/{name}"] for entry in logs if f"weight/{name}" in entry]
        table.add_row(name, f"{values[0]:.4f}", f"{values[-1]:.4f}", f"{weights[-1]:g}")
    return table


@torch.no_grad()
def latency(model, batch: dict, repeats: int = 7) -> float:
    """Milliseconds per example of a forward over `batch`; the median of some runs, after one to warm up."""
    import statistics
    import time

    model = model.eval()
    on_gpu = next(model.parameters()).device.type == "cuda"
    times = []
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(**batch)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:]) / len(batch["input_ids"])
