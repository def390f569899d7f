"""linear_divergence with a student that has a part of the tokens, and a teacher that keeps its probabilities over all of
them: what a dropped word is compared with, against sums written out in float64."""

import pytest
import test_linear_divergence_kernels as kernels
import torch
import torch.nn.functional as F

from cases import MUTANTS, gradients, randn, relative_error
from fastkd import GLMDLoss, TopK, VocabMap, backends, divergence, linear_divergence
from fastkd.vocab import alignment

KINDS = kernels.KINDS
LEFT_OUT = ("forward_kl", "reverse_kl", "soft_ce")  # kinds that can leave a part of the teacher's mass out
ROWS, VOCABULARY = 7, 23
KEPT = torch.tensor([21, 3, 7, 0, 12, 5, 9, 22, 1])
STAND_INS = KEPT[torch.arange(VOCABULARY) % len(KEPT)]
OPTIONS = {"temperature": 1.7, "logit_scale": (0.9, 1.1), "logit_softcap": (6.0, 4.0)}
every_backend = pytest.mark.parametrize("backend", ["reference", *kernels.HERE])
either_way = pytest.mark.parametrize("recompute", [False, True])


def sides(rows=ROWS, vocabulary=VOCABULARY, kept=KEPT, dtype=torch.float64, **options):
    """(hidden, head, bias) of a student with the tokens `kept`, and of a teacher with all."""
    (hidden, head, bias), teacher = kernels.sides(rows, vocabulary, dtype=dtype, **options)
    return (hidden, head[kept], bias[kept]), teacher


def shaped(side, which):
    hidden, head, bias = (x.double() for x in side)
    scale, cap = OPTIONS["logit_scale"][which], OPTIONS["logit_softcap"][which]
    return cap * torch.tanh(scale * F.linear(hidden, head, bias) / cap)


def left_out(kind, student, teacher, kept):
    """Rows, written out: softmax over all of the teacher's tokens, of which the kept ones are compared."""
    p = torch.softmax(shaped(teacher, 1) / OPTIONS["temperature"], -1)[:, kept]  # sums to less than 1
    log_q = torch.log_softmax(shaped(student, 0) / OPTIONS["temperature"], -1)
    rows = {
        "forward_kl": lambda: p * (p.log() - log_q),
        "soft_ce": lambda: -p * log_q,
        "reverse_kl": lambda: log_q.exp() * (log_q - p.log()),
    }[kind]()
    return OPTIONS["temperature"] ** 2 * rows.sum(-1)


def check(found, wanted, allowed):
    (loss, got), (true, true_gradients) = found, wanted
    assert relative_error(loss, true) <= allowed[0]
    for x, y in zip(got, true_gradients, strict=True):
        assert relative_error(x, y) <= allowed[1]


def both(kind, student, teacher, backend, kept=KEPT, vocab=None, **options):
    """(ours, written out), each loss and gradients."""
    vocab = kept if vocab is None else vocab
    call = kernels.call(teacher, backend, kind=kind, vocab=vocab, teacher_tokens="all", **OPTIONS, **options)
    mask, reduction = options.get("mask"), options.get("reduction", "mean")

    def written_out(*x):
        rows = left_out(kind, x, teacher, kept)
        w = torch.ones_like(rows) if options.get("weights") is None else options["weights"].double()
        w = w if mask is None else torch.where(mask, w, 0)
        rows = torch.where(w != 0, rows, 0) * w
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / w.sum()}[reduction]

    return gradients(call, *student), gradients(written_out, *(x.double() for x in student))


@either_way
@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mass_outside_the_kept_ids_is_ignored(kind, reduction, recompute):
    student, teacher = sides()
    mask, weights = randn(ROWS, seed=3) > -0.5, randn(ROWS, seed=4).abs()
    options = {"mask": mask, "weights": weights, "recompute_logits": recompute, "reduction": reduction}
    check(*both(kind, student, teacher, "reference", **options), (1e-12, 1e-11))
    found, wanted = both(kind, student, teacher, "reference", vocab=VocabMap(KEPT, VOCABULARY), **options)
    check(found, wanted, (1e-12, 1e-11))
    renormalised = kernels.call(teacher, "reference", kind=kind, vocab=KEPT, **OPTIONS, **options)(*student)
    assert relative_error(renormalised, wanted[0]) > 1e-2


