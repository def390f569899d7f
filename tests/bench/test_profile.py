"""`fastkd profile`: every part of a step is where it belongs, and the parts add up."""

import contextlib
import re
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

import fastkd
import tiny  # noqa: F401  first: it tells transformers to stay offline
from cases import randn

pytest.importorskip("transformers")

from fastkd.profile import implementations, loops, models, plots, results, session, timeline
from fastkd.profile.timeline import Step, Timeline
from fastkd.train.methods import METHODS

CPU = torch.device("cpu")

TINY = {
    "bert": "bert-base:num_hidden_layers=4,hidden_size=48,num_attention_heads=4,intermediate_size=64,vocab_size=120",
    "gpt2": "gpt2:n_layer=4,n_embd=48,n_head=4,vocab_size=120",
}


LOOPS = ("kd", "fcd", "glmd", "distilbert", "forward_kl", "reverse_kl", "jsd", "skew_kl")


def steps_of(*args, **changes) -> list[Step]:
    return run_of(*args, **changes)[0]


def run_of(method: str, family: str = "bert", plan=None, **changes):
    config = models.config_of(TINY[family])
    task = models.task_for(method, models.is_causal(config))
    teacher, student = models.pair(TINY[family], True, "every:2", task)
    data = models.tokens(teacher.config, task, 4, 12)
    plan = plan or session.Plan(warm=0, timed=1, memory=1, trace=0)
    options = {"batch": 4, "device": CPU, **changes}
    return session.run(teacher, student, models.first_stage(method), task, data, plan, **options)


def test_time_belongs_to_the_innermost_phase(monkeypatch):
    now = 0.0
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: now)
    line = Timeline(CPU)

    def spend(seconds):
        nonlocal now
        now += seconds

    with line.phase("before"):  # outside of a step: ignored
        spend(64)
    line.end()
    line.begin_step("fastkd", "time")
    spend(1)
    with line.phase("outer"):
        spend(2)
        with line.phase("inner"):
            spend(4)
        spend(8)
        line.switch("inner", "never")  # not the phase of the moment
        line.switch("outer", "tail")
        spend(16)
        line.switch("outer", "tail")  # a second time changes nothing
    spend(32)
    line.end()
    (step,) = line.steps
    assert step.seconds == {"trainer": 33, "outer": 10, "inner": 4, "tail": 16} and step.wall == 63


def test_ranges_follow_a_switch(monkeypatch):
    """In torch.profiler and in Nsight: what the switch begins is a range of its own, and each closes in its turn."""
    said: dict[str, list[str]] = {"profiler": [], "nvtx": []}

    @contextlib.contextmanager
    def spoken(where, name):
        said[where].append(f"({name}")
        yield
        said[where].append(f"{name})")

    monkeypatch.setattr(torch.profiler, "record_function", lambda name: spoken("profiler", name))
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: spoken("nvtx", name))
    line = Timeline(CPU)
    line.nvtx = True
    for mode in ("time", "trace"):
        line.begin_step("fastkd", mode)
        with line.phase("loss backward"), line.phase("inner"):
            line.switch("loss backward", "too early")
        with line.phase("loss backward"):
            line.switch("loss backward", "student backward")
            line.switch("loss backward", "student backward")
    line.end()
    assert said["profiler"] == said["nvtx"] == [
        "(loss backward", "(inner", "inner)", "loss backward)", "(loss backward", "loss backward)", "(student backward",
        "student backward)"]  # fmt: skip


SENSIBLE = [(name, family) for name in METHODS for family in TINY if name in models.sensible_methods(family == "gpt2")]
SMALL = {"minilmv2": "minilmv2:relation_heads=4", "codir": "codir:nce_k=8"}


@pytest.mark.parametrize(("name", "family"), SENSIBLE)
def test_every_method_is_profiled(name, family):
    """In every provider that there is, and everything a step consists of has its phase."""
    steps = steps_of(SMALL.get(name, name), family)
    there = {
        "fastkd": True,
        "logits": models.task_for(name, family == "gpt2") != "classification",
        "loop": name in LOOPS,
        "authors": True,
    }
    providers = [provider for provider in implementations.DEFAULT if there[provider]]
    assert [(s.provider, s.mode) for s in steps] == [
        (provider, mode) for mode in ("time", "memory") for provider in providers
    ]
    for step in steps:
        wanted = {"data", "teacher forward", "student forward", "loss backward", "student backward", "optimizer"}
        assert wanted <= set(step.seconds), step
        assert any(phase.startswith("loss: ") and phase != "loss: other" for phase in step.seconds)
        assert all(seconds >= 0 for seconds in step.seconds.values())


