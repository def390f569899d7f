"""The oracles give the authors' numbers, and the papers' losses give the oracles'."""

import pytest
import test_bert_emd
import test_codir
import test_glmd
import torch
import torch.nn.functional as F

from cases import GOLDENS, det, gradients, relative_error
from fastkd import BertEMDLoss, CoDIRLoss, FCDLoss, GLMDLoss, VocabMap
from oracle_cases import Draw
from oracles import contrast, losses
from oracles.relations import attention_costs, layer_costs

SEEDS = pytest.mark.parametrize("seed", range(12))


def same(ours, oracle, *leaves, tolerance=1e-9):
    (value, found), (true_value, true) = gradients(ours, *leaves), gradients(oracle, *leaves)
    assert relative_error(value, true_value) <= tolerance
    assert all(relative_error(x, y) <= 100 * tolerance for x, y in zip(found, true, strict=True))


@pytest.mark.parametrize(("B", "N", "Ds", "Dt"), [(4, 7, 12, 20), (2, 5, 6, 6), (3, 9, 16, 8)])
def test_the_authors_numbers_of_fcd(B, N, Ds, Dt):
    golden, teacher = GOLDENS[f"fcd_B{B}_N{N}_Ds{Ds}_Dt{Dt}"], det((B, N, Dt), 2)
    student = det((B, N, Ds), 1).requires_grad_()
    value = losses.fcd([student], [teacher], 1, 1, 0, "official")
    (grad,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(golden["token_plus_seq"], abs=1e-12)
    assert grad.abs().sum().item() == pytest.approx(golden["grad_l1"], abs=1e-12)
    assert losses.fcd([student], [teacher], 0, 1, 0, "position").item() == pytest.approx(golden["seq_viewN"], abs=1e-12)


def test_the_authors_numbers_of_glmd():
    student, teacher, mask, gold = test_glmd.STUDENT, test_glmd.TEACHER, test_glmd.MASK, GOLDENS["glmd"]
    small = losses.glmd(test_glmd.SMALL_STUDENT, teacher[..., test_glmd.KEPT], mask, 15.0)
    assert losses.glmd(student, teacher, mask, 15.0).item() == pytest.approx(gold["full_T15"], rel=1e-12)
    assert small.item() == pytest.approx(gold["vc_unmap_T15"], rel=1e-12)
    assert losses.glmd(student, teacher, mask, 15.0, 5).item() == pytest.approx(gold["top5"], rel=1e-12)
    least = losses.glmd(student, teacher, mask, 15.0, 10, True)
    assert least.item() == pytest.approx(gold["top20pct_teacher_min"], rel=1e-12)


@pytest.mark.parametrize("variant", test_bert_emd.VARIANTS)
def test_the_authors_numbers_of_bert_emd(variant):
    rule = {"weights": "inverse_cost", "temperature": 1.0, "separate": False} | test_bert_emd.VARIANTS[variant]
    twice = rule.get("double_softmax", rule["weights"] == "softmax")
    a, b = ([torch.full((n,), 1 / n, dtype=torch.float64)] * 2 for n in (4, 12))
    for step, golden in enumerate(GOLDENS[variant][:2]):  # later a weight of the last variant is 0
        *attn, student, teacher = test_bert_emd.step_inputs(step, torch.float64)
        costs = [attention_costs(*attn, None, False, None, None), layer_costs(student[1:], teacher[1:], None, None)]
        value, flow = zip(*(losses.transport(*x) for x in zip(costs, a, b, strict=True)), strict=True)
        assert value[0].item() == pytest.approx(golden["att_loss"], rel=1e-5)
        assert value[1].item() == pytest.approx(golden["rep_loss"], rel=1e-5)
        costs = [x.detach() for x in costs]
        a, b = losses.cost_attention(flow, costs, a, b, rule["weights"], rule["temperature"], twice, rule["separate"])
        assert a[0].tolist() == pytest.approx(golden["att_s"], abs=1e-5)
        assert b[1].tolist() == pytest.approx(golden["rep_t"], abs=1e-5)


def codir_step(loss, state, f_s, f_t, index):
    """Of the oracle: value, gradient of f_s; `state` [banks, z] moves on."""
    banks, z = state
    f_s = f_s.detach().requires_grad_()
    v = [F.linear(f, e.linear.weight, e.linear.bias) for f, e in ((f_s, loss.embed_s), (f_t, loss.embed_t))]
    v = [x / x.norm(dim=1, keepdim=True) for x in v]
    if z is None:
        sides = zip(v, banks[::-1], strict=True)
        z = [contrast.partition(x.detach(), bank, index, loss.n_data, loss.nce_t).float().double() for x, bank in sides]
    value = losses.codir(*v, banks, index, loss.n_data, loss.nce_t, z)
    moved = [contrast.moved(bank, index[:, 0], x.detach(), loss.nce_m) for x, bank in zip(v, banks, strict=True)]
    return value, torch.autograd.grad(value, [f_s, loss.embed_s.linear.weight, loss.embed_t.linear.weight]), [moved, z]


def test_the_authors_numbers_of_codir():
    loss = test_codir.golden_loss()
    state = [[loss.bank_student.clone(), loss.bank_teacher.clone()], None]
    for step, golden in enumerate(GOLDENS["codir"]):
        f_s, f_t, _, index = test_codir.golden_step(step)
        value, grads, state = codir_step(loss, state, f_s, f_t, index)
        assert value.item() == pytest.approx(golden["loss"], rel=1e-6)
        for grad, name in zip(grads, ("g_fs", "g_Ws", "g_Wt"), strict=True):
            assert grad.abs().sum().item() == pytest.approx(golden[name], rel=1e-6)


@SEEDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_fcd_loss(seed, dtype, tolerance):
    draw = Draw(f"fcd {seed}")
    B, N, grouping = draw.choice([3, 5]), draw.choice([4, 7]), draw.choice(["position", "position", "official"])
    options = {"alpha": draw.choice([0.0, 1.0, 0.3]), "beta": draw.choice([1.0, 2.0]), "gamma": draw.choice([0.0, 0.5])}
    pairs = [(draw.normal(B, N, 6).to(dtype), draw.normal(B, N, 9).to(dtype)) for _ in range(2)]
    mask = draw.mask(B, N) if grouping == "position" else None
    students, teachers = map(list, zip(*pairs, strict=True))
    ours = FCDLoss(**options, K=B * N, grouping=grouping)
    same(
        lambda *s: ours(list(s), teachers, mask),
        lambda *s: losses.fcd([x.double() for x in s], [x.double() for x in teachers], **options, grouping=grouping, mask=mask),
        *students,
        tolerance=tolerance,
    )  # fmt: skip


@SEEDS
def test_bert_emd_loss(seed):
    """Three steps: both losses, their gradients, and all weights."""
    draw = Draw(f"bert_emd {seed}")
    n, m, B, S = draw.choice([2, 3]), draw.choice([4, 5]), 2, 5
    rule, separate, temperature = draw.choice(["inverse_cost", "softmax"]), draw.maybe(), draw.choice([5.0, 20.0])
    twice = rule == "softmax" and draw.maybe()
    ours = BertEMDLoss(n, m, weights=rule, temperature=temperature, separate=separate, double_softmax=twice or None)
    ours.double_softmax = twice
    a, b = ([torch.full((k,), 1 / k, dtype=torch.float64)] * 2 for k in (n, m))
    for _ in range(3):
        mask = draw.choice([None, draw.normal(B, S) > -1])
        scores = [draw.normal(B, 2, S, S).double().requires_grad_() for _ in range(n + m)]
        hidden = [draw.normal(B, S, 6).double().requires_grad_() for _ in range(n + m)]
        frozen = [x.detach() for x in scores[n:]], [x.detach() for x in hidden[n:]]
        found = ours(scores[:n], frozen[0], hidden[:n], frozen[1], mask)
        costs = [
            attention_costs(scores[:n], frozen[0], mask, False, None, None),
            layer_costs(hidden[:n], frozen[1], mask, None),
        ]
        value, flow = zip(*(losses.transport(*x) for x in zip(costs, a, b, strict=True)), strict=True)
        leaves = scores[:n] + hidden[:n]
        grads, true = (torch.autograd.grad(sum(x), leaves) for x in (found, value))
        assert all(relative_error(x, y) <= 1e-8 for x, y in zip((*found, *grads), (*value, *true), strict=True))
        costs = [x.detach() for x in costs]
        a, b = losses.cost_attention(flow, costs, a, b, rule, temperature, twice, separate)
        for kind, weight_s, weight_t in zip(("attention", "hidden"), a, b, strict=True):
            assert relative_error(getattr(ours, f"{kind}_student_weight"), weight_s) <= 1e-8
            assert relative_error(getattr(ours, f"{kind}_teacher_weight"), weight_t) <= 1e-8


@SEEDS
def test_codir_loss(seed):
    """Three steps: loss, gradients, and what the banks become; Z is kept in float32."""
    draw = Draw(f"codir {seed}")
    n_data, B, K = 30, 4, draw.choice([1, 9, 17])
    ours = CoDIRLoss(6, 7, n_data, feat_dim=draw.choice([3, 8]), nce_k=K, nce_m=draw.choice([0.0, 0.5, 0.9])).double()
    state = [[ours.bank_student.clone(), ours.bank_teacher.clone()], None]
    for _ in range(3):
        ids = torch.tensor(draw.sample(range(n_data), B))
        index = torch.cat([ids[:, None], draw.whole(n_data, B, K)], 1)
        f_s, f_t = draw.normal(B, 6).double().requires_grad_(), draw.normal(B, 7).double()
        value, grads, state = codir_step(ours, state, f_s, f_t, index)
        found = ours(f_s, f_t, ids, index)
        leaves = [f_s, ours.embed_s.linear.weight, ours.embed_t.linear.weight]
        assert relative_error(found, value) <= 1e-6
        assert all(relative_error(x, y) <= 1e-6 for x, y in zip(torch.autograd.grad(found, leaves), grads, strict=True))
        assert all(
            relative_error(x, y) <= 1e-9 for x, y in zip((ours.bank_student, ours.bank_teacher), state[0], strict=True)
        )


@SEEDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_glmd_loss(seed, dtype, tolerance):
    draw = Draw(f"glmd {seed}")
    B, S, V, temperature = 2, 4, 40, draw.choice([15.0, 1.0])
    kept = draw.sample(range(V), 17) if draw.maybe() else list(range(V))
    student, teacher = draw.normal(B, S, len(kept)).to(dtype), draw.normal(B, S, V, scale=3.0).to(dtype)
    top_n = draw.choice([None, 3, 8])
    least, mask = top_n is not None and draw.maybe(), (draw.normal(B, S) > -1).long()
    vocab = VocabMap(kept, V) if len(kept) < V else None
    ours = GLMDLoss(temperature, vocab=vocab, top_n=top_n, teacher_min=least)
    same(
        lambda s: ours(s, teacher, mask),
        lambda s: losses.glmd(s.double(), teacher[..., kept].double(), mask, temperature, top_n, least),
        student,
        tolerance=tolerance,
    )
