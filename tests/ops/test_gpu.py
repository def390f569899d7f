"""What only a GPU can show: no synchronisation, CUDA-graph capture, more than 2³¹ elements. Precision on the GPU is
tests/ops/test_kernels.py's business, which runs there too."""

import pytest
import torch

import fastkd
from cases import randn, relative_error
from fastkd.checks import KINDS
from on_gpu import never_waits, replays

pytestmark = pytest.mark.gpu


def logits(rows, width, seed=0, dtype=torch.bfloat16):
    return (randn(rows, width, seed=seed + i, scale=3.0).to("cuda", dtype) for i in (1, 2))


def every_divergence(student, teacher):
    """(loss, gradient) of every kind, dense and sparse, with a mask and without."""
    mask = torch.arange(len(student), device="cuda") % 3 > 0
    log_probs, indices = torch.log_softmax(teacher.float(), -1).topk(8, -1)
    sparse = fastkd.TopK(indices, log_probs), fastkd.TopK(indices, log_probs, True)
    for kind in KINDS:
        for form, of_which in ((teacher, None), (teacher, mask), (sparse[0], mask), (sparse[1], None)):
            if form is not teacher and (kind == "mse" or (kind == "reverse_kl" and form.tail is None)):
                continue
            leaf = student.detach().requires_grad_()
            loss = fastkd.divergence(leaf, form, kind=kind, temperature=2.0, mask=of_which, backend="triton")
            yield loss.detach()
            yield torch.autograd.grad(loss, leaf)[0]


def test_divergence_never_synchronises():
    student, teacher = logits(64, 5000)
    never_waits(lambda: list(every_divergence(student, teacher)))


def test_divergence_in_a_cuda_graph():
    inputs = tuple(logits(64, 5000))
    replays(lambda: every_divergence(*inputs), inputs, logits(64, 5000, seed=10))


def test_divergence_is_bitwise_the_same_twice_at_size():
    student, teacher = logits(1024, 32000)
    twice = zip(every_divergence(student, teacher), every_divergence(student, teacher), strict=True)
    assert all(torch.equal(a, b) for a, b in twice)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_beyond_two_to_the_31_elements(kind):
    rows, width = 17000, 131072  # 2.2e9 elements; the last rows start beyond 2³¹
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free GPU memory")
    student, teacher = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    loss = fastkd.divergence(student, teacher, kind=kind, reduction="none", backend="triton")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    some = [0, 8191, 16383, 16384, rows - 1]
    few = student.detach()[some].double().requires_grad_()
    true_loss = fastkd.divergence(few, teacher[some].double(), kind=kind, reduction="none", backend="reference")
    (true_grad,) = torch.autograd.grad(true_loss.sum(), few)
    assert relative_error(loss[some], true_loss) < 1e-6
    assert relative_error(grad[some], true_grad) < 5e-3


def test_out_of_range_index_is_nan_and_no_fault():
    student, _ = logits(4, 50)
    indices = torch.tensor([[0, 1], [0, 99], [2, 3], [-1, 0]], device="cuda")
    loss = fastkd.divergence(student, fastkd.TopK(indices, torch.full((4, 2), -1.0, device="cuda")), reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True]


def every_relation(x, y, t, u, mask):
    """(rows, gradients) of self-relations and pairs, causal or not, with padding and without."""
    for causal in (False, True):
        for of_which in (None, mask):
            leaves = [v.detach().requires_grad_() for v in (x, y)]
            rows = fastkd.relation_kl_loss(
                [leaves[0], tuple(leaves)],
                [t, (t, u)],
                mask=of_which,
                causal=causal,
                reduction="none",
                backend="triton",
            )
            yield rows.detach()
            yield from torch.autograd.grad(rows.sum(), leaves)


def relation_states(seed, dtype=torch.bfloat16):
    states = [randn(3, 4, 200, 64, seed=seed + i).to("cuda", dtype) for i in range(4)]
    return *states, torch.arange(200, device="cuda") < torch.tensor([[200], [130], [7]], device="cuda")


