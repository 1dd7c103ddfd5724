"""Selection by the CUDA kernels on the CPU, for their tests: a matrix's candidates, by chunks.

The candidates come from a matrix of pre-activations instead of the encoder, so every number is
chosen, and what was asked for can be counted. The order of chunks is that of the host wrappers,
csrc/cuda/topk_encode.cu and batchtopk_encode.cu.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracle import assert_entries, assert_same, batchtopk_support, topk_support

testing: Any = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
select = testing.cuda_select

WIDTH = 32
POISON = 0xAB


def poisoned(shape, dtype) -> np.ndarray:
    made = np.empty(shape, dtype)
    made.view(np.uint8)[...] = POISON
    return made


class Chunk(NamedTuple):
    first: int
    last: int
    needed: int


class Scan:
    """The candidates of a matrix, chunk by chunk, as csrc/cuda/topk_encode.cu asks for them."""

    def __init__(
        self, pre: torch.Tensor, width: int = WIDTH, together: int = 0, growth: int = 2
    ) -> None:
        self.pre, self.width, self.growth = pre.numpy(), width, growth
        self.n, self.d_sae = pre.shape
        self.together = together or max(self.n, 1)
        self.capacity = min(self.n, self.together) * min(width, self.d_sae)
        self.lost = np.full(-(-self.n // self.together), self.d_sae, np.int64)
        self.chunks: list[Chunk] = []

    def run(self, best) -> None:
        for first, last in select.prefixes(self.d_sae, self.width, self.growth):
            for block in range(len(self.lost)):
                self.merge(best, block, first, last)
        begins = self.lost.tolist()
        self.lost[:] = self.d_sae
        for block, begin in enumerate(begins):
            for first, last in select.equal_chunks(begin, self.d_sae, self.width):
                self.merge(best, block, first, last)
        assert (self.lost == self.d_sae).all()

    def merge(self, best, block: int, first: int, last: int) -> None:
        rows = slice(block * self.together, min((block + 1) * self.together, self.n))
        found = self.candidates(rows, best.bound[rows], first, last)
        best.merge(found, self.lost[block : block + 1], rows.start)

    def candidates(self, rows, bound, first, last):
        pre = self.pre[rows, first:last]
        with np.errstate(invalid="ignore"):
            stored = np.isnan(pre) | (pre > bound[:, None])
        offsets = np.concatenate([[0], stored.sum(1).cumsum()]).astype(np.int64)
        needed = int(offsets[-1])
        latents = np.full(self.capacity, 2**31 - 1, np.int32)
        values = np.full(self.capacity, np.nan, np.float32)
        if needed <= self.capacity:
            rows, columns = stored.nonzero()
            latents[:needed], values[:needed] = columns + first, pre[rows, columns]
        self.chunks.append(Chunk(first, last, needed))
        return offsets.clip(max=self.capacity), latents, values, needed, self.capacity, first


class RowBest:
    def __init__(self, n: int, k: int, team: str) -> None:
        self.latents, self.values = poisoned((n, k), np.int32), poisoned((n, k), np.float32)
        self.counts, self.bound = np.zeros(n, np.int32), np.zeros(n, np.float32)
        self.team = team

    def merge(self, found, lost, first_row) -> None:
        assert first_row == 0, "rows are selected one by one"
        state = self.latents, self.values, self.counts, self.bound
        select.select_rows(self.team, *state, found, lost)


class BatchBest:
    def __init__(self, n: int, count: int, capacity: int) -> None:
        self.count = count
        self.offsets, self.bound = np.zeros(n + 1, np.int64), np.zeros(n, np.float32)
        self.latents, self.values = poisoned(capacity, np.int32), poisoned(capacity, np.float32)
        self.threshold = np.zeros((), np.float32)

    def merge(self, found, lost, first_row) -> None:
        kept = self.offsets, self.latents, self.values
        merged = select.select_batch(*kept, self.count, found, lost, first_row)
        self.offsets, self.latents, self.values, self.bound, self.threshold = merged


def tensors(arrays):
    return [torch.from_numpy(np.asarray(a)) for a in arrays]


NO_VIEW = [torch.empty(0, dtype=torch.int64)] * 2
"""In place of feature_offsets and permutation."""


def topk(pre, k, team="warp", scan=None):
    n, d_sae = pre.shape
    best = RowBest(n, k, team)
    (scan or Scan(pre)).run(best)
    kept = best.latents, best.values, best.counts
    return tensors(select.fill_rows(*kept, [d_sae], d_sae, max(n, 1))) + NO_VIEW


def batchtopk(pre, k, capacity=None, scan=None):
    n, d_sae = pre.shape
    best = BatchBest(n, int(k * n), min(int(k * n), n * d_sae))
    (scan or Scan(pre)).run(best)
    room = int(best.offsets[-1]) if capacity is None else capacity
    kept = best.offsets, best.latents, best.values
    written = select.write_batch(*kept, [d_sae], d_sae, room)
    return tensors([*written, best.threshold]) + NO_VIEW


def assert_topk(pre, k, team="warp", scan=None):
    assert_entries(topk(pre, k, team, scan), topk_support(pre, k))


def assert_batchtopk(pre, k, scan=None):
    expected, threshold = batchtopk_support(pre, k)
    result = batchtopk(pre, k, scan=scan)
    assert_entries(result, expected)
    assert_same(result[5], torch.tensor(threshold), "threshold")
    assert result[4] == result[0][-1] == result[1].shape[0]
