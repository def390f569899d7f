"""MemoryBank, NegativeQueue, CoDIR's pre-training stage, and the C++ sampler and update behind them."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastkd
from cases import randn, relative_error
from fastkd import backends, functional
from fastkd.losses.bank import MemoryBank, NegativeQueue
from fastkd.losses.codir import CoDIRLoss
from ranks import on_two_ranks

FLOAT = torch.float32
compiled_only = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built here")


def unit(*shape, seed=0, dtype=FLOAT):
    return F.normalize(randn(*shape, seed=seed), dim=-1).to(dtype)


# ---- sampling and update in C++: the reference's numbers


def table(n_data, classes=3):
    labels = torch.randint(classes, (n_data,), generator=torch.Generator().manual_seed(1))
    return labels, labels.argsort(stable=True), F.pad(torch.bincount(labels).cumsum(0), (1, 0))


@compiled_only
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("how", ["labels", "all others", 1, 40, 5000])
@pytest.mark.parametrize("count", [1, 7, 100, 999, 1500])
def test_the_kernel_draws_what_the_reference_draws(how, count, replacement):
    """Bitwise; the reference's own draws are held against chi-square, brute force and splitmix64 in test_contrast.py."""
    index = torch.randint(1000, (37,), generator=torch.Generator().manual_seed(2))
    options = {"n_data": 1000, "replacement": replacement}
    options |= {"labels": table(1000)} if how == "labels" else {"window": how} if isinstance(how, int) else {}
    state = torch.tensor([2**61 + 5, 3])
    found, expected = (
        functional.sample_negatives(index, count, state, backend=b, **options) for b in ("cpu", "reference")
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled_only)])
def test_window_is_uniform_over_the_neighbours(backend):
    """Also at the ends of the data set, where the window moves inwards instead of shrinking."""
    for own, first in ((0, 0), (2, 0), (10, 6), (19, 11)):
        index = torch.full((4000,), own)
        ids = functional.sample_negatives(index, 5, torch.tensor([4, 0]), n_data=20, window=4, backend=backend)
        allowed = [i for i in range(first, first + 9) if i != own]
        counts = torch.bincount(ids.flatten(), minlength=20).double()
        assert counts.nonzero().flatten().tolist() == allowed
        assert (ids.sort(1).values.diff() > 0).all()  # no repeats
        expected = 20000 / 8
        assert ((counts[allowed] - expected).square() / expected).sum() < 7 + 5 * 14**0.5


