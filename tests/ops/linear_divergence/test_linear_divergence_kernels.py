"""Every implementation of linear_divergence against the reference in float64, values and all three gradients."""

import pytest
import subjects
import torch
import torch.nn.functional as F
from fastkd.bench import baselines

from cases import gradients, randn, relative_error
from fastkd import TopK, backends, linear_divergence, thresholds
from fastkd.ops import linear_divergence_library

KINDS = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")
HERE = [
    pytest.param(name, marks=[pytest.mark.gpu] if subjects.device_of(name) == "cuda" else [])
    for name in ("cpu", "triton")
    if name in backends.WRITTEN["linear_divergence"] and (name != "cpu" or backends.UNAVAILABLE["cpu"] is None)
]
every_backend = pytest.mark.parametrize("backend", HERE)
every_kind = pytest.mark.parametrize("kind", KINDS)
either_way = pytest.mark.parametrize("recompute", [False, True])


def sides(rows, vocabulary, widths=(24, 40), dtype=torch.float32, noise=None, seed=1):
    """(hidden, head, bias) of the student and of the teacher; logits of size about 2. With noise, nearly the same."""
    made = []
    for i, width in enumerate(widths):
        hidden, head = (
            randn(rows, width, seed=seed + i),
            randn(vocabulary, width, seed=seed + 5 + i, scale=2 * width**-0.5),
        )
        made.append((hidden.to(dtype), head.to(dtype), randn(vocabulary, seed=seed + 8 + i, scale=0.5).to(dtype)))
    if noise is not None:
        hidden, head, bias = made[1]
        made[0] = (
            (hidden.double() * (1 + noise * randn(*hidden.shape, seed=77))).to(dtype),
            head.clone(),
            bias.clone(),
        )
    return made


def call(teacher, backend, **options):
    """linear_divergence as a function of the student's hidden states, head and bias."""
    hidden, head, bias = teacher
    device = subjects.device_of(backend)
    to = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    options = {name: to(x) for name, x in options.items()}
    if isinstance(hidden, TopK):
        hidden = TopK(*map(to, hidden))
    return lambda h, w, b: linear_divergence(
        to(h), to(w), to(hidden), to(head), student_bias=to(b), teacher_bias=to(bias), backend=backend, **options
    ).to("cpu")


def double(x):
    if isinstance(x, TopK):
        return TopK(*map(double, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def errors(student, teacher, backend, **options):
    """Relative errors of the loss and of the gradients of hidden states, head and bias."""
    loss, found = gradients(call(teacher, backend, **options), *student)
    exact = call(tuple(map(double, teacher)), "reference", **{name: double(x) for name, x in options.items()})
    true_loss, wanted = gradients(exact, *map(double, student))
    assert loss.dtype == torch.float32 and all(x.dtype == y.dtype for x, y in zip(found, student, strict=True))
    return [relative_error(x, y) for x, y in zip((loss, *found), (true_loss, *wanted), strict=True)]


def size(backend, rows, vocabulary):
    """The interpreter is slow: there the smaller of the shapes."""
    return (rows, vocabulary) if backend == "cpu" or not backends.INTERPRETED else (min(rows, 9), min(vocabulary, 301))


@every_backend
@every_kind
@either_way
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients(kind, recompute, reduction, backend):
    """More rows than a chunk holds, more tokens than a block, none of them a round number; some rows masked."""
    rows, vocabulary = size(backend, 307, 1777)
    student, teacher = sides(rows, vocabulary)
    mask = randn(rows, seed=3) > -0.5
    options = {"kind": kind, "temperature": 2.5, "beta": 0.3, "alpha": 0.2, "reduction": reduction, "mask": mask}
    loss, *of = errors(student, teacher, backend, recompute_logits=recompute, **options)
    assert loss < 2e-6
    assert max(of) < 1e-5


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "widths"), [(1, 1, (1, 1)), (1, 33, (7, 129)), (5, 2, (31, 1)),
                                                       (65, 513, (97, 33)), (1030, 130, (5, 8)), (3, 4611, (8, 16))])  # fmt: skip
def test_awkward_shapes(rows, vocabulary, widths, dtype, recompute):
    student, teacher = sides(rows, vocabulary, widths, dtype)
    found = errors(student, teacher, "cpu", recompute_logits=recompute, reduction="none", kind="soft_ce")
    assert found[0] < 2e-6
    assert (
        max(found[1:]) < (1e-5 if dtype == torch.float32 else 4e-3) or vocabulary == 1
    )  # one token: all gradients are 0


