"""by_feature's CUDA kernels, run on the CPU (csrc/testing/cuda_on_cpu.h)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import check_feature_view

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")


def run(offsets, indices, d_sae, seed=0):
    testing.cuda_seed(seed)
    try:
        found = testing.cuda_by_feature(offsets.numpy(), indices.numpy(), d_sae)
    finally:
        testing.cuda_seed(0)
    return [torch.from_numpy(array) for array in found]


def entries(n, d_sae, density, capacity=0):
    stored = torch.rand(n, d_sae) < density
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    offsets[1:] = stored.sum(1).cumsum(0)
    indices = stored.nonzero()[:, 1].to(torch.int32)
    padding = max(capacity - indices.shape[0], 0)
    return offsets, torch.cat([indices, torch.full((padding,), 3, dtype=torch.int32)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("d_sae", [0, 1, 61, 1009])
@pytest.mark.parametrize("n, density", [(0, 0.0), (1, 0.5), (40, 0.05), (9, 1.0)])
@pytest.mark.parametrize("capacity", [0, 4096])
def test_is_the_stable_sort_by_latent(n, d_sae, density, capacity, seed):
    offsets, indices = entries(n, d_sae, density, capacity)
    check_feature_view(*run(offsets, indices, d_sae, seed), offsets, indices, d_sae)


def test_latents_out_of_range_are_in_no_segment():
    offsets = torch.tensor([0, 3, 6])
    indices = torch.tensor([4, -8, 2, 7, -(2**31), 2, 1, 1], dtype=torch.int32)
    feature_offsets, permutation = run(offsets, indices, 7)
    assert feature_offsets.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert permutation.tolist() == [2, 5, 0, 0, 0, 0, 0, 0]
    assert np.all(permutation.numpy() >= 0)