@compiled_only
@pytest.mark.parametrize("bank_dtype", [FLOAT, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row_dtype", [torch.float64, FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_the_kernel_writes_what_the_reference_writes(bank_dtype, row_dtype, momentum):
    bank, rows = unit(50, 33, dtype=bank_dtype), randn(20, 33, seed=1, dtype=row_dtype)
    index = torch.randint(12, (20,), generator=torch.Generator().manual_seed(3))  # duplicates
    rows[3], rows[5, 2], index[3], index[5] = torch.nan, torch.inf, 40, 41
    for strided in (False, True):
        holders = [torch.cat([bank, bank], 1) if strided else bank.clone() for _ in range(2)]
        found, expected = (x[:, 20:53] if strided else x for x in holders)
        before = found.clone()
        functional.update_bank(found, index, rows, momentum=momentum, backend="cpu")
        functional.update_bank(expected, index, rows, momentum=momentum, backend="reference")
        assert torch.allclose(*(x.double() for x in holders), rtol=torch.finfo(bank_dtype).eps, atol=1e-7)
        assert (found != before).any(1).nonzero().flatten().tolist() == sorted(set(index.tolist()) - {40, 41})


@compiled_only
def test_opcheck():
    index, state, z = torch.tensor([3, 1, 3]), torch.tensor([5, 0]), torch.zeros(())
    bank, rows = unit(9, 5), unit(3, 5, seed=1)
    for labels in (table(9), (None, None, None)):
        torch.library.opcheck(torch.ops.fastkd.sample_negatives.default, (index, 4, 9, *labels, state, False, 0))
    torch.library.opcheck(torch.ops.fastkd.update_bank.default, (bank, index, rows, 0.5))
    torch.library.opcheck(torch.ops.fastkd.nce_partition.default, (rows, bank, index[:, None], z, 0.07, 9))
    arguments = (rows @ bank.T, rows, rows, torch.tensor(14.0, dtype=torch.float64), index, torch.arange(9))
    torch.library.opcheck(torch.ops.fastkd.info_nce_softmax.default, arguments)


@compiled_only
@pytest.mark.parametrize("bad", [-1, 9])
def test_ids_out_of_range_are_errors_not_crashes(bad):
    index = torch.tensor([0, bad])
    with pytest.raises(RuntimeError, match="index"):
        torch.ops.fastkd.sample_negatives(index, 4, 9, None, None, None, torch.tensor([5, 0]), False, 0)
    with pytest.raises(RuntimeError, match="index"):
        torch.ops.fastkd.update_bank(unit(9, 5), index, unit(2, 5), 0.5)
    with pytest.raises(RuntimeError, match="index"):
        torch.ops.fastkd.nce_partition(unit(2, 5), unit(9, 5), index[:, None], torch.zeros(()), 0.07, 9)


@compiled_only
def test_partition_keeps_a_set_z_and_ignores_scores_that_are_not_finite():
    query, bank, index = unit(6, 5), unit(9, 5, seed=1), torch.arange(18).reshape(6, 3) % 9
    query[2], bank[4, 1] = torch.nan, torch.inf
    options = {"n_data": 9, "temperature": 0.1}
    found, expected = (
        functional.nce_partition(query, bank, index, z=torch.zeros(()), backend=b, **options)
        for b in ("cpu", "reference")
    )
    assert found.isfinite() and found > 0 and relative_error(found, expected) < 1e-6
    assert functional.nce_partition(query, bank, index, z=torch.tensor(3.5), **options) == 3.5


# ---- negatives with a gradient


def in_batch_by_hand(query, positive, temperature, ids=None):
    """Cross-entropy over the similarities of all pairs, as SimCLR and CLIP have it; equal ids are not counted."""
    scores = query @ positive.T / temperature
    if ids is not None:
        same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
        scores = scores.masked_fill(same, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(query)), reduction="none")


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled_only)])
@pytest.mark.parametrize("sizes", [(2, 3), (33, 31), (129, 64), (300, 130)], ids=str)
@pytest.mark.parametrize("with_ids", [False, True])
def test_in_batch_trains_both_sides_and_the_temperature(backend, sizes, with_ids):
    ids = torch.arange(sizes[0]) % 20 if with_ids else None
    upstream = randn(sizes[0], seed=7) + 1.5
    results = []
    for dtype in (FLOAT, torch.float64):
        leaves = [unit(*sizes, seed=s, dtype=FLOAT).to(dtype).requires_grad_() for s in (0, 1)]
        leaves.append(torch.tensor(0.1, dtype=FLOAT).to(dtype).requires_grad_())
        if dtype == FLOAT:
            exclude = None if ids is None else (ids, ids)
            options = {"temperature": leaves[2], "exclude": exclude, "reduction": "none", "backend": backend}
            loss = functional.info_nce_loss(*leaves[:2], None, **options)
        else:
            loss = in_batch_by_hand(*leaves, ids)
        results.append([loss, *torch.autograd.grad(loss, leaves, upstream.to(dtype))])
    errors = [relative_error(*pair) for pair in zip(*results, strict=True)]
    assert errors[0] < 1e-6 and max(errors[1:]) < 1e-5, errors


@compiled_only
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16, torch.float16], ids=str)
def test_a_trained_bank(dtype):
    """Its gradient comes in its dtype, twice the same bit for bit, and not from a row that is excluded."""
    query, positive, bank = unit(40, 96), unit(40, 96, seed=1), unit(1031, 96, seed=2, dtype=dtype)
    ids = torch.arange(40) % 4, torch.arange(1031) % 5
    ids[0][:] = 2
    grads = []
    for backend, leaf in (("cpu", bank), ("cpu", bank), ("reference", bank.double())):
        leaf = leaf.clone().requires_grad_()
        wide = leaf.dtype == torch.float64
        loss = functional.info_nce_loss(
            *((x.double() if wide else x) for x in (query, positive)), leaf, exclude=ids, backend=backend
        )
        grads += torch.autograd.grad(loss, leaf)
    assert grads[0].dtype == dtype and torch.equal(grads[0], grads[1])
    assert (grads[0][2::5] == 0).all()
    assert relative_error(grads[0], grads[2]) < (1e-5 if dtype == FLOAT else torch.finfo(dtype).eps)


@compiled_only
def test_the_bank_may_change_between_loss_and_backward():
    query, bank = unit(8, 16).requires_grad_(), unit(99, 16, seed=1)
    expected = torch.autograd.grad(functional.info_nce_loss(query, query.detach(), bank), query)[0]
    loss = functional.info_nce_loss(query, query.detach(), bank)
    bank.zero_()
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected)


# ---- the modules


def test_memory_bank():
    torch.manual_seed(0)
    bank = MemoryBank(20, 6, momentum=0.3)
    before, ids, x = bank.rows.clone(), torch.tensor([4, 0, 4]), randn(3, 6, dtype=FLOAT).requires_grad_()
    assert torch.equal(bank(ids), before[ids]) and torch.allclose(before.norm(dim=1), torch.ones(20))
    bank.update(ids, x)
    expected = F.normalize(0.3 * before[[0, 4]] + 0.7 * x[[1, 2]], dim=1)  # the last of equal ids
    assert torch.allclose(bank(torch.tensor([0, 4])), expected, atol=1e-6)
    assert torch.equal(bank.rows[5:], before[5:]) and not bank.rows.requires_grad


