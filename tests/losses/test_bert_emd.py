"""BertEMDLoss over three steps against the authors' numbers, against a second solver, and at its hazards."""

import copy
import math

import numpy as np
import pytest
import torch

from cases import GOLDENS, det, gradients, randn, relative_error
from fastkd.losses.bert_emd import SMALLEST_WEIGHT, BertEMDLoss
from fastkd.losses.projection import Projection
from ranks import on_two_ranks

N, M = 4, 12
VARIANTS = {
    "bertemd_head_joint": {},
    "bertemd_head_separate": {"separate": True},
    "bertemd_f99d98b_T5_joint_addsoftmax": {"weights": "softmax", "temperature": 5.0},
    "bertemd_f99d98b_T5_separate_noaddsoftmax": {
        "weights": "softmax", "temperature": 5.0, "separate": True, "double_softmax": False,
    },
}  # fmt: skip
BUFFERS = {
    "att_s": "attention_student_weight",
    "att_t": "attention_teacher_weight",
    "rep_s": "hidden_student_weight",
    "rep_t": "hidden_teacher_weight",
}


def bert_emd(*args, **options):
    return BertEMDLoss(*args, backend="reference", **options)


def step_inputs(step, dtype=torch.float32):
    """Student scores, teacher scores, student hidden, teacher hidden of one step; hidden[0] is the embedding."""

    def scores(k):
        x = det((2, 2, 5, 5), k + 100 * step, dtype)
        x[..., -1] -= 10000
        return x

    def hidden(k):
        return det((2, 5, 6), k + 100 * step, dtype)

    return (
        [scores(1 + i).requires_grad_() for i in range(N)],
        [scores(31 + j) for j in range(M)],
        [hidden(51 + i).requires_grad_() for i in range(N + 1)],
        [hidden(71 + j) for j in range(M + 1)],
    )


def some_layers(seed=0, n=2, m=3, b=3):
    attn = [[randn(b, 2, 5, 5, seed=seed + 10 * side + i) for i in range(k)] for side, k in enumerate((n, m))]
    hidden = [[randn(b, 5, 6, seed=seed + 50 + 10 * side + i) for i in range(k)] for side, k in enumerate((n, m))]
    return (*attn, *hidden)


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_authors_numbers_over_three_steps(variant):
    criterion = bert_emd(N, M, **VARIANTS[variant])
    for step, golden in enumerate(GOLDENS[variant]):
        student_attn, teacher_attn, student_hidden, teacher_hidden = step_inputs(step)
        losses = criterion(student_attn, teacher_attn, student_hidden[1:], teacher_hidden[1:])
        sum(losses).backward()
        assert losses[0].item() == pytest.approx(golden["att_loss"], rel=1e-6)
        assert losses[1].item() == pytest.approx(golden["rep_loss"], rel=1e-6)
        assert student_attn[0].grad.abs().sum().item() == pytest.approx(golden["g_att0"], rel=1e-6)
        assert student_hidden[1].grad.abs().sum().item() == pytest.approx(golden["g_rep1"], rel=1e-6)
        assert student_hidden[0].grad is None and golden["g_rep0"] == 0
        for key, name in BUFFERS.items():
            # Where the authors' weights fall to 1e-21 ours stop at SMALLEST_WEIGHT.
            tolerance = 1e-12 if min(golden[key]) > SMALLEST_WEIGHT else 12 * SMALLEST_WEIGHT
            torch.testing.assert_close(
                getattr(criterion, name), torch.tensor(golden[key], dtype=torch.float64), rtol=0, atol=tolerance
            )


def second_opinion(cost, a, b):
    """The optimal flow by another exact solver."""
    return pytest.importorskip("ot").emd(a, b, cost)


