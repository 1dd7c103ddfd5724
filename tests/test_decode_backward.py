"""decode_backward: gradients of values, W_dec and b_dec from those of the reconstruction."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_all_same, assert_close_to_truth, assert_same
from samples import DTYPES, LAYOUTS, MIXED, decode_backward_args, problem
from torch import Tensor

OPS = ("decode_backward",)
NAMES = ("d_values", "d_W_dec", "d_b_dec")


def definition(d_recon: Tensor, offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor):
    """The three sums, entry by entry, in float64."""
    d_recon, W_dec = d_recon.double(), W_dec.double()
    rows = torch.repeat_interleave(torch.arange(offsets.shape[0] - 1), offsets.diff())
    latents = indices.long()
    d_values = (W_dec[latents] * d_recon[rows]).sum(1)
    terms = values[:, None].double() * d_recon[rows]
    d_W_dec = torch.zeros(W_dec.shape, dtype=torch.float64).index_add_(0, latents, terms)
    return d_values, d_W_dec, d_recon.sum(0)


def assert_exact(results, args, w_dtype=torch.float32) -> None:
    """Integer-valued arguments: every sum is exact, one rounding at the end."""
    d_values, d_W_dec, d_b_dec = definition(*args[:5])
    wanted = (d_values.float(), d_W_dec.to(w_dtype), d_b_dec.float())
    assert_all_same(results, wanted, NAMES)


def integer_args(**sizes):
    p = problem(integer=True, **sizes)
    args = decode_backward_args(p)
    args[0] = torch.randint(-3, 4, args[0].shape).to(args[0].dtype)
    return args


def skip_where_interpreted(backend, reason: str) -> None:
    """The interpreter takes 10 ms per program: what other cases cover is left to real machines."""
    if backend.interpreted:
        pytest.skip(f"interpreted: {reason}")


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("with_view", [True, False])
def test_matches_the_definition(backend, dtypes, with_view):
    if not with_view and dtypes != MIXED[1]:
        skip_where_interpreted(backend, "one pair of dtypes is sorted on the way")
    dtype, w_dtype = dtypes
    args = decode_backward_args(problem(n=33, d_sae=61, d_out=53, w_dtype=w_dtype))
    args[0] = args[0].to(dtype)
    if not with_view:
        args[5:7] = [None, None]
    truth = definition(*args[:5])
    results = backend.op("decode_backward")(*args)
    rows = torch.repeat_interleave(torch.arange(33), args[1].diff())
    acts = torch.zeros(33, 61).index_put_((rows, args[2].long()), args[3])
    d_recon, W_dec = args[0].float(), args[4].float()
    theirs = ((d_recon @ W_dec.t())[rows, args[2].long()], acts.t() @ d_recon, d_recon.sum(0))
    for mine, other, true, name in zip(results, theirs, truth, NAMES, strict=True):
        kind = w_dtype if name == "d_W_dec" else torch.float32
        assert mine.dtype == kind
        assert_close_to_truth(mine, other.to(kind), true, kind, name, terms=53)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_any_layout(backend, layout, w_dtype):
    if w_dtype != torch.bfloat16 and layout not in ("sliced", "stepped transposed"):
        skip_where_interpreted(backend, "one dtype takes every layout")
    for n in (2,) if backend.interpreted and layout.startswith("offset") else (2, 40):
        args = integer_args(n=n, d_sae=41, d_out=37, w_dtype=w_dtype)
        args[0], args[4] = LAYOUTS[layout](args[0]), LAYOUTS[layout](args[4])
        results = backend.op("decode_backward")(*args)
        assert_exact(results, args, w_dtype)
        assert results[1].stride() == torch.empty_like(args[4]).stride()


def test_results_that_nobody_asked_for_are_tensors_of_their_own(backend):
    args = integer_args()[:-3]
    results = backend.op("decode_backward")(*args, *[False] * 3)
    assert [t.shape for t in results] == [(0,)] * 3
    assert len({id(t) for t in results}) == 3


def test_stride_zero_arguments(backend):
    args = integer_args()
    for d_recon in (
        torch.tensor(2.0).expand(13, 19),
        args[0][:1].expand(13, 19),
        args[0][:, :1].expand(13, 19),
    ):
        for W_dec in (args[4], args[4][:1].expand(37, 19), args[4][:, :1].expand(37, 19)):
            changed = [d_recon, *args[1:4], W_dec, *args[5:]]
            assert_exact(backend.op("decode_backward")(*changed), changed)


@pytest.mark.parametrize("d_out", [1, 2, 7, 15, 16, 17, 31, 33, 255, 257, 640])
@pytest.mark.parametrize("n", [1, 3, 50])
def test_every_width(backend, d_out, n):
    if n == 50 and d_out not in (17, 257):
        skip_where_interpreted(backend, "1 and 3 tokens take every width")
    args = integer_args(n=n, d_sae=61, d_out=d_out)
    assert_exact(backend.op("decode_backward")(*args), args)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize(("d_sae", "d_out"), [(10_080, 1152), (1009, 5376)])
def test_sizes_of_gemma_scope(backend, d_sae, d_out, layout):
    # 46 MB of gradient: large gradients have a path of their own.
    skip_where_interpreted(backend, "10,080 programs take a minute")
    W_dec = LAYOUTS[layout](torch.randint(-2, 3, (d_sae, d_out)).float())
    indices = torch.cat([torch.randperm(d_sae)[:50].sort().values for _ in range(3)])
    offsets, values = torch.tensor([0, 50, 100, 150]), torch.randint(-3, 4, (150,)).float()
    d_recon = torch.randint(-3, 4, (3, d_out)).float()
    args = [d_recon, offsets, indices.to(torch.int32), values, W_dec, None, None, *[True] * 3]
    assert_exact(backend.op("decode_backward")(*args), args)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(backend, needs):
    args = decode_backward_args(problem())
    every = backend.op("decode_backward")(*args)
    some = backend.op("decode_backward")(*args[:7], *needs)
    for mine, other, needed in zip(some, every, needs, strict=True):
        assert_same(mine, other if needed else torch.zeros(0))


def test_the_feature_view_changes_no_bit(backend):
    n, d_sae = (20, 31) if backend.interpreted else (100, 201)
    args = decode_backward_args(problem(n=n, d_sae=d_sae))
    without = backend.op("decode_backward")(*args[:5], None, None, *args[7:])
    assert_all_same(without, backend.op("decode_backward")(*args), NAMES)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_entries(backend, n):
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    none = [offsets, torch.zeros(0, dtype=torch.int32), torch.zeros(0)]
    for d_sae, d_out in ((37, 19), (0, 19), (37, 0), (0, 0)):
        d_recon = torch.ones(n, d_out)
        W_dec = torch.ones(d_sae, d_out)
        results = backend.op("decode_backward")(d_recon, *none, W_dec, None, None, *[True] * 3)
        wanted = (torch.zeros(0), torch.zeros(d_sae, d_out), torch.full((d_out,), float(n)))
        assert_all_same(results, wanted, NAMES)


def test_padding_is_never_read(backend):
    p = problem(integer=True)
    exact = decode_backward_args(p)
    padded = decode_backward_args(p, max_nnz=13 * 37)
    nnz = int(padded[1][-1])
    padded[2][nnz:] = torch.iinfo(torch.int32).max
    padded[3][nnz:] = float("nan")
    padded[6][nnz:] = torch.iinfo(torch.int64).max
    wanted = backend.op("decode_backward")(*exact)
    d_values, *others = backend.op("decode_backward")(*padded)
    assert_all_same((d_values[:nnz], *others), wanted, NAMES)
    assert not d_values[nnz:].any(), "padding must be zero"


def test_special_values_reach_only_their_latents(backend):
    args = integer_args()
    args[0][4, 2] = float("nan")
    args[0][5, 3] = float("inf")
    args[4] = args[4].clone()
    args[4][7] = float("inf")
    results = backend.op("decode_backward")(*args)
    assert_exact(results, args)
    assert results[1].isnan().any() and not results[1].isnan().all()
