"""contrast: InfoNCE and NCE against brute force, the sampler against chi-square, the bank against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import gradients, randn, relative_error
from fastkd import functional
from fastkd.reference import contrast, contrast_bank, contrast_draw, contrast_sample


def problem(B=5, K=7, D=4, seed=0):
    query, positive, bank = (F.normalize(randn(n, D, seed=seed + k), dim=1) for k, n in enumerate((B, B, K)))
    index = torch.randint(K, (B, 6), generator=torch.Generator().manual_seed(seed))
    return query, positive, bank, index


# ---- InfoNCE


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_info_nce_brute_force(gathered, excluded, scaled):
    query, positive, bank, index = problem()
    scale = torch.linspace(0.5, 2, 7, dtype=torch.float64) if scaled else None
    exclude = (torch.tensor([0, 1, 2, 0, 9]), torch.tensor([0, 1, 2, 0, 1, 2, 2])) if excluded else None
    rows = contrast.info_nce(query, positive, bank, index if gathered else None, 1 / 0.1, exclude, scale)
    for b in range(5):
        top = math.exp(query[b] @ positive[b] / 0.1)
        total = top
        for k in index[b].tolist() if gathered else range(7):
            if not (excluded and exclude[0][b] == exclude[1][k]):
                total += math.exp((query[b] @ bank[k]) * (scale[k] if scaled else 1) / 0.1)
        assert rows[b].item() == pytest.approx(-math.log(top / total), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("gathered", [False, True])
def test_info_nce_gradcheck(gathered):
    query, positive, bank, index = problem(B=2, K=4, D=3)
    inverse = torch.tensor(3.0, dtype=torch.float64)
    exclude = torch.arange(2), torch.tensor([0, 1, 2, 3])

    def f(query, positive, bank, inverse):
        return contrast.info_nce(query, positive, bank, index if gathered else None, inverse, exclude, None)

    inputs = [x.requires_grad_() for x in (query, positive, bank, inverse)]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_info_nce_gradient_is_softmax_minus_one_hot():
    query, positive, bank, _ = problem()
    _, (grad,) = gradients(lambda q: contrast.info_nce(q, positive, bank, None, 1 / 0.1, None, None), query)
    scores = torch.cat([(query * positive).sum(1, keepdim=True), query @ bank.T], 1) / 0.1
    g = scores.softmax(1) - F.one_hot(torch.zeros(5, dtype=torch.long), 8)
    expected = (g[:, :1] * positive + g[:, 1:] @ bank) / 0.1 * (randn(5, seed=7) + 1.5)[:, None]
    assert relative_error(grad, expected) < 1e-13


def test_info_nce_without_any_negative_left():
    """All excluded, or an empty bank: loss 0 and gradient 0, not NaN."""
    query, positive, bank, _ = problem()
    ids = torch.zeros(5, dtype=torch.long), torch.zeros(7, dtype=torch.long)
    for rows in (bank, bank[:0]):
        loss, grads = gradients(
            lambda q, p, r=rows: contrast.info_nce(q, p, r, None, 10.0, (ids[0], ids[1][: len(r)]), None),
            query,
            positive,
        )
        assert (loss == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_info_nce_where_the_exponential_overflows(dtype):
    """Scores of ±1e4: finite, and the difference of scores is the loss."""
    query = torch.tensor([[100.0, 0], [100, 0]], dtype=dtype)
    positive = torch.tensor([[100.0, 0], [-100, 0]], dtype=dtype)
    loss, grads = gradients(
        lambda q, p: contrast.info_nce(q, p, torch.zeros(3, 2, dtype=dtype), None, 1.0, None, None), query, positive
    )
    assert loss.dtype == torch.float32
    assert loss[0] == 0 and loss[1].item() == pytest.approx(1e4 + math.log(3))
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


def test_info_nce_keeps_its_digits_near_zero():
    """A loss of e^-30 is not rounded to 0 in float32."""
    query, bank = torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0]])
    assert contrast.info_nce(query, query, bank, None, 15.0, None, None).item() == pytest.approx(
        math.exp(-30), rel=1e-5
    )


def test_info_nce_fp8_bank():
    query, positive, bank, index = problem(D=16)
    size = bank.abs().amax(1) / 448
    fp8 = (bank / size[:, None]).to(torch.float8_e4m3fn)
    dense = fp8.double() * size[:, None]
    for i in (None, index):
        value = contrast.info_nce(query, positive, fp8, i, 10.0, None, size)
        assert relative_error(value, contrast.info_nce(query, positive, dense, i, 10.0, None, None)) < 1e-12


# ---- NCE


def nce_as_written(query, bank, index, n_data, temperature, z):
    p = ((bank[index] * query[:, None]).sum(-1) / temperature).exp() / z
    c = (index.shape[1] - 1) / n_data
    return -(p[:, 0] / (p[:, 0] + c + 1e-7)).log() - (c / (p[:, 1:] + c + 1e-7)).log().sum(1)


@pytest.mark.parametrize("z", [0.3, 35.9, 1e6])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_nce_against_the_formula(z, temperature):
    query, _, bank, index = problem()
    options = (index, 7, temperature, z)
    loss, (grad,) = gradients(lambda q: contrast.nce(q, bank, *options), query)
    expected, (expected_grad,) = gradients(lambda q: nce_as_written(q, bank, *options), query)
    assert relative_error(loss, expected) < 1e-12 and relative_error(grad, expected_grad) < 1e-12
    assert torch.equal(
        contrast.nce(query, bank, index, 7, temperature, torch.tensor(z, dtype=torch.float64)),
        contrast.nce(query, bank, *options),
    )


def test_nce_gradcheck():
    query, _, bank, index = problem(B=2, K=4, D=3)
    inputs = query.requires_grad_(), bank.requires_grad_()
    f = lambda q, n: contrast.nce(q, n, index, 40, 0.5, 2.0)  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_nce_where_the_exponential_overflows(dtype, sign):
    """<q, n> / T = ±14.3 and ±1400: e^x leaves half precision at 11.1 and single precision at 88."""
    for size in (1.0, 100.0):
        query, bank = torch.tensor([[size, 0]], dtype=dtype), torch.tensor([[1.0, 0], [-1, 0]], dtype=dtype) * sign
        index = torch.tensor([[0, 1, 1, 0]])
        loss, (grad,) = gradients(lambda q, n=bank, i=index: contrast.nce(q, n, i, 1000, 0.07, 1e5), query)
        exact, (exact_grad,) = gradients(
            lambda q, n=bank, i=index: contrast.nce(q, n.double(), i, 1000, 0.07, 1e5), query.double()
        )
        assert loss.dtype == torch.float32 and grad.dtype == dtype and grad.isfinite().all()
        assert relative_error(loss, exact) < 1e-5 and relative_error(grad, exact_grad) < 1e-2


def test_a_nan_row_poisons_only_itself():
    query, positive, bank, index = problem()
    clean, poisoned = query.clone(), query.clone()
    poisoned[2] = torch.nan
    for f in (
        lambda q: contrast.nce(q, bank, index, 7, 0.07, 2.0),
        lambda q: contrast.info_nce(q, positive, bank, None, 5.0, None, None),
    ):
        (loss, (grad,)), (expected, (expected_grad,)) = gradients(f, poisoned), gradients(f, clean)
        rest = torch.tensor([0, 1, 3, 4])
        assert loss[2].isnan() and torch.equal(loss[rest], expected[rest])
        assert relative_error(grad[rest], expected_grad[rest]) < 1e-14


def test_partition():
    query, _, bank, index = problem()
    unset = torch.zeros((), dtype=torch.float64)
    expected = ((bank[index] * query[:, None]).sum(-1) / 0.07).exp().mean() * 40
    z = contrast.partition(query.requires_grad_(), bank, index, 40, 0.07, unset)
    assert z.item() == pytest.approx(expected.item(), rel=1e-12) and not z.requires_grad
    assert contrast.partition(query, bank, index, 40, 0.07, unset + 3) == 3
    poisoned = query.detach().index_fill(0, torch.tensor([1]), torch.nan)
    rest = torch.tensor([0, 2, 3, 4])
    without = contrast.partition(query[rest], bank, index[rest], 40, 0.07, unset)
    assert contrast.partition(poisoned, bank, index, 40, 0.07, unset).item() == pytest.approx(without.item())
    assert contrast.partition(query * torch.nan, bank, index, 40, 0.07, unset) == 0
    assert (
        contrast.partition(query.float() * 1e3, bank, index, 40, 0.07, unset.float()) == torch.finfo(torch.float32).max
    )


# ---- sampling


def classes(*sizes, seed=0):
    """(labels, order, bounds) of classes of the given sizes, the ids shuffled."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    return labels, labels.argsort(stable=True), F.pad(torch.tensor(sizes).cumsum(0), (1, 0))