@every_backend
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_convergence_the_gradient_keeps_its_digits(dtype, recompute, backend):
    """KL about 5e-3. What is left is the rounding of two float32 products, seen through their difference."""
    if backend == "triton" and backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    rows, vocabulary = size(backend, 300, 2000)
    student, teacher = sides(rows, vocabulary, (64, 64), dtype, noise=0.05)
    found = errors(student, teacher, backend, recompute_logits=recompute)
    assert found[0] < 2e-5
    assert max(found[1:]) < (2e-5 if dtype == torch.float32 else 4e-3)  # bfloat16: an ulp of the result


def eager(student, teacher, **options):
    biases = {"student_bias": student[2], "teacher_bias": teacher[2]}
    return baselines.linear_divergence.eager(*student[:2], *teacher[:2], **biases, **options)


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
@either_way
def test_bfloat16_gradients_are_ten_times_closer_than_eagers(recompute):
    student, teacher = sides(300, 2000, (64, 64), torch.bfloat16, noise=0.05)
    ours = errors(student, teacher, "cpu", recompute_logits=recompute)
    exact = call(tuple(map(double, teacher)), "reference")
    _, wanted = gradients(exact, *map(double, student))

    _, found = gradients(lambda *student: eager(student, teacher).mean().float(), *student)
    for our, x, y in zip(ours[1:], found, wanted, strict=True):
        assert our <= 0.1 * relative_error(x, y)


@every_backend
@either_way
@every_kind
def test_labels_caps_scales_and_weights(kind, recompute, backend):
    rows, vocabulary = size(backend, 70, 1601)
    student, teacher = sides(rows, vocabulary)
    labels = torch.arange(rows) * 37 % vocabulary
    labels[2] = -100
    options = {"kind": kind, "temperature": 1.7, "weights": randn(rows, seed=4).abs(), "labels": labels}
    options |= {"hard_weight": 0.4, "logit_scale": (0.8, 1.3), "logit_softcap": (3.0, None)}
    loss, *of = errors(student, teacher, backend, recompute_logits=recompute, **options)
    assert loss < 2e-6
    assert max(of) < 1e-5


@every_backend
@either_way
@pytest.mark.parametrize("tail", [None, True])
@pytest.mark.parametrize("kind", ["forward_kl", "skew_kl", "jsd", "tvd", "soft_ce"])
@pytest.mark.parametrize("shaped", [False, True])
def test_a_sparse_teacher_needs_no_head(shaped, kind, tail, recompute, backend):
    rows, vocabulary = size(backend, 270, 1301)
    student, teacher = sides(rows, vocabulary)
    log_probs, indices = F.log_softmax(2 * F.linear(*(x.double() for x in teacher)), -1).topk(9)
    sparse = TopK(indices, log_probs.float(), tail)
    mask = randn(rows, seed=3) > -0.5
    options = {"kind": kind, "temperature": 1.5, "mask": mask, "labels": indices[:, 0], "hard_weight": 0.3}
    options |= {"logit_scale": (0.8, 1.0), "logit_softcap": (3.0, None)} if shaped else {}
    loss, *of = errors(student, (sparse, None, None), backend, recompute_logits=recompute, **options)
    assert loss < 2e-6
    assert max(of) < 1e-5


@every_backend
@either_way
@every_kind
def test_an_untrained_student(kind, recompute, backend):
    """Far from the teacher, whose logits are larger: no worse than eager on logits of as much rounding."""
    rows, vocabulary = size(backend, 5, 8000)
    student, teacher = sides(rows, vocabulary)
    teacher = (3 * teacher[0], *teacher[1:])
    found = errors(
        student, teacher, backend, kind=kind, recompute_logits=recompute, reduction="none", alpha=1e-6, beta=0.3
    )
    loss, of_eager = gradients(lambda *student: eager(student, teacher, kind=kind, beta=0.3, alpha=1e-6), *student)
    true_loss, wanted = gradients(call(tuple(map(double, teacher)), "reference", kind=kind, reduction="none",
                                       alpha=1e-6, beta=0.3), *map(double, student))  # fmt: skip
    eager_errors = [relative_error(x, y) for x, y in zip((loss, *of_eager), (true_loss, *wanted), strict=True)]
    assert all(ours <= 1.25 * other + 1e-6 for ours, other in zip(found, eager_errors, strict=True))


