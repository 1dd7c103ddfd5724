"""batchtopk_encode: selection over the batch, ties, guess, capacity, gradients."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    accumulation_bound,
    assert_all_same,
    assert_close_to_truth,
    assert_entries,
    assert_same,
    batchtopk_support,
    check_csr,
    compare_supports,
    dense_selected,
    exact_pre,
    to_dense,
)
from samples import LAYOUTS, MIXED, Problem, problem, weight_layouts

import gemmascope_fast as gsf
from gemmascope_fast import reference

OPS = ("batchtopk_encode", "encode_backward", "decode", "decode_backward", "by_feature")
GUESSES = (None, 0.0, 1e-30, 1.0, 3.0, 1e30, -1.0, float("nan"), float("inf"))


def skip_interpreted(backend, condition: bool, elsewhere: str) -> None:
    """Triton's interpreter takes 0.1 s per tile of the encoder."""
    if backend.interpreted and condition:
        pytest.skip(f"the interpreter is slow; {elsewhere}")


def assert_exact(backend, p: Problem, k: float, guesses=(None,)) -> None:
    """Integer-valued or special pre-activations: exact selection, ties included."""
    expected, threshold = batchtopk_support(reference._pre(*p.encoder), k)
    for guess in guesses:
        view = not backend.interpreted
        result = backend.op("batchtopk_encode")(*p.encoder, k, guess, None, view)
        assert_entries(result, expected)
        assert_same(result[5], torch.tensor(threshold), f"threshold, guess {guess}")
        assert int(result[4]) == int(result[0][-1])


@pytest.mark.parametrize("k", [0.3, 7, 64.9])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_matches_the_definition(backend, dtypes, k):
    skip_interpreted(backend, k != 7, "k = 7 covers the dtypes")
    n, d_in, d_sae = 21, 53, 101 if backend.interpreted else 301
    p = problem(n, d_in, d_sae, 4, x_dtype=dtypes[0], w_dtype=dtypes[1])
    result = backend.op("batchtopk_encode")(*p.encoder, k, None, None, not backend.interpreted)
    check_csr(result, n, d_sae)
    assert int(result[0][-1]) == int(k * n)
    stored, values, _ = to_dense(result, d_sae)
    pre, bound = exact_pre(*p.encoder), accumulation_bound(*p.encoder)
    cut = pre.flatten().topk(int(k * n)).values[-1]
    both = compare_supports(stored, pre >= cut, (pre - cut).abs() <= 2 * bound.max())
    theirs = torch.where(both, reference._pre(*p.encoder), 0.0)
    values, truth = torch.where(both, values, 0.0), torch.where(both, pre, 0.0)
    assert_close_to_truth(values, theirs, truth, torch.float32, "values", terms=d_in)
    assert result[5] == result[2].min()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 17, 33, 65, 130])
def test_every_tile_edge_and_k_exactly(backend, n):
    skip_interpreted(backend, n not in (0, 1, 17, 65), "n = 0, 1, 17, 65 meet every edge")
    shapes = ((1, 1), (15, 17), (16, 33), (17, 65), (0, 5), (3, 0))
    for d_in, d_sae in shapes[1 :: 2 if backend.interpreted else 1] + shapes[:1]:
        ks = {0.0, 0.1, 0.99, 1.0, 2.5, float(d_sae), d_sae + 9.0}
        for k in sorted({2.5, d_sae + 9.0} if backend.interpreted else ks):
            assert_exact(backend, problem(n, d_in, d_sae, 1, integer=True, seed=n), k)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", MIXED[::4], ids=str)
def test_any_layout(backend, layout, dtypes):
    skip_interpreted(backend, dtypes != MIXED[0], "float32 shows how strides are read")
    p = problem(40, 37, 91, integer=True, x_dtype=dtypes[0], w_dtype=dtypes[1])
    assert_exact(backend, weight_layouts(p, layout), 9.5)


@pytest.mark.parametrize(("d_in", "d_sae"), [(640, 10_080), (5376, 1009)])
def test_sizes_of_gemma_scope(backend, d_in, d_sae):
    skip_interpreted(backend, d_in == 5376, "d_in = 640 has more tiles")
    assert_exact(backend, problem(2, d_in, d_sae, 1, integer=True), 100.0)