@pytest.mark.parametrize(("name", "family", "task"), [
    *((name, "gpt2", "causal_lm") for name in ("forward_kl:temperature=2", "reverse_kl", "skew_kl", "jsd:beta=0.3", "kd",
                                               "fcd", "glmd", "distilbert")),
    *((name, "bert", "masked_lm") for name in ("kd:weight=2", "glmd", "distilbert")),
    *((name, "bert", "classification") for name in ("kd", "fcd")),
])  # fmt: skip
def test_every_way_computes_the_same(name, family, task, monkeypatch):
    """Loss and gradient, of the same batch with the same dropout; other packages' too, where they are installed."""
    compute, refused, compared = session.ProfiledTrainer.compute_loss, set(), {}

    def in_all_ways(self, model, inputs, *more, **options):
        def loss_of(provider):
            self.board.provider = provider
            torch.manual_seed(0)
            return compute(self, model, inputs, *more, **options)

        for provider in implementations.PROVIDERS:
            if loops.refusal(provider, self):
                refused.add(provider)
            else:
                loss = loss_of(provider)
                found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                compared[provider] = loss.detach(), torch.cat([x.flatten() for x in found if x is not None and x.any()])
        return loss_of("fastkd")

    def data(config, *sizes):
        made = models.tokens(config, *sizes)
        for row, (mask, labels) in enumerate(
            zip(*(made.datasets[name] for name in ("attention_mask", "labels")), strict=True)
        ):
            if task == "causal_lm" and "fcd" not in name:
                labels[: row % 5] = [-100] * (row % 5)
                mask[-1 - row % 3 :] = [0] * (1 + row % 3)
        return made

    monkeypatch.setattr(session.ProfiledTrainer, "compute_loss", in_all_ways)
    teacher, student = models.pair(TINY[family], True, "every:2", task)
    with torch.no_grad():
        [x.mul_(3) for x in teacher.parameters()]  # far from the student, where eager is accurate
    plan = session.Plan(providers=("fastkd",), warm=0, timed=1, memory=0, trace=0)
    session.run(teacher, student, name, task, data(teacher.config, task, 4, 12), plan, batch=4, device=CPU)
    assert "loop" in compared and ("logits" in refused) == (task == "classification")
    loss, gradient = compared.pop("fastkd")
    for provider, (value, found) in compared.items():
        if provider == "textbrewer":  # has the teacher's entropy in it
            assert value > loss
        else:
            assert value.item() == pytest.approx(loss.item(), rel=1e-4), provider
        assert (found - gradient).norm() <= 1e-4 * gradient.norm(), provider


def test_a_way_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(loops.importlib.util, "find_spec", lambda name: None)
    plan = session.Plan(providers=("loop", "logits"), warm=0, timed=1, memory=0, trace=0)
    with pytest.raises(ValueError, match=r"providers: loop: there is no loop for pkd; logits: heads are not taken"):
        steps_of("pkd", plan=plan)
    steps, _, left_out = run_of("jsd", "gpt2", replace(plan, providers=("trl", "fastkd", "gkd")))
    assert [step.provider for step in steps] == ["fastkd"] and left_out == dict.fromkeys(
        ("trl", "gkd"), "trl is not installed"
    )


def test_the_parts_add_up_to_the_wall_time(monkeypatch):
    """Against a clock outside: from the start of training to its end, everything that Trainer does is somewhere."""
    marks = []
    begun, ended = session.Turns.on_train_begin, session.ProfiledTrainer._maybe_log_save_evaluate

    def begin(self, *args, **kwargs):
        begun(self, *args, **kwargs)
        marks.append(time.perf_counter())

    def last(self, *args, **kwargs):
        marks.append(time.perf_counter())
        return ended(self, *args, **kwargs)

    monkeypatch.setattr(session.Turns, "on_train_begin", begin)
    monkeypatch.setattr(session.ProfiledTrainer, "_maybe_log_save_evaluate", last)
    steps = steps_of("bert_emd + kd", plan=session.Plan(warm=0, timed=8, memory=0, trace=0))
    assert sum(sum(step.seconds.values()) for step in steps) == pytest.approx(marks[-1] - marks[0], rel=0.05)
    assert results.accounted(steps) == pytest.approx(1.0, abs=0.05)