def draw(index, count, n_data, table, seed=1, step=0, replacement=False):
    table = table or (None, None, None)
    return contrast_sample.sample_negatives(index, count, n_data, *table, torch.tensor([seed, step]), replacement)


def chi_square_is_ordinary(counts, expected):
    """Within 5 standard deviations of its mean: fails by chance once in millions of seeds, and the seeds are fixed."""
    statistic = ((counts - expected).square() / expected).sum().item()
    freedom = counts.numel() - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    count=st.integers(1, 30),
    seed=st.integers(0, 2**62),
    replacement=st.booleans(),
)
def test_draws_have_other_labels_and_no_repeats(sizes, count, seed, replacement):
    table = classes(*sizes, seed=seed % 1000)
    labels, n_data = table[0], sum(sizes)
    index = torch.arange(n_data)
    ids = draw(index, count, n_data, table, seed, replacement=replacement)
    assert ids.shape == (n_data, count) and ids.dtype == torch.int64
    assert (labels[ids] != labels[:, None]).all()
    for b in range(n_data):
        pool = n_data - sizes[labels[b]]
        if not replacement and count <= pool:
            assert len(set(ids[b].tolist())) == count
    everything = draw(index, n_data - 1, n_data, None, seed)
    assert all(sorted([b, *row]) == list(range(n_data)) for b, row in enumerate(everything.tolist()))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("table", [None, classes(5, 1, 9, 6)], ids=["no labels", "labels"])
