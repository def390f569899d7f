"""What a teacher said, kept: the same training without its forward, never somebody else's words, and no shard made twice."""

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from safetensors.torch import load_file
from test_methods import pair

import fastkd
from fastkd.train import cache, heads
from fastkd.train.cache import shards
from fastkd.train.cache.contents import drawn, from_8_bits, in_8_bits, likeliest
from fastkd.train.cache.shards import INDEX, shard_name
from fastkd.train.states import read
from fastkd.train.trainer import DistillTrainer

LIVE = "live"


def trainer(folder, method, task, kept=None, *, family=None, teacher=LIVE, student=None, data=None, **changes):
    """kept: cache.Options or a folder. teacher: None for a cache alone."""
    family = family or ("gpt2" if task == "causal_lm" else "bert")
    live, ours = pair(family, task)
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    args = tiny.arguments(folder / "run", **{**options, "train_sampling_strategy": "sequential", **changes})
    answers = torch.tensor([7, 9]) if task == "cloze" else None
    torch.manual_seed(0)
    return DistillTrainer(
        student or ours, live if teacher is LIVE else teacher, method, task=task, args=args, answers=answers,
        train_dataset=tiny.dataset(task, rows=12) if data is None else data, teacher_cache=kept,
    )  # fmt: skip


def trained(*args, **options):
    made = trainer(*args, **options)
    made.train()
    return made


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


EXACT = [
    ("kd", "classification", "bert"),
    ("kd", "regression", "bert"),
    ("pkd + kd", "classification", "bert"),
    ("bert_emd:beta=1", "classification", "bert"),
    ("fcd:share=1", "classification", "gpt2"),
    ("codir:nce_k=3,feat_dim=8", "masked_lm", "bert"),
    ("tinybert", "masked_lm", "distilbert"),
    ("glmd:temperature=2", "cloze", "bert"),
    ("distilbert", "masked_lm", "roberta"),
    ("forward_kl:hard=1", "causal_lm", "gpt2"),
    ("jsd + minilm:share=1", "causal_lm", "llama"),
    ("minilmv2:relation_heads=4,teacher_layer=3", "causal_lm", "qwen2"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "task", "family"), EXACT)
def test_states_that_were_kept_train_bit_for_bit_as_the_live_teacher(method, task, family, tmp_path):
    even = method.startswith(("bert_emd", "tinybert"))  # they read padding
    options = {"family": family, "data": tiny.dataset(task, rows=12, even=even)}
    live = trained(tmp_path, method, task, **options)
    kept = cache.Options(tmp_path / "cache", examples_per_shard=8)
    first = trained(tmp_path, method, task, kept, **options)
    alone = trained(tmp_path, method, task, tmp_path / "cache", teacher=None, **options)
    assert losses(alone) == losses(first) == losses(live)
    assert torch.equal(parameters(first), parameters(live)) and torch.equal(parameters(alone), parameters(live))


def test_only_what_the_method_reads_is_kept(tmp_path):
    names = {
        "kd": {"logits"}, "fcd:share=1": {"hidden.4"}, "minilm:share=1": {"q.3", "k.3", "v.3"},
        "codir:nce_k=3,feat_dim=8": {"logits", "hidden.1", "hidden.3"},
    }  # fmt: skip
    for method, kept in names.items():
        made = trainer(tmp_path, method, "classification", tmp_path / method.partition(":")[0])
        assert set(made.cache.index["tensors"]) == kept, method


def test_one_cache_serves_another_method_that_needs_less(tmp_path):
    trainer(tmp_path, "forward_kl + fcd:share=1", "causal_lm", tmp_path / "cache")
    alone = trained(tmp_path, "jsd", "causal_lm", tmp_path / "cache", teacher=None)
    assert losses(alone) == losses(trained(tmp_path, "jsd", "causal_lm"))


