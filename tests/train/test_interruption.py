"""SIGTERM and Ctrl-C: a checkpoint within one step, in training, evaluation and while the teacher cache is built."""

import contextlib
import os
import signal

import pytest
from test_resume import assert_same, made

import tiny
from fastkd import interruption
from fastkd.train import cache, checkpoints
from fastkd.train.trainer import DistillTrainer

pytest.importorskip("transformers")
from test_methods import pair
from transformers import TrainerCallback

pytestmark = pytest.mark.usefixtures("interruptible")


def kill(number):
    os.kill(os.getpid(), number)


class Signal(TrainerCallback):
    """The signal comes at an event of a step, or at the second batch of an evaluation after it."""

    def __init__(self, number, event: str, step: int):
        self.number, self.event, self.step, self.batches = number, event, step, 0
        setattr(self, event, self.strike)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.batches += 1
            if self.event != "on_prediction_step" or self.batches == 2:
                kill(self.number)


TERMINATED, INTERRUPTED = (signal.SIGTERM, interruption.Terminated), (signal.SIGINT, KeyboardInterrupt)
EVENTS = [  # when the signal comes, and the step of the checkpoint
    ("on_substep_end", 4, 5, *TERMINATED),
    ("on_prediction_step", 4, 4, *INTERRUPTED),
    *(pytest.param(*row, *TERMINATED, marks=pytest.mark.long) for row in (
        ("on_prediction_step", 4, 4), ("on_step_begin", 4, 5), ("on_step_end", 4, 4), ("on_epoch_end", 3, 4), ("on_save", 4, 4),
        ("on_log", 5, 6), ("on_step_begin", 6, 7),
    )),
]  # fmt: skip
EVALUATES = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = made(tmp_path_factory.mktemp("straight"), "bert_emd", **EVALUATES)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("event", "step", "saved", "number", "raised"), EVENTS)
def test_a_checkpoint_within_one_step_and_on_from_there(event, step, saved, number, raised, straight, tmp_path):
    before = signal.getsignal(number)
    trainer = made(tmp_path, "bert_emd", callbacks=[Signal(number, event, step)], **EVALUATES)
    with pytest.raises(raised) as error:
        trainer.train()
    sentence = getattr(error.value, "sentence", "") or str(error.value)
    assert f"goes on from {tmp_path / f'checkpoint-{saved}'}" in sentence
    assert signal.getsignal(number) == before and not interruption.requested()
    assert checkpoints.newest(tmp_path) == (str(tmp_path / f"checkpoint-{saved}"), [])
    resumed = made(tmp_path, "bert_emd", seed=99, **EVALUATES)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, straight)
    evaluated = [
        {e["step"]: e["eval_loss"] for e in t.state.log_history if "eval_loss" in e} for t in (straight, resumed)
    ]
    assert evaluated[0] == evaluated[1] and list(evaluated[0]) == [2, 4, 6, 7]


def test_terminated_is_an_exit_with_143():
    assert interruption.Terminated("").code == 143


def test_the_second_signal_is_obeyed_at_once(tmp_path):
    class Impatient(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kill(signal.SIGINT)
            kill(signal.SIGINT)
            pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, callbacks=[Impatient()]).train()


def test_no_checkpoints_asked_for_and_one_saved_none_the_less(tmp_path):
    with pytest.raises(interruption.Terminated):
        made(tmp_path, callbacks=[Signal(signal.SIGTERM, "on_step_begin", 1)], save_strategy="no").train()
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-2"]


def test_an_ignored_signal_stays_ignored():
    """As under nohup, or for a job in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.deferred():
            kill(signal.SIGINT)
            assert not interruption.requested()
    finally:
        signal.signal(signal.SIGINT, before)


def struck(number, *contexts, then=None):
    """What comes of a signal within these contexts, and whether the code behind it ran."""
    ran = []
    try:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            kill(number)
            ran.append(True)
            if then:
                raise then
    except BaseException as error:
        return type(error), bool(ran)


def test_where_signals_are_obeyed():
    terminated, terminable, deferred = interruption.Terminated, interruption.terminable, interruption.deferred
    assert struck(signal.SIGTERM, terminable) == (terminated, False)
    assert struck(signal.SIGTERM, terminable, deferred) == (terminated, True)
    assert struck(signal.SIGINT, deferred, deferred) == (KeyboardInterrupt, True)
    lost = RuntimeError("connection closed by peer")  # what other ranks see where one has stopped
    assert struck(signal.SIGTERM, deferred, then=lost) == (terminated, True)
    assert struck(signal.SIGTERM, deferred, then=ValueError("wrong")) == (ValueError, True)


@pytest.mark.parametrize(("number", "raised"), [TERMINATED, INTERRUPTED])
def test_the_building_of_the_teacher_cache_stops_between_two_batches(number, raised, tmp_path):
    teacher, student = pair("bert", "classification")
    calls = []

    def strike(*_):
        calls.append(1)
        if len(calls) == 2:
            kill(number)

    teacher.register_forward_hook(strike)
    data = tiny.dataset("classification", rows=12)
    args = tiny.arguments(tmp_path / "run", per_device_eval_batch_size=2)

    def trainer():
        return DistillTrainer(student, teacher, "kd", args=args, train_dataset=data, teacher_cache=tmp_path / "cache")

    with pytest.raises(raised):
        trainer()
    assert len(calls) == 2 and cache.complete(tmp_path / "cache") is None
    trainer().train()
    assert cache.complete(tmp_path / "cache") is not None