def test_draws_are_uniform_over_the_pool(table, replacement):
    n_data, count, own = 21, 6, 8
    ids = torch.cat([draw(torch.full((500,), own), count, n_data, table, 3, step, replacement) for step in range(40)])
    allowed = torch.arange(n_data) != own if table is None else table[0] != table[0][own]
    for column in (ids[:, 0], ids[:, 3], ids[:, -1]):  # every draw alone
        counts = torch.bincount(column, minlength=n_data).double()
        assert counts[~allowed].sum() == 0
        assert chi_square_is_ordinary(counts[allowed], 20000 / allowed.sum())
    pairs = torch.bincount(ids[:, 1] * n_data + ids[:, 4], minlength=n_data**2).reshape(n_data, n_data).double()
    possible = allowed[:, None] & allowed[None, :] & (replacement | ~torch.eye(n_data, dtype=torch.bool))
    assert pairs[~possible].sum() == 0  # and two draws together
    assert chi_square_is_ordinary(pairs[possible], 20000 / possible.sum())


def test_every_ordered_subset_is_equally_likely():
    """3 of 4 without repeats: 24 sequences. Marginals can be flat where this is not."""
    ids = torch.cat([draw(torch.zeros(1000, dtype=torch.long), 3, 5, None, 9, step) for step in range(24)]) - 1
    counts = torch.bincount(ids @ torch.tensor([16, 4, 1]), minlength=64).double()
    assert (counts > 0).sum() == 24
    assert chi_square_is_ordinary(counts[counts > 0], 1000.0)


def test_shuffle_is_fisher_yates():
    """The parallel form gives exactly what the swaps give, one after the other."""
    generator = torch.Generator().manual_seed(5)
    for n, K in ((1, 1), (2, 2), (9, 9), (12, 7), (400, 33)):
        steps = torch.arange(K)
        target = steps + torch.randint(2**40, (200, K), generator=generator) % (n - steps)
        result = contrast_draw.first_of_shuffle(target)
        for row, swaps in zip(result.tolist(), target.tolist(), strict=True):
            deck = list(range(n))
            for k, other in enumerate(swaps):
                deck[k], deck[other] = deck[other], deck[k]
            assert row == deck[:K]