@every_backend
@either_way
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_kernels_against_float64(kind, recompute, backend):
    rows, vocabulary = kernels.size(backend, 150, 2777)
    kept = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: vocabulary // 2]
    student, teacher = sides(rows, vocabulary, kept, torch.float32)
    mask = randn(rows, seed=3) > -0.5
    mask[0] = False
    for reduction in ("mean", "none"):
        options = {"recompute_logits": recompute, "mask": mask, "reduction": reduction}
        _, wanted = both(kind, student, teacher, backend, kept, **options)
        padded = [(side[0].index_fill(0, torch.tensor([0]), torch.nan), *side[1:]) for side in (student, teacher)]
        found, _ = both(kind, *padded, backend, kept, **options)
        assert (found[1][0][~mask] == 0).all()
        check(found, wanted, (1e-6, 1e-5))


@every_backend
def test_bfloat16_is_as_accurate_as_its_operands(backend):
    if backend == "triton" and backends.INTERPRETED:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    kept = torch.arange(0, 900, 3)
    student, teacher = sides(40, 900, kept, torch.bfloat16)
    check(*both("forward_kl", student, teacher, backend, kept), (1e-5, 4e-3))


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("place", [0, 1])
def test_no_mutant_of_the_kept_mass_survives(mutant, place, monkeypatch):
    """What the divergence of the kept tokens is weighted with, or shifted by, alone wrong."""
    student, teacher = sides()
    right = alignment.weighting

    def wrong(*args):
        found = list(right(*args))
        found[place] = MUTANTS[mutant](found[place])
        return found

    monkeypatch.setattr(alignment, "weighting", wrong)
    with pytest.raises(AssertionError):
        check(*both("forward_kl", student, teacher, "reference"), (1e-4, 1e-4))


@pytest.mark.parametrize("kind", ["forward_kl", "soft_ce"])
def test_equals_a_sparse_teacher_without_a_tail(kind):
    student, teacher = sides()
    log_p = torch.log_softmax(shaped(teacher, 1) / OPTIONS["temperature"], -1)[:, KEPT]
    sparse = TopK(torch.arange(len(KEPT)).expand(ROWS, -1).contiguous(), log_p)
    options = OPTIONS | {"logit_scale": 0.9, "logit_softcap": 6.0}
    wanted = gradients(kernels.call((sparse, None, None), "reference", kind=kind, **options), *student)
    check(both(kind, student, teacher, "reference")[0], wanted, (1e-12, 1e-11))


@either_way
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_token_is_counted_as_its_stand_in(kind, recompute):
    """The student's softmax is over all tokens; padding of the teacher's head is none of them."""
    student, teacher = sides()
    vocab = VocabMap(KEPT, VOCABULARY, replacement=STAND_INS)
    padded = (teacher[0], torch.cat([teacher[1], randn(3, 40)]), torch.cat([teacher[2], randn(3)]))
    mask = randn(ROWS, seed=3) > -0.5
    options = {"kind": kind, "temperature": 1.7, "mask": mask, "reduction": "none"}
    call = kernels.call(padded, "reference", vocab=vocab, teacher_tokens="all", recompute_logits=recompute, **options)
    place = [KEPT.tolist().index(i if i in KEPT else int(STAND_INS[i])) for i in range(VOCABULARY)]
    t = F.linear(*teacher)
    wanted = gradients(lambda *x: divergence(F.linear(*x)[:, place], t, **options), *student)
    check(gradients(call, *student), wanted, (1e-12, 1e-11))


@every_backend
def test_stand_ins_in_kernels(backend):
    rows, vocabulary = kernels.size(backend, 100, 1777)
    kept = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: vocabulary // 3]
    vocab = VocabMap(kept, vocabulary, replacement=int(kept[0]))
    student, teacher = sides(rows, vocabulary, kept, torch.float32)
    options = {"kind": "jsd", "vocab": vocab, "teacher_tokens": "all"}
    exact = kernels.call(tuple(map(kernels.double, teacher)), "reference", **options)
    wanted = gradients(exact, *map(kernels.double, student))
    check(gradients(kernels.call(teacher, backend, **options), *student), wanted, (2e-6, 1e-5))


def test_the_gradient_of_a_stand_in_of_thousands_is_summed_in_float32():
    """A bfloat16 sum of ones would stop growing at 256."""
    head = randn(2, 3, dtype=torch.bfloat16).requires_grad_()
    place = torch.ones(4000, dtype=torch.int64)
    rows = alignment._expanded(head, place)
    assert rows.dtype == torch.bfloat16 and torch.equal(rows, head[place])
    (grad,) = torch.autograd.grad(rows.sum(), head)
    assert grad.dtype == torch.bfloat16 and grad.tolist() == [[0.0] * 3, [4000.0] * 3]