WHERE = {
    "teacher": "teacher forward", "student": "student forward", "backward": "student backward", "loss": "loss: divergence",
    "loss backward": "loss backward", "optimizer": "optimizer", "data": "data",
}  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
def test_a_delay_shows_where_it_is(where, monkeypatch):
    """A quarter of a second of sleep in one place appears in its phase, and in no other; the shortest step counts, as this
    machine may be busy with other things too."""
    delay = 0.25
    sleeping = lambda *_: time.sleep(delay)  # noqa: E731

    class SlowGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            time.sleep(delay)
            return grad

    pair, tokens = models.pair, models.tokens

    def slowed(*args):
        teacher, student = pair(*args)
        if where in ("teacher", "student"):
            {"teacher": teacher, "student": student}[where].register_forward_pre_hook(sleeping)
        if where == "backward":
            next(student.parameters()).register_hook(sleeping)
        return teacher, student

    def slow_tokens(*args):
        data = tokens(*args)
        if where == "data":
            data.__getitems__ = lambda rows: time.sleep(delay) or [data[row] for row in rows]  # a loader asks for these
        return data

    def divergence(student, *args, _original=fastkd.functional.divergence, **options):
        if where == "loss":
            time.sleep(delay)
        return _original(SlowGradient.apply(student) if where == "loss backward" else student, *args, **options)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(models, "pair", slowed)
    monkeypatch.setattr(models, "tokens", slow_tokens)
    monkeypatch.setattr(fastkd.functional, "divergence", divergence)
    if where == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: time.sleep(delay) or step(self, *a, **k))
    plan = session.Plan(providers=("fastkd",), warm=1, timed=4, memory=0, trace=0)
    steps = [step for step in steps_of("kd:alpha=1.0", plan=plan) if step.mode == "time"]
    found = {name: min(step.seconds.get(name, 0.0) for step in steps) for name in steps[0].seconds}
    slow = [name for name, seconds in found.items() if seconds > 0.75 * delay]
    assert len(slow) == 1 and slow[0].startswith(WHERE[where]), found


def test_a_traced_backward_has_one_thread(monkeypatch):
    """Ranges are counted by thread, and on a GPU autograd has one of its own."""
    found, backward = [], torch.Tensor.backward

    def watched(*args, **kwargs):
        found.append(torch._C._is_multithreading_enabled())
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    steps_of("kd", plan=session.Plan(providers=("fastkd",), warm=0, timed=1, memory=0, trace=1))
    assert found == [True, False]


def test_ours_are_put_back():
    before = {name: getattr(fastkd.functional, name) for name in implementations.HOT}
    with implementations.Switchboard(Timeline(CPU)).installed():
        assert all(getattr(fastkd.functional, name) is not function for name, function in before.items())
    assert all(getattr(fastkd.functional, name) is function for name, function in before.items())


def test_a_method_of_two_stages_distils():
    assert models.first_stage("fcd + kd:alpha=0.3") == "fcd:share=1.0 + kd:alpha=0.3"
    assert models.first_stage("tinybert:share=0.5") == "tinybert:share=0.5"


def test_the_authors_way_of_half_precision_is_in_float32():
    """A teacher is in bfloat16 on a GPU; what nobody released is refused."""
    student, teacher = randn(2, 3, 4, dtype=torch.float32), randn(2, 3, 4, seed=1, dtype=torch.bfloat16)
    call = implementations.authors("layer_costs", ([student], [teacher]), {"mask": None, "backend": "auto"})
    assert torch.equal(call(), torch.nn.functional.mse_loss(student, teacher.float()).view(1, 1))
    assert implementations.authors("layer_costs", ([student], [teacher]), {"order": 2}) is None
    assert implementations.authors("update_bank", (), {}) is None


def test_configs_by_name_are_what_they_say():
    """Layers and width, as the models' cards give them."""
    sizes = {
        "bert-base": (12, 768), "bert-large": (24, 1024), "roberta-large": (24, 1024), "distilbert": (6, 768),
        "modernbert": (22, 768), "gpt2": (12, 768), "llama-1b": (16, 2048), "llama-8b": (32, 4096), "qwen-0.5b": (24, 896),
        "smollm2-135m": (30, 576),
    }  # fmt: skip
    configs = {name: models.config_of(name).get_text_config() for name in models.CONFIGS}
    assert {name: (config.num_hidden_layers, config.hidden_size) for name, config in configs.items()} == sizes


