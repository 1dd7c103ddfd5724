"""What the Triton passes in token order promise beyond the ops' common tests."""

from __future__ import annotations

import os

import pytest
import torch
from oracle import assert_same
from samples import DTYPES, problem

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import by_feature as by_feature_module
from gemmascope_fast.kernels import decode as decode_module
from gemmascope_fast.kernels import launching
from gemmascope_fast.kernels.by_feature import by_feature
from gemmascope_fast.kernels.decode import accumulate, decode, decode_
from gemmascope_fast.kernels.gathered_dot import gathered_dot
from gemmascope_fast.kernels.pre_at import pre_at

DEVICE = os.environ.get("GEMMASCOPE_FAST_TEST_DEVICE", "")
if not (DEVICE or launching.INTERPRETED):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

LENGTHS = torch.tensor([0, 1, 31, 32, 33, 0, 64, 65, 200, 5, 96, 128, 1])
"""Rows that end before, on and after multiples of the interpreter's PIECE, 32."""

F, PADDING = 70, 40


@pytest.fixture(autouse=True)
def where_kernels_run():
    """Tensors made by a test live where kernels run."""
    with torch.device(DEVICE or "cpu"):
        yield


def entries(lengths: torch.Tensor = LENGTHS):
    """offsets, indices and values, and the row of each entry; the padding is poison."""
    lengths = lengths.to(DEVICE or "cpu")
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    nnz = int(offsets[-1])
    indices = torch.randint(0, F, (nnz + PADDING,)).to(torch.int32)
    values = torch.randint(-3, 4, (nnz + PADDING,)).float()
    indices[nnz:], values[nnz:] = torch.iinfo(torch.int32).max, float("nan")
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return offsets, indices, values, rows


def summed(rows, indices, values, W, n):
    """The definition; entries whose index is out of range are left out."""
    indices, values = indices[: len(rows)].long(), values[: len(rows)]
    keep = (indices >= 0) & (indices < W.shape[0])
    terms = values[keep, None] * W.float()[indices[keep]]
    return torch.zeros(n, W.shape[1]).index_add_(0, rows[keep], terms)


def spoil(indices):
    """Indices of which three are out of range, and a value that must not be seen there."""
    bad = indices.clone()
    bad[5], bad[40], bad[100] = -1, F, 2**31 - 1
    return bad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_length_are_summed_once(dtype):
    offsets, indices, values, rows = entries()
    W = torch.randint(-2, 3, (F, 21)).to(dtype)
    recon = decode(offsets, indices, values, W, None, None, None, torch.float32)
    assert_same(recon, summed(rows, indices, values, W, 13))


def test_the_sum_of_a_row_does_not_depend_on_where_it_lies():
    _, indices, values, _ = entries()
    W = torch.randn(F, 21)
    alone = torch.tensor([0, 150])
    first = decode(alone, indices[:150], values[:150], W, None, None, None, torch.float32)
    for before in (1, 17, 31):
        moved = (
            torch.cat([indices[:before], indices[:150]]),
            torch.cat([values[:before], values[:150]]),
        )
        offsets = torch.tensor([0, before, before + 150])
        again = decode(offsets, *moved, W, None, None, None, torch.float32)
        assert_same(again[1:], first)


def test_indices_out_of_range_contribute_nothing():
    offsets, indices, values, rows = entries()
    W, g = torch.randint(-2, 3, (F, 21)).float(), torch.randint(-2, 3, (13, 21)).float()
    bad = spoil(indices)
    values[5] = float("nan")
    recon = decode(offsets, bad, values, W, None, None, None, torch.float32)
    assert_same(recon, summed(rows, bad, values, W, 13))
    dots = gathered_dot(offsets, bad, W, g)
    assert dots[[5, 40, 100]].tolist() == [0.0] * 3
    feature_offsets, permutation = by_feature(offsets, bad, F)
    kept = [e for e in range(len(rows)) if e not in (5, 40, 100)]
    order = sorted(kept, key=lambda e: (int(indices[e]), e))
    assert int(feature_offsets[-1]) == len(kept)
    assert permutation.tolist() == order + [0] * (PADDING + 3)


