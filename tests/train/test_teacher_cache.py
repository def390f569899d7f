"""The teacher's logits, computed once: the same training without its forward, and never somebody else's logits."""

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from test_methods import pair

from fastkd.train import cache
from fastkd.train.trainer import DistillTrainer


def trained(folder, cached=None, method="kd", task="classification", rows=12, teacher=None, epochs=2):
    default, student = pair("bert", task)
    teacher = teacher or default
    args = tiny.arguments(folder, per_device_train_batch_size=4, per_device_eval_batch_size=5)
    args.num_train_epochs, args.max_steps = epochs, -1
    torch.manual_seed(0)
    trainer = DistillTrainer(
        student,
        teacher,
        method,
        task=task,
        args=args,
        train_dataset=tiny.dataset(task, rows=rows),
        teacher_cache=cached,
    )
    trainer.train()
    return trainer


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("task", cache.TASKS)
def test_trains_as_without_it_and_asks_the_teacher_once(task, tmp_path):
    plain = trained(tmp_path / "plain", task=task)
    teacher, _ = pair("bert", task)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    first = trained(tmp_path / "first", tmp_path / "cache", task=task, teacher=teacher)
    assert len(calls) == 3  # 12 rows in batches of 5, whatever the epochs
    second = trained(tmp_path / "second", tmp_path / "cache", task=task, teacher=teacher)
    assert len(calls) == 3
    torch.testing.assert_close(parameters(first), parameters(plain), rtol=1e-4, atol=1e-6)
    assert torch.equal(parameters(first), parameters(second))
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [cache.FILE]


def test_refuses_what_was_made_from_something_else(tmp_path):
    trained(tmp_path / "1", tmp_path / "cache")
    before = (tmp_path / "cache" / cache.FILE).read_bytes()
    other, _ = pair("bert", "classification")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"teacher_cache: .* made with another teacher than this run has"):
        trained(tmp_path / "2", tmp_path / "cache", teacher=other)
    with pytest.raises(ValueError, match="another data than"):
        trained(tmp_path / "3", tmp_path / "cache", rows=13)
    assert (tmp_path / "cache" / cache.FILE).read_bytes() == before
    (tmp_path / "cache" / cache.FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a cache of fastkd"):
        trained(tmp_path / "4", tmp_path / "cache")


@pytest.mark.parametrize(
    ("method", "task"), [("fcd", "classification"), ("bert_emd", "classification"), ("kd", "masked_lm")]
)
def test_refuses_methods_and_tasks_that_need_more(method, task, tmp_path):
    with pytest.raises(ValueError, match=r"teacher_cache: .*(hidden states|predicts words)"):
        trained(tmp_path, tmp_path / "cache", method, task)
    assert not (tmp_path / "cache").exists()
