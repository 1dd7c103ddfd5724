"""decode and decode_: values, dtypes, strides, sizes, padding, special values, gradients."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close_to_truth, assert_same
from samples import DTYPES, LAYOUTS, MIXED, Problem, jumprelu_entries, problem
from torch import Tensor

import gemmascope_fast as gsf

OPS = ("decode", "decode_", "decode_backward", "by_feature")


def call(backend, p: Problem, entries: list[Tensor], dtype=None, b_dec: Tensor | None = None):
    offsets, indices, values, *_ = entries
    dtype = p.W_dec.dtype if dtype is None else dtype
    return backend.op("decode")(offsets, indices, values, p.W_dec, b_dec, None, None, dtype)


def per_entry_sum(p: Problem, entries: list[Tensor], b_dec: Tensor | None) -> Tensor:
    """The definition, entry by entry, in float64."""
    offsets, indices, values, *_ = entries
    n, nnz = offsets.shape[0] - 1, int(offsets[-1])
    rows = torch.repeat_interleave(torch.arange(n), offsets.diff())
    terms = values[:nnz, None].double() * p.W_dec[indices[:nnz].long()].double()
    recon = torch.zeros(n, p.W_dec.shape[1], dtype=torch.float64).index_add_(0, rows, terms)
    return recon if b_dec is None else recon + b_dec.double()


def acts_of(entries: list[Tensor], shape: tuple[int, ...], **kwargs) -> gsf.SparseActs:
    return gsf.SparseActs(*entries[:4], shape, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_matches_the_definition(backend, dtype, w_dtype, bias):
    p = problem(n=17, d_sae=61, d_out=53, w_dtype=w_dtype)
    entries = jumprelu_entries(p)
    b_dec = p.b_dec if bias else None
    truth = per_entry_sum(p, entries, b_dec)
    dense = torch.zeros(17, 61).index_put_(
        (
            torch.repeat_interleave(torch.arange(17), entries[0].diff()),
            entries[1].long(),
        ),
        entries[2],
    )
    theirs = dense @ p.W_dec.float() + (0 if b_dec is None else b_dec)
    recon = call(backend, p, entries, dtype, b_dec)
    assert recon.dtype == dtype and recon.is_contiguous()
    assert_close_to_truth(recon, theirs.to(dtype), truth, dtype)
    if b_dec is None:
        added = torch.randn(17, 53).to(dtype)
        before = added.clone()
        backend.op("decode_")(added, *entries[:3], p.W_dec)
        theirs = (before.float() + dense @ p.W_dec.float()).to(dtype)
        assert_close_to_truth(added, theirs, before.double() + truth, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_any_layout_of_the_decoder(backend, layout, w_dtype):
    interpreted = backend.name == "triton"
    if interpreted and w_dtype == torch.float16:
        pytest.skip("interpreted layouts: float16 differs from bfloat16 by one conversion")
    # Few and many entries beside d_sae: gathered in place or copied first.
    for n in (1, 4 if interpreted else 40):
        p = problem(n=n, d_sae=41, d_out=37, integer=True, w_dtype=w_dtype)
        entries = jumprelu_entries(p)
        moved = p.with_(W_dec=LAYOUTS[layout](p.W_dec))
        expected = per_entry_sum(p, entries, p.b_dec)
        recon = call(backend, moved, entries, torch.float32, p.b_dec)
        assert_same(recon, expected.float())
        added = LAYOUTS[layout](torch.ones(n, 37))
        backend.op("decode_")(added, *entries[:3], moved.W_dec)
        assert_same(added, (expected - p.b_dec + 1).float())


def test_decode_in_place_writes_only_its_own_memory(backend):
    p = problem(integer=True)
    entries = jumprelu_entries(p)
    buffer = torch.full((3 * 13, 2 * 19 + 3), 7.0)
    backend.op("decode_")(buffer[::3, 1:-2:2], *entries[:3], p.W_dec)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[::3, 1:-2:2] = True
    assert (buffer[~inside] == 7).all()
    assert_same(buffer[::3, 1:-2:2], (per_entry_sum(p, entries, None) + 7).float())


def test_stride_zero_decoder_and_bias(backend):
    p = problem(integer=True)
    entries = jumprelu_entries(p)
    row = p.W_dec[:1].expand(37, 19)
    column = p.W_dec[:, :1].expand(37, 19)
    for W_dec in (row, column):
        moved = p.with_(W_dec=W_dec)
        bias = torch.tensor(3.0).expand(19)
        expected = per_entry_sum(moved, entries, bias)
        assert_same(call(backend, moved, entries, b_dec=bias), expected.float())


@pytest.mark.parametrize("d_out", [1, 2, 3, 7, 15, 16, 17, 31, 33, 127, 255, 256, 257, 640, 1152])
def test_every_width_and_row_length(backend, d_out):
    if backend.name == "triton" and d_out in (3, 15, 17, 127, 256, 257, 1152):
        pytest.skip("interpreting every width takes minutes")
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 61])
    p = problem(d_sae=61, d_out=d_out, integer=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.cat(
        [torch.arange(int(length)) * (61 // max(int(length), 1)) for length in lengths]
    )
    values = torch.randint(-3, 4, indices.shape).float()
    for dtype in DTYPES:
        moved = p.with_(W_dec=p.W_dec.to(dtype))
        entries = [offsets, indices.to(torch.int32), values]
        recon = call(backend, moved, entries, torch.float32, p.b_dec)
        assert_same(recon, per_entry_sum(p, entries, p.b_dec).float())


@pytest.mark.parametrize(("d_sae", "d_out"), [(10_080, 1152), (10_080, 640), (1009, 5376)])
def test_sizes_of_gemma_scope(backend, d_sae, d_out):
    W_dec = torch.randint(-2, 3, (d_sae, d_out)).float()
    indices = torch.cat([torch.randperm(d_sae)[:100].sort().values for _ in range(3)])
    entries = [
        torch.tensor([0, 100, 200, 300]),
        indices.to(torch.int32),
        torch.randint(-3, 4, (300,)).float(),
    ]
    p = problem().with_(W_dec=W_dec)
    assert_same(call(backend, p, entries), per_entry_sum(p, entries, None).float())


def test_rows_far_apart_in_memory(backend):
    # Element offsets beyond 2^31. The pages between the rows are never touched.
    torch.use_deterministic_algorithms(False)  # or 4 GiB would be filled
    stride = 2**27 + 1
    W_dec = torch.empty(16 * stride + 8, dtype=torch.bfloat16).as_strided((17, 8), (stride, 1))
    W_dec.copy_(torch.arange(17)[:, None] + torch.arange(8))
    entries = [torch.tensor([0, 2]), torch.tensor([3, 16], dtype=torch.int32), torch.ones(2)]
    recon = call(backend, problem().with_(W_dec=W_dec), entries)
    assert recon.tolist() == [[19.0 + 2 * k for k in range(8)]]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_entries(backend, n):
    entries = [
        torch.zeros(n + 1, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0),
    ]
    p = problem()
    assert_same(call(backend, p, entries), torch.zeros(n, 19))
    assert_same(call(backend, p, entries, b_dec=p.b_dec), p.b_dec.expand(n, 19))
    none = p.with_(W_dec=torch.zeros(0, 19))
    assert_same(call(backend, none, entries, b_dec=p.b_dec), p.b_dec.expand(n, 19))
    narrow = p.with_(W_dec=torch.zeros(37, 0))
    assert_same(call(backend, narrow, entries), torch.zeros(n, 0))
    recon = torch.ones(n, 19)
    backend.op("decode_")(recon, *entries, p.W_dec)
    assert_same(recon, torch.ones(n, 19))


def test_padding_is_never_read(backend):
    p = problem(integer=True)
    entries = jumprelu_entries(p, max_nnz=13 * 37)
    expected = call(backend, p, entries, b_dec=p.b_dec)
    nnz = int(entries[0][-1])
    entries[1][nnz:] = torch.iinfo(torch.int32).max
    entries[2][nnz:] = float("nan")
    assert_same(call(backend, p, entries, b_dec=p.b_dec), expected)
    recon = torch.zeros(13, 19)
    backend.op("decode_")(recon, *entries[:3], p.W_dec)
    assert_same(recon + p.b_dec, expected)


def test_special_values_stay_in_their_rows(backend):
    p = problem(integer=True)
    entries = jumprelu_entries(p)
    active = entries[1][: int(entries[0][1])].long()
    unused = next(j for j in range(37) if j not in active)
    W_dec = p.W_dec.clone()
    W_dec[unused] = float("inf")
    recon = call(backend, p.with_(W_dec=W_dec), entries)
    expected = per_entry_sum(p.with_(W_dec=W_dec), entries, None).float()
    assert expected[0].isfinite().all() and not expected.isfinite().all()
    assert_same(recon, expected)
    values = entries[2].clone()
    values[int(entries[0][2])] = float("nan")
    recon = call(backend, p, [*entries[:2], values])
    assert recon[2].isnan().all() and recon[[0, 1, *range(3, 13)]].isfinite().all()


def test_rounds_once(backend):
    # 1 + 2^-8 + 2^-9 rounds to 1 + 2^-7 in bfloat16; adding in bfloat16 would stay at 1.
    W_dec = torch.tensor([[1.0], [2.0**-8], [2.0**-9]]).to(torch.bfloat16)
    entries = [torch.tensor([0, 3]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.ones(3)]
    p = problem().with_(W_dec=W_dec)
    assert call(backend, p, entries).item() == 1 + 2.0**-7
    recon = torch.ones(1, 1, dtype=torch.bfloat16)
    backend.op("decode_")(recon, torch.tensor([0, 2]), entries[1][1:], entries[2][1:], W_dec)
    assert recon.item() == 1 + 2.0**-7
    big = p.with_(W_dec=torch.full((3, 1), 30000.0))
    assert call(backend, big, entries, torch.float16).item() == float("inf")
    assert call(backend, big, entries, torch.bfloat16).item() == 90112.0


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (3, 1, 2)])
def test_leading_dimensions_and_default_dtype(backend, batch):
    p = problem(n=6 if batch else 1, integer=True, w_dtype=torch.bfloat16)
    entries = jumprelu_entries(p)
    acts = acts_of(entries, (*batch, 37))
    recon = gsf.decode(acts, p.W_dec, p.b_dec)
    assert recon.dtype == torch.bfloat16 and recon.shape == (*batch, 19)
    expected = per_entry_sum(p, entries, p.b_dec)
    assert_same(recon.reshape(-1, 19), expected.bfloat16())
    wide = gsf.decode(acts, p.W_dec, p.b_dec, dtype=torch.float32)
    assert_same(wide.reshape(-1, 19), expected.float())
    target = torch.zeros(*batch, 19)
    assert gsf.decode_(target, acts, p.W_dec) is target
    assert_same(target.reshape(-1, 19), (expected - p.b_dec).float())


def test_in_place_takes_a_transposed_target_and_bumps_its_version(backend):
    p = problem(integer=True)
    acts = acts_of(jumprelu_entries(p), (13, 37))
    target = torch.zeros(19, 13).t()
    version = target._version
    gsf.decode_(target, acts, p.W_dec)
    assert_same(target, gsf.decode(acts, p.W_dec))
    assert target._version > version


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gradients(backend, dtypes, layout):
    dtype, w_dtype = dtypes
    p = problem(w_dtype=w_dtype)
    p = p.with_(W_dec=LAYOUTS[layout](p.W_dec)).leaves()
    entries = jumprelu_entries(p.map(torch.Tensor.detach))
    values = entries[2].clone().requires_grad_()
    acts = acts_of([*entries[:2], values, entries[3]], (13, 37))
    grad = torch.randn(13, 19).to(dtype)
    inputs = (values, p.W_dec, p.b_dec)
    ours = torch.autograd.grad(gsf.decode(acts, p.W_dec, p.b_dec, dtype=dtype), inputs, grad)

    def dense(wide: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(wide).requires_grad_() for t in inputs]
        rows = torch.repeat_interleave(torch.arange(13), entries[0].diff())
        acts = torch.zeros(13, 37, dtype=wide).index_put((rows, entries[1].long()), leaves[0])
        return torch.autograd.grad(acts @ leaves[1] + leaves[2], leaves, grad.to(wide))

    results = zip(inputs, ours, dense(torch.float32), dense(torch.float64), strict=True)
    for parameter, mine, theirs, truth in results:
        assert mine.dtype == parameter.dtype and mine.stride() == parameter.stride()
        assert_close_to_truth(mine, theirs.to(mine.dtype), truth, mine.dtype)


def test_gradient_of_an_expanded_or_strided_upstream(backend):
    p = problem(integer=True).leaves()
    acts = acts_of(jumprelu_entries(p.map(torch.Tensor.detach)), (13, 37))
    grads = []
    upstreams = [
        torch.ones(1, 1).expand(13, 19),
        torch.ones(19, 13).t(),
        torch.ones(26, 38)[::2, ::2],
    ]
    for upstream in [torch.ones(13, 19), *upstreams]:
        recon = gsf.decode(acts, p.W_dec, p.b_dec)
        grads.append(torch.autograd.grad(recon, (p.W_dec, p.b_dec), upstream))
    recon = gsf.decode(acts, p.W_dec, p.b_dec)
    grads.append(torch.autograd.grad(recon.sum(), (p.W_dec, p.b_dec)))
    for other in grads[1:]:
        assert_same(other[0], grads[0][0])
        assert_same(other[1], grads[0][1])


def test_only_wanted_gradients_are_computed(backend):
    p = problem().leaves()
    entries = jumprelu_entries(p.map(torch.Tensor.detach))
    acts = acts_of(entries, (13, 37))
    recon = gsf.decode(acts, p.W_dec.detach(), p.b_dec)
    (d_b_dec,) = torch.autograd.grad(recon, p.b_dec, torch.ones_like(recon))
    assert_same(d_b_dec, torch.full((19,), 13.0))
    with torch.no_grad():
        assert not gsf.decode(acts, p.W_dec, p.b_dec).requires_grad


def test_second_derivative_is_an_error(backend):
    p = problem().leaves()
    acts = acts_of(jumprelu_entries(p.map(torch.Tensor.detach)), (13, 37)).requires_grad_()
    recon = gsf.decode(acts, p.W_dec)
    (d_values,) = torch.autograd.grad(recon.square().sum(), acts.values, create_graph=True)
    with pytest.raises(RuntimeError, match="decode_backward is not differentiable"):
        d_values.sum().backward()


def test_float64_bias_beside_float32_weights(backend):
    p = problem().leaves()
    acts = acts_of(jumprelu_entries(p.map(torch.Tensor.detach)), (13, 37))
    b_dec = p.b_dec.detach().double().requires_grad_()
    recon = gsf.decode(acts, p.W_dec, b_dec)
    torch.testing.assert_close(recon, gsf.decode(acts, p.W_dec, p.b_dec))
    recon.sum().backward()
    assert_same(b_dec.grad, torch.full((19,), 13.0, dtype=torch.float64))


def test_in_place_keeps_the_digits_of_a_float64_target(backend):
    p = problem(integer=True)
    acts = acts_of(jumprelu_entries(p), (13, 37))
    target = torch.full((13, 19), 2.0**-40, dtype=torch.float64)
    gsf.decode_(target, acts, p.W_dec)
    assert_same(target - gsf.decode(acts, p.W_dec), torch.full_like(target, 2.0**-40))
