"""topk_encode: selection, ties, special values, gradients."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    accumulation_bound,
    assert_close_to_truth,
    assert_entries,
    check_csr,
    compare_supports,
    dense_selected,
    exact_pre,
    to_dense,
    topk_support,
)
from samples import LAYOUTS, MIXED, Problem, problem, weight_layouts

import gemmascope_fast as gsf
from gemmascope_fast import reference

OPS = ("topk_encode", "encode_backward", "decode", "decode_backward", "by_feature")


def skip_interpreted(backend, condition: bool, elsewhere: str) -> None:
    """Triton's interpreter takes 0.1 s per tile of the encoder."""
    if backend.interpreted and condition:
        pytest.skip(f"the interpreter is slow; {elsewhere}")


def assert_exact(backend, p: Problem, k: int) -> None:
    """Integer-valued or special pre-activations: exact selection, ties included."""
    result = backend.op("topk_encode")(*p.encoder, k, not backend.interpreted)
    assert result[0].tolist() == [k * i for i in range(p.x.shape[0] + 1)]
    assert_entries(result, topk_support(reference._pre(*p.encoder), k))


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_matches_the_definition(backend, dtypes, k):
    skip_interpreted(backend, k != 7, "k = 7 covers the dtypes")
    n, d_in, d_sae = 21, 53, 101 if backend.interpreted else 301
    p = problem(n, d_in, d_sae, 4, x_dtype=dtypes[0], w_dtype=dtypes[1])
    result = backend.op("topk_encode")(*p.encoder, k, not backend.interpreted)
    check_csr(result, n, d_sae)
    assert (result[0].diff() == k).all()
    stored, values, gate = to_dense(result, d_sae)
    pre, bound = exact_pre(*p.encoder), accumulation_bound(*p.encoder)
    cut = torch.relu(pre).topk(k, dim=1).values[:, -1:]
    doubtful = (torch.relu(pre) - cut).abs() <= 2 * bound.max()
    both = compare_supports(stored & (gate > 0), (pre >= cut) & (pre > 0), doubtful)
    theirs = torch.where(both, reference._pre(*p.encoder), 0.0)
    values = torch.where(both, values, 0.0)
    truth = torch.where(both, pre, 0.0)
    assert_close_to_truth(values, theirs, truth, torch.float32, "values", terms=d_in)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 15, 17, 33, 65, 130])
