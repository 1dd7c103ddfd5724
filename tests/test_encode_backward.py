"""encode_backward: gradients of x, W_enc, b_enc and the threshold from those of the entries."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_all_same, assert_close_to_truth, assert_same
from samples import DTYPES, LAYOUTS, MIXED, encode_backward_args, problem
from torch import Tensor

OPS = ("encode_backward",)
NAMES = ("d_x", "d_W_enc", "d_b_enc", "d_threshold")


def definition(args) -> list[Tensor]:
    """The four sums of docs/design.md, entry by entry, in float64."""
    d_values, d_gate, x, W_enc, threshold, bandwidth, offsets, indices, values, gate = args[:10]
    zero = torch.zeros_like(values)
    d_values = (zero if d_values is None else d_values).double()
    d_gate = (zero if d_gate is None else d_gate).double()
    x, W_enc = x.double(), W_enc.double()
    rows = torch.repeat_interleave(torch.arange(x.shape[0]), offsets.diff())
    latents, d_pre = indices.long(), d_values * gate

    def add(size: int, where: Tensor, terms: Tensor) -> Tensor:
        total = torch.zeros(size, *terms.shape[1:], dtype=torch.float64)
        return total.index_add_(0, where, terms)

    d_x = add(x.shape[0], rows, d_pre[:, None] * W_enc.t()[latents])
    d_W_enc = add(W_enc.shape[1], latents, d_pre[:, None] * x[rows]).t()
    d_b_enc, d_threshold = add(W_enc.shape[1], latents, d_pre), torch.zeros(W_enc.shape[1])
    if threshold is not None and bandwidth > 0:
        theta = threshold[latents]
        window = (gate == 0) | (values < theta + bandwidth / 2)
        terms = torch.where(window, theta.double() * d_values + d_gate, 0.0)
        d_threshold = -add(W_enc.shape[1], latents, terms) / bandwidth
    return [d_x, d_W_enc, d_b_enc, d_threshold]


def integer_args(x_dtype=torch.float32, w_dtype=torch.float32, **sizes):
    p = problem(integer=True, x_dtype=x_dtype, w_dtype=w_dtype, **sizes)
    args = encode_backward_args(p, bandwidth=4.0)
    for i in (0, 1):
        args[i] = torch.randint(-3, 4, args[i].shape).float()
    assert args[8].shape[0] == 0 or sizes.get("n", 13) < 5 or 0 < args[9].mean() < 1
    return args


def assert_exact(results, args) -> None:
    wanted = definition(args)
    kinds = (args[2].dtype, args[3].dtype, torch.float32, torch.float32)
    wanted = [t.to(kind) for t, kind in zip(wanted, kinds, strict=True)]
    assert_all_same(results, wanted, NAMES)


def skip_where_interpreted(backend, reason: str) -> None:
    """The interpreter takes 10 ms per program: what other cases cover is left to real machines."""
    if backend.interpreted:
        pytest.skip(f"interpreted: {reason}")


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("with_view", [True, False])
def test_matches_the_definition(backend, dtypes, with_view):
    if not with_view and dtypes != MIXED[1]:
        skip_where_interpreted(backend, "one pair of dtypes is sorted on the way")
    x_dtype, w_dtype = dtypes
    p = problem(n=33, d_in=53, d_sae=61, x_dtype=x_dtype, w_dtype=w_dtype)
    args = encode_backward_args(p)
    if not with_view:
        args[10:12] = [None, None]
    truth = definition(args)
    results = backend.op("encode_backward")(*args)
    rows, latents = torch.repeat_interleave(torch.arange(33), args[6].diff()), args[7].long()
    d_values, d_gate, values, gate = args[0], args[1], args[8], args[9]
    d_pre = torch.zeros(33, 61).index_put_((rows, latents), d_values * gate)
    window = (gate == 0) | (values < p.threshold[latents] + 0.2)
    terms = torch.where(window, p.threshold[latents] * d_values + d_gate, 0.0)
    d_theta = torch.zeros(33, 61).index_put_((rows, latents), terms).sum(0) / -0.4
    x, W_enc = p.x.float(), p.W_enc.float()
    theirs = (d_pre @ W_enc.t(), x.t() @ d_pre, d_pre.sum(0), d_theta)
    kinds = (x_dtype, w_dtype, torch.float32, torch.float32)
    for mine, other, true, kind, name in zip(results, theirs, truth, kinds, NAMES, strict=True):
        assert mine.dtype == kind
        assert_close_to_truth(mine, other.to(kind), true, kind, name, terms=61)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(backend, layout, dtype):
    if dtype != torch.bfloat16 and layout not in ("sliced", "stepped transposed"):
        skip_where_interpreted(backend, "one dtype takes every layout")
    for n in (2,) if backend.interpreted and layout.startswith("offset") else (2, 40):
        args = integer_args(n=n, d_in=37, d_sae=41, x_dtype=dtype, w_dtype=dtype)
        args[2], args[3] = LAYOUTS[layout](args[2]), LAYOUTS[layout](args[3])
        results = backend.op("encode_backward")(*args)
        assert_exact(results, args)
        assert results[1].stride() == torch.empty_like(args[3]).stride()


def test_stride_zero_arguments(backend):
    args = integer_args()
    for x in (args[2][:1].expand(13, 23), args[2][:, :1].expand(13, 23)):
        for W_enc in (args[3], args[3][:1].expand(23, 37), args[3][:, :1].expand(23, 37)):
            one = torch.tensor(1.0)
            changed = [one.expand(args[0].shape), *args[1:]]
            changed[2], changed[3], changed[4] = x, W_enc, one.expand(37)
            assert_exact(backend.op("encode_backward")(*changed), changed)


@pytest.mark.parametrize("d_in", [1, 2, 7, 15, 16, 17, 31, 33, 255, 257, 640])
@pytest.mark.parametrize("n", [1, 3, 50])
def test_every_width(backend, d_in, n):
    if n == 50 and d_in not in (17, 257):
        skip_where_interpreted(backend, "1 and 3 tokens take every width")
    args = integer_args(n=n, d_in=d_in, d_sae=61)
    assert_exact(backend.op("encode_backward")(*args), args)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize(("d_in", "d_sae"), [(1152, 10_080), (5376, 1009)])
def test_sizes_of_gemma_scope(backend, d_in, d_sae, layout):
    # 46 MB of gradient: large gradients have a path of their own.
    skip_where_interpreted(backend, "10,080 programs take a minute")
    W_enc = LAYOUTS[layout](torch.randint(-2, 3, (d_in, d_sae)).float())
    x = torch.randint(-2, 3, (3, d_in)).float()
    indices = torch.cat([torch.randperm(d_sae)[:50].sort().values for _ in range(3)])
    offsets, gate = torch.tensor([0, 50, 100, 150]), torch.randint(0, 2, (150,)).float()
    values = torch.randint(1, 4, (150,)) * gate
    d_values = torch.randint(-3, 4, (150,)).float()
    entries = [offsets, indices.to(torch.int32), values, gate, None, None]
    args = [d_values, None, x, W_enc, torch.ones(d_sae), 2.0, *entries, *[True] * 4]
    assert_exact(backend.op("encode_backward")(*args), args)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_wanted_gradients(backend, needs):
    if sum(needs) == 2:
        skip_where_interpreted(backend, "each gradient is left out alone, and alone wanted")
    args = encode_backward_args(problem())
    every = backend.op("encode_backward")(*args)
    some = backend.op("encode_backward")(*args[:12], *needs)
    for mine, other, needed in zip(some, every, needs, strict=True):
        assert_same(mine, other if needed else torch.zeros(0))
    backend.opcheck("encode_backward", [*args[:12], *needs], test_utils="test_schema")


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_absent_upstream_gradients_are_zeros(backend, missing):
    args = integer_args()
    for i in missing:
        args[i] = None
    assert_exact(backend.op("encode_backward")(*args), args)


def test_without_a_threshold(backend):
    args = integer_args()
    args[1], args[4], args[5], args[15] = None, None, 0.0, False
    wanted = [t.float() for t in definition(args)[:3]]
    assert_all_same(backend.op("encode_backward")(*args)[:3], wanted, NAMES[:3])


def test_the_feature_view_changes_no_bit(backend):
    n, d_sae = (20, 31) if backend.interpreted else (100, 201)
    args = encode_backward_args(problem(n=n, d_sae=d_sae))
    without = backend.op("encode_backward")(*args[:10], None, None, *args[12:])
    assert_all_same(without, backend.op("encode_backward")(*args), NAMES)


def test_results_that_nobody_asked_for_are_tensors_of_their_own(backend):
    args = encode_backward_args(problem())[:-4]
    results = backend.op("encode_backward")(*args, *[False] * 4)
    assert [t.shape for t in results] == [(0,)] * 4
    assert len({id(t) for t in results}) == 4


def test_window_edges_to_the_ulp(backend):
    # gate 1 entries at, one ulp below and one ulp above threshold + bandwidth / 2.
    for bandwidth in (0.5, 0.001, 0.03):
        theta = torch.tensor([0.001, 0.7, 1.0, 3.3])
        edge = theta + bandwidth / 2
        below, above = edge.nextafter(theta), edge.nextafter(edge + 1)
        values = torch.stack([below, edge, above])
        ones = torch.ones(12)
        indices = torch.arange(4, dtype=torch.int32).repeat(3)
        entries = [torch.tensor([0, 4, 8, 12]), indices, values.flatten(), ones]
        inputs = [None, ones, torch.ones(3, 1), torch.ones(1, 4), theta, bandwidth]
        args = [*inputs, *entries, None, None, False, False, False, True]
        d_threshold = backend.op("encode_backward")(*args)[3]
        torch.testing.assert_close(d_threshold * bandwidth, torch.full((4,), -1.0))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_entries(backend, n):
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    none = [offsets, torch.zeros(0, dtype=torch.int32), torch.zeros(0), torch.zeros(0)]
    for d_in, d_sae in ((23, 37), (23, 0), (0, 37), (0, 0)):
        x, W_enc, theta = torch.ones(n, d_in), torch.ones(d_in, d_sae), torch.ones(d_sae)
        args = [torch.zeros(0), None, x, W_enc, theta, 0.5, *none, None, None, *[True] * 4]
        wanted = [torch.zeros_like(t) for t in (x, W_enc, theta, theta)]
        assert_all_same(backend.op("encode_backward")(*args), wanted, NAMES)


def test_padding_is_never_read(backend):
    p = problem(integer=True)
    exact = encode_backward_args(p, 4.0)
    padded = encode_backward_args(p, 4.0, max_nnz=13 * 37)
    nnz = int(padded[6][-1])
    for i in (0, 1):
        padded[i][:nnz] = exact[i]
    for i in (0, 1, 8, 9):
        padded[i][nnz:] = float("nan")
    padded[7][nnz:] = torch.iinfo(torch.int32).max
    padded[11][nnz:] = torch.iinfo(torch.int64).max
    wanted = backend.op("encode_backward")(*exact)
    assert_all_same(backend.op("encode_backward")(*padded), wanted, NAMES)
    padded[10:12] = [None, None]
    assert_all_same(backend.op("encode_backward")(*padded), wanted, NAMES)


def test_special_values_reach_only_their_latents(backend):
    args = integer_args()
    x, W_enc = args[2].clone(), args[3].clone()
    x[4, 2], x[5, 3], W_enc[:, 7] = float("nan"), float("inf"), float("-inf")
    args[2], args[3] = x, W_enc
    nan_entry = int(args[6][9])
    args[8][nan_entry], args[0][nan_entry] = float("nan"), float("nan")
    results = backend.op("encode_backward")(*args)
    assert_exact(results, args)
    assert results[1].isnan().any() and not results[1].isnan().all()


def test_repeated_and_unordered_latents_of_a_row(backend):
    # What the gradient of pre_at passes: pairs in any order, some of them twice.
    indices = torch.tensor([5, 2, 5, 0, 36, 36, 36, 1], dtype=torch.int32)
    entries = [torch.tensor([0, 4, 4, 8]), indices, torch.zeros(8), torch.ones(8)]
    p = problem(n=3, integer=True)
    d_values = torch.arange(8).float()
    args = [d_values, None, p.x, p.W_enc, None, 0.0, *entries, None, None, *[True] * 3, False]
    wanted = [t.float() for t in definition(args)[:3]]
    assert_all_same(backend.op("encode_backward")(*args)[:3], wanted, NAMES[:3])


@pytest.mark.parametrize("bandwidth", [1e-39, 1e-30, 0.001, 0.03, 0.7, 3.0, 100.0, 1e30])
def test_the_threshold_gradient_is_divided_as_the_definition_says(backend, bandwidth):
    # One rounding, after an exact sum; 1 / bandwidth would overflow at 1e-39.
    args = [*integer_args()[:4], *integer_args()[4:]]
    args[5] = bandwidth
    sums = definition([*args[:5], 1.0, *args[6:]])[3] * 0
    latents, theta = args[7].long(), args[4][args[7].long()]
    window = (args[9] == 0) | (args[8] < theta + bandwidth / 2)
    sums.index_add_(0, latents, torch.where(window, theta * args[0] + args[1], 0.0).double())
    d_threshold = backend.op("encode_backward")(*args)[3]
    assert_same(d_threshold, sums.float() / -bandwidth)
    assert not d_threshold.isnan().any() and sums.count_nonzero() > 5