def test_shuffled_examples_with_numbers_of_their_own_get_their_own_rows(tmp_path):
    data = tiny.dataset("causal_lm", rows=12)
    data = data.remove_columns("example_id").add_column("example_id", [100 - 3 * i for i in range(12)])
    options = {"data": data, "train_sampling_strategy": "random", "dataloader_num_workers": 1}
    live = trained(tmp_path, "forward_kl", "causal_lm", **options)
    kept = cache.Options(tmp_path / "cache", examples_per_shard=5)
    torch.testing.assert_close(
        parameters(trained(tmp_path, "forward_kl", "causal_lm", kept, **options)),
        parameters(live),
        rtol=1e-5,
        atol=1e-7,
    )


SGD = {"optim": "sgd", "learning_rate": 0.1}
KINDS = ["forward_kl:temperature=2", "reverse_kl", "jsd:beta=0.3", "skew_kl", "kd:alpha=0.3", "glmd:temperature=3"]


@pytest.mark.parametrize("method", KINDS)
def test_all_tokens_as_the_most_likely_ones_are_the_whole_distribution(method, tmp_path):
    live = trained(tmp_path, method, "causal_lm", **SGD)
    kept = trained(tmp_path, method, "causal_lm", cache.Options(tmp_path / "cache", top_k=tiny.VOCAB), **SGD)
    torch.testing.assert_close(parameters(kept), parameters(live), rtol=1e-5, atol=1e-6)


def test_a_student_that_makes_all_logits_reads_the_most_likely_tokens(tmp_path, monkeypatch):
    """As under FSDP, or where a model's head cannot be taken off."""
    kept = cache.Options(tmp_path / "cache", top_k=7)
    headless = trained(tmp_path, KINDS[-1], "causal_lm", kept, **SGD)
    monkeypatch.setattr(heads, "find", lambda model: None)
    whole = trained(tmp_path, KINDS[-1], "causal_lm", kept, **SGD)
    torch.testing.assert_close(parameters(whole), parameters(headless), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", KINDS[:-1])
def test_most_likely_tokens_are_a_topk_of_the_live_logits(method, tmp_path):
    kept = trained(
        tmp_path, method, "causal_lm", cache.Options(tmp_path / "cache", top_k=7), max_steps=1, learning_rate=0.0
    )
    data, (teacher, student) = tiny.dataset("causal_lm", rows=12), pair("gpt2", "causal_lm")
    inputs = {name: torch.tensor(data[name][:4]) for name in ("input_ids", "attention_mask", "labels")}
    labels = inputs.pop("labels")[:, 1:]
    loss = next(iter(kept.method.methods.values())).loss
    with torch.no_grad():
        ours, theirs = (read(model.eval(), inputs).logits[:, :-1] for model in (student, teacher))
        temperature = loss.divergence["temperature"]
        log_probs, indices = (theirs.double() / temperature).log_softmax(-1).topk(7)
        rest = torch.log1p(-log_probs.exp().sum(-1))
        sparse = fastkd.TopK(indices, log_probs.float(), rest.float())
        soft = fastkd.divergence(ours, sparse, mask=inputs["attention_mask"][:, 1:], labels=labels, **loss.divergence)
        hard = torch.nn.functional.cross_entropy(ours.flatten(0, 1), labels.flatten())
    assert losses(kept)[0] == pytest.approx(float(loss.soft * soft + loss.hard * hard), rel=1e-5)


def test_likeliest_tokens_and_their_tail_are_the_whole_mass():
    logits = 40 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))  # tails down to e^-80
    found = likeliest(logits, 5)
    every = logits.double().log_softmax(-1)
    want, indices = every.topk(5)
    assert torch.equal(found["indices"], indices)
    torch.testing.assert_close(found["log_probs"].double(), want, rtol=1e-5, atol=1e-5)
    tail = every.scatter(-1, indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found["tail"].double(), tail, rtol=1e-5, atol=1e-5)