def test_draws_depend_on_seed_step_and_position():
    index = torch.tensor([3, 3, 4])
    first = draw(index, 50, 1000, None, 1, 0)
    assert torch.equal(first, draw(index, 50, 1000, None, 1, 0))
    others = [draw(index, 50, 1000, None, 1, 1), draw(index, 50, 1000, None, 2, 0), first.roll(1, 0)]
    assert all(((first == x).float().mean(1) < 0.1).all() for x in others)


def test_random_bits_are_splitmix64():
    """Against Python's integers, which do not wrap."""

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    state, index = torch.tensor([2**61 + 12345, 7]), torch.tensor([11, 5])
    bits = contrast_draw.random_bits(index, 3, state)
    for b in range(2):
        stream = mix((mix((mix((mix(2**61 + 12345) + 7) % 2**64) + b) % 2**64) + int(index[b])) % 2**64)
        for k in range(3):
            assert bits[b, k] == mix((stream + (k + 1) * 0x9E3779B97F4A7C15) % 2**64) & (2**63 - 1)


# ---- the bank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_bank_is_the_loop(dtype):
    bank, rows = randn(9, 5, dtype=dtype), randn(7, 5, seed=1, dtype=dtype)
    index = torch.tensor([4, 0, 4, 8, 0, 4, 2])
    expected, old = bank.double().clone(), bank.double().clone()
    for i, row in zip(index.tolist(), rows.double(), strict=True):
        expected[i] = F.normalize(0.3 * old[i] + 0.7 * row, dim=0)
    contrast_bank.update_bank(bank, index, rows, 0.3)
    assert bank.dtype == dtype
    assert relative_error(bank, expected) < {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 4e-3}[dtype]


def test_update_bank_hazards():
    """Rows that cancel give 0; rows that are not finite change nothing; rows that need grad get none."""
    bank = F.normalize(randn(4, 3), dim=1)
    before = bank.clone()
    rows = torch.stack([-bank[0], bank[1] * torch.nan, bank[2] * torch.inf]).requires_grad_()
    contrast_bank.update_bank(bank, torch.arange(3), rows, 0.5)
    assert (bank[0] == 0).all() and torch.equal(bank[1:], before[1:]) and not bank.requires_grad


# ---- the public functions


def test_functions_reduce_the_rows():
    query, positive, bank, index = problem()
    rows = contrast.info_nce(query, positive, bank, index, 1 / 0.2, None, None)
    for reduction, expected in (("mean", rows.mean()), ("sum", rows.sum()), ("none", rows)):
        value = functional.info_nce_loss(query, positive, bank, index, temperature=0.2, reduction=reduction)
        assert torch.equal(value, expected)
    rows = contrast.nce(query, bank, index, 7, 0.2, 3.0)
    options = {"n_data": 7, "temperature": 0.2, "z": 3.0}
    assert torch.equal(functional.nce_loss(query, bank, index, **options), rows.mean())
    state = torch.tensor([1, 0])
    table = classes(3, 4)
    drawn = functional.sample_negatives(index[:, 0], 2, state, n_data=7, labels=table)
    assert torch.equal(drawn, draw(index[:, 0], 2, 7, table))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("state", lambda: functional.sample_negatives(torch.tensor([0]), 2, torch.tensor([1]), n_data=7)),
        ("count", lambda: functional.sample_negatives(torch.tensor([0]), 0, torch.tensor([1, 0]), n_data=7)),
        ("index", lambda: functional.sample_negatives(torch.tensor([7]), 2, torch.tensor([1, 0]), n_data=7)),
        ("rows", lambda: functional.update_bank(torch.ones(4, 3), torch.tensor([0]), torch.ones(1, 2), momentum=0.5)),
        ("index", lambda: functional.update_bank(torch.ones(4, 3), torch.tensor([4]), torch.ones(1, 3), momentum=0.5)),
        (
            "momentum",
            lambda: functional.update_bank(torch.ones(4, 3), torch.tensor([0]), torch.ones(1, 3), momentum=1.0),
        ),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call()