@pytest.mark.parametrize("size", [1, 5, 8, 12])
@pytest.mark.parametrize("batch", [1, 3, 5, 30])
def test_queue_keeps_the_newest_keys(size, batch):
    """Against a Python list; batches that do not divide the size, and batches larger than it."""
    queue, ring, at = NegativeQueue(size, 4), [None] * size, 0
    for step in range(7):
        keys, ids = randn(batch, 4, seed=step, dtype=FLOAT), torch.arange(batch) + 100 * step
        queue.push(keys, ids)
        for key, i in zip(F.normalize(keys, dim=1), ids.tolist(), strict=True):
            ring[at], at = (key, i), (at + 1) % size
    assert queue.pointer == at
    for place, entry in enumerate(ring):
        if entry is not None:
            assert queue.ids[place] == entry[1] and torch.allclose(queue.rows[place], entry[0], atol=1e-6)
        else:
            assert queue.ids[place] == -1


def test_queue_loss_is_moco():
    torch.manual_seed(0)
    queue = NegativeQueue(50, 8, temperature=0.2, learnable=True)
    query, key = unit(6, 8).requires_grad_(), unit(6, 8, seed=1)
    queue.push(key, torch.arange(6))
    loss = queue(query, key)
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.rows.T], 1) / 0.2
    assert torch.allclose(loss, F.cross_entropy(scores, torch.zeros(6, dtype=torch.long)), rtol=1e-6)
    loss.backward()
    assert query.grad.norm() > 0 and queue.log_temperature.grad.abs() > 0
    scores = scores.masked_fill(F.pad(torch.arange(6)[:, None] == queue.ids, (1, 0)), -torch.inf)
    expected = F.cross_entropy(scores, torch.zeros(6, dtype=torch.long))
    assert torch.allclose(queue(query, key, torch.arange(6)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16, torch.float16], ids=str)
