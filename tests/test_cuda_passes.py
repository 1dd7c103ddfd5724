"""The CUDA kernels of decode, pre_at and the backward ops, on the CPU, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from samples import (
    DTYPES,
    LAYOUTS,
    Problem,
    decode_backward_args,
    encode_backward_args,
    jumprelu_entries,
    problem,
    sae_backward_args,
)
from torch import Tensor

from gemmascope_fast import reference

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGE = 232448
"""Bytes of shared memory that a block of an H100 may have."""


def matrix(t: Tensor) -> tuple[np.ndarray, int]:
    """The elements of a matrix where they are, and the code of their dtype."""
    if t.dtype == torch.float32:
        return t.numpy(), 0
    return t.view(torch.int16).numpy().view(np.uint16), CODES[t.dtype]


def vector(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.contiguous().numpy()


def full(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that nothing has been written to yet."""
    return torch.full(shape, float("nan"), dtype=dtype)


def close(ours: Tensor, truth: Tensor, theirs: Tensor) -> None:
    """As exact as the reference in the tested dtype, up to a rounding."""
    assert ours.shape == truth.shape
    assert ours.dtype == theirs.dtype
    ours, theirs = ours.double(), theirs.double()
    assert torch.equal(ours.isnan(), truth.isnan())
    ours, theirs, truth = (t.nan_to_num(0.0, 0.0, 0.0) for t in (ours, theirs, truth))
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    atol = 4 * scale * torch.finfo(torch.float32).eps
    bound = 2 * float((theirs - truth).abs().max() if truth.numel() else 0.0) + atol
    assert float((ours - truth).abs().max() if truth.numel() else 0.0) <= bound


def doubled(args: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


# ---- token order


def token_pass(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor | None,
    gate: Tensor | None,
    features: Tensor,
    bias: Tensor | None,
    out: Tensor,
    add: bool = False,
) -> Tensor:
    testing.cuda_token_pass(
        *(vector(offsets), vector(indices), vector(coefficients), vector(gate)),
        *(matrix(features), vector(bias), matrix(out), add),
    )
    return out


def check_decode(p: Problem, out: torch.dtype, biased: bool = True) -> None:
    offsets, indices, values, *_ = jumprelu_entries(p, max_nnz=p.x.shape[0] * p.W_dec.shape[0])
    padding = torch.arange(indices.shape[0]) >= offsets[-1]
    bias = p.b_dec if biased else None
    theirs = reference.decode(offsets, indices, values, p.W_dec, bias, None, None, out)
    wide = [values.double(), p.W_dec.double(), None if bias is None else bias.double()]
    truth = reference.decode(offsets, indices, *wide, None, None, torch.float64)
    poison = values.masked_fill(padding, float("nan")), indices.masked_fill(padding, 2**31 - 1)
    recon = full(*truth.shape, dtype=out)
    close(token_pass(offsets, poison[1], poison[0], None, p.W_dec, bias, recon), truth, theirs)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 33, 100, 128, 264, 640])
def test_decode(d, dtype, out):
    check_decode(problem(d_out=d, w_dtype=dtype), out, biased=d != 33)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_of_any_layout(layout, dtype):
    p = problem(d_out=24, w_dtype=dtype)
    check_decode(p.with_(W_dec=LAYOUTS[layout](p.W_dec)), dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 300])
def test_decode_adds_rows_of_any_length_in_stored_order(count):
    W = torch.randn(50, 136)
    indices = torch.randint(0, 50, (count + 3,), dtype=torch.int32)
    values = torch.randn(count + 3)
    offsets = torch.tensor([0, 2, 2, count + 2, count + 3])
    out = token_pass(offsets, indices, values, None, W, None, full(4, 136))
    row = torch.zeros(136, dtype=torch.float64)
    for e in range(2, count + 2):  # a product and a sum, rounded once: an fma
        row = (row + values[e].double() * W[indices[e]].double()).float().double()
    assert torch.equal(out[2].double(), row)
    assert not out[1].any()