def test_samples_are_unbiased_and_come_again_for_the_same_seed():
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1)).mul(2).expand(20_000, 9)
    taken = [drawn(logits, 12, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert all(torch.equal(taken[0][name], taken[1][name]) for name in taken[0])
    counts = torch.zeros(20_000, 9).scatter_(1, taken[0]["indices"], taken[0]["counts"].float())
    assert (counts.sum(-1) == 12).all() and taken[0]["indices"].sort(-1).values.diff().all()
    p = logits[0].softmax(-1)
    error = (counts.mean(0) / 12 - p) / (p * (1 - p) / (12 * 20_000)).sqrt()
    assert error.abs().max() < 4.5


def test_the_most_likely_tokens_with_samples_of_the_others_are_unbiased():
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1)).expand(20_000, 9)
    found = likeliest(logits, 3, 4, torch.Generator().manual_seed(7))
    assert found["indices"].shape == (20_000, 7) and found["indices"].sort(-1).values.diff().all()
    assert (found["counts"].sum(-1) == 4).all()
    contents = cache.contents.Contents("causal_lm", "top_k", 3, 1.0, (), (), None, 9, others=4)
    topk = contents.states(found, None, {}, 1, torch.float32).predictions.topk
    p, q = logits[0].softmax(-1), torch.zeros(20_000, 9).scatter_(1, topk.indices, topk.log_probs.exp())
    assert topk.tail is None
    torch.testing.assert_close(q.sum(-1), torch.ones(20_000))
    torch.testing.assert_close(q[:, found["indices"][0, :3]], p[found["indices"][0, :3]].expand(20_000, 3))
    tail = found["tail"][0].exp()
    error = (q.mean(0) - p) / (p / tail * (1 - p / tail) / (4 * 20_000)).sqrt().nan_to_num(0).clamp_min(1e-6) / tail
    assert error.abs().max() < 4.5


def test_a_step_on_samples_is_the_live_step_but_for_noise(tmp_path):
    before = parameters(trainer(tmp_path, "forward_kl", "causal_lm"))
    live = parameters(trained(tmp_path, "forward_kl", "causal_lm", max_steps=1, **SGD)) - before
    noise = {}
    for count in (12, 192, (32, 12)):
        options = {"samples": count} if isinstance(count, int) else {"top_k": count[0], "samples": count[1]}
        kept = cache.Options(tmp_path / str(count), **options)
        step = parameters(trained(tmp_path, "forward_kl", "causal_lm", kept, max_steps=1, **SGD)) - before
        noise[count] = float((step - live).norm() / live.norm())
    assert noise[192] < noise[12] / 2.5  # 1 / 4 but for chance
    assert noise[32, 12] < noise[12] / 1.2  # only the tail is noise


def test_bfloat16_takes_half_and_stays_near(tmp_path):
    live = losses(trained(tmp_path, "forward_kl", "causal_lm"))
    made = trained(tmp_path, "forward_kl", "causal_lm", cache.Options(tmp_path / "half", dtype="bfloat16"))
    assert losses(made) == pytest.approx(live, rel=2e-2) and losses(made) != live
    assert made.cache.index["tensors"] == {"last": ["torch.bfloat16", [16]]}


