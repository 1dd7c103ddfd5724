"""jumprelu_encode: entries, window, thresholds at the ulp, special values, capacity, gradients."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    accumulation_bound,
    assert_all_same,
    assert_close_to_truth,
    assert_entries,
    assert_same,
    check_csr,
    check_feature_view,
    compare_supports,
    dense_jumprelu,
    exact_pre,
    jumprelu_support,
    to_dense,
)
from samples import LAYOUTS, MIXED, Problem, problem, weight_layouts

import gemmascope_fast as gsf
from gemmascope_fast import reference

OPS = ("jumprelu_encode", "encode_backward", "decode", "decode_backward", "by_feature")
SIZES = [0, 1, 2, 7, 15, 16, 17, 31, 33, 65, 130, 257]


def encode(backend, p: Problem, bandwidth=0.0, max_nnz=None, by_feature=False):
    return backend.op("jumprelu_encode")(*p.encoder, p.threshold, bandwidth, max_nnz, by_feature)


def assert_exact(backend, p: Problem, bandwidth=0.0) -> None:
    """`p` is integer-valued: every pre-activation is exact in float32."""
    expected = jumprelu_support(exact_pre(*p.encoder).float(), p.threshold, bandwidth)
    assert_entries(encode(backend, p, bandwidth, by_feature=not interpreted(backend)), expected)


def interpreted(backend) -> bool:
    """Triton's interpreter takes 0.1 s per tile, and more for the feature-major view."""
    return backend.name == "triton"


def skip_interpreted(backend, condition: bool, elsewhere: str) -> None:
    if interpreted(backend) and condition:
        pytest.skip(f"the interpreter is slow; {elsewhere}")


@pytest.mark.parametrize("bandwidth", [0.0, 0.4])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_matches_the_definition(backend, dtypes, bandwidth):
    x_dtype, w_dtype = dtypes
    small = interpreted(backend)
    skip_interpreted(backend, bandwidth == 0 and x_dtype != w_dtype, "the window covers this pair")
    for n, d_in, d_sae in ((33, 53, 101 if small else 301), (1, 640, 97), (5, 1152, 64)):
        p = problem(n, d_in, d_sae, 4, x_dtype=x_dtype, w_dtype=w_dtype)
        result = encode(backend, p, bandwidth, by_feature=not small)
        check_csr(result, n, d_sae)
        assert int(result[4]) == int(result[0][-1]) == result[1].shape[0]
        stored, values, gate = to_dense(result, d_sae)
        pre, bound = exact_pre(*p.encoder), accumulation_bound(*p.encoder)
        limit = p.threshold.double() - bandwidth / 2
        compare_supports(stored, pre > limit, (pre - limit).abs() <= bound + 1e-7)
        close = (pre - p.threshold.double()).abs() <= bound
        both = compare_supports(gate > 0, pre > p.threshold.double(), close)
        theirs = torch.where(both, reference._pre(*p.encoder), 0.0)
        truth = torch.where(both, pre, 0.0)
        values = torch.where(both, values, 0.0)
        assert_close_to_truth(values, theirs, truth, torch.float32, "values", terms=d_in)


