"""CoDIRLoss and CRDLoss: the authors' numbers over three steps, the state they keep, and their hazards closed."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastkd.bench import baselines

from cases import GOLDENS, det, randn
from fastkd.losses.codir import CoDIRLoss
from fastkd.losses.crd import CRDLoss
from ranks import on_two_ranks


def golden_loss(cls=CoDIRLoss):
    if cls is CRDLoss:
        loss = CRDLoss(SimpleNamespace(s_dim=12, t_dim=18, feat_dim=8, n_data=20, nce_k=5, nce_t=0.07, nce_m=0.5))
    else:
        loss = CoDIRLoss(12, 18, 20, feat_dim=8, nce_k=5)
    loss = loss.double()
    with torch.no_grad():
        loss.embed_s.linear.weight.copy_(0.3 * det((8, 12), 3))
        loss.embed_s.linear.bias.copy_(0.1 * det((8,), 4))
        loss.embed_t.linear.weight.copy_(0.3 * det((8, 18), 5))
        loss.embed_t.linear.bias.copy_(0.1 * det((8,), 6))
        loss.bank_student.copy_(F.normalize(det((20, 8), 7), dim=1))
        loss.bank_teacher.copy_(F.normalize(det((20, 8), 8), dim=1))
    return loss


def golden_step(step):
    idx = torch.tensor([1, 6, 11, 16]) + step
    negatives = [[(3 * b + 5 * j + step + 2) % 20 for j in range(5)] for b in range(4)]
    contrast_idx = torch.cat([idx[:, None], torch.tensor(negatives)], 1)
    return det((4, 12), 9 + step).requires_grad_(), det((4, 18), 19 + step), idx, contrast_idx


@pytest.mark.parametrize("cls", [CoDIRLoss, CRDLoss])
def test_three_official_steps(cls):
    """The released code's loss, gradients, Z and banks; 1e-6, since it keeps T and Z in float32."""
    loss = golden_loss(cls)
    for step, golden in enumerate(GOLDENS["codir"]):
        f_s, f_t, idx, contrast_idx = golden_step(step)
        value = loss(f_s, f_t, idx, contrast_idx)
        loss.zero_grad()
        value.backward()
        seen = {
            "loss": value.item(),
            "g_fs": f_s.grad.abs().sum().item(),
            "g_Ws": loss.embed_s.linear.weight.grad.abs().sum().item(),
            "g_Wt": loss.embed_t.linear.weight.grad.abs().sum().item(),
            "Z1": loss.z_student.item(),
            "Z2": loss.z_teacher.item(),
            "mem1_row": loss.bank_student[idx[0]].tolist(),
            "mem2_row": loss.bank_teacher[idx[0]].tolist(),
        }
        for name, number in golden.items():
            assert seen[name] == pytest.approx(number, rel=1e-6, abs=1e-9), (step, name)


def test_state_dict_continues_exactly():
    """A new module that loads the state goes on with the same losses, draws, banks and Z, and unlike a fresh one."""
    torch.manual_seed(0)
    loss, other = CoDIRLoss(6, 7, 40, feat_dim=4, nce_k=9), CoDIRLoss(6, 7, 40, feat_dim=4, nce_k=9)
    labels = torch.arange(40) % 3 + 5
    loss.set_labels(labels)
    batch = (randn(5, 6, dtype=torch.float32), randn(5, 7, seed=1, dtype=torch.float32), torch.tensor([3, 0, 39, 7, 8]))
    loss(*batch)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    for _ in range(3):
        assert torch.equal(loss(*batch), other(*batch))
    assert loss.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(loss.state_dict()[name], other.state_dict()[name]) for name in loss.state_dict())
    assert int(loss.sampler[1]) == 4
    other.sampler[1] += 1
    assert not torch.equal(loss(*batch), other(*batch))