@pytest.mark.parametrize("k", [0.0, 0.29, 1.0, 3.7, 20.0, 37.0])
def test_the_guess_changes_nothing(backend, k):
    skip_interpreted(backend, k != 3.7, "test_triton_select.py has the guesses")
    some = (None, 1.0) if backend.interpreted else GUESSES
    assert_exact(backend, problem(100, integer=True), k, some)
    p = problem(100)
    view = not backend.interpreted
    plain = backend.op("batchtopk_encode")(*p.encoder, k, None, None, view)
    exact = plain[5].item()
    near = () if backend.interpreted else (exact, exact * 0.9999, *some)
    for guess in (exact * 1.0001, exact * 2, *near):
        guessed = backend.op("batchtopk_encode")(*p.encoder, k, guess, None, view)
        assert_all_same(guessed, plain)


def test_the_count_is_truncated_as_python_does(backend):
    # 0.29 * 100 is 28.999999999999996: 28 entries, not 29.
    p = problem(100)
    assert int(backend.op("batchtopk_encode")(*p.encoder, 0.29, None, None, False)[4]) == 28


@pytest.mark.parametrize("count", [1, 5, 39, 41, 4000, 40_001])
def test_ties_go_to_row_then_latent(backend, count):
    skip_interpreted(backend, count != 4000, "test_triton_select.py has the ties")
    p = problem(40, 16, 2000, 1).with_(b_enc=torch.ones(2000), W_enc=torch.zeros(16, 2000))
    k = (count + 0.5) / 40
    offsets, indices, *_ = backend.op("batchtopk_encode")(*p.encoder, k, None, None, False)
    rows = torch.repeat_interleave(torch.arange(40), offsets.diff())
    assert (rows * 2000 + indices).tolist() == list(range(count))
    steps = torch.arange(2000).div(7, rounding_mode="floor").float() % 5
    assert_exact(backend, p.with_(b_enc=steps), k)


def test_more_entries_than_the_pool_holds(backend):
    # 300,000 positive entries for 500 places: the pool is cut several times.
    p = problem(300, 1, 1000, 1)
    x = torch.randperm(300)[:, None].float() + 1
    W_enc = torch.randperm(1000)[None].float() + 1
    p = p.with_(x=x, W_enc=W_enc, b_enc=torch.zeros(1000))
    pre = (x * W_enc).flatten()
    order = pre.argsort(descending=True, stable=True)[:500]
    offsets, indices, values, _, _, threshold, *_ = backend.op("batchtopk_encode")(
        *p.encoder, 500 / 300, None, None, False
    )
    rows = torch.repeat_interleave(torch.arange(300), offsets.diff())
    assert (rows * 1000 + indices).tolist() == sorted(order.tolist())
    assert threshold == pre[order[-1]] == values.min()


def test_special_values(backend):
    nan, inf = float("nan"), float("inf")
    p = problem(12, 32, 90, integer=True)
    x, W_enc, b_enc = p.x.clone(), p.W_enc.clone(), p.b_enc.clone()
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = nan, inf, -inf, nan, 0.0, -0.0
    x[7] = x[7] * 1e5
    W_enc[:, 40], W_enc[3, 41], W_enc[3, 42] = nan, inf, -inf
    b_enc[10], b_enc[60], b_enc[61] = nan, inf, -inf
    for q in (p.with_(x=x), p.with_(x=x, W_enc=W_enc, b_enc=b_enc)):
        for k in (20.0,) if backend.interpreted else (0.1, 1.0, 5.0, 20.0, 90.0):
            assert_exact(backend, q, k, (None, 3.0, 1e30))


def test_fewer_positive_entries_than_asked(backend):
    p = problem(5, 4, 50, 1).with_(b_enc=torch.full((50,), -1.0), W_enc=torch.zeros(4, 50))
    result = backend.op("batchtopk_encode")(*p.encoder, 7.0, None, None, True)
    assert int(result[4]) == 0 and result[5] == 0 and result[1].numel() == 0
    some = (None, 3.0) if backend.interpreted else GUESSES
    assert_exact(backend, problem(integer=True), 36.0, some)