@every_backend
@either_way
def test_masked_rows_that_hold_nan_change_nothing(recompute, backend):
    rows, vocabulary = size(backend, 300, 200)
    student, teacher = sides(rows, vocabulary)
    mask = torch.arange(rows) % 3 != 1
    wanted, wanted_gradients = gradients(call(teacher, backend, mask=mask, recompute_logits=recompute), *student)
    student[0][4], teacher[0][7] = torch.nan, torch.inf
    loss, found = gradients(call(teacher, backend, mask=mask, recompute_logits=recompute), *student)
    assert torch.equal(loss, wanted) and all(map(torch.equal, found, wanted_gradients))
    assert (found[0][~mask] == 0).all()
    loss, found = gradients(call(teacher, backend, mask=torch.zeros(rows), recompute_logits=recompute), *student)
    assert loss == 0 and all((x == 0).all() for x in found)


@every_backend
@either_way
def test_tokens_with_a_bias_of_minus_infinity(recompute, backend):
    """The padding of a vocabulary; whole blocks of it."""
    rows, vocabulary = size(backend, 6, 1800)
    student, teacher = sides(rows, vocabulary)
    fewer = vocabulary * 2 // 3
    for side in (student, teacher):
        side[2][fewer:] = -torch.inf
    loss, found = gradients(call(teacher, backend, recompute_logits=recompute), *student)
    less = [(h, w[:fewer], b[:fewer]) for h, w, b in (student, teacher)]
    wanted, wanted_gradients = gradients(call(less[1], "reference"), *less[0])
    assert relative_error(loss, wanted) < 2e-6
    for x, y in zip(found, wanted_gradients, strict=True):
        assert relative_error(x[: len(y)], y) < 1e-5
        assert (x[len(y) :] == 0).all()


@every_backend
def test_frozen_layers_have_no_gradient_and_no_cost(backend):
    student, teacher = sides(9, 50)
    device = subjects.device_of(backend)
    (hidden, head, bias), (t_hidden, t_head, _) = ([x.to(device) for x in side] for side in (student, teacher))
    hidden.requires_grad_()
    linear_divergence(hidden, head, t_hidden, t_head, student_bias=bias, backend=backend).backward()
    assert hidden.grad is not None and head.grad is None and bias.grad is None
    kept = hidden.grad.clone()
    head.requires_grad_()
    linear_divergence(hidden.detach(), head, t_hidden, t_head, student_bias=bias, backend=backend).backward()
    both = linear_divergence(hidden, head, t_hidden, t_head, student_bias=bias, backend=backend)
    found = torch.autograd.grad(both, (hidden, head))
    assert torch.equal(found[0], kept) and torch.equal(found[1], head.grad)
    with torch.no_grad():
        alone = [linear_divergence(hidden, head, t_hidden, t_head, student_bias=bias, kind=kind, backend=backend)
                 for kind in ("forward_kl", "jsd")]  # fmt: skip
    assert relative_error(alone[0], both) < 1e-6 and not alone[1].requires_grad


@every_backend
@either_way
def test_two_runs_two_results_and_two_backwards(recompute, backend):
    """Bitwise the same twice; nothing returned is a buffer that another call, or another backward, writes to."""
    device = subjects.device_of(backend)
    student, teacher = sides(*size(backend, 300, 400))
    leaves = [x.to(device).requires_grad_() for x in student]
    run = lambda: linear_divergence(  # noqa: E731
        leaves[0], leaves[1], teacher[0].to(device), teacher[1].to(device), student_bias=leaves[2], recompute_logits=recompute,
        backend=backend,
    )  # fmt: skip
    loss = run()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.fill_(7)
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), copies))
    again = run()
    assert torch.equal(again, loss) and all(map(torch.equal, torch.autograd.grad(again, leaves), copies))


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
@either_way
def test_results_do_not_depend_on_the_number_of_threads(recompute):
    student, teacher = sides(300, 1700, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss, found = gradients(call(teacher, "cpu", recompute_logits=recompute), *student)
        results.append((loss, *found))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@every_backend
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    student, teacher = sides(*size(backend, 20, 90))
    for recompute in (False, True):
        plain = call(teacher, backend, recompute_logits=recompute, mask=torch.arange(student[0].shape[0]) != 3)
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        loss, found = gradients(plain, *student)
        other, other_found = gradients(compiled, *student)
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(other_found, found)


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
def test_a_label_outside_the_vocabulary_is_an_error():
    student, teacher = sides(4, 10)
    with pytest.raises(ValueError, match=r"labels: a label that counts must lie in \[0, 10\)"):
        call(teacher, "cpu", labels=torch.tensor([1, 2, 10, 3]), hard_weight=1.0)(*student)


@pytest.mark.parametrize("backend", [x for x in HERE if x.values == ("triton",)])
@either_way
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_chunks_of_rows_and_several_blocks_of_columns(kind, recompute, backend, monkeypatch):
    """As the interpreter cannot have so many rows, chunks of four."""
    from fastkd.kernels import linear_divergence as kernels

    monkeypatch.setattr(kernels, "ROWS", {False: 4, True: 4})
    for rows, vocabulary in ((11, 130), (5, 2051)):
        student, teacher = sides(rows, vocabulary)
        options = {"kind": kind, "mask": torch.arange(rows) != 2, "labels": torch.arange(rows), "hard_weight": 0.2}
        loss, *of = errors(student, teacher, backend, recompute_logits=recompute, **options)
        assert loss < 2e-6
        assert max(of) < 1e-5


@every_backend
@either_way
@pytest.mark.parametrize("spare", [0, 2])
def test_num_valid_changes_nothing(spare, recompute, backend):
    student, teacher = sides(11, 40)
    mask = torch.arange(11) % 3 != 1
    for reduction in ("mean", "none"):
        options = {
            "mask": mask,
            "recompute_logits": recompute,
            "reduction": reduction,
            "labels": torch.arange(11),
            "hard_weight": 0.5,
        }
        loss, *of = errors(student, teacher, backend, num_valid=int(mask.sum()) + spare, **options)
        assert loss < 2e-6
        assert max(of) < 1e-5
    with pytest.raises(ValueError, match="num_valid"):
        call(teacher, "cpu", mask=mask, num_valid=3)(*student)


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
@either_way
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("hidden", "head"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
                                              (torch.float16, torch.bfloat16)], ids=str)  # fmt: skip