@pytest.mark.parametrize("n", SIZES)
def test_every_tile_edge_exactly(backend, n):
    small = interpreted(backend)
    skip_interpreted(backend, n not in (0, 1, 17, 33), "n = 0, 1, 17, 33 meet every edge")
    for d_in in (0, 1, 33) if small else (0, 1, 15, 16, 17, 33):
        for d_sae in (0, 1, 33, 65) if small else (0, 1, 15, 16, 17, 33, 257):
            p = problem(n, d_in, d_sae, 1, integer=True, seed=n + d_in + d_sae)
            expected = jumprelu_support(exact_pre(*p.encoder).float(), p.threshold, 2.0)
            assert_entries(encode(backend, p, 2.0), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", MIXED[::2], ids=str)
def test_any_layout(backend, layout, dtypes):
    skip_interpreted(backend, dtypes != MIXED[0], "float32 shows how strides are read")
    for n, d_in in ((3, 37), (40, 48))[: 1 if interpreted(backend) else 2]:
        p = problem(n, d_in, 41, integer=True, x_dtype=dtypes[0], w_dtype=dtypes[1])
        assert_exact(backend, weight_layouts(p, layout), 2.0)


def test_stride_zero_arguments(backend):
    p = problem(integer=True)
    for x in (p.x[:1].expand(13, 23), p.x[:, :1].expand(13, 23)):
        assert_exact(backend, p.with_(x=x), 2.0)
    for W_enc in (p.W_enc[:1].expand(23, 37), p.W_enc[:, :1].expand(23, 37)):
        assert_exact(backend, p.with_(W_enc=W_enc), 2.0)
    one = torch.tensor(1.0)
    assert_exact(backend, p.with_(b_enc=one.expand(37), threshold=one.expand(37)), 2.0)
    spread = p.with_(b_enc=p.b_enc.repeat(2)[::2], threshold=p.threshold.repeat(3)[::3])
    assert_exact(backend, spread, 2.0)


@pytest.mark.parametrize(("d_in", "d_sae"), [(640, 10_080), (1152, 10_080), (5376, 1009)])
def test_sizes_of_gemma_scope(backend, d_in, d_sae):
    p = problem(2, d_in, d_sae, 1, integer=True).with_(threshold=torch.full((d_sae,), 60.0))
    assert_exact(backend, p, 4.0)


def test_rows_far_apart_in_memory(backend):
    # Element offsets beyond 2^31. The pages between the rows are never touched.
    torch.use_deterministic_algorithms(False)  # or 4 GiB would be filled
    stride = 2**27 + 1
    buffer = torch.empty(16 * stride + 16, dtype=torch.bfloat16)
    p = problem(17, 16, 17, 1, integer=True)
    far = buffer.as_strided((17, 16), (stride, 1))
    far.copy_(p.x)
    assert_exact(backend, p.with_(x=far), 2.0)
    far.copy_(p.W_enc.t())
    assert_exact(backend, p.with_(W_enc=far.t()), 2.0)


@pytest.mark.parametrize("bandwidth", [0.0, 0.5, 0.001, 0.03, 1e-12, 3.0])
@pytest.mark.parametrize("d_in", [1, 16, 33])
def test_thresholds_and_window_edges_to_the_ulp(backend, bandwidth, d_in):
    skip_interpreted(backend, d_in != 16, "one d_in shows the comparisons")
    # One row with x = (1, 0, ...): the pre-activation is W_enc[0] exactly.
    theta = torch.tensor([0.0, 0.001, 0.3, 1.0, -1.0, 7.7, 65504.0, 1e-30, -0.0])
    lower = theta - torch.tensor(bandwidth / 2)
    edges = torch.stack([theta, lower, theta + torch.tensor(bandwidth / 2)])
    infinity = torch.tensor(float("inf"))
    pre = torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity)]).flatten()
    W_enc = torch.randn(d_in, pre.shape[0])
    W_enc[0] = pre
    x = torch.zeros(1, d_in)
    x[0, 0] = 1
    p = problem().with_(x=x, W_enc=W_enc, b_enc=torch.zeros_like(pre), threshold=theta.repeat(9))
    expected = jumprelu_support(pre[None], p.threshold, bandwidth)
    assert 0 < int(expected[2].sum()) < pre.shape[0]
    assert_entries(encode(backend, p, bandwidth), expected)
    biased = p.with_(W_enc=torch.zeros(d_in, pre.shape[0]), b_enc=pre)
    assert_entries(encode(backend, biased, bandwidth), expected)


def test_the_gate_sees_the_rounded_sum(backend):
    # fl(dot + b) decides: 1 + 2^-25 rounds to 1, which is not above a threshold of 1.
    p = problem().with_(
        x=torch.ones(1, 1), W_enc=torch.ones(1, 2), b_enc=torch.tensor([2.0**-25, 2.0**-23])
    )
    p = p.with_(threshold=torch.ones(2))
    result = encode(backend, p)
    assert result[1].tolist() == [1] and result[2].item() == 1 + 2.0**-23


@pytest.mark.parametrize("theta", [-1e30, 1e30])
def test_all_on_and_all_off(backend, theta):
    p = problem(40, 24, 300, integer=True).with_(threshold=torch.full((300,), theta))
    assert_exact(backend, p, 0.5)
    assert int(encode(backend, p)[4]) == (40 * 300 if theta < 0 else 0)


def test_one_row_with_everything_on(backend):
    p = problem(40, 24, 300, integer=True)
    x = torch.zeros(40, 24)
    x[17, 0] = 1
    W_enc = torch.full((24, 300), 3.0)
    p = p.with_(x=x, W_enc=W_enc, b_enc=torch.zeros(300), threshold=torch.ones(300))
    lengths = encode(backend, p)[0].diff()
    assert lengths[17] == 300 and lengths.sum() == 300
    assert_exact(backend, p)


