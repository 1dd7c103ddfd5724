"""The screened TopK encoder's CUDA kernels on a CPU: upper bounds, scans, decisions, leftovers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from selection import BatchBest, Chunk, RowBest, Scan, select, testing

screened, topk = testing.cuda_screened, testing.cuda_topk_screened
DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}
NAN, INF = np.float32("nan"), np.float32("inf")


@pytest.fixture(autouse=True)
def seed_of_threads():
    yield
    testing.cuda_seed(0)


def rounded(values, dtype):
    return torch.from_numpy(values).to(DTYPES[dtype]).float().numpy()


def draw(n, d, f, dtype=1, massive=0.0):
    """Gaussian tokens around a centre with a few large dimensions; latents of norms 0.5 to 2."""
    g = np.random.default_rng(0)
    center = g.normal(size=d).astype(np.float32) * 0.3
    center[:: max(d // 4, 1)] += massive
    x = rounded(g.normal(size=(n, d)).astype(np.float32) + center, dtype)
    w = g.normal(size=(f, d)) / np.sqrt(d) * np.exp(g.uniform(-0.7, 0.7, (f, 1)))
    w = rounded(w.astype(np.float32), dtype)
    bias = (0.1 * g.normal(size=f) - w @ center).astype(np.float32)
    return x, w, bias, center


class Uppers(Scan):
    """What pre can be at most, chunk by chunk, from codes."""

    def __init__(self, x, w, bias, center, dtype=1, width=256, hopper=False) -> None:
        self.truth = x.astype(np.float64) @ w.T.astype(np.float64) + bias
        super().__init__(torch.from_numpy(self.truth.astype(np.float32)), width)
        tokens = screened.quantise(x, dtype, x.shape[1], center, False)
        self.codes, self.scale, self.bound = tokens
        self.w_codes, scale, dot, _ = screened.quantise(w, dtype, w.shape[1], center, True)
        self.units, self.limit = topk.limits(scale, dot, bias)
        self.hopper = hopper

    def candidates(self, rows, bound, first, last):
        tokens = self.codes[rows], self.scale[rows], self.bound[rows]
        latents = self.w_codes, self.units, self.limit
        found = topk.uppers(
            *tokens, *latents, np.asarray(bound), first, last, self.capacity, self.hopper
        )
        self.chunks.append(Chunk(first, last, found[3]))
        return *found, self.capacity, first


class Decided(NamedTuple):
    latents: Any
    values: Any
    counts: Any
    bound: Any
    unsure: Any
    decided: int


def decide(data, scan, kept, k, dtype=1, stride=None):
    x, w, bias = data[:3]
    tokens = x, dtype, stride or x.shape[1], w, dtype, w.shape[1]
    state = kept.latents, kept.values, kept.counts, kept.bound
    return Decided(*topk.decide(*tokens, bias, scan.scale, *state, k))


def encode(data, k, room=0, dtype=1, team="warp", stride=None, **how):
    """The k best of each row, the scan they come from, and what it kept."""
    scan = Uppers(*data, dtype, **how)
    kept = RowBest(scan.n, room or topk.room(k, scan.d_sae), team)
    scan.run(kept)
    return decide(data, scan, kept, k, dtype, stride), scan, kept


def slack_of(data):
    x, w, bias = (np.abs(a).astype(np.float64) for a in data[:3])
    with np.errstate(invalid="ignore"):
        return 1e-6 * (x @ w.T + bias)


def assert_best(data, k, found, truth, skip=()):
    """Latents above the k-th best for sure are there, those below it are not; values are exact."""
    slack = slack_of(data)
    for i in set(range(len(truth))) - set(skip):
        count = int(found.counts[i])
        latents, values = found.latents[i, :count], found.values[i, :count]
        assert (np.diff(latents) > 0).all()
        pre = np.where(np.isnan(truth[i]), np.inf, truth[i])
        cut = max(np.sort(pre)[-k], 0)
        has = np.isin(np.arange(len(pre)), latents)
        near = (
            np.where(np.isfinite(slack[i]), slack[i], 0) + (slack[i][np.isfinite(slack[i])]).max()
        )
        assert has[pre > cut + near].all(), f"row {i} lacks a latent"
        assert not has[pre < cut - near].any(), f"row {i} has a latent too many"
        assert count == min(k, int((pre > 0).sum())) or (np.abs(pre) <= near).any()
        exact = truth[i, latents]
        assert (np.isnan(values) == np.isnan(exact)).all()
        sure = np.isfinite(exact)
        assert (np.abs(values[sure] - exact[sure]) <= slack[i, latents][sure]).all()
        assert (values[~sure & ~np.isnan(exact)] == INF).all()


# ---- upper bounds


@pytest.mark.parametrize(("d", "dtype"), [(128, 0), (200, 1), (640, 2)])
@pytest.mark.parametrize("massive", [0.0, 30.0])
def test_an_upper_bound_is_one_and_not_much_more(d, dtype, massive):
    data = draw(40, d, 500, dtype, massive)
    scan = Uppers(*data, dtype)
    scan.capacity = scan.n * scan.d_sae
    least = np.linspace(0, 2, 40).astype(np.float32)
    offsets, latents, values, needed, *_ = scan.candidates(slice(None), least, 0, 500)
    assert needed == offsets[-1] == len(latents)
    rows = np.repeat(np.arange(40), np.diff(offsets))
    pre = scan.truth[rows, latents]
    codes_per_unit = scan.scale[rows].astype(np.float64) * scan.units[latents]
    margin = (screened.zero - scan.bound[rows]) / codes_per_unit
    above = (values - pre) / margin
    assert above.min() > 0 and above.max() < 2 and 0.9 < above.mean() < 1.1
    assert (values > least[rows] * (1 - 1e-5)).all()
    emitted = np.zeros(scan.truth.shape, bool)
    emitted[rows, latents] = True
    assert emitted[scan.truth > least[:, None]].all() and not emitted.all()


@pytest.mark.parametrize(("n", "d", "f"), [(1, 128, 1), (140, 136, 520), (20, 384, 270)])
def test_hopper_bounds_are_those_of_exact_sums(n, d, f):
    data = draw(n, d, f, massive=20.0)
    if f == 1:
        data[2][:] = 9
    scans = [Uppers(*data, hopper=hopper) for hopper in (False, True)]
    bound = np.full(n, 0.3, np.float32)
    for first in range(0, f, 512):
        last = min(first + 512, f)
        plain, ours = (scan.candidates(slice(None), bound, first, last) for scan in scans)
        assert plain[3] == ours[3] > 0.2 * n * (last - first) / 2
        for a, b in zip(plain[:3], ours[:3], strict=True):
            assert np.array_equal(a, b)


def test_dense_strips_and_sparse_ones_hold_the_same_bounds():
    """Few hits of a thread are picked out of its registers, many are written block by block."""
    data = draw(64, 200, 256)
    scan = Uppers(*data)
    scan.capacity = 64 * 256
    every = scan.candidates(slice(None), np.zeros(64, np.float32), 0, 256)
    upper = np.full((64, 256), -1, np.float32)
    upper[np.repeat(np.arange(64), np.diff(every[0])), every[1]] = every[2]
    least = np.sort(upper, axis=1)[:, -2].copy()
    few = scan.candidates(slice(None), least, 0, 256)
    rows = np.repeat(np.arange(64), np.diff(few[0]))
    assert few[3] <= 64 < 64 * 60 < every[3]
    assert np.array_equal(few[2], upper[rows, few[1]])


@pytest.mark.parametrize("guess", [0.0, 2.2])
def test_the_largest_bounds_of_a_batch_hold_its_best_entries(guess):
    """Room as in batchtopk_screened.cu; tokens differ in size, so that some have most entries."""
    data = draw(40, 200, 900)
    x, w, bias, center = data
    x[:] = rounded((x - center) * np.geomspace(0.5, 2, 40)[:, None] + center, 1)
    scan, count = Uppers(*data), 40 * 8
    kept = BatchBest(scan.n, 2 * count + 32, 2 * count + 32)
    if guess == 0:
        scan.run(kept)
    else:
        least = np.full(40, guess, np.float32)
        kept.merge(scan.candidates(slice(None), least, 0, 900), scan.lost, 0)
    rows = np.repeat(np.arange(40), np.diff(kept.offsets))
    found = np.zeros(scan.truth.shape, bool)
    found[rows, kept.latents[: len(rows)]] = True
    cut = np.sort(scan.truth, axis=None)[-count]
    assert found[scan.truth >= cut].all() and max(float(kept.threshold), guess) < cut
    assert count < len(rows) <= 2 * count + 32


# ---- rows


@pytest.mark.parametrize(
    ("layout", "k"),
    [
        ({}, 16),
        ({}, 1),
        ({"dtype": 0}, 8),
        ({"dtype": 2, "team": "block"}, 8),
        ({"stride": 203}, 8),
    ],
)
def test_rows(layout, k):
    data = draw(18, 200, 700, layout.get("dtype", 1), massive=30.0)
    found, scan, _ = encode(data, k, **layout)
    assert len(found.unsure) == 0
    assert_best(data, k, found, scan.truth)
    assert 18 * k <= found.decided < 18 * (2.2 * k + 2), "no more than can be among the best"


def test_the_same_bits_in_every_order_of_threads():
    data = draw(10, 128, 600)
    found, *_ = encode(data, 12)
    for seed in range(1, 3):
        testing.cuda_seed(seed)
        again, *_ = encode(data, 12)
        for name in ("latents", "values", "counts", "bound"):
            assert np.array_equal(getattr(found, name), getattr(again, name)), name
        assert again.decided == found.decided


def test_a_value_depends_on_its_token_and_latent_alone():
    data = draw(10, 384, 400)
    found, *_ = encode(data, 8)
    one, *_ = encode((data[0][7:8], *data[1:]), 8)
    assert np.array_equal(one.values[0], found.values[7])
    *_, offsets, indices, pre = screened.encode(
        *(data[0], 1, 384, data[1], 1, 384, data[2], np.ones(400, np.float32), 0.0),
        *(data[3], -1, False),
    )
    for i in range(10):
        row = slice(offsets[i], offsets[i + 1])
        chosen = np.isin(indices[row], found.latents[i])
        assert np.array_equal(pre[row][chosen], found.values[i]), "those of jumprelu_encode"


def test_a_margin_that_room_does_not_cover_is_told():
    """8 kept for k = 6: where the 8th bound reaches the 6th value, the row is unsure."""
    data = draw(40, 256, 500)
    found, scan, kept = encode(data, 6, room=8)
    sixth = np.sort(found.values, axis=1)[:, 0]
    assert sorted(found.unsure) == np.flatnonzero(sixth <= kept.bound).tolist()
    assert 5 < len(found.unsure) < 40
    assert_best(data, 6, found, scan.truth, found.unsure)


def test_latents_that_are_the_same_tie_to_the_smaller():
    data = draw(9, 128, 600)
    data[1][300:] = data[1][:300]
    data[2][300:] = data[2][:300]
    found, scan, _ = encode(data, 5)
    assert len(found.unsure) == 0
    order = np.argsort(-scan.truth, axis=1, kind="stable")[:, :5]
    assert np.array_equal(found.latents, np.sort(order, axis=1))


def test_fewer_positive_entries_than_k():
    data = draw(12, 128, 600)
    data[2][:] -= 3
    data[2][50] += 40
    found, scan, kept = encode(data, 20)
    assert (kept.bound == 0).all() and len(found.unsure) == 0
    assert (found.counts < 20).all() and (found.bound == 0).all() and (found.counts > 0).all()
    assert_best(data, 20, found, scan.truth)
    data[2][:] -= 100
    found, *_ = encode(data, 20)
    assert (found.counts == 0).all() and found.decided == 0 and len(found.unsure) == 0


def test_after_an_overflow_the_scan_goes_on_from_there():
    data = draw(30, 128, 1500)
    data[2][:] += 0.02 * np.maximum(np.arange(1500) - 500, 0)  # later latents beat earlier ones
    found, scan, _ = encode(data, 4)
    assert [chunk.first for chunk in scan.chunks] == [0, 256, 512, 1024, 512, 768, 1024, 1280]
    assert scan.chunks[2].needed > scan.capacity and len(found.unsure) == 0
    assert_best(data, 4, found, scan.truth)


def test_what_is_not_finite_or_extreme():
    data = x, w, bias, center = draw(21, 136, 700, 0)
    x[2, 5], x[3, 0], x[6], x[7] = NAN, INF, x[6] * 1e30, x[7] * 1e-30
    x[4], x[5] = 0.0, center
    w[3, 5], w[7], w[8], w[9] = NAN, 0.0, w[8] * 1e25, w[9] * 1e-25
    bias[30], bias[31], bias[32], bias[7] = NAN, INF, -INF, 5.0
    with np.errstate(all="ignore"):
        found, scan, _ = encode(data, 12, dtype=0)
    assert sorted(set(found.unsure)) == sorted(found.unsure)
    assert {2, 3, 6, 7} - {7} <= set(found.unsure) <= {2, 3, 4, 5, 6, 7}, "they have no codes"
    assert_best(data, 12, found, scan.truth, found.unsure)
    assert {3, 30, 31} <= set(found.latents[0])


def test_tokens_without_codes_emit_nothing():
    data = draw(20, 128, 300, 0)
    data[0][4, 3] = NAN
    scan = Uppers(*data, 0)
    scan.capacity = 20 * 300
    offsets, *_ = scan.candidates(slice(None), np.zeros(20, np.float32), 0, 300)
    assert offsets[5] == offsets[4] and (np.delete(np.diff(offsets), 4) > 50).all()


# ---- what the plain encoder is handed


def test_rows_go_where_they_belong():
    rows = np.arange(48, dtype=np.float32).reshape(6, 8)
    which = np.array([4, 0, 5])
    assert np.array_equal(topk.gather(rows, which), rows[which])
    latents, values = np.array([[1, 5], [7, 0], [2, 3]]), np.float32([[1, 2], [3, 0], [4, 5]])
    given = latents, values, np.array([2, 1, 2]), [9], 9, 3
    offsets, indices, out, gate = select.fill_rows(*given, which=which, rows=6)
    assert [offsets[i + 1] for i in which] == [10, 2, 12]
    at = [(2 * i, 2 * i + 1) for i in which]
    assert [indices[list(pair)].tolist() for pair in at] == [[1, 5], [0, 7], [2, 3]]
    assert [out[list(pair)].tolist() for pair in at] == [[1, 2], [0, 3], [4, 5]]
    assert [gate[list(pair)].tolist() for pair in at] == [[1, 1], [0, 1], [1, 1]]
    untouched = np.delete(np.arange(12), np.ravel(at))
    assert (indices[untouched].view(np.uint8) == 0xAB).all()


def test_room_for_what_the_margin_lets_through():
    assert topk.room(64, 65536) == 160 and topk.room(1, 65536) == 34 and topk.room(64, 100) == 100
