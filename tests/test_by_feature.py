"""by_feature: the feature-major view of the entries."""

from __future__ import annotations

import pytest
import torch
from oracle import check_feature_view
from samples import jumprelu_entries, problem

import gemmascope_fast as gsf

OPS = ("by_feature",)


def random_entries(n: int, d_sae: int, mean: float):
    stored = torch.rand(n, d_sae) < mean
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    offsets[1:] = stored.sum(1).cumsum(0)
    return offsets, stored.nonzero()[:, 1].to(torch.int32)


@pytest.mark.parametrize("n", [0, 1, 2, 17, 200])
@pytest.mark.parametrize("d_sae", [1, 2, 61, 1009])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_is_the_stable_sort_by_latent(backend, n, d_sae, density):
    offsets, indices = random_entries(n, d_sae, density)
    view = backend.op("by_feature")(offsets, indices, d_sae)
    check_feature_view(*view, offsets, indices, d_sae)


def test_many_entries_few_latents(backend):
    # Enough entries for a histogram per thread.
    offsets, indices = random_entries(3000, 64, 0.6)
    assert indices.shape[0] > 2 * (2 * 64 + 32768)
    view = backend.op("by_feature")(offsets, indices, 64)
    check_feature_view(*view, offsets, indices, 64)


def test_one_latent_takes_every_token(backend):
    offsets = torch.arange(5001)
    indices = torch.full((5000,), 6, dtype=torch.int32)
    feature_offsets, permutation = backend.op("by_feature")(offsets, indices, 10_080)
    assert feature_offsets.tolist() == [0] * 7 + [5000] * (10_080 - 6)
    assert permutation.tolist() == list(range(5000))


def test_empty(backend):
    offsets, indices = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    for d_sae in (0, 3):
        feature_offsets, permutation = backend.op("by_feature")(offsets, indices, d_sae)
        assert feature_offsets.tolist() == [0] * (d_sae + 1)
        assert permutation.shape == (0,) and permutation.dtype == torch.int64


def test_padding_is_neither_read_nor_left_undefined(backend):
    p = problem()
    offsets, indices, *_ = jumprelu_entries(p, max_nnz=13 * 37)
    nnz = int(offsets[-1])
    indices[nnz:] = torch.iinfo(torch.int32).max
    view = backend.op("by_feature")(offsets, indices, 37)
    check_feature_view(*view, offsets, indices, 37)


def test_strided_entries(backend):
    offsets, indices = random_entries(9, 31, 0.4)
    apart = torch.stack([indices, indices - 99], 1)[:, 0]
    spread = torch.stack([offsets, offsets - 99], 1)[:, 0]
    assert not apart.is_contiguous() and not spread.is_contiguous()
    view = backend.op("by_feature")(spread, apart, 31)
    check_feature_view(*view, offsets, indices, 31)


def test_sparse_acts_compute_it_once(backend):
    p = problem()
    acts = gsf.SparseActs(*jumprelu_entries(p)[:4], (13, 37))
    first = acts.by_feature()
    check_feature_view(*first, acts.offsets, acts.indices, 37)
    assert acts.by_feature()[0] is first[0] and acts.by_feature()[1] is first[1]