def test_special_values(backend):
    nan, inf = float("nan"), float("inf")
    p = problem(12, 32, 90, integer=True)
    x, W_enc = p.x.clone(), p.W_enc.clone()
    b_enc, theta = p.b_enc.clone(), p.threshold.clone()
    x[1, 3], x[2, 4], x[3, 5] = nan, inf, -inf
    x[4], x[5], x[6] = nan, 0.0, -0.0
    x[7] = x[7] * 1e5
    W_enc[:, 40], W_enc[3, 41], W_enc[3, 42] = nan, inf, -inf
    b_enc[10], b_enc[60], b_enc[61] = nan, inf, -inf
    theta[20], theta[21], theta[22], theta[23] = nan, inf, -inf, -0.0
    b_enc[23], W_enc[:, 23] = -0.0, -0.0
    only_theta = p.with_(threshold=theta)
    for q in (p.with_(x=x), only_theta, p.with_(x=x, W_enc=W_enc, b_enc=b_enc, threshold=theta)):
        pre = reference._pre(*q.encoder)
        for bandwidth in (0.0, 2.0):
            expected = jumprelu_support(pre, q.threshold, bandwidth)
            view = not interpreted(backend)
            assert_entries(encode(backend, q, bandwidth, by_feature=view), expected)


def test_many_rows_of_nan_store_one_entry_each(backend):
    p = problem(70, 16, 600, integer=True)
    p = p.with_(x=torch.full_like(p.x, float("nan")))
    offsets, indices, values, gate, *_ = encode(backend, p, 1.0)
    assert offsets.tolist() == list(range(71)) and not indices.any()
    assert values.isnan().all() and gate.eq(1).all()


def test_capacity(backend):
    p = problem(integer=True)
    exact = encode(backend, p, 2.0, by_feature=True)
    nnz = int(exact[4])
    for capacity in (nnz, nnz + 1, nnz + 100):
        padded = encode(backend, p, 2.0, capacity, True)
        check_csr(padded, 13, 37)
        assert int(padded[4]) == nnz and padded[1].shape == (capacity,)
        cut = [t[:nnz] for t in padded[1:4]]
        assert_all_same([padded[0], *cut, padded[5]], [*exact[:4], exact[5]])
        check_feature_view(padded[5], padded[6], padded[0], padded[1], 37)
    for capacity in (0, nnz - 1):
        if backend.gpu_terms:
            if not interpreted(backend):  # which has tests of its own: test_triton_encode.py
                cut = encode(backend, p, 2.0, capacity)
                assert int(cut[4]) == nnz and cut[2].shape == (capacity,) and cut[2].isnan().all()
            continue
        with pytest.raises(RuntimeError, match=rf"CapacityError: .*max_nnz={capacity}.* {nnz} "):
            encode(backend, p, 2.0, capacity)
    needed = int(encode(backend, p)[4])
    if not backend.gpu_terms:
        with pytest.raises(gsf.CapacityError, match=f"pass max_nnz >= {needed}$"):
            gsf.jumprelu_encode(*p.encoder, p.threshold, max_nnz=needed - 1)
    assert gsf.jumprelu_encode(*p.encoder, p.threshold, max_nnz=needed).nnz == needed
    assert encode(backend, p.with_(x=p.x[:0]), 2.0, 5)[1].tolist() == [0] * 5


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (3, 1, 2)])
def test_leading_dimensions(backend, batch):
    p = problem(n=6 if batch else 1, integer=True)
    acts = gsf.jumprelu_encode(p.x.reshape(*batch, 23), *p.encoder[1:], p.threshold)
    assert acts.shape == (*batch, 37)
    _, values, gate = jumprelu_support(exact_pre(*p.encoder).float(), p.threshold, 0.0)
    assert_same(acts.to_dense(), values.reshape(*batch, 37))
    assert_same(acts.l0().reshape(-1), gate.sum(1), "l0")


def losses(p: Problem, bandwidth: float, gate_weight: float):
    """The straight-through loss and its gradients: sparse composition and dense oracle."""
    target = torch.randn(p.x.shape[0], p.W_dec.shape[1]).double()
    weight = torch.randn(p.x.shape[0]).double()

    def sparse(leaves: Problem):
        acts = gsf.jumprelu_encode(*leaves.encoder, leaves.threshold, bandwidth=bandwidth)
        recon = gsf.decode(acts, leaves.W_dec, leaves.b_dec)
        error = (recon - target.to(recon.dtype)).square().sum()
        return error + gate_weight * (acts.l0() * weight.to(acts.dtype)).sum()

    def dense(leaves: Problem):
        pre = leaves.x @ leaves.W_enc + leaves.b_enc
        acts, gate = dense_jumprelu(pre, leaves.threshold, bandwidth)
        error = (acts @ leaves.W_dec + leaves.b_dec - target.to(pre.dtype)).square().sum()
        return error + gate_weight * (gate.sum(1) * weight.to(pre.dtype)).sum()

    return sparse, dense


def gradients(loss, leaves: Problem):
    return torch.autograd.grad(loss(leaves), list(vars(leaves).values()))