def test_relation_never_synchronises():
    states = relation_states(0)
    never_waits(lambda: list(every_relation(*states)))


def test_relation_in_a_cuda_graph_and_the_same_twice():
    states = relation_states(0)
    replays(lambda: every_relation(*states), states[:4], relation_states(10)[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relation_at_size(dtype):
    """Against float64 on a few heads of many."""
    x, t = (torch.randn(16, 12, 1000, 64, device="cuda", dtype=dtype) for _ in range(2))
    x.requires_grad_()
    rows = fastkd.relation_kl_loss([x], [t], reduction="none", backend="triton")[0]
    (grad,) = torch.autograd.grad(rows.sum(), x)
    few = x.detach()[-1:].double().requires_grad_()
    true_rows = fastkd.relation_kl_loss([few], [t[-1:].double()], reduction="none", backend="reference")[0]
    (true_grad,) = torch.autograd.grad(true_rows.sum(), few)
    assert relative_error(rows[-1:], true_rows) < 1e-6
    assert relative_error(grad[-1:], true_grad) < (1e-5 if dtype == torch.float32 else 5e-3)


def every_gram(students, teachers, mask):
    """(loss, gradients): two pairs at both levels, with padding and without, matrix by matrix and row by row, and in the
    released code's grouping."""
    forms = [{"pearson": pearson, "mask": of_which} for of_which in (None, mask) for pearson in ("matrix", "row")]
    for form in (*forms, {"grouping": "official"}):
        leaves = [x.detach().requires_grad_() for x in students]
        loss = fastkd.gram_correlation_loss(
            leaves, teachers, level={"token": 1.0, "sequence": 2.0}, backend="triton", **form
        )
        yield loss.detach()
        yield from torch.autograd.grad(loss, leaves)


def gram_states(length, dtype, seed=0):
    """Up to 64 tokens one program holds a sentence, in float32 too; 312 columns are TinyBERT's."""
    students, teachers = (
        [randn(5, length, width, seed=seed + 2 * i + k).to("cuda", dtype) + 0.5 for i in range(2)]
        for k, width in ((0, 312), (1, 768))
    )
    return (
        students,
        teachers,
        torch.arange(length, device="cuda") < length // torch.arange(1, 6, device="cuda")[:, None],
    )


every_kind_of_gram = pytest.mark.parametrize(
    ("length", "dtype"),
    [(60, torch.bfloat16), (60, torch.float32), (300, torch.bfloat16), (300, torch.float32)],
    ids=str,
)


@every_kind_of_gram
def test_gram_never_synchronises(length, dtype):
    states = gram_states(length, dtype)
    never_waits(lambda: list(every_gram(*states)))


@every_kind_of_gram
def test_gram_in_a_cuda_graph_and_the_same_twice(length, dtype):
    students, teachers, mask = gram_states(length, dtype)
    others = gram_states(length, dtype, seed=10)
    replays(lambda: every_gram(students, teachers, mask), (*students, *teachers), (*others[0], *others[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [512, 5000])
def test_gram_at_size(length, dtype):
    """Against float64; weights are made in parts at 5000 tokens (in float32, rows of one sequence). Nothing of the size of
    a Gram matrix of all sequences is allocated."""
    groups = 64 if length == 512 else 2
    shared = torch.randn(768, device="cuda")
    student, teacher = (
        (torch.randn(groups, length, 768, device="cuda") + 3 * shared).to(dtype) for _ in range(2)
    )  # mean cosine 0.9
    leaf = student.requires_grad_()
    options = {"level": "token", "reduction": "none"}
    fastkd.gram_correlation_loss(leaf, teacher, backend="triton", **options).sum().backward()
    leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = fastkd.gram_correlation_loss(leaf, teacher, backend="triton", **options)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    extra = torch.cuda.max_memory_allocated() - before - grad.numel() * grad.element_size()
    assert extra <= (64 << 20) + (32 << 20)
    few = student.detach()[-1:].double().requires_grad_()
    true = fastkd.gram_correlation_loss(few, teacher[-1:].double(), backend="reference", **options)
    (true_grad,) = torch.autograd.grad(true.sum(), few)
    assert (values[-1:] - true).abs().max() < 1e-6
    assert relative_error(grad[-1:], true_grad) < (1e-5 if dtype == torch.float32 else 1e-2)


def contrast_inputs(dtype=torch.bfloat16, seed=0):
    query, positive = (randn(64, 128, seed=seed + i).cuda() / 11 for i in (1, 2))
    bank = (randn(5000, 128, seed=seed + 3) / 11).to("cuda", dtype)
    index = torch.randint(5000, (64, 300), generator=torch.Generator().manual_seed(seed)).cuda()
    return query.float(), positive.float(), bank, index


def every_contrast(query, positive, bank, index, scale=None):
    """(loss, gradient) of InfoNCE against a bank, gathered, in the batch, with a trained temperature; and of NCE."""
    if scale is not None:
        leaf = query.detach().requires_grad_()
        for of_query in (None, index):
            loss = fastkd.info_nce_loss(leaf, positive, bank, of_query, scale=scale, backend="triton")
            yield loss.detach()
            yield torch.autograd.grad(loss, leaf)[0]
        return
    temperature = torch.full((), 0.1, device="cuda", requires_grad=True)
    leaf = query.detach().requires_grad_()
    for loss in (
        fastkd.info_nce_loss(leaf, positive, bank, temperature=temperature),
        fastkd.info_nce_loss(
            leaf, positive, bank, index, temperature=0.1, exclude=(index[:, 0], index[:, 0].new_zeros(5000))
        ),
        fastkd.info_nce_loss(leaf, positive, None, temperature=0.1),
        fastkd.nce_loss(leaf, bank, index, n_data=5000, temperature=0.1, z=torch.full((), 900.0, device="cuda")),
    ):
        yield loss.detach()
        yield torch.autograd.grad(loss, leaf)[0]


def test_contrast_never_synchronises():
    from fastkd import functional

    inputs = contrast_inputs()
    queue, state = fastkd.NegativeQueue(1000, 128).cuda(), torch.tensor([1, 2], device="cuda")
    bank, ids = fastkd.MemoryBank(5000, 128).cuda(), inputs[3][:, 0].contiguous()

    def step():
        list(every_contrast(*inputs))
        queue(inputs[0], inputs[1], ids)
        queue.push(inputs[1], ids)
        bank.update(ids, inputs[0])
        functional.sample_negatives(ids, 50, state, n_data=5000)

    never_waits(step)


def test_contrast_in_a_cuda_graph():
    inputs = contrast_inputs()
    replays(lambda: every_contrast(*inputs), inputs, contrast_inputs(seed=10))


def in_eight_bits(query, positive, bank, index):
    from fastkd.reference.contrast_bank import eight_bits

    rows, scale = eight_bits(bank.float())
    return query, positive, rows, index, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_contrast_against_eight_bit_rows(dtype):
    """As the reference in float64 has it of the same rows; no waiting, and the same in a captured graph."""
    inputs, others = (in_eight_bits(*contrast_inputs(seed=seed)) for seed in (0, 10))
    memory, ids = fastkd.MemoryBank(5000, 128, dtype=torch.float8_e4m3fn).cuda(), inputs[3][:, 0].contiguous()
    options = {"n_data": 5000, "temperature": 0.1, "z": torch.full((), 900.0, device="cuda")}

    def step():
        list(every_contrast(*inputs))
        fastkd.nce_loss(inputs[0], memory.rows, inputs[3], scale=memory.scale, **options, backend="triton")
        memory.update(ids, inputs[0])

    never_waits(step)
    query, positive, bank, index, scale = inputs
    found = list(every_contrast(query.to(dtype), positive, bank, index, scale))
    for at, of_query in ((0, None), (2, index)):
        leaf = query.to(dtype).double().requires_grad_()
        options = {"scale": scale.double(), "backend": "reference"}
        loss = fastkd.info_nce_loss(leaf, positive.double(), bank.double(), of_query, **options)
        true = loss, torch.autograd.grad(loss, leaf)[0]
        errors = [relative_error(x, y) for x, y in zip(found[at : at + 2], true, strict=True)]
        assert max(errors) < (1e-4 if dtype == torch.float32 else 1e-2), errors
    replays(lambda: every_contrast(*inputs), inputs, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_info_nce_memory_does_not_grow_with_the_bank(dtype):
    query, positive, _, _ = contrast_inputs()
    extra = []
    for rows in (1 << 14, 1 << 20):
        bank = torch.randn(rows, 128, device="cuda").to(dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        leaf = query.detach().requires_grad_()
        torch.autograd.grad(fastkd.info_nce_loss(leaf, positive, bank), leaf)
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] <= 2 * extra[0] + (1 << 20) and extra[1] < 64 << 20


def every_linear_divergence(student, teacher, mask, labels):
    """(loss, gradients) of both modes: two kinds, with a mask packed and not, hard labels, a sparse teacher."""
    hidden, head = student
    log_probs, indices = torch.log_softmax((teacher[0] @ teacher[1].T).float(), -1).topk(8, -1)
    for recompute in (False, True):
        for form in (teacher, (fastkd.TopK(indices, log_probs, True), None)):
            for options in (
                {"kind": "forward_kl", "mask": mask, "num_valid": len(mask) * 2 // 3 + 1},
                {"kind": "skew_kl", "mask": mask, "labels": labels, "hard_weight": 0.5, "logit_softcap": 30.0},
            ):
                leaves = [x.detach().requires_grad_() for x in (hidden, head)]
                loss = fastkd.linear_divergence(
                    *leaves, *form, temperature=2.0, recompute_logits=recompute, backend="triton", **options
                )
                yield loss.detach()
                yield from torch.autograd.grad(loss, leaves)


def linear_inputs(rows=300, vocabulary=5000, seed=0, dtype=torch.bfloat16):
    make = lambda *size, i, scale=1.0: randn(*size, seed=seed + i, scale=scale).to("cuda", dtype)  # noqa: E731
    student, teacher = (
        (make(rows, d, i=i), make(vocabulary, d, i=i + 5, scale=2 * d**-0.5)) for i, d in ((1, 128), (2, 192))
    )
    index = torch.arange(rows, device="cuda")
    return student, teacher, index % 3 > 0, index * 7 % vocabulary


def test_linear_divergence_never_synchronises():
    inputs = linear_inputs()
    never_waits(lambda: list(every_linear_divergence(*inputs)))


def test_linear_divergence_is_bitwise_the_same_twice():
    inputs = linear_inputs(2100, 9000)
    twice = zip(every_linear_divergence(*inputs), every_linear_divergence(*inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in twice)


@pytest.mark.parametrize("recompute", [False, True])
def test_linear_divergence_near_convergence_in_bfloat16(recompute):
    """Several chunks; logits come out of the GEMM in float32, so the gradient keeps its digits (G3)."""
    _, teacher, mask, _ = linear_inputs(4500, 8000)
    hidden = (teacher[0].double() * (1 + 0.05 * randn(*teacher[0].shape, seed=9).to("cuda"))).bfloat16()
    exact = [hidden.double().requires_grad_(), teacher[1].double().requires_grad_()]
    options = {"mask": mask, "temperature": 2.0}
    true = fastkd.linear_divergence(*exact, *(x.double() for x in teacher), backend="reference", **options)
    leaves = [hidden.requires_grad_(), teacher[1].clone().requires_grad_()]
    loss = fastkd.linear_divergence(*leaves, *teacher, recompute_logits=recompute, backend="triton", **options)
    assert relative_error(loss, true) < 2e-5
    wanted = torch.autograd.grad(true, exact)
    for x, y in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert relative_error(x, y) < 4e-3