PHASES = ("data", "student forward", "loss: divergence", "loss: hard labels")
FACTS = {"device": "box", "torch": "2", "cuda": "13.0", "date": "2026-01-01", "foreign_cores": None}
SETUPS = [{}, {"length": 512}, {"batch": 8}, {"dtype": "bfloat16"}, {"compiled": True}, {"task": "masked_lm"},
          {"method": "fcd"}, {"model": "tiny, student 0,1"}]  # fmt: skip


def setup_of(**changes) -> dict:
    return {"model": "tiny", "method": "kd", "task": "classification", "batch": 4, "length": 64, "dtype": "float32",
            "compiled": False, **changes}  # fmt: skip


def rows(**changes):
    """Two providers of one setup; every phase takes a millisecond, the step four, and the authors' twice that."""
    steps = [Step(provider, "time", dict.fromkeys(PHASES, ms / 1e3), {}, 4 * ms / 1e3, 7e-3)
             for _ in range(6) for provider, ms in (("fastkd", 1), ("authors", 2))]  # fmt: skip
    steps.append(Step("fastkd", "memory", dict.fromkeys(PHASES, 1.0), dict.fromkeys(PHASES, 3 << 20), 4.0))
    return results.rows_of(steps, FACTS, setup_of(**changes))


def test_rows_are_arithmetic(capsys):
    found = rows()
    assert list(found["phase"]) == [*("step", "data", "student forward", "loss: divergence", "loss: hard labels")] * 2
    step, authors = (
        found[(found["provider"] == provider) & (found["phase"] == "step")].iloc[0]
        for provider in ("fastkd", "authors")
    )
    assert (step["median_ms"], step["share"], step["loss_share"], step["extra_mib"]) == pytest.approx((4, 1, 0.5, 3))
    assert step["cpu_ms"] == pytest.approx(7)
    assert (step["tokens_per_second"], step["examples_per_second"]) == pytest.approx((64e3, 1e3))
    assert (authors["times_ours"], authors["times_ours_low"], authors["times_ours_high"]) == pytest.approx((2, 2, 2))
    results.print_table(found)
    results.print_summary(pd.concat([found, rows(method="fcd").replace({"provider": {"authors": "loop"}})]))
    out = capsys.readouterr().out
    assert "loss: divergence" in out and "50%" in out and re.search(r"fcd.*–.*2\.00× \[2–2\]", out)


def test_every_setup_stands_for_itself(tmp_path):
    """In the CSV, with a trace of its own, and in the picture."""
    pytest.importorskip("matplotlib")
    for changes in (*SETUPS, *SETUPS):  # the second time replaces the first
        results.write(rows(**changes), tmp_path)
    kept = results.read(tmp_path)
    assert len(kept) == len(SETUPS) * len(rows()) and set(kept["cuda"]) == {"13.0"}
    assert len({results.trace_of(tmp_path, setup_of(**changes)) for changes in SETUPS}) == len(SETUPS)
    figure = plots.stacked(kept)
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert labels.count("authors") == len(SETUPS) and len(labels) == 2 * len(SETUPS)
    assert {"kd · fastkd", "kd · masked_lm · fastkd", "kd · compiled · fastkd", "fcd · fastkd"} <= set(labels)
    lengths = [patch.get_x() + patch.get_width() for axes in figure.axes for patch in axes.patches]
    assert max(lengths) == pytest.approx(8)
    assert plots.draw(tmp_path) == "profile.png" and (tmp_path / "profile.png").stat().st_size > 1000


def test_an_older_table_is_carried_on_and_anothers_refused(tmp_path):
    results.write(rows(), tmp_path)
    path = tmp_path / "profile.csv"
    results.read(tmp_path).drop(columns="driver").to_csv(path, index=False)
    results.write(rows(length=512).assign(driver="550, 1980"), tmp_path)
    assert set(results.read(tmp_path)["driver"]) == {"", "550, 1980"}
    path.write_text("name,amount\nbread,3\n")
    with pytest.raises(
        ValueError, match=r"out: .*profile.csv is no table of `fastkd profile` \(amount, name\); choose"
    ):
        results.write(rows(), tmp_path)
    assert path.read_text() == "name,amount\nbread,3\n"


def test_every_way_is_held_against_the_clock():
    said = results.sums({"fastkd": 0.999, "reference": 1.0, "authors": 0.9})
    assert "fastkd 99.9%, reference 100.0%, authors 90.0%; authors: TOO FAR OFF" in said
    assert "TOO FAR" not in results.sums({"fastkd": 0.96, "authors": 1.04})