def test_decode_of_no_tokens_and_of_no_entries():
    none = torch.zeros(0, dtype=torch.int32)
    token_pass(torch.zeros(1, dtype=torch.int64), none, torch.zeros(0), None, full(3, 8), None,
               full(0, 8))  # fmt: skip
    bias = torch.randn(8)
    out = token_pass(torch.zeros(3, dtype=torch.int64), none, torch.zeros(0), None, full(3, 8),
                     bias, full(2, 8))  # fmt: skip
    assert torch.equal(out, bias.expand(2, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_leaves_out_indices_out_of_range(dtype):
    W = torch.randint(-2, 3, (6, 40)).to(dtype)
    offsets = torch.tensor([0, 5])
    indices = torch.tensor([3, -1, 6, 2**31 - 1, 5], dtype=torch.int32)
    values = torch.tensor([2.0, float("nan"), 1.0, 1.0, -1.0])
    out = token_pass(offsets, indices, values, None, W, None, full(1, 40))
    assert torch.equal(out[0], 2 * W[3].float() - W[5].float())


def test_decode_propagates_what_is_not_finite_from_rows_that_are_used():
    W = torch.zeros(3, 8)
    W[0], W[1, 2], W[2, 3] = float("nan"), float("inf"), float("-inf")
    entries = torch.tensor([0, 2]), torch.tensor([1, 2], dtype=torch.int32)
    out = token_pass(*entries, torch.tensor([1.0, 0.0]), None, W, None, full(1, 8))[0]
    assert out[2] == float("inf")
    assert out[3].isnan()
    assert not out[[0, 1, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "stepped"])
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_decode_in_place_adds_and_rounds_once(out, layout):
    p = problem(d_out=24)
    entries = jumprelu_entries(p)[:3]
    recon = LAYOUTS[layout](torch.randn(13, 24).to(out))
    truth, theirs = recon.double(), recon.clone()
    reference.decode_(truth, *entries[:2], entries[2].double(), p.W_dec.double())
    reference.decode_(theirs, *entries, p.W_dec)
    token_pass(*entries, None, p.W_dec, None, recon, True)
    close(recon, truth, theirs)


@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [7, 100, 768, 808])
def test_pre_at(d, x_dtype, w_dtype):
    p = problem(d_in=d, x_dtype=x_dtype, w_dtype=w_dtype)
    rows, latents = torch.arange(26) % 13, torch.arange(26) * 5 % 37
    pre = full(26)
    args = (vector(p.b_enc), vector(rows), vector(latents), vector(pre))
    testing.cuda_pre_at(matrix(p.x), matrix(p.W_enc.t()), *args)
    truth = reference.pre_at(*p.double().encoder, rows, latents)
    close(pre, truth, reference.pre_at(*p.encoder, rows, latents))


def test_pre_at_of_pairs_out_of_range_is_zero():
    p = problem()
    rows = torch.tensor([-1, 0, 13, 2**40, 3])
    latents = torch.tensor([0, -5, 1, 2, 37])
    pre = full(5)
    args = (vector(p.b_enc), vector(rows), vector(latents), vector(pre))
    testing.cuda_pre_at(matrix(p.x), matrix(p.W_enc.t()), *args)
    assert not pre.any()


# ---- feature-major


ABSENT = dict.fromkeys(
    ["g", "W_dec", "x", "d_W_dec", "d_W_enc", "threshold", "d_gate", "d_b_enc"]
    + ["d_threshold", "d_values", "d_pre", "hot_slots", "hot"]
)


def records(offsets, feature_offsets, permutation, values, gate, d_values) -> Tensor:
    out = torch.full((permutation.shape[0], 4), -5, dtype=torch.int32)
    sources = dict(values=vector(values), gate=vector(gate), gradient=vector(d_values))
    view = dict(feature_offsets=vector(feature_offsets), permutation=vector(permutation))
    testing.cuda_latent_order(dict(offsets=vector(offsets), **view, **sources), vector(out))
    return out


def rows_like(parameter: Tensor) -> Tensor:
    """A gradient in the dtype and layout of rows, one per latent."""
    return torch.empty_like(parameter).fill_(float("nan"))


def pass_arguments(first: int = 0, last: int = -1, **given: Any) -> dict[str, Any]:
    a = {**ABSENT, **given}
    for name in ("g", "W_dec", "x", "d_W_dec", "d_W_enc"):
        a[name] = None if a[name] is None else matrix(a[name])
    for name, t in a.items():
        a[name] = vector(t) if isinstance(t, Tensor) else t
    last = given["feature_offsets"].shape[0] - 1 if last < 0 else last
    return {"bandwidth": 0.0, **a, "first": first, "last": last}


def run_pass(shared: int, slab: int, first: int = 0, last: int = -1, **given: Any) -> int:
    return testing.cuda_feature_pass(pass_arguments(first, last, **given), shared, slab)


def decode_backward(args: list[Any], shared: int = LARGE, slab: int = 0) -> tuple[Tensor, ...]:
    d_recon, offsets, indices, values, W_dec, feature_offsets, permutation, *_ = args
    view = dict(feature_offsets=feature_offsets, permutation=permutation, indices=indices)
    record = records(offsets, feature_offsets, permutation, values, None, None)
    d_values, d_W_dec = torch.zeros_like(values), rows_like(W_dec)
    run_pass(
        *(shared, slab),
        **view,
        **dict(records=record, n=d_recon.shape[0], g=d_recon, W_dec=W_dec),
        **dict(d_values=d_values, d_W_dec=d_W_dec),
    )
    return d_values, d_W_dec


def encode_backward(args: list[Any], shared: int = LARGE, slab: int = 0) -> tuple[Tensor, ...]:
    d_values, d_gate, x, W_enc, threshold, bandwidth, offsets, indices, values, gate = args[:10]
    feature_offsets, permutation = args[10:12]
    view = dict(feature_offsets=feature_offsets, permutation=permutation, indices=indices)
    record = records(offsets, feature_offsets, permutation, values, gate, d_values)
    d_sae = W_enc.shape[1]
    d_W_enc, d_b_enc = rows_like(W_enc), full(d_sae)
    d_threshold = full(d_sae if bandwidth > 0 else 0)
    run_pass(
        *(shared, slab),
        **view,
        **dict(records=record, n=x.shape[0], x=x, d_W_enc=d_W_enc.t(), d_b_enc=d_b_enc),
        **dict(threshold=threshold, bandwidth=bandwidth, d_gate=d_gate),
        d_threshold=d_threshold if bandwidth > 0 else None,
    )
    d_x = full(*x.shape, dtype=x.dtype)
    token_pass(offsets, indices, d_values, gate, W_enc.t(), None, d_x)
    return d_x, d_W_enc, d_b_enc, d_threshold


def sae_backward(args: list[Any], shared: int = LARGE, slab: int = 0) -> tuple[Tensor, ...]:
    x, W_enc, threshold, bandwidth, W_dec, d_recon, group_ends, *entries = args
    offsets, indices, values, gate, d_values, d_gate, feature_offsets, permutation, need_x = entries
    record = records(offsets, feature_offsets, permutation, values, gate, d_values)
    d_W_enc, d_W_dec, d_b_enc = rows_like(W_enc), rows_like(W_dec), full(W_dec.shape[0])
    d_threshold = full(W_dec.shape[0] if bandwidth > 0 else 0)
    d_pre = torch.zeros_like(values)
    seen = d_recon[-1]
    for group in reversed(range(len(group_ends))):
        if group < len(group_ends) - 1:
            total = full(*seen.shape)
            testing.cuda_group_sums(matrix(seen), matrix(d_recon[group]), vector(total))
            seen = total
        run_pass(
            *(shared, slab, [0, *group_ends][group], group_ends[group]),
            **dict(feature_offsets=feature_offsets, permutation=permutation, indices=indices),
            **dict(records=record, n=x.shape[0], x=x, g=seen, W_dec=W_dec, d_b_enc=d_b_enc),
            **dict(d_W_enc=d_W_enc.t(), d_W_dec=d_W_dec, d_pre=d_pre, d_gate=d_gate),
            **dict(threshold=threshold, bandwidth=bandwidth),
            d_threshold=d_threshold if bandwidth > 0 else None,
        )
    d_x = full(*x.shape, dtype=x.dtype)
    token_pass(offsets, indices, d_pre, None, W_enc.t(), None, d_x)
    return (d_x if need_x else x.new_empty(0)), d_W_enc, d_b_enc, d_threshold, d_W_dec


SIZES = [(1, 1), (7, 33), (100, 7), (40, 24), (128, 128), (264, 512)]
DTYPE_SETS = [(x, w) for x in DTYPES for w in DTYPES]


def check_decode_backward(args: list[Any], **limits: int) -> None:
    truth, theirs = reference.decode_backward(*doubled(args)), reference.decode_backward(*args)
    for ours, right, plain in zip(decode_backward(args, **limits), truth, theirs, strict=False):
        close(ours, right, plain)


def check_encode_backward(args: list[Any], **limits: int) -> None:
    args[-1] = args[5] > 0
    truth, theirs = reference.encode_backward(*doubled(args)), reference.encode_backward(*args)
    for ours, right, plain in zip(encode_backward(args, **limits), truth, theirs, strict=True):
        close(ours, right, plain)


def check_sae_backward(args: list[Any], **limits: int) -> None:
    truth, theirs = reference.sae_backward(*doubled(args)), reference.sae_backward(*args)
    for ours, right, plain in zip(sae_backward(args, **limits), truth, theirs, strict=False):
        close(ours, right, plain)


@pytest.mark.parametrize("x_dtype, w_dtype", DTYPE_SETS, ids=str)
@pytest.mark.parametrize("d_in, d_out", [(7, 33), (40, 24)])
def test_gradients_of_every_dtype(d_in, d_out, x_dtype, w_dtype):
    p = problem(d_in=d_in, d_out=d_out, x_dtype=x_dtype, w_dtype=w_dtype)
    check_decode_backward(decode_backward_args(p))
    check_encode_backward(encode_backward_args(p))
    check_sae_backward(sae_backward_args(p))


@pytest.mark.parametrize("d_in, d_out", SIZES)
def test_gradients_of_every_size(d_in, d_out):
    p = problem(d_in=d_in, d_out=d_out, x_dtype=torch.bfloat16, w_dtype=torch.bfloat16)
    check_decode_backward(decode_backward_args(p))
    check_encode_backward(encode_backward_args(p))
    check_sae_backward(sae_backward_args(p))


def test_gradients_of_a_dtype_of_their_own():
    p = problem(d_in=40, d_out=24, x_dtype=torch.float16, w_dtype=torch.bfloat16)
    args = sae_backward_args(p)
    args[5] = args[5].float()
    check_sae_backward(args)
    args[4] = args[4].to(torch.float16)
    check_sae_backward(args)


@pytest.mark.parametrize("d", [2056, 4104, 5384])
def test_rows_of_several_chunks_per_thread(d):
    p = problem(4, d, 5, d, x_dtype=torch.bfloat16, w_dtype=torch.bfloat16)
    check_sae_backward(sae_backward_args(p))


@pytest.mark.parametrize("shared, stages", [(17000, 1), (25000, 2), (33500, 3), (LARGE, 4)])
def test_any_number_of_stages(shared, stages):
    p = problem(30, 40, 11, 24)
    args = sae_backward_args(p)
    record = torch.zeros(args[8].shape[0], 4, dtype=torch.int32)
    view = dict(feature_offsets=args[13], permutation=args[14], indices=args[8])
    parts = dict(x=args[0], g=args[5][0], W_dec=args[4])
    targets = dict(d_W_enc=rows_like(args[1]).t(), d_W_dec=rows_like(args[4]))
    shape = run_pass(shared, 0, n=30, records=record - 1, **view, **parts, **targets)
    assert shape == 10 + stages
    check_sae_backward(args, shared=shared)


@pytest.mark.parametrize("slab", [8, 24, 64])
def test_rows_that_do_not_fit_go_in_slabs(slab):
    p = problem(d_in=40, d_out=56, x_dtype=torch.bfloat16)
    check_decode_backward(decode_backward_args(p), slab=slab)
    check_encode_backward(encode_backward_args(p), slab=slab)
    check_sae_backward(sae_backward_args(p), slab=slab)


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("ends", [(37,), (5, 5, 37), (0, 20, 37), (12, 37, 37)])
@pytest.mark.parametrize("slab", [0, 16])
def test_stacked_sets_and_nested_groups(sets, ends, slab):
    p = problem(d_in=24, d_out=40, x_dtype=torch.bfloat16)
    check_sae_backward(sae_backward_args(p, sets=sets, group_ends=ends), slab=slab)


@pytest.mark.parametrize("n", [255, 256, 257, 300, 600, 1100])
@pytest.mark.parametrize("d", [8, 20])
def test_long_segments_are_cut_and_added_up(n, d):
    p = problem(n, d, 5, d)
    always = p.b_enc.clone()
    always[1], always[4] = 50, 50
    p = p.with_(b_enc=always)
    check_sae_backward(sae_backward_args(p))
    check_sae_backward(sae_backward_args(p, group_ends=(2, 5)), slab=8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(layout):
    p = problem(d_in=40, d_out=24, x_dtype=torch.bfloat16, w_dtype=torch.bfloat16)
    move = LAYOUTS[layout]
    args = sae_backward_args(p.with_(x=move(p.x), W_dec=move(p.W_dec)))
    args[5] = move(args[5][0])[None]
    check_sae_backward(args)


def test_without_a_window_and_without_other_gradients():
    args = sae_backward_args(problem(), bandwidth=0.4)
    args[2], args[3], args[11], args[12], args[15] = None, 0.0, None, None, False
    check_sae_backward(args)


def test_entries_that_are_off_lie_in_the_window_whatever_the_threshold_is():
    p = problem()
    args = encode_backward_args(p.with_(threshold=p.threshold - 1.0))
    off = args[9] == 0
    assert (off & (args[8] >= args[4][args[7].long()] + 0.2)).any()  # 0 is beyond their window
    check_encode_backward(args)


def test_padding_is_never_read():
    p = problem()
    args = sae_backward_args(p)
    tight = sae_backward(args)
    for at in (8, 9, 10, 11, 12, 14):
        poison = torch.full((5,), 2**31 - 1 if at in (8, 14) else float("nan"))
        args[at] = torch.cat([args[at], poison.to(args[at].dtype)])
    for ours, right in zip(sae_backward(args), tight, strict=True):
        assert torch.equal(ours, right)


def test_views_that_are_wrong_touch_no_memory():
    args = sae_backward_args(problem())
    capacity = args[8].shape[0]
    args[14] = args[14].clone()
    args[14][3], args[14][7], args[14][9] = -1, capacity, 2**40
    args[13] = args[13].clone()
    args[13][-1] = capacity + 1000
    args[13][0] = -7
    for ours in sae_backward(args):
        assert ours.isfinite().all()


def test_latents_without_entries_have_no_gradient():
    p = problem()
    p = p.with_(b_enc=torch.where(torch.arange(37) % 3 == 0, -100.0, p.b_enc))
    _, d_W_enc, d_b_enc, d_threshold, d_W_dec = sae_backward(sae_backward_args(p))
    for rows in (d_W_enc.t(), d_b_enc, d_threshold, d_W_dec):
        assert not rows[::3].any()
        assert rows[1::3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot_products_in_token_order(dtype):
    p = problem(d_out=1000, w_dtype=dtype)
    args = decode_backward_args(p, max_nnz=13 * 37)
    out = full(13 * 37)
    entries = vector(args[1]), vector(args[2])
    testing.cuda_entry_dots(*entries, matrix(p.W_dec), matrix(args[0]), vector(out))
    truth, theirs = reference.decode_backward(*doubled(args)), reference.decode_backward(*args)
    close(out, truth[0], theirs[0])
    args[2][[0, 4]] = torch.tensor([-1, 37], dtype=torch.int32)
    testing.cuda_entry_dots(*entries, matrix(p.W_dec), matrix(args[0]), vector(out))
    assert not out[[0, 4]].any()


def test_the_order_of_threads_changes_no_bit():
    args = sae_backward_args(problem(60, 40, 37, 24))
    first = sae_backward(args)
    for seed in (1, 2):
        testing.cuda_seed(seed)
        try:
            again = sae_backward(args)
        finally:
            testing.cuda_seed(0)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