IN_8_BITS = {
    "forward_kl": ("causal_lm", {"last": ["torch.int8", [16]], "last.scale": ["torch.float32", [1]]}),
    "kd": ("classification", {"logits": ["torch.int8", [2]], "logits.scale": ["torch.float32", [1]]}),
    "fcd:share=1": ("causal_lm", {"hidden.4": ["torch.int8", [16]], "hidden.4.scale": ["torch.float32", [1]]}),
    "minilm:share=1": (
        "causal_lm",
        {f"{x}.3{end}": layout for x in "qkv" for end, layout in (("", ["torch.int8", [4, 4]]), (".scale", ["torch.float32", [4, 1]]))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", IN_8_BITS)
def test_8_bits_with_a_scale_stay_near(method, tmp_path):
    task, layout = IN_8_BITS[method]
    live = losses(trained(tmp_path, method, task))
    kept = cache.Options(tmp_path / "8 bits", dtype="int8", examples_per_shard=5)
    made = trained(tmp_path, method, task, kept)
    again = trained(tmp_path, method, task, kept.folder, teacher=None)
    assert made.cache.index["tensors"] == layout
    assert losses(again) == losses(made) == pytest.approx(live, rel=2e-2) and losses(made) != live


def test_8_bits_are_half_a_step_off_at_most():
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 50)[:, None]
    x[7] = 0
    kept = dict(in_8_bits("x", x))
    assert kept["x"].dtype == torch.int8 and torch.equal(kept["x.scale"], x.abs().amax(1, keepdim=True) / 127)
    error = (from_8_bits("x", kept) - x).abs()
    assert (error <= 0.501 * kept["x.scale"]).all() and (error[7] == 0).all() and error.max() > 0


class Stopped(Exception):
    """Takes the place of a signal."""


def same_tensors(*paths):
    ours, theirs = map(load_file, paths)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_cache_is_gone_on_with(after, tmp_path, monkeypatch):
    kept, whole = (cache.Options(tmp_path / name, examples_per_shard=4) for name in ("cache", "whole"))
    trainer(tmp_path, "forward_kl", "causal_lm", whole)
    written, write = [], shards.write

    def stopping(path, *args):
        if len(written) == after:
            raise Stopped
        written.append(path.name)
        write(path, *args)

    monkeypatch.setattr(shards, "write", stopping)
    with pytest.raises(Stopped):
        trainer(tmp_path, "forward_kl", "causal_lm", kept)
    with pytest.raises(ValueError, match=r"teacher_cache: .* is missing in .*cache, as are \d other files"):
        trainer(tmp_path, "forward_kl", "causal_lm", kept, teacher=None)
    (tmp_path / "cache" / ".999999999-shard-00001.safetensors").touch()  # of a process that is no more
    after = -1
    trainer(tmp_path, "forward_kl", "causal_lm", kept)
    names = ["head.safetensors", *map(shard_name, range(3))]
    assert written == names  # each once
    assert sorted(x.name for x in kept.folder.iterdir()) == sorted([*names, INDEX])
    assert (kept.folder / INDEX).read_bytes() == (whole.folder / INDEX).read_bytes()
    for name in names:
        assert same_tensors(kept.folder / name, whole.folder / name)


def build(folder, kept, method="forward_kl", *, task="causal_lm", teacher=LIVE, data=None, **more):
    live, student = pair("gpt2", task)
    return DistillTrainer(
        student, live if teacher is LIVE else teacher, method, task=task, args=tiny.arguments(folder / "run"),
        train_dataset=tiny.dataset(task, rows=12) if data is None else data, teacher_cache=kept, **more,
    )  # fmt: skip


def test_a_part_of_the_vocabulary(tmp_path):
    """The student's tokens are half of the teacher's; teacher and student agree on them exactly."""
    from fastkd.vocab import VocabMap

    words = torch.tensor([0, 1, 2, *range(4, 58, 2)])
    teacher = tiny.model("gpt2", "causal_lm", seed=3)
    student = VocabMap(words, tiny.VOCAB).shrink(teacher)
    data = tiny.dataset("causal_lm", rows=12).map(
        lambda x: {name: [i % 30 if i >= 0 else i for i in x[name]] for name in ("input_ids", "labels")}
    )
    for form in ({}, {"top_k": 30}, {"top_k": 6}):
        kept = cache.Options(tmp_path / f"cache{form.get('top_k')}", **form)
        made = DistillTrainer(
            student, teacher, "forward_kl", task="causal_lm", args=tiny.arguments(tmp_path / "run", learning_rate=0.0),
            train_dataset=data, teacher_cache=kept, teacher_tokens=words,
        )  # fmt: skip
        made.train()
        assert losses(made)[0] < 1e-9
        other = torch.tensor([0, 1, 2, *range(5, 59, 2)])
        with pytest.raises(ValueError, match="made with another vocabulary"):
            build(tmp_path, kept.folder, data=data, teacher_tokens=other, teacher=None)
