"""Dense products in place of passes over entries: values, what they leave out, when they pay."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from oracle import assert_close_to_truth, assert_same
from samples import DTYPES, LAYOUTS, problem, sae_backward_args

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import decode as decode_module
from gemmascope_fast.kernels import decode_backward as decode_backward_module
from gemmascope_fast.kernels import dense, launching
from gemmascope_fast.kernels import sae_backward as sae_backward_module
from gemmascope_fast.kernels.decode import accumulate
from gemmascope_fast.kernels.decode_backward import decode_backward
from gemmascope_fast.kernels.densify import densify
from gemmascope_fast.kernels.encode_backward import encode_backward
from gemmascope_fast.kernels.gathered_dot import gathered_dot
from gemmascope_fast.kernels.sae_backward import sae_backward

DEVICE = os.environ.get("GEMMASCOPE_FAST_TEST_DEVICE", "")
runs_kernels = pytest.mark.skipif(
    not (DEVICE or launching.INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1"
)

N, F, D, PADDING = 9, 70, 21, 40
LENGTHS = (0, 1, 31, 32, 33, 70, 0, 65, 5)


@pytest.fixture(autouse=True)
def where_kernels_run():
    with torch.device(DEVICE or "cpu"):
        yield


@pytest.fixture
def forced(monkeypatch):
    """Every product is dense, two rows at a time, and every call of one is counted."""
    calls: list[str] = []

    def counted(name):
        product = getattr(dense, name)

        def run(*args):
            calls.append(name)
            return product(*args)

        return run

    monkeypatch.setattr(dense, "FORCED", True)
    monkeypatch.setattr(dense, "_rows", lambda n, *sizes: 2)
    entry_sum, entry_dots = counted("entry_sum"), counted("entry_dots")
    monkeypatch.setattr(dense, "entry_sum", entry_sum)
    monkeypatch.setattr(decode_module, "entry_sum", entry_sum)
    for module in (decode_backward_module, sae_backward_module):
        monkeypatch.setattr(module, "entry_dots", entry_dots)
    return calls


def entries(integer: bool = True):
    """offsets, ascending indices, coefficients and the row of each entry; the padding is poison."""
    lengths = torch.tensor(LENGTHS)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    picked = [torch.randperm(F)[:k].sort().values for k in LENGTHS]
    nnz = sum(LENGTHS)
    indices = torch.full((nnz + PADDING,), torch.iinfo(torch.int32).max, dtype=torch.int32)
    indices[:nnz] = torch.cat(picked)
    coefficients = torch.full((nnz + PADDING,), float("nan"))
    draw = torch.randint(-3, 4, (nnz,)).float() if integer else torch.randn(nnz)
    coefficients[:nnz] = draw
    return offsets, indices, coefficients, torch.repeat_interleave(torch.arange(N), lengths)


def summed(rows, indices, coefficients, W):
    """The definition, in float64; entries whose index is out of range are left out."""
    indices, coefficients = indices[: len(rows)].long(), coefficients[: len(rows)]
    keep = (indices >= 0) & (indices < W.shape[0])
    terms = coefficients[keep, None].double() * W.double()[indices[keep]]
    return torch.zeros(N, W.shape[1], dtype=torch.float64).index_add_(0, rows[keep], terms)


def spread(offsets, indices, coefficients, W, out=None, bias=None, add=False):
    out = torch.empty(N, W.shape[1]) if out is None else out
    accumulate(offsets, indices, coefficients, W, bias, out, add)
    return out


@runs_kernels
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_terms_add_up_to_the_coefficients(parts):
    offsets, indices, _, rows = entries()
    coefficients = torch.randn(len(indices)) * 10.0 ** torch.randint(-20, 20, (len(indices),))
    kind = torch.float32 if parts == 1 else torch.bfloat16
    matrix, left = torch.zeros(parts, N, F, dtype=kind), torch.full((len(indices),), 7).int()
    finite = torch.ones(F, dtype=torch.bool)
    any_left = densify(offsets, indices, coefficients, finite, matrix, left)
    at = rows, indices[: len(rows)].long()
    wanted = torch.zeros(N, F, dtype=torch.float64)
    wanted[at] = coefficients[: len(rows)].double()
    error = (matrix.double().sum(0) - wanted).abs()
    limit = 2.0**-15 if parts == 2 else 0.0  # 2^-17 but for the interpreter, which truncates
    assert (error <= limit * wanted.abs()).all()
    assert not any_left.any() and (left[: len(rows)] == -1).all() and (left[len(rows) :] == 7).all()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "stepped transposed", "sliced"])
def test_sums_match_the_definition(forced, dtype, layout):
    offsets, indices, coefficients, rows = entries(integer=False)
    W = LAYOUTS[layout](torch.randn(F, D).to(dtype))
    truth = summed(rows, indices, coefficients, W)
    theirs = summed(rows, indices, coefficients, W.float()).float()
    bias = torch.randn(D)
    for out_dtype in DTYPES:
        out = spread(offsets, indices, coefficients, W, torch.empty(N, D, dtype=out_dtype), bias)
        wanted = truth + bias
        assert_close_to_truth(out, (theirs + bias).to(out_dtype), wanted, out_dtype)
        target = LAYOUTS["stepped"](torch.randn(N, D).to(out_dtype))
        wanted = truth + target
        spread(offsets, indices, coefficients, W, target, add=True)
        assert_close_to_truth(target, wanted.to(out_dtype), wanted, out_dtype)
    assert forced == ["entry_sum"] * 6


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_coefficients_keep_their_digits(forced, dtype):
    offsets, indices, coefficients, rows = entries(integer=False)
    W = torch.randn(F, D).to(dtype)
    out = spread(offsets, indices, coefficients * 1e-20, W)
    truth = summed(rows, indices, coefficients * 1e-20, W)
    assert (out - truth).abs().max() < 1e-6 * truth.abs().max()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_special_weights_reach_only_the_rows_that_use_them(forced, dtype, special):
    offsets, indices, coefficients, rows = entries()
    W = torch.randint(-2, 3, (F, D)).to(dtype)
    W[int(indices[3]), 4] = special  # used by some rows, not by those without entries
    out = spread(offsets, indices, coefficients, W)
    assert_same(out, summed(rows, indices, coefficients, W).float())
    assert out[[0, 6]].isfinite().all() and not out.isfinite().all()


@runs_kernels
@pytest.mark.parametrize("special", [float("inf"), float("nan"), 3.4e38])
def test_special_coefficients_stay_in_their_rows(forced, special):
    offsets, indices, coefficients, rows = entries()
    coefficients[40] = special
    for dtype in DTYPES:
        W = torch.randint(1, 2, (F, D)).to(dtype)
        out = spread(offsets, indices, coefficients, W)
        assert_same(out, summed(rows, indices, coefficients, W).float())


@runs_kernels
def test_repeated_and_unsorted_indices_are_summed(forced):
    offsets, indices, coefficients, rows = entries()
    indices[2:30] = 5  # most of row 2
    indices[70:80] = indices[70:80].flip(0)  # in row 4
    W = torch.randint(-2, 3, (F, D)).to(torch.bfloat16)
    out = spread(offsets, indices, coefficients, W)
    assert_same(out, summed(rows, indices, coefficients, W).float())


@runs_kernels
def test_indices_out_of_range_contribute_nothing(forced):
    offsets, indices, coefficients, rows = entries()
    for at, bad in ((1, -1), (31, F), (70, 2**31 - 1), (90, -(2**31))):
        indices[at], coefficients[at] = bad, float("nan")
    indices[63], coefficients[63] = F, 3.0  # the last of row 3, where indices ascend
    W, g = torch.randint(-2, 3, (F, D)).float(), torch.randint(-2, 3, (N, D)).float()
    out = spread(offsets, indices, coefficients, W)
    assert_same(out, summed(rows, indices, coefficients, W).float())
    assert_same(dense.entry_dots(offsets, indices, W, g), gathered_dot(offsets, indices, W, g))


@runs_kernels
def test_offsets_beyond_the_capacity_are_clamped(forced):
    offsets, indices, coefficients, rows = entries()
    W, g = torch.randint(-2, 3, (F, D)).float(), torch.randint(-2, 3, (N, D)).float()
    few = indices[:150].clone(), coefficients[:150].clone()
    out = spread(offsets, *few, W)
    assert_same(out, summed(rows[:150], *few, W).float())
    assert_same(dense.entry_dots(offsets, few[0], W, g), gathered_dot(offsets, few[0], W, g))


@runs_kernels
@pytest.mark.parametrize("dtypes", [(w, g) for w in DTYPES for g in DTYPES], ids=str)
def test_dot_products_match_the_pass(forced, dtypes):
    offsets, indices, _, rows = entries()
    W, g = (torch.randint(-2, 3, (k, D)).to(t) for k, t in zip((F, N), dtypes, strict=True))
    W[7, 3], g[5, 2] = float("inf"), float("nan")
    dots = dense.entry_dots(offsets, indices, W, g)
    assert_same(dots, gathered_dot(offsets, indices, W, g))
    assert not dots[len(rows) :].any() and dots.isnan().any() and dots.isinf().any()


@runs_kernels
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_equal_those_of_the_passes(forced, monkeypatch, w_dtype):
    p = problem(n=5, d_sae=11, integer=True, w_dtype=w_dtype)
    args = [t.to(DEVICE or "cpu") if torch.is_tensor(t) else t for t in sae_backward_args(p, 4.0)]
    for i in (5, 11, 12):
        args[i] = torch.randint(-2, 3, args[i].shape).to(args[i].dtype)
    offsets, indices, values, gate, d_values, d_gate, *view = args[7:15]
    decode_args = (args[5][0], offsets, indices, values, args[4], *view, True, True, True)
    inputs = (d_values, d_gate, *args[:4], offsets, indices, values, gate, *view)
    encode_args = (*inputs, True, True, True, True)
    calls = (sae_backward, args), (decode_backward, decode_args), (encode_backward, encode_args)
    found = [op(*given) for op, given in calls]
    assert forced.count("entry_dots") == 2 and forced.count("entry_sum") == 6
    monkeypatch.setattr(dense, "FORCED", False)
    for ours, (op, given) in zip(found, calls, strict=True):
        for mine, theirs in zip(ours, op(*given), strict=True):
            assert_same(mine, theirs)
    assert len(forced) == 8


@runs_kernels
def test_same_bits_in_every_run(forced):
    offsets, indices, coefficients, _ = entries(integer=False)
    W = torch.randn(F, D).to(torch.bfloat16)
    first = spread(offsets, indices, coefficients, W)
    assert_same(spread(offsets, indices, coefficients, W), first)


def meta(F: int, dtype: torch.dtype = torch.bfloat16, d: int = 5376) -> torch.Tensor:
    return torch.empty(F, d, dtype=dtype, device="meta")


@pytest.fixture
def h100(monkeypatch):
    """`pays` as on an H100."""
    rows = launching.table("dense")["sm_90"][0]["config"]
    monkeypatch.setattr(dense, "choose", lambda name, device: dict(rows))
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("F", "dtype", "few", "many"),
    [
        (1024, torch.bfloat16, 25, 30),
        (4096, torch.bfloat16, 70, 78),
        (16384, torch.bfloat16, 260, 270),
        (4096, torch.float32, 190, 200),
        (65536, torch.bfloat16, 1000, 1200),
    ],
)
def test_dense_from_so_many_entries_per_token(h100, F, dtype, few, many):
    for per_token, wanted in ((few, False), (many, True)):
        work = dense.sum_work(8192 * per_token, 8192, meta(F, dtype), dtype)
        assert dense.pays(h100, work) is wanted


def test_few_tokens_or_no_entries_are_never_dense(h100):
    for n, capacity in ((1, 16384), (2, 2 * 16384), (8192, 0)):
        work = dense.sum_work(capacity, n, meta(16384), torch.bfloat16)
        assert not dense.pays(h100, work)
    assert not dense.pays(h100, dense.sum_work(10**9, 0, meta(16384), torch.bfloat16))
    assert not dense.pays(h100, dense.dots_work(10**9, meta(0), meta(8192)))


def test_a_large_dictionary_is_never_copied(monkeypatch):
    monkeypatch.setattr(dense, "FORCED", True)
    assert dense.sum_pays(2**20, 8192, meta(65536), torch.bfloat16)
    assert not dense.sum_pays(2**40, 8192, meta(1048576), torch.bfloat16)
    assert not dense.dots_pay(2**40, meta(1048576), meta(8192))


def test_only_where_products_are_fast_and_repeatable(h100, monkeypatch):
    work = dense.sum_work(8192 * 4096, 8192, meta(4096), torch.bfloat16)
    assert dense.pays(h100, work)
    assert not dense.pays(torch.device("cpu"), work)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    assert not dense.pays(h100, work), "deterministic mode, which the tests run in"
    torch.use_deterministic_algorithms(False)
    assert dense.pays(h100, work)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not dense.pays(h100, work)


def test_a_chunk_stays_within_its_bytes():
    for F, d in ((1024, 5376), (16384, 5376), (1048576, 640), (7, 1)):
        rows = dense._rows(2**20, F, d, torch.bfloat16, 2)
        assert rows == 1 or rows * 2 * max(2 * F, 4 * d) <= dense.CHUNK_BYTES
    assert dense._rows(8192, 16384, 5376, torch.bfloat16, 2) == 2048
    work = dense.sum_work(1, 8192, meta(1024), torch.bfloat16)
    assert work == replace(work, operations=4 * 8192 * 1024 * 5376, wide=False)
