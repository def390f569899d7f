"""The authors' own calls: their signatures give their released numbers, quirks included."""

import doctest
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_bert_emd import BUFFERS, VARIANTS, M, N, numpy_step, step_inputs
from test_codir import golden_loss, golden_step
from test_glmd import GOLD, KEPT, MASK, SMALL_STUDENT, STUDENT, TEACHER

import fastkd
from cases import GOLDENS, assert_same, det, randn
from fastkd.compat import bert_emd, codir, fcd, glmd
from fastkd.losses.bert_emd import SMALLEST_WEIGHT
from fastkd.vocab import VocabMap


@pytest.mark.parametrize(("B", "N", "Ds", "Dt"), [(4, 7, 12, 20), (2, 5, 6, 6), (3, 9, 16, 8)])
def test_fcd(B, N, Ds, Dt):
    golden = GOLDENS[f"fcd_B{B}_N{N}_Ds{Ds}_Dt{Dt}"]
    student, teacher = det((B, N, Ds), 1).requires_grad_(), det((B, N, Dt), 2)
    loss = fcd.FCDLoss()(feature_S=student, feature_T=teacher)
    loss.backward()
    assert loss.item() == pytest.approx(golden["token_plus_seq"], abs=1e-12)
    assert student.grad.abs().sum().item() == pytest.approx(golden["grad_l1"], abs=1e-12)
    intended = fcd.FCDLoss(grouping="position")(student, teacher)
    assert intended.item() == pytest.approx(golden["token"] + golden["seq_viewN"], abs=1e-12)


def released_fcd(student, teacher, alpha, beta, gamma, K):
    """The released formula, written from the paper's and its quirks: one view, no normalisation without alpha."""

    def correlation(a, b):
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).mean()

    (B, L, _), loss, sides = student.shape, 0.0, [student, teacher]
    if alpha:
        sides = [F.normalize(x, dim=-1) for x in sides]
        loss = loss + alpha * correlation(*((x @ x.mT).reshape(B, -1) for x in sides))
    if beta:
        sides = [x.transpose(0, 1) for x in sides]
        loss = loss + beta * correlation(*((x @ x.mT).reshape(B, -1) for x in sides))
    if gamma:
        drawn = torch.randperm(B * L)[:K]
        loss = loss + gamma * correlation(*(x.reshape(B * L, -1)[drawn] @ x.reshape(B * L, -1)[drawn].T for x in sides))
    return loss


