"""`audit`: what it counts, and that it finds what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from screening import draw

import gemmascope_fast as gsf


def sample(dtype: torch.dtype = torch.float32, window: float = 0.0):
    x, W, b, t = draw(40, 64, 9000)
    x, W = x.to(dtype), W.t().to(dtype).t()
    acts = gsf.jumprelu_encode(x, W, b, t.requires_grad_(window > 0), bandwidth=window)
    return acts, (x, W, b, t.detach())


def without(acts: gsf.SparseActs, entries: list[int]) -> gsf.SparseActs:
    keep = torch.ones(acts.indices.shape[0], dtype=torch.bool)
    keep[entries] = False
    counts = torch.zeros(acts.offsets.shape[0], dtype=torch.int64)
    rows = torch.arange(len(counts) - 1).repeat_interleave(acts.offsets.diff())
    counts[1:] = torch.bincount(rows[keep], minlength=len(counts) - 1)
    arrays = (a[keep] for a in (acts.indices, acts.values, acts.gate))
    return gsf.SparseActs(counts.cumsum(0), *arrays, acts.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", [0.0, 0.2])
def test_nothing_is_wrong_with_the_encoder(dtype: torch.dtype, window: float) -> None:
    acts, data = sample(dtype, window)
    found = gsf.audit(acts, *data, bandwidth=window, tokens=100)
    assert (found.tokens, found.missed, found.extra) == (40, 0, 0)
    assert found.entries + found.near >= acts.indices.shape[0] > found.entries - 3
    assert found.entries > 10_000 and found.recall == 1
    packed = gsf.PackedEncoder(data[1], None)
    assert gsf.audit(acts, data[0], packed, *data[2:], bandwidth=window, tokens=100) == found


def test_misses_and_extras_are_counted() -> None:
    acts, (x, W, b, t) = sample()
    missed = gsf.audit(without(acts, [0, 7, 5000, 12345]), x, W, b, t, tokens=40)
    assert (missed.missed, missed.extra) == (4, 0) and 0.999 < missed.recall < 1
    assert "4 of" in str(missed)
    higher = t.clone()
    higher[acts.indices[7].long()] += 100
    column = int((acts.indices == acts.indices[7]).sum())
    assert gsf.audit(acts, x, W, b, higher, tokens=40).extra == column


def test_a_sample_is_of_tokens_and_seeded() -> None:
    acts, data = sample()
    first = gsf.audit(acts, *data, tokens=7)
    assert first.tokens == 7 and first == gsf.audit(acts, *data, tokens=7)
    assert first != gsf.audit(acts, *data, tokens=7, seed=1)
    rows = acts.offsets.diff()
    assert rows.min() * 7 <= first.entries + first.near and first.entries <= rows.max() * 7
    one = gsf.audit(acts, *data, tokens=40)
    parts = gsf.audit(without(acts, [3]), *data, tokens=40)
    assert replace(parts, missed=0) == one


def test_leading_dimensions_and_padding() -> None:
    x, W, b, t = draw(12, 64, 300)
    acts = gsf.jumprelu_encode(x.view(3, 4, 64), W, b, t, max_nnz=5000)
    found = gsf.audit(acts, x.view(3, 4, 64), W, b, t)
    assert found.tokens == 12 and found.missed == found.extra == 0 < found.entries


def test_pairs_that_are_nan_are_not_looked_at() -> None:
    x, W, b, t = draw(12, 64, 300)
    x[3, 4], t[7] = torch.nan, torch.nan
    found = gsf.audit(gsf.jumprelu_encode(x, W, b, t), x, W, b, t)
    assert found.missed == found.extra == 0


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_selections(bias: float) -> None:
    """At -3 tokens have fewer positive entries than k, and fillers."""
    x, W, b, _ = draw(40, 64, 900)
    b = b + bias
    acts = gsf.topk_encode(x, W, b, 50)
    active = int(acts.gate.sum())
    assert (active == 40 * 50) == (bias == 0)
    found = gsf.audit(acts, x, W, b)
    assert (found.tokens, found.missed, found.extra) == (40, 0, 0)
    # The k-th best is near its own limit; where there are fewer, all exceed 0.
    assert found.entries + found.near >= active > found.entries - 3
    strong = acts.values > acts.values.median()
    lost = [int(i) for i in strong.nonzero()[[0, 9]]]
    missed = gsf.audit(without(acts, lost), x, W, b)
    assert (missed.missed, missed.extra) == (2, 0) and missed.entries == found.entries
    batch = gsf.batchtopk_encode(x, W, b, 5.0)
    found = gsf.audit(batch, x, W, b)
    assert found.missed == found.extra == 0 and found.entries + found.near == batch.nnz > 80


def test_bad_input() -> None:
    acts, (x, W, b, t) = sample()
    with pytest.raises(TypeError, match="audit: acts must be a SparseActs, got Tensor"):
        gsf.audit(acts.to_dense(), x, W, b, t)
    with pytest.raises(ValueError, match="audit: acts has shape"):
        gsf.audit(acts, x[:5], W, b, t)
    with pytest.raises(ValueError, match="audit: tokens must be >= 0, got -1"):
        gsf.audit(acts, x, W, b, t, tokens=-1)
    assert gsf.audit(acts, x, W, b, t, tokens=0) == gsf.Audit(0, 0, 0, 0, 0)
