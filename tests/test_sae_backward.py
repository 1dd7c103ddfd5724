"""sae_backward: equal to decode_backward, then encode_backward; groups and stacked entry sets."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_all_same, assert_close_to_truth
from samples import LAYOUTS, MIXED, Problem, problem, sae_backward_args
from torch import Tensor

OPS = ("sae_backward", "decode_backward", "encode_backward")
NAMES = ("d_x", "d_W_enc", "d_b_enc", "d_threshold", "d_W_dec", "d_b_dec")
X, W_ENC, THETA, BANDWIDTH, W_DEC, D_RECON, ENDS, OFFSETS = range(8)


def composed(backend, args) -> list[Tensor]:
    """One group, one entry set: decode_backward, then encode_backward."""
    offsets, indices, values, gate, d_values, d_gate, *view, need_x = args[OFFSETS:]
    needs = (True, True, True)
    decode_args = (args[D_RECON][0], offsets, indices, values, args[W_DEC], *view, *needs)
    total, d_W_dec, d_b_dec = backend.op("decode_backward")(*decode_args)
    total = total if d_values is None else total + d_values
    inputs = (total, d_gate, args[X], args[W_ENC], args[THETA], args[BANDWIDTH])
    entries = (offsets, indices, values, gate, *view)
    needs = (need_x, True, True, args[BANDWIDTH] > 0)
    return [*backend.op("encode_backward")(*inputs, *entries, *needs), d_W_dec, d_b_dec]


def dense(args, wide: torch.dtype) -> list[Tensor]:
    """Every group and set through dense matrices, in `wide`."""
    x, W_enc, W_dec = (args[i].to(wide) for i in (X, W_ENC, W_DEC))
    offsets, indices, values, gate, d_values, d_gate, *_ = args[OFFSETS:]
    d_recon, bandwidth = args[D_RECON].to(wide), args[BANDWIDTH]
    m, d_sae = d_recon.shape[1], W_enc.shape[1]
    where = torch.repeat_interleave(torch.arange(m), offsets.diff()), indices.long()

    def spread(t: Tensor | None) -> Tensor:
        filled = torch.zeros(m, d_sae, dtype=wide)
        return filled if t is None else filled.index_put_(where, t.to(wide))

    acts, stored = spread(values), spread(torch.ones_like(gate))
    d_dot, d_W_dec, start = torch.zeros_like(acts), torch.zeros_like(W_dec), 0
    for g, end in enumerate(args[ENDS]):
        seen = d_recon[g:].sum(0)
        d_dot[:, start:end] = seen @ W_dec[start:end].t()
        d_W_dec[start:end] = acts[:, start:end].t() @ seen
        start = end
    d_acts = d_dot * stored + spread(d_values)
    d_pre = d_acts * spread(gate)
    stacked = x.repeat(m // max(x.shape[0], 1), 1)
    d_x = (d_pre @ W_enc.t()).view(-1, *x.shape).sum(0)
    results = [d_x, stacked.t() @ d_pre, d_pre.sum(0), torch.zeros(0)]
    if bandwidth > 0:
        theta = args[THETA].to(wide)
        window = stored.bool() & ((spread(gate) == 0) | (acts < theta + bandwidth / 2))
        terms = torch.where(window, theta * d_acts + spread(d_gate), 0.0)
        results[3] = terms.sum(0) / -bandwidth
    return [*results, d_W_dec, d_recon.sum((0, 1))]


def skip_where_interpreted(backend, reason: str) -> None:
    """The interpreter takes 10 ms per program: what other cases cover is left to real machines."""
    if backend.interpreted:
        pytest.skip(f"interpreted: {reason}")


def check(backend, args) -> list[Tensor]:
    results = backend.op("sae_backward")(*args)
    kinds = [args[X].dtype, args[W_ENC].dtype, *[torch.float32] * 2, args[W_DEC].dtype]
    kinds.append(torch.float32)
    plain, true = dense(args, torch.float32), dense(args, torch.float64)
    for mine, theirs, truth, kind, name in zip(results, plain, true, kinds, NAMES, strict=True):
        if name == "d_x" and not args[-1]:
            assert mine.shape == (0,) and mine.dtype == kind
            continue
        assert mine.dtype == kind, name
        assert_close_to_truth(
            mine, theirs.to(kind), truth, kind, name, terms=args[D_RECON].shape[1] * 4
        )
    return results


def integer_problem(**sizes) -> Problem:
    return problem(integer=True, **sizes)


@pytest.mark.parametrize("with_extras", [True, False])
@pytest.mark.parametrize("bandwidth", [0.4, 0.0])
@pytest.mark.parametrize("d", [16, 23, 64, 257])
def test_equals_the_composition_bit_for_bit(backend, with_extras, bandwidth, d):
    if d != 23 or (with_extras and bandwidth == 0):
        skip_where_interpreted(backend, "one width, with and without the options")
    n, d_sae = (20, 31) if backend.interpreted else (70, 301)
    p = problem(n=n, d_in=d, d_sae=d_sae, d_out=d + 3)
    args = sae_backward_args(p, bandwidth)
    if not with_extras:
        args[11:13] = [None, None]
    if bandwidth == 0:
        args[THETA], args[12] = None, None
    results = backend.op("sae_backward")(*args)
    if backend.native:
        assert_all_same(results, composed(backend, args), NAMES)
    check(backend, args)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_dtypes(backend, dtypes):
    x_dtype, w_dtype = dtypes
    n = 9 if backend.interpreted else 33
    args = sae_backward_args(problem(n=n, x_dtype=x_dtype, w_dtype=w_dtype))
    check(backend, [*args[:-1], False])
    results = check(backend, args)
    if backend.native:
        assert_all_same(results, composed(backend, args), NAMES)


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("sets", [1, 2, 3])
@pytest.mark.parametrize("ends", [(37,), (9, 37), (1, 2, 36, 37), (0, 20, 20, 37)], ids=str)
def test_groups_and_sets(backend, ends, sets, need_x):
    if sets == 2 or not (need_x or sets == 1):
        skip_where_interpreted(backend, "three sets stand for two")
    for bandwidth in (0.4, 0.0) if sets == 1 or not backend.interpreted else (0.4,):
        args = sae_backward_args(problem(), bandwidth, sets=sets, group_ends=ends)
        if bandwidth == 0:
            args[THETA], args[12] = None, None
        args[-1] = need_x
        check(backend, args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, layout):
    p = integer_problem(n=4 if backend.interpreted else 40)
    args = sae_backward_args(p, 4.0, sets=2, group_ends=(11, 37))
    for i in (11, 12, D_RECON):
        args[i] = torch.randint(-2, 3, args[i].shape).float()
    wanted = [t.float() for t in dense(args, torch.float64)]
    for i in (X, W_ENC, W_DEC):
        args[i] = LAYOUTS[layout](args[i])
    args[D_RECON] = torch.stack([args[D_RECON].permute(1, 2, 0)] * 2)[0].permute(2, 0, 1)
    results = backend.op("sae_backward")(*args)
    assert_all_same(results, wanted, NAMES)
    for gradient, parameter in ((results[1], args[W_ENC]), (results[4], args[W_DEC])):
        assert gradient.stride() == torch.empty_like(parameter).stride()


def test_rows_apart_upstream(backend):
    """Rows of d_recon that are part of wider rows, in every group."""
    args = sae_backward_args(integer_problem(n=4), 4.0, sets=2, group_ends=(11, 20, 37))
    for i in (11, 12, D_RECON):
        args[i] = torch.randint(-2, 3, args[i].shape).float()
    wanted = [t.float() for t in dense(args, torch.float64)]
    d_recon = args[D_RECON]
    wide = torch.full((*d_recon.shape[:2], 3 * d_recon.shape[2]), torch.nan)
    args[D_RECON] = wide[:, :, d_recon.shape[2] : 2 * d_recon.shape[2]].copy_(d_recon)
    assert_all_same(backend.op("sae_backward")(*args), wanted, NAMES)


def test_stride_zero_upstream(backend):
    args = sae_backward_args(integer_problem(), 4.0, sets=2, group_ends=(11, 37))
    args[11:13] = [None, None]
    args[D_RECON] = torch.tensor(1.0).expand(2, 26, 19)
    wanted = [t.float() for t in dense(args, torch.float64)]
    assert_all_same(backend.op("sae_backward")(*args), wanted, NAMES)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_large_gradients(backend, layout):
    # More than 32 MiB of W_enc and W_dec: large gradients have a path of their own.
    skip_where_interpreted(backend, "10,080 programs take a minute")
    p = integer_problem(n=3, d_in=1152, d_sae=10_080, d_out=1152)
    p = p.with_(threshold=torch.full((10_080,), 60.0), x=p.x.clone())
    p = p.with_(W_enc=LAYOUTS[layout](p.W_enc), W_dec=LAYOUTS[layout](p.W_dec))
    args = sae_backward_args(p, 2.0)
    for i in (11, 12, D_RECON):
        args[i] = torch.randint(-2, 3, args[i].shape).float()
    wanted = [t.float() for t in dense(args, torch.float64)]
    assert_all_same(backend.op("sae_backward")(*args), wanted, NAMES)


@pytest.mark.parametrize("n", [0, 2])
def test_without_entries(backend, n):
    none = [torch.zeros(2 * n + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)]
    none += [torch.zeros(0)] * 2 + [None, None]
    for d, d_sae in ((5, 7), (5, 0), (0, 7)):
        view = [torch.zeros(d_sae + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]
        x, W_enc, theta = torch.ones(n, d), torch.ones(d, d_sae), torch.ones(d_sae)
        d_recon = torch.ones(1, 2 * n, 3)
        args = [x, W_enc, theta, 0.5, torch.ones(d_sae, 3), d_recon, [d_sae], *none, *view, True]
        wanted = [torch.zeros_like(t) for t in (x, W_enc, theta, theta)]
        wanted += [torch.zeros(d_sae, 3), torch.full((3,), 2.0 * n)]
        assert_all_same(backend.op("sae_backward")(*args), wanted, NAMES)


def test_padding_is_never_read(backend):
    args = sae_backward_args(integer_problem(), 4.0)
    nnz = args[8].shape[0]
    wanted = backend.op("sae_backward")(*args)
    garbage = torch.full((9,), float("nan"))
    for i in (9, 10, 11, 12):
        args[i] = torch.cat([args[i], garbage])
    args[8] = torch.cat([args[8], torch.full((9,), torch.iinfo(torch.int32).max)]).int()
    args[14] = torch.cat([args[14], torch.full((9,), torch.iinfo(torch.int64).max)])
    assert int(args[OFFSETS][-1]) == nnz
    assert_all_same(backend.op("sae_backward")(*args), wanted, NAMES)


def test_special_values_reach_only_their_latents(backend):
    args = sae_backward_args(integer_problem(), 4.0)
    args[D_RECON][0, 4, 2] = float("nan")
    x = args[X].clone()
    x[6, 1] = float("nan")
    args[X] = x
    results = backend.op("sae_backward")(*args)
    touched = torch.zeros(37, dtype=torch.bool)
    for row in (4, 6):
        entries = slice(int(args[OFFSETS][row]), int(args[OFFSETS][row + 1]))
        touched[args[8][entries].long()] = True
    assert touched.any() and not touched.all()
    assert results[1].isfinite().all(0)[~touched].all() and results[1].isnan().any()
    assert results[4].isfinite().all(1)[~touched].all() and results[4].isnan().any()
    assert results[0][[*range(4), 5, *range(7, 13)]].isfinite().all()