def test_hidden_states_and_head_of_two_dtypes(hidden, head, masked, recompute):
    """Several chunks of rows, where the place for a row's gradient is narrower, or wider, than the row."""
    student, teacher = sides(400, 700, (25, 24))
    student = (student[0].to(hidden), student[1].to(head), student[2])
    mask = torch.arange(400) % 5 != 2 if masked else None
    loss, *of = errors(student, teacher, "cpu", recompute_logits=recompute, mask=mask)
    assert loss < 2e-6
    for error, dtype in zip(of, (hidden, head, torch.float32), strict=True):
        assert error < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
def test_an_upstream_gradient_scales_what_the_forward_made():
    student, teacher = sides(90, 300, dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in student]
    run = call(teacher, "cpu")
    wanted = torch.autograd.grad(run(*leaves), leaves)
    loss = run(*leaves)
    for factor in (-4.0, 1.0, 4.0):  # powers of two: exact in bfloat16; the first one is handed over, the others made
        found = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        assert all(torch.equal(x, factor * y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("masked", ["", "some", "all"])
def test_products_by_the_library_give_what_our_tile_gives(sparse, masked, monkeypatch):
    """Whichever of them this processor prefers, over more than one chunk, with every option."""
    student, teacher = sides(300, 501)
    mask = torch.arange(300) % 3 > 0 if masked == "some" else torch.zeros(300, dtype=torch.bool) if masked else None
    if masked:
        student[0][~mask] = torch.nan
    if sparse:
        log_probs, indices = randn(300, 501, seed=9).log_softmax(-1).topk(7)
        teacher = TopK(indices, log_probs, True), None, None
    options = {"mask": mask, "labels": torch.arange(300), "hard_weight": 0.3, "logit_softcap": (3.0, None)}
    monkeypatch.setattr(linear_divergence_library, "MOST_ROWS", 128)
    found = []
    for up_to in (thresholds.ALWAYS, thresholds.NEVER):
        monkeypatch.setitem(thresholds.UP_TO, "linear_divergence", up_to)
        loss, of_student = gradients(call(teacher, "cpu", **options), *student)
        found.append([loss, *of_student])
    assert max(relative_error(x, y) for x, y in zip(*found, strict=True)) < 2e-6


@pytest.mark.skipif(not backends.INTERPRETED, reason="without a GPU, Triton runs in the interpreter only")
def test_small_weights_in_float16_and_many_chunks_triton(monkeypatch):
    """Each row weighs 2^-20: its gradient would be subnormal in float16."""
    monkeypatch.setattr("fastkd.kernels.linear_divergence.BUDGET", 0)  # 128 rows to a chunk
    sizes = (150, 8), (40, 8), (150, 9), (40, 9)
    tensors = [randn(*size, seed=i).half() for i, size in enumerate(sizes)]

    def pulled(dtype, backend):
        x = [t.detach().to(dtype) for t in tensors]
        leaves = [t.requires_grad_() for t in x[:2]]
        loss = linear_divergence(*x, num_items_in_batch=2**20, backend=backend)
        return torch.autograd.grad(loss * 2.0**20, leaves)

    for found, true in zip(pulled(torch.float16, "triton"), pulled(torch.float64, "reference"), strict=True):
        assert relative_error(found.double(), true) < 1e-3