def test_capacity(backend):
    p = problem(integer=True)
    exact = backend.op("batchtopk_encode")(*p.encoder, 4.0, None, None, True)
    assert int(exact[4]) == 52
    padded = backend.op("batchtopk_encode")(*p.encoder, 4.0, None, 60, True)
    check_csr(padded, 13, 37)
    cut = [t[:52] for t in (*padded[1:4], padded[7])]
    wanted = [exact[0], exact[4], exact[5], exact[6], *exact[1:4], exact[7]]
    assert_all_same([padded[0], padded[4], padded[5], padded[6], *cut], wanted)
    at_capacity = backend.op("batchtopk_encode")(*p.encoder, 4.0, None, 52, True)
    assert_all_same(at_capacity, exact)
    if backend.gpu_terms:
        small = backend.op("batchtopk_encode")(*p.encoder, 4.0, None, 51, False)
        assert small[4] == 52 and small[0].tolist() == exact[0].clamp(max=51).tolist()
        assert small[2].shape == (51,) and small[2].isnan().all()
        return
    with pytest.raises(RuntimeError, match=r"CapacityError: .*max_nnz=51.* 52 entries"):
        backend.op("batchtopk_encode")(*p.encoder, 4.0, None, 51, False)
    with pytest.raises(gsf.CapacityError, match="pass max_nnz >= 52$"):
        gsf.batchtopk_encode(*p.encoder, 4, max_nnz=51)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (3, 1, 2)])
def test_leading_dimensions(backend, batch):
    p = problem(n=6 if batch else 1, integer=True)
    acts = gsf.batchtopk_encode(p.x.reshape(*batch, 23), p.W_enc, p.b_enc, 2.5)
    (_, wanted, _), threshold = batchtopk_support(exact_pre(*p.encoder).float(), 2.5)
    assert acts.shape == (*batch, 37)
    assert torch.equal(acts.to_dense(), wanted.reshape(*batch, 37))
    assert acts.threshold == threshold


def gradients(p: Problem, k: float, dense: bool):
    leaves = p.leaves()
    if dense:
        pre = leaves.x @ leaves.W_enc + leaves.b_enc
        acts = dense_selected(pre, lambda t: batchtopk_support(t, k)[0][0])
        recon = acts @ leaves.W_dec + leaves.b_dec
    else:
        recon = gsf.decode(gsf.batchtopk_encode(*leaves.encoder, k), leaves.W_dec, leaves.b_dec)
    inputs = [*leaves.encoder, leaves.W_dec, leaves.b_dec]
    return torch.autograd.grad(recon.square().sum() + recon.sum(), inputs)


@pytest.mark.parametrize("k", [0, 0.5, 5, 37])
def test_gradients_equal_dense_autograd(backend, k):
    skip_interpreted(backend, k != 5, "k = 5 shows the wiring")
    p = problem(n=29)
    ours = gradients(p, k, dense=False)
    theirs, truth = gradients(p, k, dense=True), gradients(p.double(), k, dense=True)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert_close_to_truth(mine, other, true, torch.float32, terms=37)
    assert ours[1].stride() == p.W_enc.stride() and ours[3].stride() == p.W_dec.stride()


def test_the_threshold_carries_no_gradient(backend):
    p = problem().leaves()
    acts = gsf.batchtopk_encode(*p.encoder, 3)
    assert not acts.threshold.requires_grad and not acts.gate.requires_grad
    assert acts.values.requires_grad


def test_gradcheck(backend):
    p = problem(n=3, d_in=4, d_sae=6, d_out=2).double().leaves()

    def recon(x, W_enc, b_enc, W_dec, b_dec):
        return gsf.decode(gsf.batchtopk_encode(x, W_enc, b_enc, 2.5), W_dec, b_dec)

    assert torch.autograd.gradcheck(recon, (*p.encoder, p.W_dec, p.b_dec))