@pytest.mark.parametrize("weights", [(1, 1, 0), (0, 1, 0), (0.5, 0, 2), (0, 1, 1), (1, 2, 3)], ids=str)
def test_fcd_draws_the_same_tokens(weights):
    student, teacher = randn(4, 9, 6, seed=1), randn(4, 9, 5, seed=2)

    def seeded(f):
        torch.manual_seed(3)
        return f()

    ours = fcd.FCDLoss(*weights, K=7)
    assert_same(
        lambda x: seeded(lambda: ours(x, teacher)),
        lambda x: seeded(lambda: released_fcd(x, teacher, *weights, 7)),
        student, tolerance=1e-10,
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_bert_emd_over_three_steps(variant):
    options, released = VARIANTS[variant], bert_emd.TransformerLoss("f99d98b" if "f99d98b" in variant else "head")
    args = SimpleNamespace(
        use_att=True, use_rep=True, update_weight=True, seperate=options.get("separate", False), eval_step=50,
        add_softmax=options.get("double_softmax", True),
    )  # fmt: skip
    for step, golden in enumerate(GOLDENS[variant]):
        inputs = step_inputs(step)
        T = options.get("temperature", 1)
        losses = released(*inputs[:2], *inputs[2:], "cpu", torch.nn.MSELoss(), args, step, T)
        sum(losses).backward()
        assert [x.item() for x in losses] == pytest.approx([golden["att_loss"], golden["rep_loss"]], rel=1e-5)
        assert inputs[0][0].grad.abs().sum().item() == pytest.approx(golden["g_att0"], rel=1e-5)
        for key, name in BUFFERS.items():
            atol = 1e-6 if min(golden[key]) > SMALLEST_WEIGHT else 12 * SMALLEST_WEIGHT
            torch.testing.assert_close(
                getattr(released.loss, name), torch.tensor(golden[key], dtype=torch.float64), rtol=0, atol=atol
            )


def test_bert_emd_with_one_kind_averages_it_with_the_other_ones_old_weights():
    args = SimpleNamespace(use_att=False, use_rep=True, update_weight=True, seperate=False)
    released, weights = bert_emd.TransformerLoss(), [torch.full((n,), 1.0 / n, dtype=torch.float64) for n in (N, M)]
    for step in range(3):
        inputs = step_inputs(step)
        att_loss, rep_loss = released(*inputs, "cpu", torch.nn.MSELoss(), args, step)
        costs = {"hidden": torch.stack([torch.stack([F.mse_loss(s, t) for t in inputs[3][1:]]) for s in inputs[2][1:]])}
        costs = {kind: x.detach().double().numpy() for kind, x in costs.items()}
        old = {"hidden": [w.numpy() for w in weights]}
        expected, moved = numpy_step(costs, old, "inverse_cost", 1.0, False, True, "sum_of_products")
        weights = [(w + torch.from_numpy(new)) / 2 for w, new in zip(weights, moved["hidden"], strict=True)]
        assert att_loss == 0 and rep_loss.item() == pytest.approx(expected["hidden"], rel=1e-5)
        for kind in ("attention", "hidden"):
            for side, weight in zip(("student", "teacher"), weights, strict=True):
                torch.testing.assert_close(getattr(released.loss, f"{kind}_{side}_weight"), weight, rtol=1e-5, atol=0)


def test_bert_emd_keeps_its_weights_until_reset():
    args = SimpleNamespace(use_att=True, use_rep=True, update_weight=False, seperate=True)
    released, call = bert_emd.transformer_loss, (*step_inputs(0), "cpu", torch.nn.MSELoss(), args, 0)
    released(*call)
    assert (released.loss.hidden_student_weight == 1 / N).all()  # update_weight=False
    args.update_weight = True
    released(*call)
    assert not (released.loss.hidden_student_weight == 1 / N).any()
    with pytest.raises(ValueError, match="those of 4 and 12 layers, got 3 and 12; call reset"):
        released(call[0][:3], *call[1:])
    with pytest.raises(ValueError, match="loss_mse: expected"):
        released(*call[:5], torch.nn.L1Loss(), args, 0)
    released.reset()
    assert released.loss is None


def test_codir_over_three_steps():
    """From a state_dict of the released module, whose memories and Z have other names, and back to it."""
    opt = SimpleNamespace(s_dim=12, t_dim=18, feat_dim=8, n_data=20, nce_k=5, nce_t=0.07, nce_m=0.5)
    loss, source = codir.CRDLoss(opt).double(), golden_loss()
    state = {name: x for name, x in source.state_dict().items() if name.startswith("embed")}
    state["contrast.params"] = torch.tensor([5, 0.07, -1, -1, 0.5])
    state["contrast.memory_v1"], state["contrast.memory_v2"] = source.bank_student, source.bank_teacher
    loss.load_state_dict(state)
    for step, golden in enumerate(GOLDENS["codir"]):
        f_s, f_t, idx, contrast_idx = golden_step(step)
        value = loss(f_s, f_t, idx, contrast_idx)
        value.backward()
        assert value.shape == (1,) and value.item() == pytest.approx(golden["loss"], rel=1e-6)
        assert f_s.grad.abs().sum().item() == pytest.approx(golden["g_fs"], rel=1e-6)
        assert loss.z_student.item() == pytest.approx(golden["Z1"], rel=1e-6)
    state["contrast.params"] = torch.tensor([5, 0.07, 36.0, 99.0, 0.5])
    loss.load_state_dict(state)
    assert (loss.z_student, loss.z_teacher) == (36.0, 99.0)


def test_codir_draws_from_all_examples():
    """Released, an example may be its own negative."""
    opt = SimpleNamespace(s_dim=4, t_dim=4, feat_dim=4, n_data=3, nce_k=200, nce_t=0.5, nce_m=0.5)
    seen = {}
    for negatives in ("all", "others"):
        loss = codir.CRDLoss(opt, negatives=negatives)
        loss._nce = lambda queries, banks, index, negatives=negatives: seen.setdefault(negatives, index)[0, 0] * 0.0
        loss(randn(2, 4, dtype=torch.float32), randn(2, 4, dtype=torch.float32), torch.tensor([0, 2]))
    own = torch.tensor([[0], [2]])
    assert (seen["all"][:, :1] == own).all() and (seen["all"][:, 1:] == own).any()
    assert not (seen["others"][:, 1:] == own).any()


def test_glmd():
    def distil(student=STUDENT, vocab=None, **args):
        args = SimpleNamespace(distill_temperature=15.0, logitsdistil_mask_pad=True, **args)
        # GLM's positions: padding is at 0, like the first token.
        positions = torch.stack([MASK * torch.arange(6), MASK * 0], 1)
        return glmd.logits_distil_loss(student, TEACHER, args, position_ids=positions, vocab=vocab).item()

    assert distil() == pytest.approx(GOLD["full_T15"], rel=1e-12)
    assert distil(SMALL_STUDENT, VocabMap(KEPT, 50)) == pytest.approx(GOLD["vc_unmap_T15"], rel=1e-12)
    assert distil(logitsdistil_top_n=5.0) == pytest.approx(GOLD["top5"], rel=1e-12)
    assert distil(logitsdistil_top_n=0.2, logitsdistil_teacher_min=True) == pytest.approx(
        GOLD["top20pct_teacher_min"], rel=1e-12
    )
    assert distil(logitsdistil_mse=True) == pytest.approx(GOLD["mse"], rel=1e-12)
    kl = glmd.CustomLoss.kl_div(STUDENT / 15, TEACHER / 15, input_mask=MASK) * 15**2
    assert kl.item() == pytest.approx(GOLD["full_T15"], rel=1e-12)
    soft = glmd.CustomLoss.cross_entropy(det((4, 3), 14), det((4, 3), 15))
    assert soft.item() == pytest.approx(GOLD["stage3_softCE"], rel=1e-12)


@pytest.mark.parametrize("keep_batch", [False, True])
@pytest.mark.parametrize("masks", ["", "input_mask", "mask", "both", "one"])
@pytest.mark.parametrize("name", ["kl_div", "cross_entropy", "mse_loss"])
def test_glmd_divergences(name, masks, keep_batch):
    """Against the released rules in plain PyTorch: input_mask multiplies the logits, mask the losses, and all rows count."""
    weights = MASK * torch.tensor([1.0, 0.5, 2.0])[:, None]
    given = {"input_mask": MASK[..., None], "mask": weights}
    options = {key: x for key, x in given.items() if masks in (key, "both")} or ({"mask": 1} if masks == "one" else {})

    def released(student):
        s, t = (x * options["input_mask"] if "input_mask" in options else x for x in (student, TEACHER))
        rows = {
            "kl_div": lambda: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1),
            "cross_entropy": lambda: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1),
            "mse_loss": lambda: (s - t).square().mean(-1),
        }[name]()
        rows = rows * options["mask"] if "mask" in options else rows
        return rows.mean(1) if keep_batch else rows.mean()

    call = getattr(glmd.CustomLoss, name)
    assert_same(lambda x: call(x, TEACHER, keep_batch=keep_batch, **options), released, STUDENT, tolerance=1e-11)


@pytest.mark.parametrize(
    "subject", [fcd.FCDLoss, bert_emd.TransformerLoss, codir.CRDLoss, glmd.CustomLoss, glmd.logits_distil_loss]
)
def test_the_example_runs(subject):
    (found,) = doctest.DocTestFinder(recurse=False).find(subject, globs={"torch": torch, "fastkd": fastkd})
    assert found.examples and doctest.DocTestRunner().run(found).failed == 0