def numpy_step(costs, weights, rule, temperature, double_softmax, separate, unit_cost):
    """One step by the book: losses, and the four weight vectors after it."""
    losses, moved = {}, {}
    for kind, d in costs.items():
        w_s, w_t = weights[kind]
        f = second_opinion(d, w_s, w_t)
        losses[kind] = (f * d).sum()
        c_s, c_t = (f * d).sum(1) / w_s, (f * d).sum(0) / w_t
        if unit_cost == "product_of_sums":
            c_s, c_t = f.sum(1) * d.sum(1) / w_s, f.sum(0) * d.sum(0) / w_t
        out = []
        for c in (c_s, c_t):
            r = np.array([c.sum() / x for x in c])
            e = np.exp(r / temperature)
            out.append(e / e.sum() if rule == "softmax" else r / r.sum())
        moved[kind] = out
    if not separate:
        shared = [(x + y) / 2 for x, y in zip(moved["attention"], moved["hidden"], strict=True)]
        moved = dict.fromkeys(moved, shared)
    if double_softmax:
        moved = {kind: [np.exp(x) / np.exp(x).sum() for x in pair] for kind, pair in moved.items()}
    return losses, moved


@pytest.mark.parametrize("unit_cost", ["sum_of_products", "product_of_sums"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("rule", "double_softmax"), [("inverse_cost", False), ("softmax", True), ("softmax", False)])
def test_against_a_second_solver_and_the_book(rule, double_softmax, separate, unit_cost):
    options = {"temperature": 3.0, "double_softmax": double_softmax or None, "separate": separate, "cost": unit_cost}
    if rule == "softmax":
        options["double_softmax"] = double_softmax
    criterion = bert_emd(3, 5, weights=rule, **options)
    weights = {kind: (np.full(3, 1 / 3), np.full(5, 1 / 5)) for kind in ("attention", "hidden")}
    for step in range(3):
        attn_s, attn_t, hidden_s, hidden_t = some_layers(seed=100 * step, n=3, m=5)
        costs = {}
        for kind, (students, teachers) in {"attention": (attn_s, attn_t), "hidden": (hidden_s, hidden_t)}.items():
            costs[kind] = np.array([[((s - t) ** 2).mean().item() for t in teachers] for s in students])
        expected, weights = numpy_step(costs, weights, rule, 3.0, double_softmax, separate, unit_cost)
        losses = criterion(attn_s, attn_t, hidden_s, hidden_t)
        for kind, value in zip(("attention", "hidden"), losses, strict=True):
            assert value.item() == pytest.approx(expected[kind], rel=1e-10)
            for side, vector in zip(("student", "teacher"), weights[kind], strict=True):
                np.testing.assert_allclose(getattr(criterion, f"{kind}_{side}_weight").numpy(), vector, rtol=1e-9)


def test_gradient_is_the_flow_times_the_cost_gradient():
    attn_s, attn_t, hidden_s, hidden_t = some_layers()
    criterion = bert_emd(2, 3)
    _, grads = gradients(lambda *hs: torch.stack(criterion(attn_s, attn_t, hs, hidden_t)), *hidden_s)
    flow = criterion.flows["hidden"]
    upstream = randn(2, seed=7)[1] + 1.5
    for i, grad in enumerate(grads):
        difference = sum(flow[i, j] * (hidden_s[i] - hidden_t[j]) for j in range(3))
        assert relative_error(grad, upstream * 2 * difference / difference.numel()) < 1e-12


def test_flows_are_detached_and_meet_their_marginals():
    criterion = bert_emd(N, M)
    assert criterion.flows == {}
    inputs = step_inputs(0)
    before = buffers(criterion)
    criterion(inputs[0], inputs[1], inputs[2][1:], inputs[3][1:])
    for kind in ("attention", "hidden"):
        flow = criterion.flows[kind]
        assert flow.shape == (N, M) and not flow.requires_grad and (flow >= 0).all()
        assert (flow > 0).sum() <= N + M - 1
        assert relative_error(flow.sum(1), before[f"{kind}_student_weight"]) < 1e-12
        assert relative_error(flow.sum(0), before[f"{kind}_teacher_weight"]) < 1e-12


def test_only_training_moves_the_weights_once_per_call():
    criterion, inputs = bert_emd(2, 3), some_layers()
    start = buffers(criterion)
    in_training = criterion(*inputs)
    moved = buffers(criterion)
    assert all(not torch.equal(start[name], moved[name]) for name in start)
    criterion.eval()
    in_eval = criterion(*inputs)
    assert all(torch.equal(moved[name], buffer) for name, buffer in criterion.named_buffers())
    assert in_eval[1] != in_training[1]  # the new weights are in force
    assert torch.equal(criterion(*inputs)[1], in_eval[1])


def test_state_dict_carries_what_was_learned():
    criterion = bert_emd(2, 3, separate=True)
    assert sorted(criterion.state_dict()) == sorted(BUFFERS.values())
    for seed in range(3):
        criterion(*some_layers(seed))
    restored = bert_emd(2, 3, separate=True)
    restored.load_state_dict(criterion.state_dict())
    for seed in (7, 8):
        assert all(map(torch.equal, criterion(*some_layers(seed)), restored(*some_layers(seed))))
    copied = copy.deepcopy(criterion)
    copied(*some_layers(9))
    assert not torch.equal(copied.hidden_student_weight, criterion.hidden_student_weight)


def test_two_calls_before_one_backward():
    criterion, inputs = bert_emd(2, 3), some_layers()
    leaves = [x.clone().requires_grad_() for x in inputs[2]]
    first = criterion(*inputs[:2], leaves, inputs[3])[1]
    (alone,) = torch.autograd.grad(first, leaves[:1], retain_graph=True)
    second = criterion(*inputs[:2], leaves, inputs[3])[1]
    (again,) = torch.autograd.grad(first, leaves[:1], retain_graph=True)
    assert torch.equal(alone, again)
    (both,) = torch.autograd.grad(first + second, leaves[:1])
    assert both.isfinite().all() and not torch.equal(both, alone)


def test_the_order_of_teacher_layers_does_not_matter():
    inputs, order = some_layers(m=5), [3, 0, 4, 1, 2]
    plain, shuffled = bert_emd(2, 5), bert_emd(2, 5)
    for _ in range(2):
        expected = plain(*inputs)
        losses = shuffled(inputs[0], [inputs[1][j] for j in order], inputs[2], [inputs[3][j] for j in order])
        for a, b in zip(losses, expected, strict=True):
            assert relative_error(a, b) < 1e-12
        assert relative_error(shuffled.hidden_teacher_weight, plain.hidden_teacher_weight[order]) < 1e-10


@pytest.mark.parametrize("separate", [False, True])
def test_either_kind_may_be_missing(separate):
    inputs = some_layers()
    both, attention, hidden = (bert_emd(2, 3, separate=separate) for _ in range(3))
    attention_loss, hidden_loss = both(*inputs)
    value, zero = attention(inputs[0], inputs[1], None, None)
    assert torch.equal(value, attention_loss) and zero == 0 and list(attention.flows) == ["attention"]
    zero, value = hidden(None, None, inputs[2], inputs[3])
    assert torch.equal(value, hidden_loss) and zero == 0 and list(hidden.flows) == ["hidden"]
    shared = torch.equal(attention.attention_student_weight, attention.hidden_student_weight)
    assert shared is not separate
    with pytest.raises(ValueError, match="both are None"):
        both(None, None, None, None)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_instead_of_scores(causal):
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    students = [(randn(2, 4, 5, 3, seed=i), randn(2, 2, 5, 3, seed=20 + i)) for i in range(2)]
    teachers = [(randn(2, 4, 5, 8, seed=40 + j), randn(2, 4, 5, 8, seed=60 + j)) for j in range(3)]
    additive = torch.where(mask.bool(), 0.0, -10000.0)[:, None, None, :].double()
    if causal:
        additive = additive + torch.full((5, 5), -10000.0).triu(1)

    def scores(q, k):
        return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / q.shape[-1] ** 0.5 + additive

    expected = bert_emd(2, 3)([scores(*x) for x in students], [scores(*x) for x in teachers], None, None)[0]
    value = bert_emd(2, 3, causal=causal)(students, teachers, None, None, mask)[0]
    assert relative_error(value, expected) < 1e-12


def test_a_mask_leaves_padding_out_of_the_hidden_cost():
    _, _, students, teachers = some_layers()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    value, grads = gradients(lambda *xs: bert_emd(2, 3)(None, None, xs, teachers, mask)[1], *students)
    dirty = [[x.masked_fill(mask[..., None] == 0, float("nan")) for x in xs] for xs in (students, teachers)]
    bad, bad_grads = gradients(lambda *xs: bert_emd(2, 3)(None, None, xs, dirty[1], mask)[1], *dirty[0])
    assert torch.equal(value, bad) and all(map(torch.equal, grads, bad_grads))
    assert all((g[mask == 0] == 0).all() for g in grads)


@pytest.mark.parametrize("options", list(VARIANTS.values()), ids=list(VARIANTS))
@pytest.mark.parametrize("hazard", ["zero weight", "one layer learned", "all learned", "tiny costs", "all masked"])
def test_hazards_stay_finite(hazard, options):
    attn_s, attn_t, hidden_s, hidden_t = (list(x) for x in some_layers())
    criterion, mask = bert_emd(2, 3, **options), None
    if hazard == "zero weight":
        criterion.hidden_teacher_weight.copy_(torch.tensor([0.0, 0.0, 1.0]))
        criterion.attention_student_weight.copy_(torch.tensor([1.0, 0.0]))
    elif hazard == "one layer learned":
        attn_s[0], hidden_s[0] = attn_t[0].clone(), hidden_t[0].clone()
    elif hazard == "all learned":
        attn_s, attn_t, hidden_s, hidden_t = attn_t[:1] * 2, attn_t[:1] * 3, hidden_t[:1] * 2, hidden_t[:1] * 3
    elif hazard == "tiny costs":
        attn_s, attn_t, hidden_s, hidden_t = ([x * 1e-30 for x in xs] for xs in (attn_s, attn_t, hidden_s, hidden_t))
    elif hazard == "all masked":
        mask = torch.zeros(3, 5)
    for _ in range(4):
        _, grads = gradients(
            lambda *xs: torch.stack(criterion(xs[:2], attn_t, xs[2:], hidden_t, mask)), *attn_s, *hidden_s
        )
        assert all(g.isfinite().all() for g in grads)
        for name, buffer in criterion.named_buffers():
            assert buffer.isfinite().all() and (buffer >= SMALLEST_WEIGHT / 2).all(), name
            assert math.isclose(buffer.sum(), 1, rel_tol=1e-12), name


def test_a_layer_that_has_learned_all_gets_no_weight_as_released():
    """r_i = 0 where c_i = 0: the authors' rule, which led to 0/0 in their next step."""
    attn_s, attn_t, _, _ = some_layers(n=2, m=2)
    attn_s[0] = attn_t[0].clone()
    criterion = bert_emd(2, 2)
    for _ in range(2):
        loss, _ = criterion(attn_s, attn_t, None, None)
        assert loss.isfinite()
        assert relative_error(criterion.attention_student_weight[0], torch.tensor(SMALLEST_WEIGHT)) < 1e-6


@pytest.mark.parametrize("options", list(VARIANTS.values()), ids=list(VARIANTS))
def test_weights_do_not_depend_on_the_unit_of_the_costs(options):
    plain, tiny = bert_emd(2, 3, **options), bert_emd(2, 3, **options)
    for seed in range(3):
        inputs = some_layers(seed)
        plain(*inputs)
        tiny(*([1e-20 * x for x in xs] for xs in inputs))
    for name, buffer in plain.named_buffers():
        assert relative_error(tiny.get_buffer(name), buffer) < 1e-9


def test_a_step_that_overflowed_leaves_the_state_alone(monkeypatch):
    criterion = bert_emd(2, 3)
    inputs = some_layers()
    criterion(*inputs)
    before = buffers(criterion)
    inputs[3][0][0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="costs must be finite"):
        criterion(*inputs)
    monkeypatch.setattr("fastkd.checks.looks_are_free", lambda x: False)  # as on a GPU
    _, loss = criterion(*inputs)
    assert loss.isnan()
    for name, buffer in criterion.named_buffers():
        if name.startswith("hidden"):
            torch.testing.assert_close(buffer, before[name], rtol=1e-14, atol=0)
        assert buffer.isfinite().all()


@pytest.mark.parametrize("shared", [True, False])
def test_with_a_projection_and_the_embedding_term(shared):
    torch.manual_seed(0)
    project = Projection(4, 6, levels=3, shared=shared)
    hidden = [randn(2, 5, 4, seed=i, dtype=torch.float32).requires_grad_() for i in range(3)]
    teacher = [randn(2, 5, 6, seed=10 + j, dtype=torch.float32) for j in range(4)]
    criterion = bert_emd(2, 3)
    projected = project(hidden)
    embedding = criterion.embedding_loss(projected[0], teacher[0])
    assert embedding.shape == () and relative_error(embedding, ((projected[0] - teacher[0]) ** 2).mean()) < 1e-6
    (embedding + criterion(None, None, projected[1:], teacher[1:])[1]).backward()
    assert len(list(project.parameters())) == (2 if shared else 6)
    assert all(p.grad is not None and p.grad.any() for p in project.parameters())
    assert all(x.grad.any() for x in hidden)


def test_dtypes():
    attn_s, attn_t, hidden_s, hidden_t = some_layers()
    half = [[x.bfloat16() for x in xs] for xs in (attn_s, hidden_s)]
    criterion = bert_emd(2, 3)
    losses, grads = gradients(lambda *xs: torch.stack(criterion(half[0], attn_t, xs, hidden_t)), *half[1])
    assert losses.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in grads)
    assert all(b.dtype == torch.float64 for b in criterion.buffers())
    exact = bert_emd(2, 3)([x.double() for x in half[0]], attn_t, [x.double() for x in half[1]], hidden_t)
    assert relative_error(losses, torch.stack(exact)) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_two_ranks_equal_the_global_batch(masked):
    """One flow, one set of weights, and the average of gradients is the global batch's, whatever each rank's share."""
    results = on_two_ranks(f"""
from test_bert_emd import some_layers, bert_emd, RANK_MASK
attn_s, attn_t, hidden_s, hidden_t = some_layers(b=4)
own = slice(0, 1) if rank == 0 else slice(1, 4)
cut = lambda xs: [x[own].clone() for x in xs]
leaves = [x.requires_grad_() for x in cut(hidden_s)]
criterion = bert_emd(2, 3, process_group=group)
mask = RANK_MASK[own] if {masked} else None
for _ in range(2):
    losses = criterion(cut(attn_s), cut(attn_t), leaves, cut(hidden_t), mask)
losses[1].backward()
result = torch.stack(losses).detach(), [x.grad for x in leaves], dict(criterion.named_buffers()), criterion.flows
""")
    attn_s, attn_t, hidden_s, hidden_t = some_layers(b=4)
    leaves = [x.clone().requires_grad_() for x in hidden_s]
    criterion = bert_emd(2, 3)
    for _ in range(2):
        losses = criterion(attn_s, attn_t, leaves, hidden_t, RANK_MASK if masked else None)
    losses[1].backward()
    for value, _, state, flows in results:
        assert relative_error(value, torch.stack(losses)) < 1e-12
        assert relative_error(flows["hidden"], criterion.flows["hidden"]) < 1e-12
        for name, buffer in criterion.named_buffers():
            assert relative_error(state[name], buffer) < 1e-12
    for i, leaf in enumerate(leaves):
        assert relative_error(torch.cat([r[1][i] for r in results]) / 2, leaf.grad) < 1e-12


RANK_MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


def test_mistakes():
    attn_s, attn_t, hidden_s, hidden_t = some_layers()
    criterion = bert_emd(2, 3)
    with pytest.raises(ValueError, match="embeddings not among them"):
        criterion(attn_s, attn_t, [*hidden_s, hidden_s[0]], hidden_t)
    with pytest.raises(ValueError, match="teacher_attention"):
        criterion(attn_s, None, hidden_s, hidden_t)
    with pytest.raises(ValueError, match="project the student"):
        criterion(None, None, [x[..., :3] for x in hidden_s], hidden_t)
    with pytest.raises(ValueError, match="requires grad"):
        criterion(None, None, hidden_s, [x.clone().requires_grad_() for x in hidden_t])
    for argument, value in {"weights": "uniform", "temperature": 0.0, "cost": "mean", "double_softmax": True}.items():
        with pytest.raises(ValueError, match=argument):
            BertEMDLoss(2, 3, **{argument: value})
    with pytest.raises(ValueError, match="n_student"):
        BertEMDLoss(0, 3)