def test_z_is_frozen_by_the_first_training_call():
    loss = golden_loss()
    f_s, f_t, idx, contrast_idx = golden_step(0)
    loss.eval()
    first = loss(f_s, f_t, idx, contrast_idx)
    assert loss.z_student == 0
    assert first.item() == pytest.approx(GOLDENS["codir"][0]["loss"], rel=1e-6)
    before = loss.bank_student.clone()
    loss.train()
    loss(f_s, f_t, idx, contrast_idx)
    z = loss.z_student.clone()
    assert z > 0 and not torch.equal(loss.bank_student, before)
    loss(*golden_step(1))
    assert torch.equal(loss.z_student, z)
    changed = (loss.bank_student != before).any(1).nonzero().flatten().tolist()
    assert changed == [1, 2, 6, 7, 11, 12, 16, 17]


@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(preset, dtype):
    """e^(cos / 0.07) passes 65504 at cos 0.776, and Z passes it always; the released code then gives NaN."""
    torch.manual_seed(1)
    loss = CoDIRLoss(8, 8, 50, feat_dim=8, nce_k=6, preset=preset).to(dtype)
    idx = torch.arange(4)
    f = randn(4, 8, dtype=dtype)
    with torch.no_grad():
        loss.embed_t.linear.weight.copy_(loss.embed_s.linear.weight)
        loss.embed_t.linear.bias.copy_(loss.embed_s.linear.bias)
        for bank in filter(lambda x: x is not None, (loss.bank_student, loss.bank_teacher)):
            bank[:4] = loss.embed_s(f).to(dtype)  # cosines of 1
    for _ in range(3):
        f_s = (f + 0.1 * randn(4, 8, seed=5, dtype=dtype)).requires_grad_()
        value = loss(f_s, f, idx)
        (value * 1024).backward()  # as GradScaler does
        assert value.dtype == torch.float32 and value.isfinite()
        assert f_s.grad.dtype == dtype and f_s.grad.isfinite().all() and f_s.grad.abs().sum() > 0
    assert loss.bank_student.dtype == dtype and loss.bank_student.isfinite().all()
    if preset == "official":
        assert loss.z_student.dtype == torch.float32 and 65504 < loss.z_student < torch.inf


