"""Two processes that train together: the steps of one process with the whole batch, state that is alike, resuming."""

import copy
import functools
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

import tiny

pytest.importorskip("transformers")
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from test_methods import METHODS, pair, spelled, task_of
from transformers import TrainerCallback, logging

from fastkd import distributed
from fastkd.train import ranks
from fastkd.train.methods import Setup, Side, build
from fastkd.train.trainer import DistillTrainer
from ranks import on_two_ranks

logging.set_verbosity_error()
long = pytest.mark.long  # of a pair of processes, which takes seconds to start
ROWS = 16
# What couples samples does more here than at the methods' own weights; the rest is each method as it is.
METHOD = {
    "bert_emd": "bert_emd:beta=1", "fcd": "fcd:gamma=1,K=8,share=1,layers=uniform", "glmd": "glmd:temperature=2",
    "codir": "codir:nce_k=3,feat_dim=8,crd=1",
}  # fmt: skip
CASES = [
    *((METHOD.get(name, spelled(name)), "gpt2" if METHODS[name].causal else "bert", None) for name in METHODS),
    ("bert_emd:beta=1,weights=softmax,separate=True + kd:weight=0.5", "gpt2", "causal_lm"),
    ("codir:nce_k=3,feat_dim=8,crd=1,preset=paper,negatives=in_batch", "bert", "classification"),
    ("codir:nce_k=3,feat_dim=8,crd=1,negatives=in_batch", "bert", "masked_lm"),
    ("tinybert:share=0.5", "llama", "causal_lm"),
]
SHARDED = ["fcd:share=1", "bert_emd:beta=1"]
TEACHERS = [("forward_kl + fcd:share=1", "llama", "causal_lm"), ("bert_emd:beta=1 + kd", "bert", None)]
RESUMED = ["bert_emd:beta=1", METHOD["codir"], "fcd:gamma=1,K=8,share=1 + kd"]


class Steps(TrainerCallback):
    """The parameters and the method's state before the first step and after each."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen = []
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        trained = {"student": self.trainer.accelerator.unwrap_model(self.trainer.model), "method": self.trainer.method}
        now = {f"{side} {name}": x for side, part in trained.items() for name, x in part.state_dict().items()}
        self.seen.append({name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in now.items()})


def uneven(task: str) -> Dataset:
    """Texts of 3 to 10 tokens without padding; in masked_lm some have more labels than others of their length."""
    columns = tiny.dataset(task, ROWS, even=True).to_dict()
    for row in range(ROWS):
        length = 3 + row * 5 % 8
        for name in columns:
            if isinstance(columns[name][row], list):
                columns[name][row] = columns[name][row][row % 2 : length]
    return Dataset.from_dict(columns)


def collate(rows: list[dict]) -> dict:
    fills = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    return {
        name: pad_sequence(x, batch_first=True, padding_value=fills[name]) if x[0].dim() else torch.stack(x)
        for name, x in columns.items()
    }


def trained(folder, method: str, family: str, task: str | None, world: int, double: bool, **options) -> DistillTrainer:
    task = task or task_of(method.partition(":")[0], family)
    models = pair(family, task)
    for model in models if double else ():
        model.double()
    resume = options.pop("resume", None)
    dropout, sharded = options.pop("dropout", 0.0), options.pop("shard_teacher", False)
    for module in models[1].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1} | options
    args = tiny.arguments(
        folder, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
        ddp_backend="gloo" if world > 1 else None, **options,
    )  # fmt: skip
    if args.fsdp:  # of accelerate's kinds of ranks only those on accelerators can shard; torch shards on CPUs, too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    torch.manual_seed(0)
    steps = Steps()
    teacher, student = models
    steps.trainer = trainer = DistillTrainer(
        student, teacher, method, task=task, args=args, train_dataset=uneven(task), data_collator=collate,
        callbacks=[steps], teacher_dtype="float64" if double else "float32", shard_teacher=sharded,
    )  # fmt: skip
    if double:
        trainer.method.double()
    trainer.train(resume_from_checkpoint=resume)
    trainer.steps = steps.seen
    return trainer


def every(folder, world: int) -> list[dict]:
    """What each of CASES does in two steps, in float64."""
    found = []
    for method, family, task in CASES:
        trainer = trained(folder, method, family, task, world, double=True)
        logged = [{k: x for k, x in e.items() if k.startswith(("loss", "term/"))} for e in trainer.state.log_history]
        kinds = [type(x).__name__ for x in (trainer.model_wrapped, trainer.teacher)]
        found.append({"steps": trainer.steps, "logged": logged[:2], "kinds": kinds})
    return found


def others(folder) -> dict:
    """What two ranks are asked besides."""
    result = {"resumed": [], "sharded": [], "raised": {}}
    for method in RESUMED:
        options = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
        straight = trained(f"{folder}/straight", method, "bert", "classification", 2, False, **options)
        torch.manual_seed(99 + torch.distributed.get_rank())
        resume = f"{folder}/straight/checkpoint-2"
        resumed = trained(f"{folder}/resumed", method, "bert", "classification", 2, False, **options, resume=resume)
        result["resumed"].append([straight.steps[-1], resumed.steps[-1]])
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(f"{folder}/straight")
        torch.distributed.barrier()
    checkpointed = {"gradient_checkpointing": True}
    runs = (trained(folder, "fcd:beta=0,share=1", "bert", None, 2, True, **more) for more in ({}, checkpointed))
    result["checkpointing"] = [run.steps[-1] for run in runs]
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
    for method in SHARDED:
        start = functools.partial(
            trained, method=method, family="llama", task="causal_lm", world=2, double=True, **options
        )
        whole, sharded = start(f"{folder}/whole"), start(f"{folder}/{method}", fsdp=True)
        found = {"kind": type(sharded.model).__name__, "whole": whole.steps[-1], "sharded": sharded.steps[-1]}
        if method.startswith("bert_emd"):
            found["resumed"] = start(folder, fsdp=True, resume=f"{folder}/{method}/checkpoint-1").steps[-1]
        result["sharded"].append(found)
    result["teacher"] = [of_a_sharded_teacher(folder, *case) for case in TEACHERS]
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    batches = [{"input_ids": torch.full((2, 3 + 2 * rank), 7), "labels": torch.full((2, 3 + 2 * rank), 5)}]
    ranks.pad_alike(batches, 1, "left", group)
    result["padded"] = batches[0]
    drawn = torch.full((2,), rank)
    result["drawn"] = distributed.from_first(drawn, group)
    result["first"] = distributed.on_first_rank(lambda: rank)
    tasks = {
        "shapes": lambda: ranks.pad_alike([{"input_ids": torch.ones(2 + rank, 3)}], 1, "right", group),
        "first": lambda: distributed.on_first_rank(copy.deepcopy, _Refuses(rank)),
    }
    for name, task in tasks.items():
        try:
            task()
        except ValueError as error:
            result["raised"][name] = str(error)
    return result


def of_a_sharded_teacher(folder, method: str, family: str, task: str | None) -> dict:
    """Steps of a run with a whole teacher and with a sharded one, the latter's evaluation, and what a rank holds of it."""
    whole, sharded = (
        trained(folder, method, family, task, 2, True, shard_teacher=sharded) for sharded in (False, True)
    )
    layers = [x for name, x in sharded.teacher.named_parameters() if ".0." in name]
    sizes = [sum(x.numel() for x in part) for part in ([x.to_local() for x in layers], layers)]
    losses = [
        run.evaluate_other(run.teacher, uneven(task or "classification"))["eval_loss"] for run in (whole, sharded)
    ]
    return {
        "whole": whole.steps[-1], "sharded": sharded.steps[-1], "sizes": sizes, "losses": losses,
        "headless": sharded._finish["teacher"] is not None,
    }  # fmt: skip