def test_offsets_beyond_the_capacity_are_clamped():
    offsets, indices, values, rows = entries()
    W, g = torch.randint(-2, 3, (F, 21)).float(), torch.randint(-2, 3, (13, 21)).float()
    few = indices[:150].clone(), values[:150].clone()
    recon = decode(offsets, *few, W, None, None, None, torch.float32)
    assert_same(recon, summed(rows[:150], *few, W, 13))
    dots = gathered_dot(offsets, few[0], W, g)
    assert_same(dots, (W[few[0].long()] * g[rows[:150]]).sum(1))
    feature_offsets, permutation = by_feature(offsets, few[0], F)
    assert_same(permutation, few[0].long().argsort(stable=True))
    assert int(feature_offsets[-1]) == 150


@pytest.mark.parametrize("d_sae", [1, 2, 255, 256, 257, 65_536, 65_537, 2**24 + 1, 2**31 - 1])
def test_sorts_by_any_number_of_digits(d_sae, monkeypatch):
    # Without the bounds, which are d_sae long.
    monkeypatch.setattr(by_feature_module, "radix_bounds", lambda *args: None)
    latents = torch.randint(0, d_sae, (100,)).to(torch.int32)
    latents[::7], latents[3::7] = d_sae - 1, 0
    permutation = torch.empty(100, dtype=torch.int64)
    count = torch.tensor([100])
    keys, total = by_feature_module._sort(latents, count, permutation, d_sae)
    assert int(total) == 100
    assert_same(permutation, latents.long().argsort(stable=True))
    assert_same(keys, latents.sort().values)


def test_positions_are_64_bits_wide_beyond_2_31_entries(monkeypatch):
    # The sort of fewer entries, as it runs for more.
    monkeypatch.setattr(by_feature_module, "NARROW_POSITIONS", 0)
    offsets, indices, _, rows = entries()
    feature_offsets, permutation = by_feature(offsets, indices, F)
    stored = indices[: len(rows)].long()
    assert_same(permutation[: len(rows)], stored.argsort(stable=True))
    assert_same(feature_offsets[1:], torch.bincount(stored, minlength=F).cumsum(0))


@pytest.mark.parametrize("dtypes", [(w, g) for w in DTYPES for g in DTYPES], ids=str)
@pytest.mark.parametrize("d", [1, 16, 37])
def test_dot_products_of_entries(dtypes, d):
    offsets, indices, _, rows = entries()
    W, g = (torch.randint(-2, 3, (k, d)).to(t) for k, t in zip((F, 13), dtypes, strict=True))
    expected = torch.zeros(len(rows) + PADDING)
    expected[: len(rows)] = (W.float()[indices[: len(rows)].long()] * g.float()[rows]).sum(1)
    for move in (lambda t: t, lambda t: t.t().contiguous().t()):
        assert_same(gathered_dot(offsets, indices, move(W), move(g)), expected)
    ones = torch.ones(1, 1).to(dtypes[1]).expand(13, d)
    expected[: len(rows)] = W.float()[indices[: len(rows)].long()].sum(1)
    assert_same(gathered_dot(offsets, indices, W, ones), expected)


def test_dot_products_of_nothing():
    none = torch.zeros(1, dtype=torch.int64)
    dots = gathered_dot(none, torch.ones(3).int(), torch.ones(4, 5), torch.ones(0, 5))
    assert_same(dots, torch.zeros(3))
    offsets, indices, *_ = entries()
    assert not gathered_dot(offsets, indices, torch.ones(F, 0), torch.ones(13, 0)).any()
    assert not gathered_dot(offsets, indices, torch.ones(0, 5), torch.ones(13, 5)).any()