def test_a_bf16_teacher_beside_a_float32_student_and_autocast():
    torch.manual_seed(2)
    loss = CoDIRLoss(6, 7, 30, feat_dim=5, nce_k=8)
    f_s, f_t, idx = randn(4, 6, dtype=torch.float32).requires_grad_(), randn(4, 7, seed=1).bfloat16(), torch.arange(4)
    twin = copy.deepcopy(loss)
    plain = loss(f_s, f_t, idx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = twin(f_s, f_t, idx)
    assert plain.dtype == cast.dtype == torch.float32
    assert cast.item() == pytest.approx(plain.item(), rel=0.05)
    (grad,) = torch.autograd.grad(cast, f_s)
    assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_zero_vectors_and_one_example(preset):
    """B = 1, features that project to exactly 0: finite loss, finite gradients, a bank without NaN."""
    loss = CoDIRLoss(6, 7, 2, feat_dim=5, nce_k=3, preset=preset)
    with torch.no_grad():
        loss.embed_s.linear.bias.zero_(), loss.embed_t.linear.bias.zero_()
    for f_s in (torch.zeros(1, 6), randn(1, 6, dtype=torch.float32)):
        f_s.requires_grad_()
        value = loss(f_s, torch.zeros(1, 7), torch.tensor([1]))
        value.backward()
        assert value.isfinite() and f_s.grad.isfinite().all()
        assert f_s.grad.abs().max() < 1e3
        assert all(x.isfinite().all() for x in loss.state_dict().values())


def test_a_row_that_overflowed_leaves_bank_and_z():
    """GradScaler skips the step of an overflow; the bank and Z must come through it too."""
    loss, f_s = golden_loss(), golden_step(0)[0].detach()
    _, f_t, idx, contrast_idx = golden_step(0)
    before = loss.bank_student[idx[2]].clone()
    f_s[2] = torch.inf
    assert loss(f_s, f_t, idx, contrast_idx).isnan()
    assert torch.equal(loss.bank_student[idx[2]], before)
    assert loss.z_student.isfinite() and loss.z_student > 0
    fresh = golden_loss()
    assert fresh(f_s.fill_(torch.nan), f_t * torch.nan, idx, contrast_idx).isnan()
    assert fresh.z_student == 0  # nothing to freeze yet
    fresh(*golden_step(0))
    assert fresh.z_student.item() == pytest.approx(GOLDENS["codir"][0]["Z1"], rel=1e-6)


def test_duplicate_ids_the_last_wins():
    loss = golden_loss()
    f_s, f_t, _, _ = golden_step(0)
    idx = torch.tensor([4, 9, 4, 4])
    expected = F.normalize(0.5 * loss.bank_student[4] + 0.5 * loss.embed_s(f_s)[3], dim=0)
    loss(f_s, f_t, idx)
    assert torch.allclose(loss.bank_student[4], expected, rtol=0, atol=1e-15)


def test_drawn_negatives_have_another_label():
    """Without contrast_idx the loss equals the one with the draw made outside from the same state."""
    torch.manual_seed(3)
    loss = CoDIRLoss(6, 7, 60, feat_dim=4, nce_k=20)
    labels = torch.arange(60) // 20 * 10 - 3
    loss.set_labels(labels[torch.randperm(60)])
    labels = loss.labels
    seen = {}
    original = CoDIRLoss._nce

    def spy(self, queries, banks, index):
        seen["index"] = index
        return original(self, queries, banks, index)

    loss._nce = spy.__get__(loss)
    idx = torch.tensor([5, 17, 59])
    inputs = randn(3, 6, dtype=torch.float32), randn(3, 7, seed=1, dtype=torch.float32), idx
    loss(*inputs)
    index = seen["index"]
    assert index.shape == (3, 21) and torch.equal(index[:, 0], idx)
    assert (labels[index[:, 1:]] != labels[idx][:, None]).all()
    assert all(len(set(row.tolist())) == 21 for row in index)
    loss(*inputs)
    assert not torch.equal(index, seen["index"])


def test_paper_preset_by_hand():
    """InfoNCE: the teacher's vector as anchor, the student's as positive, negatives from the student bank."""
    torch.manual_seed(4)
    loss = CoDIRLoss(12, 14, 30, feat_dim=5, nce_t=0.1, nce_m=0.25, preset="paper").double()
    assert loss.bank_teacher is None and "bank_teacher" not in loss.state_dict()
    states_s, states_t = [randn(3, 4, 6, seed=k) for k in (1, 2)], [randn(3, 4, 7, seed=k) for k in (3, 4)]
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    pool = lambda xs: torch.cat([torch.stack([x[b, mask[b] == 1].mean(0) for b in range(3)]) for x in xs], 1)  # noqa: E731
    idx = torch.tensor([2, 28, 9])
    contrast_idx = torch.cat([idx[:, None], torch.tensor([[1, 3, 5], [7, 7, 0], [29, 4, 6]])], 1)
    v_s = F.normalize(loss.embed_s.linear(pool(states_s)), dim=1)
    v_t = F.normalize(loss.embed_t.linear(pool(states_t)), dim=1)
    bank = loss.bank_student.clone()
    expected = baselines.contrast.eager_info_nce(v_t, v_s, bank, contrast_idx[:, 1:], 0.1).mean()
    assert loss(states_s, states_t, idx, contrast_idx, mask=mask).item() == pytest.approx(expected.item(), rel=1e-12)
    moved = F.normalize(0.25 * bank[idx] + 0.75 * v_s, dim=1)
    assert torch.allclose(loss.bank_student[idx], moved, rtol=0, atol=1e-14)
    assert loss.z_student == 0
    others = torch.ones(30, dtype=torch.bool).index_fill(0, idx, False)
    assert torch.equal(loss.bank_student[others], bank[others])


def test_cls_pooling_under_padding():
    """The first token that counts: position 0, or behind left padding the first real one."""
    loss = CoDIRLoss(6, 6, 5, feat_dim=3, nce_k=2)
    x = randn(2, 4, 6, dtype=torch.float32)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert torch.equal(loss.pooled("f_s", x, None), x[:, 0])
    assert torch.equal(loss.pooled("f_s", x, mask), torch.stack([x[0, 2], x[1, 0]]))


def test_crd_flattens_feature_maps():
    opt = SimpleNamespace(s_dim=12, t_dim=18, feat_dim=8, n_data=20, nce_k=5, nce_t=0.07, nce_m=0.5)
    loss = CRDLoss(opt)
    value = loss(randn(4, 12, 1, 1, dtype=torch.float32), randn(4, 2, 3, 3, dtype=torch.float32), torch.arange(4))
    assert value.isfinite() and value.dim() == 0


TWO_RANKS = """
from cases import randn
from fastkd.losses.codir import CoDIRLoss

def run(rows, group=None):
    torch.manual_seed(0)
    loss = CoDIRLoss(6, 7, 30, feat_dim=5, nce_k=4, process_group=group).double()
    values = []
    for step in range(3):
        idx = torch.tensor([3, 4, 5, 3, 9, 4])[rows] + step
        contrast_idx = torch.cat([idx[:, None], (idx[:, None] + torch.arange(1, 5)) % 30], 1)
        f_s, f_t = randn(6, 6, seed=step)[rows], randn(6, 7, seed=50 + step)[rows]
        values.append(loss(f_s, f_t, idx, contrast_idx).detach())
    return torch.stack(values), loss.state_dict()
"""


def test_two_processes_are_one_with_the_whole_batch():
    """Banks (an id that both ranks hold: the later rank's row stays) and Z come out alike on both, as on one process."""
    ranks = on_two_ranks(TWO_RANKS + "result = run(slice(3 * rank, 3 * rank + 3), group)")
    namespace = {"torch": torch}
    exec(TWO_RANKS, namespace)
    values, state = namespace["run"](slice(0, 6))
    assert torch.allclose((ranks[0][0] + ranks[1][0]) / 2, values, rtol=1e-6, atol=0)  # Z is float32
    for name, x in state.items():
        assert torch.equal(ranks[0][1][name], ranks[1][1][name]), name
        assert torch.allclose(ranks[0][1][name], x, rtol=1e-6 if name.startswith("z_") else 1e-14), name


def wrong(**changes):
    f_s, f_t, idx, contrast_idx = golden_step(0)
    arguments = {"f_s": f_s, "f_t": f_t, "idx": idx, "contrast_idx": contrast_idx} | changes
    return lambda: golden_loss()(**arguments)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("s_dim", lambda: CoDIRLoss(0, 4, 9)),
        ("n_data", lambda: CoDIRLoss(4, 4, 1)),
        ("nce_t", lambda: CoDIRLoss(4, 4, 9, nce_t=0.0)),
        ("nce_k", lambda: CoDIRLoss(4, 4, 9, nce_k=0)),
        ("nce_m", lambda: CoDIRLoss(4, 4, 9, nce_m=1.0)),
        ("preset", lambda: CoDIRLoss(4, 4, 9, preset="offical")),
        ("pool", lambda: CoDIRLoss(4, 4, 9, pool="max")),
        ("labels", lambda: golden_loss().set_labels(torch.zeros(20))),
        ("labels", lambda: golden_loss().set_labels(torch.zeros(19, dtype=torch.long))),
        ("labels", lambda: golden_loss().set_labels(torch.zeros(20, dtype=torch.long))),
        ("f_s", wrong(f_s=det((4, 13), 1))),
        ("f_s", wrong(f_s=det((3, 12), 1))),
        ("f_s", wrong(f_s=[])),
        ("mask", wrong(f_s=det((4, 2, 12), 1), mask=torch.ones(4, 3))),
        ("f_t", wrong(f_t=det((4, 18), 1).requires_grad_())),
        ("idx", wrong(idx=torch.tensor([1.0, 6, 11, 16]))),
        ("idx", wrong(idx=torch.tensor([1, 6, 11, 20]))),
        ("contrast_idx", wrong(contrast_idx=torch.zeros(4, 6, dtype=torch.long))),
        ("index", wrong(contrast_idx=golden_step(0)[3][:, :1])),
    ],
)
def test_mistakes_are_named(name, call):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call()