def test_queue_is_saved_and_restored_exactly(dtype):
    queue = NegativeQueue(10, 4, dtype=dtype)
    queue.push(randn(7, 4, dtype=FLOAT), torch.arange(7))
    other = NegativeQueue(10, 4, dtype=dtype)
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    for step in range(3):
        for q in (queue, other):
            q.push(randn(4, 4, seed=step, dtype=FLOAT), torch.arange(4))
    assert all(torch.equal(x, y) for x, y in zip(queue.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_key_that_is_not_finite_is_not_written():
    queue = NegativeQueue(4, 3)
    before, keys = queue.rows.clone(), randn(3, 3, dtype=FLOAT)
    keys[1, 0] = torch.nan
    queue.push(keys, torch.tensor([7, 8, 9]))
    assert torch.equal(queue.rows[1], before[1]) and queue.ids.tolist() == [7, -1, 9, -1]


def test_push_compiles_without_a_graph_break():
    torch._dynamo.reset()
    queue, other = NegativeQueue(10, 4), NegativeQueue(10, 4)
    other.load_state_dict(queue.state_dict())
    push = torch.compile(lambda key: other.push(key), fullgraph=True, backend="aot_eager")
    for step in range(4):
        key = randn(3, 4, seed=step, dtype=FLOAT)
        queue.push(key)
        push(key)
    assert torch.equal(queue.rows, other.rows) and queue.pointer == other.pointer == 2


TWO_RANKS = """
from cases import randn
from fastkd.losses.bank import MemoryBank, NegativeQueue
from fastkd.losses.codir import CoDIRLoss

def run(rows, group=None):
    torch.manual_seed(0)
    queue, bank = NegativeQueue(10, 5, process_group=group), MemoryBank(30, 5, process_group=group)
    loss = CoDIRLoss(6, 7, 30, feat_dim=5, preset="paper", negatives="in_batch", process_group=group).double()
    official = CoDIRLoss(6, 7, 30, feat_dim=5, negatives="in_batch", process_group=group).double()
    values = []
    for step in range(4):
        ids, key = torch.tensor([3, 4, 5, 3, 9, 4])[rows] + step, randn(6, 5, seed=step, dtype=torch.float32)[rows]
        queue.push(key, ids)
        bank.update(ids, key)
        f_s, f_t = randn(6, 6, seed=step)[rows].requires_grad_(), randn(6, 7, seed=50 + step)[rows]
        value = loss(f_s, f_t, ids)
        (grad,) = torch.autograd.grad(value, f_s)
        values.append((value.detach(), grad, official(f_s, f_t, ids).detach()))
    return values, [queue.state_dict(), bank.state_dict(), official.state_dict()]
"""


def test_two_processes_equal_one_with_the_full_batch():
    ranks = on_two_ranks(TWO_RANKS + "result = run(slice(3 * rank, 3 * rank + 3), group)")
    namespace = {"torch": torch}
    exec(TWO_RANKS, namespace)
    values, states = namespace["run"](slice(0, 6))
    for step, (value, grad, official) in enumerate(values):
        (a, grad_a, official_a), (b, grad_b, official_b) = ranks[0][0][step], ranks[1][0][step]
        assert torch.allclose((a + b) / 2, value, rtol=1e-12)
        assert torch.allclose(torch.cat([grad_a, grad_b]) / 2, grad, rtol=1e-9, atol=1e-15)  # DDP averages
        assert torch.allclose((official_a + official_b) / 2, official, rtol=1e-6)  # Z is float32
    for k, state in enumerate(states):
        for name, x in state.items():
            assert torch.equal(ranks[0][1][k][name], ranks[1][1][k][name]), name
            assert torch.allclose(ranks[0][1][k][name].double(), x.double(), rtol=1e-6), name


# ---- CoDIR's pre-training stage


def codir(**options):
    torch.manual_seed(0)
    return CoDIRLoss(6, 7, 40, feat_dim=4, nce_k=5, **options)


def features(seed=0):
    f_s, f_t = randn(5, 6, seed=seed, dtype=FLOAT), randn(5, 7, seed=seed + 1, dtype=FLOAT)
    return f_s.requires_grad_(), f_t, torch.tensor([3, 20, 39, 7, 8])


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_window_negatives_are_neighbours(preset, monkeypatch):
    drawn = []
    real = functional.sample_negatives
    monkeypatch.setattr(functional, "sample_negatives", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    loss = codir(preset=preset, negatives="window", window=3)
    for step in range(20):
        value = loss(*features(step))
        value.backward()
        assert value.isfinite()
    ids = features()[2][:, None]
    far = (torch.stack(drawn) - ids).abs()
    assert far.min() == 1 and far.max() == 6  # 6: at the end of the data set the window moves inwards
    assert int(loss.sampler[1]) == 20


def test_paper_in_the_batch_by_hand():
    loss = codir(preset="paper", negatives="in_batch")
    assert loss.bank_student is None and loss.bank_teacher is None
    f_s, f_t, idx = features()
    for labels in (None, torch.arange(40) % 2):
        if labels is not None:
            loss.set_labels(labels)
        value = loss(f_s, f_t, idx)
        v_s, v_t = loss.embed_s(f_s), loss.embed_t(f_t)
        expected = in_batch_by_hand(v_t, v_s, 0.07, idx if labels is None else labels[idx]).mean()
        assert torch.allclose(value, expected, rtol=1e-5)
        grads = [
            torch.autograd.grad(x, [f_s, loss.embed_t.linear.weight], retain_graph=True) for x in (value, expected)
        ]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_official_in_the_batch_is_given_indices():
    loss, given = codir(negatives="in_batch"), codir()
    f_s, f_t, idx = features()
    index = torch.stack([idx.roll(-b) for b in range(5)])
    assert torch.equal(loss(f_s, f_t, idx), given(f_s, f_t, idx, index))
    assert torch.equal(loss.bank_student, given.bank_student)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("size", lambda: NegativeQueue(0, 4)),
        ("dim", lambda: NegativeQueue(4, 0)),
        ("dtype", lambda: NegativeQueue(4, 4, dtype=torch.int32)),
        ("temperature", lambda: NegativeQueue(4, 4, temperature=0)),
        ("key", lambda: NegativeQueue(4, 4).push(torch.ones(4))),
        ("ids", lambda: NegativeQueue(4, 4).push(torch.ones(2, 4), torch.ones(2))),
        ("momentum", lambda: MemoryBank(4, 4, momentum=1)),
        ("n_data", lambda: MemoryBank(0, 4)),
        ("rows", lambda: MemoryBank(4, 4).update(torch.tensor([1]), torch.ones(1, 3))),
        ("negatives", lambda: codir(negatives="inbatch")),
        ("negatives", lambda: codir(negatives="label")(*features())),
        ("window", lambda: codir(negatives="window")),
        ("window", lambda: codir(window=3)),
        ("contrast_idx", lambda: codir(preset="paper", negatives="in_batch")(*features(), torch.zeros(5, 3).long())),
        ("bank", lambda: functional.info_nce_loss(torch.ones(2, 3), torch.ones(2, 3), None, torch.zeros(2, 1).long())),
        (
            "exclude",
            lambda: fastkd.info_nce_loss(*[torch.ones(2, 3)] * 2, None, exclude=(torch.ones(2), torch.zeros(2))),
        ),
        (
            "window",
            lambda: functional.sample_negatives(torch.tensor([0]), 2, torch.tensor([1, 0]), n_data=7, window=-1),
        ),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call()