class _Refuses:
    def __init__(self, rank: int):
        self.rank = rank

    def __deepcopy__(self, memo):
        raise ValueError(f"refused on rank {self.rank}")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Everything that two ranks do, in one pair of processes."""
    folder = str(tmp_path_factory.mktemp("two"))
    return on_two_ranks(
        f"""
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
import test_ranks
result = {{"cases": test_ranks.every({folder!r}, 2), "others": test_ranks.others({folder!r})}}
""",
        seconds=600,
    )


def moved(steps: list[dict], step: int) -> dict[str, torch.Tensor]:
    """By how much each of the method's tensors changed in a step, and all of the student's together."""
    change = {name: (x - steps[step - 1][name]).flatten().double() for name, x in steps[step].items()}
    student = torch.cat([x for name, x in change.items() if name.startswith("student")])
    return {"student": student} | {name: x for name, x in change.items() if name.startswith("method")}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return every(str(tmp_path_factory.mktemp("one")), 1)


@long
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{method}-{family}" for method, family, _ in CASES])
def test_two_ranks_take_the_steps_of_one_process_with_the_whole_batch(case, one, two):
    """Of plain SGD, so that a step is the gradient: micro-batches and ranks hold unequal numbers of tokens and labels."""
    alone = one[case]
    for rank in two:
        together = rank["cases"][case]
        assert together["kinds"] == ["DistributedDataParallel", alone["kinds"][1]]  # the teacher is never wrapped
        for step in (1, 2):
            right, found = (moved(run["steps"], step) for run in (alone, together))
            assert right["student"].norm() > 1e-6
            for name, x in right.items():
                assert (found[name] - x).norm() <= 1e-6 * x.norm() + 1e-14, (name, step)
        for ours, theirs in zip(together["logged"], alone["logged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@long
def test_what_ranks_hold_is_equal_after_each_step(two):
    """To the last bit: student, projections, layer weights, banks, Z, sampler."""
    for first, second in zip(two[0]["cases"], two[1]["cases"], strict=True):
        for ours, theirs in zip(first["steps"], second["steps"], strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


@long
@pytest.mark.parametrize("case", range(len(RESUMED)), ids=RESUMED)
def test_two_ranks_resume_bitwise(case, two):
    for rank in two:
        straight, resumed = rank["others"]["resumed"][case]
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(x, resumed[name]) for name, x in straight.items())


@long
def test_gradient_checkpointing_changes_nothing_where_no_prediction_is_read(two):
    for rank in two:
        plain, checkpointed = rank["others"]["checkpointing"]
        for name, x in plain.items():
            torch.testing.assert_close(checkpointed[name], x, rtol=1e-9, atol=1e-12)


@long
@pytest.mark.parametrize("case", range(len(SHARDED)), ids=SHARDED)
def test_a_student_sharded_by_fsdp2_learns_what_a_whole_one_learns(case, two):
    """What the method learns is replicated beside it, and resumes with it."""
    for rank in two:
        found = rank["others"]["sharded"][case]
        assert found["kind"].startswith("FSDP")
        for name, x in found["whole"].items():
            torch.testing.assert_close(found["sharded"][name], x, rtol=1e-6, atol=1e-9)
            assert torch.equal(found.get("resumed", found["sharded"])[name], found["sharded"][name]), name


@long
@pytest.mark.parametrize("case", range(len(TEACHERS)), ids=[case[0] for case in TEACHERS])
def test_a_sharded_teacher_teaches_what_a_whole_one_teaches(case, two):
    """A language model's head is not run: the loss reads its weight after the forward."""
    for rank in two:
        found = rank["others"]["teacher"][case]
        assert found["headless"] == (TEACHERS[case][2] is not None)
        local, whole = found["sizes"]
        assert local <= 0.6 * whole
        assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-9)
        for name, x in found["whole"].items():
            torch.testing.assert_close(found["sharded"][name], x, rtol=1e-9, atol=1e-12)