@pytest.mark.parametrize(
    "vocab", [KEPT, VocabMap(KEPT, VOCABULARY, replacement=STAND_INS)], ids=["left out", "stand-ins"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hard_labels_use_the_students_own_vocabulary(vocab, reduction):
    student, teacher = sides()
    labels = torch.tensor([0, 8, -100, 3, 3, -100, 1])
    options = {"vocab": vocab, "teacher_tokens": "all", "labels": labels, "reduction": reduction, **OPTIONS}
    found = gradients(kernels.call(teacher, "reference", hard_weight=0.3, **options), *student)

    def separate(*x):
        hard = F.cross_entropy(shaped(x, 0), labels, reduction=reduction)
        return kernels.call(teacher, "reference", **options)(*x) + 0.3 * hard

    check(found, gradients(separate, *student), (1e-12, 1e-11))


def test_keeping_the_full_vocabulary_changes_nothing():
    student, teacher = sides(kept=torch.arange(VOCABULARY))
    wanted = gradients(kernels.call(teacher, "reference"), *student)
    for vocab in (None, torch.arange(VOCABULARY), VocabMap(torch.arange(VOCABULARY), VOCABULARY)):
        found = gradients(kernels.call(teacher, "reference", vocab=vocab, teacher_tokens="all"), *student)
        check(found, wanted, (0, 0))


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
def test_compiled_equals_eager():
    student, teacher = sides(dtype=torch.float32)
    mask = randn(ROWS, seed=3) > -0.5
    call = kernels.call(teacher, "cpu", vocab=KEPT, teacher_tokens="all", mask=mask)
    check(gradients(torch.compile(call, fullgraph=True), *student), gradients(call, *student), (1e-6, 1e-5))


def test_the_kept_mass_as_an_op():
    _, (hidden, head, bias) = sides(dtype=torch.float32)
    dropped = torch.tensor([i for i in range(VOCABULARY) if i not in KEPT])
    args = (hidden, head, bias, KEPT, dropped, randn(ROWS) > 0, "reference", 2.0, 1.0, 0.0, False, None)
    torch.library.opcheck(torch.ops.fastkd.kept_log_mass, args)


@pytest.mark.parametrize("how_far", [1e4, -1e4])
def test_a_kept_part_of_almost_all_and_of_almost_nothing(how_far):
    """log of the kept mass is as far as the logits are, or rounds to 0: no overflow, no 0 times infinity."""
    student, (hidden, head, bias) = sides(dtype=torch.float32)
    bias = bias.index_add(0, KEPT, torch.full((len(KEPT),), how_far))
    for kind in LEFT_OUT:
        call = kernels.call((hidden, head, bias), "auto", kind=kind, vocab=KEPT, teacher_tokens="all")
        loss, got = gradients(call, *student)
        exact = kernels.call(tuple(map(kernels.double, (hidden, head, bias))), "reference", kind=kind, vocab=KEPT,
                             teacher_tokens="all")  # fmt: skip
        check((loss, got), gradients(exact, *map(kernels.double, student)), (1e-3, 1e-2))


def test_glmd_from_hidden_states_is_the_public_one():
    student, teacher = sides()
    vocab = VocabMap(KEPT, VOCABULARY, replacement=STAND_INS)
    loss = GLMDLoss(2.0, vocab=vocab, teacher_tokens="all", normalize="tokens")
    shape = lambda x: x[None]  # noqa: E731
    found = loss.from_hidden(shape(student[0]), student[1], shape(teacher[0]), teacher[1], student_bias=student[2])
    wanted = kernels.call((*teacher[:2], None), "auto", vocab=vocab, teacher_tokens="all", temperature=2.0)(*student)
    assert torch.equal(found, wanted)


def test_invalid_arguments_are_errors():
    student, teacher = sides()
    call = lambda **x: kernels.call(teacher, "auto", **({"teacher_tokens": "all", "vocab": KEPT} | x))(*student)  # noqa: E731
    for kind in set(KINDS) - set(LEFT_OUT):
        with pytest.raises(ValueError, match="replacement"):
            call(kind=kind)
    with pytest.raises(ValueError, match="teacher_tokens"):
        call(teacher_tokens="some")
    with pytest.raises(ValueError, match="only once"):
        call(vocab=torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="student_head"):
        call(vocab=VocabMap(KEPT[:5], VOCABULARY, replacement=int(KEPT[0])))
    with pytest.raises(ValueError, match="teacher_head"):
        call(vocab=VocabMap(KEPT, 99, replacement=int(KEPT[0])))
    sparse = TopK(torch.zeros(ROWS, 1, dtype=torch.int64), torch.zeros(ROWS, 1))
    with pytest.raises(ValueError, match="encode"):
        linear_divergence(*student[:2], sparse, teacher_tokens="all")
    with pytest.raises(ValueError, match="stand-in"):
        GLMDLoss(vocab=VocabMap(KEPT, VOCABULARY), teacher_tokens="all")
