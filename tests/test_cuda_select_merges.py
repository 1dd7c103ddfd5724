"""The CUDA kernels that select entries, one merge or one output pass at a time, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from selection import POISON, BatchBest, RowBest, Scan, batchtopk, select, tensors, testing

NAN, INF = float("nan"), float("inf")
TEAMS = ("warp", "warp, from memory", "block", "block, from memory")
N, D_SAE = 7, 300


@pytest.fixture(autouse=True)
def order():
    """Restore the order of threads."""
    yield
    testing.cuda_seed(0)


def rows_of(lengths, draw):
    """Values of candidates, some of which can never be selected, and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = draw(int(offsets[-1])).astype(np.float32)
    return offsets, values


def best_of(values, k):
    """Positions of the k best that can be selected, ascending; and the k-th best value, or 0."""
    # NaN first; `sorted` is stable, reversed too.
    keys = [(1, 0.0) if np.isnan(v) else (0, float(v)) for v in values]
    able = [e for e, v in enumerate(values) if not v <= 0]
    chosen = sorted(able, key=keys.__getitem__, reverse=True)[:k]
    last = values[chosen[-1]] if len(chosen) == k else 0.0
    return sorted(chosen), INF if np.isnan(last) else last


DRAWS = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "ties": lambda rng, size: rng.integers(-1, 4, size),
    "special": lambda rng, size: rng.choice([NAN, INF, 1.0, 2.0, 1e-45, 0.0, -0.0, -INF], size),
    "bits": lambda rng, size: rng.integers(0, 2**32, size, np.uint32).view(np.float32),
    "near": lambda rng, size: 1 + rng.integers(0, 300, size) * 2.0**-23,
}


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("k", [1, 5, 64, 130])
def test_merges_of_any_lengths(team, draw, k):
    rng = np.random.default_rng(k)
    lengths = [[0, 1, 31, 32, 33, 64, 65, k, k + 1, 257], [0, 1, 5, 0, 300, 64, 2, 1, k, 90]]
    n = len(lengths[0])
    best, lost = RowBest(n, k, team), np.full(1, 10**6, np.int64)
    held = [np.empty(0, np.float32)] * n
    where = [np.empty(0, np.int64)] * n
    for chunk, counts in enumerate(lengths):
        testing.cuda_seed(chunk + k)
        offsets, values = rows_of(counts, lambda size: DRAWS[draw](rng, size))
        first = 1000 * chunk
        spots = [np.sort(rng.choice(1000, c, replace=False)) + first for c in counts]
        latents = np.concatenate(spots).astype(np.int32)
        best.merge((offsets, latents, values, len(values), len(values), first), lost, 0)
        for i in range(n):
            held[i] = np.concatenate([held[i], values[offsets[i] : offsets[i + 1]]])
            where[i] = np.concatenate([where[i], spots[i]])
            chosen, bound = best_of(held[i], k)
            held[i], where[i] = held[i][chosen], where[i][chosen]
            count = best.counts[i]
            assert count == len(chosen)
            assert best.latents[i, :count].tolist() == where[i].tolist()
            np.testing.assert_array_equal(best.values[i, :count], held[i])
            assert best.bound[i] == bound
            assert (best.latents[i, count:].view(np.uint8) == POISON).all()


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("rank", [1, 40, 500, 10**6])
def test_merges_of_a_batch(draw, rank):
    rng = np.random.default_rng(rank)
    lengths = [[0, 1, 31, 90, 33, 64, 65], [70, 1, 0, 40, 300, 0, 2]]
    best, lost = BatchBest(7, rank, min(rank, 1000)), np.full(1, 10**6, np.int64)
    held = [np.empty(0, np.float32)] * 7
    where = [np.empty(0, np.int64)] * 7
    for chunk, counts in enumerate(lengths):
        testing.cuda_seed(chunk + rank)
        offsets, values = rows_of(counts, lambda size: DRAWS[draw](rng, size))
        first = 1000 * chunk
        spots = [np.sort(rng.choice(1000, c, replace=False)) + first for c in counts]
        latents = np.concatenate(spots).astype(np.int32)
        best.merge((offsets, latents, values, len(values), len(values), first), lost, 0)
        held = [
            np.concatenate([a, b])
            for a, b in zip(held, np.split(values, offsets[1:-1]), strict=True)
        ]
        where = [np.concatenate([a, b]) for a, b in zip(where, spots, strict=True)]
        chosen, _ = best_of(np.concatenate(held), rank)
        ends = np.cumsum([len(a) for a in held])
        taken = np.split(np.isin(np.arange(ends[-1]), chosen), ends[:-1])
        held = [a[t] for a, t in zip(held, taken, strict=True)]
        where = [a[t] for a, t in zip(where, taken, strict=True)]
        count = best.offsets[-1]
        assert best.offsets.tolist() == [0, *np.cumsum([len(a) for a in held]).tolist()]
        assert best.latents[:count].tolist() == np.concatenate(where).tolist()
        np.testing.assert_array_equal(best.values[:count], np.concatenate(held))
        assert (best.latents[count:].view(np.uint8) == POISON).all()
        ranked = np.sort(np.concatenate(held))  # NaN last
        np.testing.assert_array_equal(best.threshold, ranked[0] if count == rank else 0.0)