@long
def test_micro_batches_are_padded_to_the_longest_of_all_ranks(two):
    first, second = (rank["others"]["padded"] for rank in two)
    assert first["input_ids"].tolist() == [[1, 1, 7, 7, 7]] * 2 and second["input_ids"].tolist() == [[7] * 5] * 2
    assert first["attention_mask"].tolist() == [[0, 0, 1, 1, 1]] * 2 and first["labels"][0].tolist() == [
        -100,
        -100,
        5,
        5,
        5,
    ]


@long
def test_what_the_first_rank_does_reaches_all(two):
    for rank in two:
        asked = rank["others"]
        assert asked["drawn"].tolist() == [0, 0] and asked["first"] == 0
        assert asked["raised"]["first"] == "refused on rank 0"
        assert "the ranks hold between 2 and 3 examples" in asked["raised"]["shapes"]


def test_one_process_needs_no_group(tmp_path):
    assert ranks.process_group(tiny.arguments(tmp_path)) is None
    assert distributed.on_first_rank(lambda: 3) == 3
    on_cpus = SimpleNamespace(fsdp=True, world_size=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"fsdp: accelerate shards a model over several GPUs .* 2 processes on cpu"):
        ranks.check_sharding(SimpleNamespace(args=on_cpus, is_fsdp_enabled=False))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ((1, False, False), "shard_teacher: divides the teacher among processes, and this run has one"),
        ((2, True, False), "shard_teacher: cannot be combined with compile_teacher"),
        ((2, False, True), "shard_teacher: cannot be combined with teacher_cache"),
    ],
)
def test_a_teacher_that_cannot_be_sharded_is_refused(case, message):
    with pytest.raises(ValueError, match=message):
        ranks.check_sharded_teacher(*case)


@pytest.mark.parametrize(
    ("method", "version", "fp16", "message"),
    [
        ("kd", 1, True, None), ("bert_emd", 2, False, None), ("minilm + kd", 2, True, None),
        ("tinybert", 2, False, None),
        ("minilm", 2, False, r"minilm reads queries and keys .* as in minilm \+ kd, or use DDP"),
        ("bert_emd", 1, False, "bert_emd learns pieces of its own, which train beside a sharded student under FSDP2"),
        ("bert_emd + kd", 2, True, r"bert_emd \+ kd learns pieces of its own"),
        ("codir:nce_k=3,feat_dim=512", 2, False, r"codir keeps [\d,]+ numbers, .* the student has [\d,]+; use DDP"),
    ],
)  # fmt: skip
def test_what_cannot_be_replicated_beside_a_sharded_student_is_refused_by_name(method, version, fp16, message):
    teacher, student = pair("bert", "classification")
    built = build(method, Setup(Side.of(student), Side.of(teacher), "classification", tiny.dataset("classification")))
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    trainer = SimpleNamespace(
        is_fsdp_enabled=True, is_deepspeed_enabled=False, accelerator=SimpleNamespace(state=state),
        args=SimpleNamespace(fp16=fp16),
    )  # fmt: skip
    if message is None:
        return ranks.check_replicas(trainer, built, student)
    with pytest.raises(ValueError, match=message):
        ranks.check_replicas(trainer, built, student)