def test_every_tile_edge_and_k_exactly(backend, n):
    skip_interpreted(backend, n not in (0, 1, 17, 65), "n = 0, 1, 17, 65 meet every edge")
    shapes = ((1, 1), (15, 17), (16, 33), (17, 257), (0, 5), (3, 0))
    for d_in, d_sae in shapes[1 :: 2 if backend.interpreted else 1] + shapes[:1]:
        ks = {0, 1, 2, d_sae // 2, d_sae - 1, d_sae}
        for k in sorted({d_sae // 2, d_sae - 1} if backend.interpreted else ks):
            if 0 <= k <= d_sae:
                assert_exact(backend, problem(n, d_in, d_sae, 1, integer=True, seed=n + k), k)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", MIXED[::4], ids=str)
def test_any_layout(backend, layout, dtypes):
    skip_interpreted(backend, dtypes != MIXED[0], "float32 shows how strides are read")
    p = problem(40, 37, 91, integer=True, x_dtype=dtypes[0], w_dtype=dtypes[1])
    assert_exact(backend, weight_layouts(p, layout), 9)


@pytest.mark.parametrize(("d_in", "d_sae"), [(640, 10_080), (1152, 10_080), (5376, 1009)])
def test_sizes_of_gemma_scope(backend, d_in, d_sae):
    skip_interpreted(backend, d_in > 640, "d_in = 640 has more tiles")
    p = problem(2, d_in, d_sae, 1, integer=True)
    for k in (100,) if backend.interpreted else (1, 100, d_sae):
        assert_exact(backend, p, k)


@pytest.mark.parametrize("k", [1, 3, 64, 300, 1999, 2000])
def test_ties_go_to_the_smaller_latent(backend, k):
    skip_interpreted(backend, k != 64, "test_triton_select.py has the ties")
    flat = problem(5, 16, 2000, 1).with_(b_enc=torch.ones(2000), W_enc=torch.zeros(16, 2000))
    result = backend.op("topk_encode")(*flat.encoder, k, False)
    assert result[1].tolist() == list(range(k)) * 5
    steps = flat.with_(b_enc=torch.arange(2000).div(7, rounding_mode="floor").float() % 5)
    if not backend.interpreted:
        assert_exact(backend, steps, k)
    rising = flat.with_(b_enc=torch.arange(2000).float())  # every latent beats all before it
    assert_exact(backend, rising, k)
    if backend.interpreted:
        return  # test_triton_select.py has the others
    assert_exact(backend, flat.with_(b_enc=torch.arange(2000).flip(0).float()), k)


def test_fewer_positive_than_k_fills_with_zeros_at_the_smallest_latents(backend):
    b_enc = torch.full((50,), -1.0)
    b_enc[[7, 30]] = torch.tensor([2.0, 1.0])
    b_enc[3] = -0.0
    p = problem(2, 4, 50, 1).with_(b_enc=b_enc, W_enc=torch.zeros(4, 50))
    _, indices, values, gate, *_ = backend.op("topk_encode")(*p.encoder, 5, False)
    assert indices.tolist() == [0, 1, 2, 7, 30] * 2
    assert values.tolist() == [0, 0, 0, 2, 1] * 2 and gate.tolist() == [0, 0, 0, 1, 1] * 2
    assert not values.signbit().any()


def test_special_values(backend):
    nan, inf = float("nan"), float("inf")
    p = problem(12, 32, 90, integer=True)
    x, W_enc, b_enc = p.x.clone(), p.W_enc.clone(), p.b_enc.clone()
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = nan, inf, -inf, nan, 0.0, -0.0
    x[7] = x[7] * 1e5
    W_enc[:, 40], W_enc[3, 41], W_enc[3, 42] = nan, inf, -inf
    b_enc[10], b_enc[60], b_enc[61] = nan, inf, -inf
    for q in (p.with_(x=x), p.with_(x=x, W_enc=W_enc, b_enc=b_enc)):
        for k in (2, 60) if backend.interpreted else (1, 2, 5, 60, 90):
            assert_exact(backend, q, k)


def test_more_nan_than_k(backend):
    b_enc = torch.arange(900).float()
    b_enc[100::2] = float("nan")
    b_enc[5] = float("inf")
    p = problem(3, 16, 900, 1).with_(b_enc=b_enc, W_enc=torch.zeros(16, 900))
    for k in (10, 401) if backend.interpreted else (1, 10, 399, 401, 402):
        assert_exact(backend, p, k)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (3, 1, 2)])
def test_leading_dimensions(backend, batch):
    p = problem(n=6 if batch else 1, integer=True)
    acts = gsf.topk_encode(p.x.reshape(*batch, 23), p.W_enc, p.b_enc, 4)
    values, indices = acts.as_topk()
    assert acts.shape == (*batch, 37) and values.shape == indices.shape == (*batch, 4)
    _, wanted, _ = topk_support(exact_pre(*p.encoder).float(), 4)
    assert torch.equal(acts.to_dense(), wanted.reshape(*batch, 37))


def gradients(p: Problem, k: int, dense: bool):
    leaves = p.leaves()
    if dense:
        pre = leaves.x @ leaves.W_enc + leaves.b_enc
        acts = dense_selected(pre, lambda t: topk_support(t, k)[0])
        recon = acts @ leaves.W_dec + leaves.b_dec
    else:
        recon = gsf.decode(gsf.topk_encode(*leaves.encoder, k), leaves.W_dec, leaves.b_dec)
    inputs = [*leaves.encoder, leaves.W_dec, leaves.b_dec]
    return torch.autograd.grad(recon.square().sum() + recon.sum(), inputs)


@pytest.mark.parametrize("k", [0, 1, 5, 37])
def test_gradients_equal_dense_autograd(backend, k):
    # k = 37 selects every latent, about half of them at 0: those must pass no gradient.
    skip_interpreted(backend, k != 5, "k = 5 shows the wiring")
    p = problem(n=29)
    ours = gradients(p, k, dense=False)
    theirs, truth = gradients(p, k, dense=True), gradients(p.double(), k, dense=True)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert_close_to_truth(mine, other, true, torch.float32, terms=37)
    assert ours[1].stride() == p.W_enc.stride() and ours[3].stride() == p.W_dec.stride()


def test_selected_zeros_pass_no_gradient(backend):
    p = problem().with_(b_enc=torch.full((37,), -100.0)).leaves()
    acts = gsf.topk_encode(*p.encoder, 5)
    assert acts.nnz == 65 and not acts.values.any() and not acts.gate.any()
    recon = gsf.decode(acts, p.W_dec, p.b_dec)
    recon.sum().backward()
    for t in (*p.encoder, p.W_dec):
        assert t.grad is not None and not t.grad.any()
    assert not acts.gate.requires_grad


def test_float64_and_gradcheck(backend):
    p = problem(n=3, d_in=4, d_sae=6, d_out=2).double().leaves()

    def recon(x, W_enc, b_enc, W_dec, b_dec):
        return gsf.decode(gsf.topk_encode(x, W_enc, b_enc, 3), W_dec, b_dec)

    assert torch.autograd.gradcheck(recon, (*p.encoder, p.W_dec, p.b_dec))


def test_second_derivative_is_an_error(backend):
    p = problem().leaves()
    acts = gsf.topk_encode(*p.encoder, 3)
    (d_x,) = torch.autograd.grad(acts.values.sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="encode_backward is not differentiable"):
        d_x.sum().backward()