def test_the_earliest_loss_is_remembered_and_nothing_after_it_is_merged():
    pre = torch.arange(1.0, D_SAE + 1).repeat(N, 1)
    for best in (RowBest(N, 4, "warp"), RowBest(N, 4, "block"), BatchBest(N, 4 * N, 4 * N)):
        scan = Scan(pre)
        scan.merge(best, 0, 0, 32)
        before = [np.copy(a) for a in (best.latents, best.values, best.bound)]
        scan.merge(best, 0, 32, 64)
        assert scan.lost[0] == D_SAE
        with pytest.raises(AssertionError):
            for mine, old in zip((best.latents, best.values), before, strict=False):
                np.testing.assert_array_equal(mine, old)
        before = [np.copy(a) for a in (best.latents, best.values, best.bound)]
        scan.merge(best, 0, 64, 128)
        scan.merge(best, 0, 128, 160)
        scan.merge(best, 0, 160, 300)
        assert scan.lost[0] == 64
        after = best.latents, best.values, best.bound
        for mine, old in zip(after, before, strict=True):
            np.testing.assert_array_equal(mine, old)


def test_rows_that_lost_candidates_are_nan():
    best = RowBest(3, 4, "warp")
    pre = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [-1.0] * 5, [2.0, -1.0, -1.0, -1.0, -1.0]])
    Scan(pre).merge(best, 0, 0, 5)
    kept = best.latents, best.values, best.counts
    offsets, latents, values, gate = select.fill_rows(*kept, [5, 5], 5, 2)
    assert offsets.tolist() == [0, 4, 8, 12]
    assert latents.tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]
    assert values.tolist() == [2, 3, 4, 5, 0, 0, 0, 0, 2, 0, 0, 0]
    assert gate.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    for lost, rows in (([4, 5], [0, 1]), ([5, 0], [2]), ([3, 4], [0, 1, 2])):
        offsets, _, values, gate = select.fill_rows(*kept, lost, 5, 2)
        assert offsets.tolist() == [0, 4, 8, 12]
        failed = np.isnan(values.reshape(3, 4))
        assert failed.all(1).nonzero()[0].tolist() == failed.any(1).nonzero()[0].tolist() == rows
        assert (gate.reshape(3, 4)[rows] == 1).all()


def test_fixed_capacity_of_batchtopk():
    pre = torch.randn(N, D_SAE)
    exact = batchtopk(pre, 5.0)
    assert exact[4] == 35
    padded = batchtopk(pre, 5.0, 40)
    for mine, wanted in zip(padded[1:4], exact[1:4], strict=True):
        assert torch.equal(mine[:35], wanted) and not mine[35:].any() and mine.shape == (40,)
    small = batchtopk(pre, 5.0, 20)
    assert small[4] == 35 and small[0].tolist() == exact[0].clamp(max=20).tolist()
    assert small[1].shape == (20,) and small[2].isnan().all() and (small[3] == 1).all()
    kept = [exact[0].numpy(), exact[1].numpy(), exact[2].numpy()]
    lost = tensors(select.write_batch(*kept, [64], D_SAE, 40))
    assert lost[0].tolist() == exact[0].tolist() and lost[2].isnan().all()