def test_a_matrix_with_columns_apart_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(decode_module, "COPY_ELEMENTS", 1)
    offsets, indices, values, rows = entries(LENGTHS[:9])
    W = torch.randint(-2, 3, (150, F)).float().t()  # parts of 64, 64 and 22 columns
    bias, g = torch.randint(-2, 3, (150,)).float(), torch.randint(-2, 3, (9, 150)).float()
    assert len(list(decode_module.column_parts(W, len(indices)))) == 3
    expected = summed(rows, indices, values, W, 9)
    out = torch.ones(150, 9).t()
    accumulate(offsets, indices, values, W, bias, out, True)
    assert_same(out, expected + bias + 1)
    accumulate(offsets, indices, values, W, bias, out, False)
    assert_same(out, expected + bias)
    dots = gathered_dot(offsets, indices, W, g)
    assert_same(dots[: len(rows)], (W[indices[: len(rows)].long()] * g[rows]).sum(1))
    few = indices[:4], values[:4]
    assert len(list(decode_module.column_parts(W, 4))) == 1  # too few entries to copy for
    accumulate(torch.tensor([0, 4]), *few, W, None, out[:1], False)
    assert_same(out[:1], summed(rows[:4] * 0, *few, W, 1))


def test_pairs_out_of_range_are_zero():
    p = problem(integer=True)
    x, W_enc, b_enc = (t.to(DEVICE or "cpu") for t in p.encoder)
    rows = torch.tensor([0, -1, 13, 2, 2, 2**40, 12])
    latents = torch.tensor([0, 0, 0, -1, 37, 0, 36])
    pre = pre_at(x, W_enc, b_enc, rows, latents)
    expected = (x @ W_enc + b_enc)[[0, 12], [0, 36]]
    assert_same(pre[[0, 6]], expected)
    assert not pre[1:6].any()


@pytest.mark.parametrize("name", ["W_dec", "values", "indices"])
def test_in_place_refuses_a_target_that_shares_memory(name):
    memory = torch.zeros(60)
    recon, elsewhere = memory[:6].view(2, 3), torch.zeros(4)
    W_dec = memory[5:17].view(4, 3) if name == "W_dec" else torch.zeros(4, 3)
    values = memory[4:8] if name == "values" else elsewhere
    indices = memory[3:7].view(torch.int32) if name == "indices" else elsewhere.int()
    with pytest.raises(RuntimeError, match=f"decode_: recon shares memory with {name}.*clone"):
        decode_(recon, torch.tensor([0, 2, 4]), indices, values, W_dec)
    decode_(memory[:6].view(2, 3), torch.tensor([0, 2, 4]), elsewhere.int(), elsewhere, W_dec * 1)


@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (18, 1), (1, 12), (7, 3)])
def test_in_place_refuses_a_target_that_overlaps_itself(strides):
    offsets, indices, values, _ = entries()
    recon = torch.zeros(500).as_strided((13, 19), strides)
    with pytest.raises(RuntimeError, match="decode_: recon must not overlap itself, .*clone"):
        decode_(recon, offsets, indices, values, torch.zeros(F, 19))
    assert not recon.any()


def test_padding_beside_no_latents_at_all():
    offsets, indices = torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    W = torch.ones(4, 3)[:, :0].t()  # [0, 4], columns apart
    recon = decode(offsets, indices, torch.zeros(5), W, torch.ones(4), None, None, torch.float32)
    assert recon.tolist() == [[1.0] * 4] * 2


def test_offsets_that_make_no_sense_reach_no_memory_outside():
    W = torch.randn(5, 8)
    indices, values = torch.arange(4, dtype=torch.int32), torch.ones(4)
    for wrong in ([0, 2**33, 4], [0, -(2**33), 4], [-5, 2, 2**40], [3, 1, 0]):
        recon = decode(torch.tensor(wrong), indices, values, W, None, None, None, torch.float32)
        assert recon.shape == (2, 8) and recon.isfinite().all(), wrong