@pytest.mark.parametrize("layout", ["fast", "contiguous", "sliced"])
@pytest.mark.parametrize("gate_weight", [0.0, 0.7])
def test_gradients_equal_dense_autograd(backend, gate_weight, layout):
    p = problem(n=29, d_in=31, d_sae=67, d_out=19)
    p = p if layout == "fast" else weight_layouts(p, layout)
    sparse, dense = losses(p, 0.5, gate_weight)
    leaves = p.leaves()
    ours = gradients(sparse, leaves)
    theirs, truth = gradients(dense, p.leaves()), gradients(dense, p.double().leaves())
    for name, mine, other, true in zip(vars(p), ours, theirs, truth, strict=True):
        assert mine.dtype == torch.float32
        if not name == "x":
            like = torch.empty_like(getattr(p, name))
            assert mine.stride() == like.stride(), name
        assert_close_to_truth(mine, other, true, torch.float32, name, terms=67)


def test_float64_equals_dense_autograd(backend):
    p = problem().double()
    sparse, dense = losses(p, 0.5, 0.7)
    for mine, true in zip(gradients(sparse, p.leaves()), gradients(dense, p.leaves()), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-11)


def test_gradcheck_with_the_threshold_fixed(backend):
    p = problem(n=3, d_in=4, d_sae=6, d_out=2).double().leaves()

    def recon(x, W_enc, b_enc, W_dec, b_dec):
        acts = gsf.jumprelu_encode(x, W_enc, b_enc, p.threshold.detach())
        return gsf.decode(acts, W_dec, b_dec)

    assert torch.autograd.gradcheck(recon, (*p.encoder, p.W_dec, p.b_dec))


@pytest.mark.parametrize("wanted", ["x", "W_enc", "b_enc", "threshold"])
def test_one_gradient_alone(backend, wanted):
    p = problem()
    every = p.leaves()
    sparse, _ = losses(p, 0.5, 0.7)
    index = list(vars(p)).index(wanted)
    one = p.with_(**{wanted: getattr(p, wanted).detach().requires_grad_()})
    (mine,) = torch.autograd.grad(sparse(one), getattr(one, wanted))
    torch.testing.assert_close(mine, gradients(sparse, every)[index], rtol=1e-5, atol=1e-5)


def test_low_precision_threshold_and_bias_get_gradients_in_their_dtype(backend):
    p = problem()
    theta = p.threshold.bfloat16().requires_grad_()
    b_enc = p.b_enc.half().requires_grad_()
    acts = gsf.jumprelu_encode(p.x, p.W_enc, b_enc, theta, bandwidth=0.5)
    (acts.values.sum() + acts.gate.sum()).backward()
    assert theta.grad.dtype == torch.bfloat16 and b_enc.grad.dtype == torch.float16
    assert theta.grad.any() and b_enc.grad.any()


def test_the_window_is_stored_only_for_gradients(backend):
    p = problem(integer=True)
    theta = p.threshold.clone().requires_grad_()
    with_window = gsf.jumprelu_encode(*p.encoder, theta, bandwidth=2.0)
    assert (with_window.gate == 0).any()
    with torch.no_grad():
        assert (gsf.jumprelu_encode(*p.encoder, theta, bandwidth=2.0).gate == 1).all()
        gsf.jumprelu_encode(*p.encoder, theta)  # bandwidth 0 is fine without gradients
    assert (gsf.jumprelu_encode(*p.encoder, p.threshold, bandwidth=2.0).gate == 1).all()
    with pytest.raises(ValueError, match="threshold requires grad but bandwidth is 0: pass"):
        gsf.jumprelu_encode(*p.encoder, theta)


def test_nan_reaches_the_loss_and_its_gradients(backend):
    p = problem()
    x = p.x.clone()
    x[3, 2] = float("nan")
    leaves = p.with_(x=x).leaves()
    acts = gsf.jumprelu_encode(*leaves.encoder, leaves.threshold, bandwidth=0.5)
    recon = gsf.decode(acts, leaves.W_dec, leaves.b_dec)
    assert recon[3].isnan().all() and recon[[0, 1, 2, 4]].isfinite().all()
    recon.square().sum().backward()
    assert leaves.x.grad[3].isnan().all() and leaves.W_enc.grad.isnan().any()


def test_second_derivative_is_an_error(backend):
    p = problem().leaves()
    acts = gsf.jumprelu_encode(*p.encoder, p.threshold.detach())
    (d_x,) = torch.autograd.grad(acts.values.sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="encode_backward is not differentiable"):
        d_x.sum().backward()


def test_float64_threshold_beside_float32_weights(backend):
    p = problem()
    theta = p.threshold.double().requires_grad_()
    acts = gsf.jumprelu_encode(*p.encoder, theta, bandwidth=0.5)
    same = gsf.jumprelu_encode(*p.encoder, p.threshold)
    torch.testing.assert_close(acts.to_dense(), same.to_dense())
    acts.gate.sum().backward()
    assert theta.grad.dtype == torch.float64 and theta.grad.any()
