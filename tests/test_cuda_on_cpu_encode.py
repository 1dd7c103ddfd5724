"""The encoder's CUDA kernels, run on the CPU (csrc/testing/cuda_on_cpu.h)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import assert_entries, assert_same, exact_pre, jumprelu_support
from samples import problem

testing = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")

NAN, INF = float("nan"), float("inf")
EXTREMES = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, INF, -INF, NAN])


class Encoded:
    """Entries of one run, and the number of records that its strips reserved."""

    def __init__(self, found):
        offsets, indices, values, gate = (torch.from_numpy(a) for a in found[:4])
        self.offsets, self.indices, self.values, self.gate = offsets, indices, values, gate
        self.needed, self.reserved = found[4:]

    def check(self, expected):
        """Exactly `(stored, values, gate)`; without gate for candidates, which have none."""
        stored, values, gate = expected
        assert self.needed == int(stored.sum())
        empty = self.offsets.new_empty(0)
        entries = self.offsets, self.indices, self.values, self.gate, empty, empty
        assert_entries(entries, (stored, values, gate))


def run(call, *args, per_token=False, window=0.0, latents=None, arena=0, capacity=-1, seed=0):
    """`call` is `cuda_encode_tiles(x, W, dtype, bias, ..)` or `cuda_encode_sums(sums, width, ..)`.

    args: its own ones, then bias and threshold (bounds); the last dimension of W or sums is d_sae.
    """
    arrays = [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
    latents = (0, arrays[-2].shape[0]) if latents is None else latents
    testing.cuda_seed(seed)
    try:
        found = call(*arrays, per_token, window, latents, arena, capacity)
    finally:
        testing.cuda_seed(0)
    if per_token:  # candidates have no gate: what the array was made of
        assert found[3].tobytes() == b"\xab" * found[3].nbytes
        found = (*found[:3], np.zeros_like(found[2]), *found[4:])
        found[3][: found[0][-1]] = 1
    return Encoded(found)


def candidates(pre, bound, first, last):
    stored = ~(pre <= bound[:, None])
    stored[:, :first] = False
    stored[:, last:] = False
    return stored, torch.where(stored, pre, 0.0), stored.float()


def given(n, d_sae, density, seed=0, integer=False):
    """Sums, bias and a threshold that the given fraction passes."""
    draw = torch.Generator().manual_seed(seed)
    sums, bias = torch.randn(n, d_sae, generator=draw), torch.randn(d_sae, generator=draw)
    if integer:
        sums, bias = (2 * sums).round(), (2 * bias).round()
    theta = (
        (sums + bias).flatten().sort().values[min(int((1 - density) * n * d_sae), n * d_sae - 1)]
    )
    theta = theta - 1 if density == 1 else theta
    return sums, bias, theta.expand(d_sae).clone()


# ---- the limit of the sum without bias


@pytest.mark.parametrize("window", [0.0, 5e-4, 1e30])
def test_the_limit_is_the_last_sum_that_does_not_pass(window):
    draw = np.random.default_rng(0)
    bias, threshold = draw.integers(0, 2**32, (2, 20000), np.uint32).view(np.float32)
    bias[:121], threshold[:121] = np.repeat(EXTREMES.numpy(), 11), np.tile(EXTREMES.numpy(), 11)
    bias[200:9000] = draw.normal(size=8800)
    threshold[200:9000] = bias[200:9000] * (
        1 + draw.normal(size=8800) * 2.0 ** -(np.arange(8800) % 27)
    )
    limit = testing.cuda_encode_limits(bias, threshold, window)
    unlimited = ~np.isfinite(bias) | np.isnan(threshold)
    assert (np.isnan(limit) == unlimited).all()
    with np.errstate(over="ignore", invalid="ignore"):
        lower = (threshold - np.float32(window))[~unlimited]
        bias, limit = bias[~unlimited], limit[~unlimited]
        assert (limit + bias <= lower).all()
        above = np.nextafter(limit, np.float32(INF))
        assert ((above + bias > lower) | ((limit == INF) & (lower == INF))).all()


# ---- the epilogue and the placement, from given sums


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.1, 1.0])
@pytest.mark.parametrize("n, d_sae", [(1, 1), (16, 256), (37, 515), (70, 1000)])
def test_sums_become_canonical_entries(width, density, n, d_sae):
    sums, bias, theta = given(n, d_sae, density)
    for seed, arena in enumerate((n * d_sae, n * d_sae // 3, 0)):
        found = run(testing.cuda_encode_sums, sums, width, bias, theta, arena=arena, seed=seed)
        found.check(jumprelu_support(sums + bias, theta, 0.0))


@pytest.mark.parametrize("seed", range(6))
def test_window_entries_and_sums_on_the_limit(seed):
    sums, bias, theta = given(35, 300, 0.05, seed, integer=True)
    found = run(testing.cuda_encode_sums, sums, 128, bias, theta, window=1.0, arena=9, seed=seed)
    found.check(jumprelu_support(sums + bias, theta, 2.0))


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("window", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(12))
def test_first_invalid_latent_of_each_token(width, window, seed):
    sums, bias, theta = given(40, 530, 0.03, seed)
    draw = torch.Generator().manual_seed(seed)
    for tensor in (sums.view(-1), bias, theta):
        at = torch.randint(tensor.numel(), (3 + 20 * (tensor.numel() > 530),), generator=draw)
        tensor[at] = EXTREMES[torch.randint(len(EXTREMES), at.shape, generator=draw)]
    arena = 4 if seed % 2 else 40 * 530
    found = run(
        testing.cuda_encode_sums, sums, width, bias, theta, window=window, arena=arena, seed=seed
    )
    found.check(jumprelu_support(sums + bias, theta, 2 * window))


@pytest.mark.parametrize(
    "bias, theta", [(INF, 0.0), (INF, INF), (-INF, -INF), (NAN, 0.0), (0.0, NAN)]
)
def test_a_latent_without_limit(bias, theta):
    sums = torch.tensor([[1.0, INF, -INF, NAN, -1.0]]).t().expand(5, 20).contiguous()
    biases, thetas = torch.zeros(20), torch.ones(20)
    biases[11], thetas[11] = bias, theta
    found = run(testing.cuda_encode_sums, sums, 64, biases, thetas, arena=100)
    found.check(jumprelu_support(sums + biases, thetas, 0.0))


def test_more_column_blocks_than_a_group_has():
    sums, bias, theta = given(19, 64 * 70 + 5, 0.02)
    sums[3, 64 * 69] = NAN
    found = run(testing.cuda_encode_sums, sums, 64, bias, theta, arena=100)
    found.check(jumprelu_support(sums + bias, theta, 0.0))


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("latents", [(0, 600), (256, 600), (512, 513), (256, 256), (0, 7)])
def test_candidates_above_the_bound_of_their_token(width, latents):
    sums, bias, _ = given(40, 600, 0.5, integer=True)
    sums[5, 100], sums[5, 300], sums[6, 599], sums[7, 512] = NAN, INF, -INF, NAN
    bound = torch.arange(40.0) / 4
    bound[9], bound[5] = INF, 1e30
    expected = candidates(sums + bias, bound, *latents)
    for seed, arena in enumerate((40 * 600, 11)):
        found = run(
            *(testing.cuda_encode_sums, sums, width, bias, bound),
            **{"per_token": True, "latents": latents, "arena": arena, "seed": seed},
        )
        found.check(expected)


def test_the_second_pass_writes_what_the_first_had_no_room_for():
    sums, bias, theta = given(64, 512, 0.9)
    expected = jumprelu_support(sums + bias, theta, 0.0)
    total = int(expected[0].sum())
    assert total > 3 * 4096, "runs before, across and behind the end of the arena"
    for seed, arena in enumerate((0, 1, 4000, 4097, 9000, total - 1, total)):
        found = run(testing.cuda_encode_sums, sums, 256, bias, theta, arena=arena, seed=seed)
        assert found.reserved == total
        found.check(expected)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_fixed_capacity(per_token):
    sums, bias, theta = given(21, 300, 0.1)
    sums[4, 7] = NAN
    if per_token:
        theta = torch.ones(21)
        stored, values, gate = candidates(sums + bias, theta, 0, 300)
    else:
        stored, values, gate = jumprelu_support(sums + bias, theta, 0.0)
    needed = int(stored.sum())
    for capacity in (needed + 50, needed, needed - 1, 1, 0):
        found = run(
            *(testing.cuda_encode_sums, sums, 128, bias, theta),
            **{"per_token": per_token, "arena": capacity, "capacity": capacity},
        )
        assert found.indices.shape == (capacity,) and found.needed == needed
        if capacity >= needed:
            if per_token:  # nothing is written behind the last candidate
                found.indices, found.values = found.indices[:needed], found.values[:needed]
                found.gate = found.gate[:needed]
            found.check((stored, values, gate))
            continue
        offsets = torch.cat([torch.zeros(1), stored.sum(1).cumsum(0)]).long()
        assert_same(found.offsets, offsets.clamp(max=capacity))
        assert not found.indices.any() and found.values.isnan().all() and found.gate.eq(1).all()


@pytest.mark.parametrize("n, d_sae", [(0, 0), (0, 5), (3, 0)])
def test_nothing_to_encode(n, d_sae):
    found = run(
        testing.cuda_encode_sums, torch.ones(n, d_sae), 128, torch.ones(d_sae), torch.ones(d_sae)
    )
    assert found.offsets.tolist() == [0] * (n + 1) and found.needed == 0


# ---- the portable kernel: its copies, its swizzle, its product


DTYPES = [t + size for t in ("float32", "bfloat16", "float16") for size in ("", ":small")]


def encoder(n, d, d_sae, seed=0):
    p = problem(n, d, d_sae, integer=True, seed=seed)
    return p.x, p.W_enc.t().contiguous(), p.b_enc, p.threshold, exact_pre(*p.encoder).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, d, d_sae", [(1, 1, 1), (33, 8, 130), (129, 40, 257), (5, 0, 300), (140, 100, 300)]
)
def test_tiles_multiply_exactly(dtype, n, d, d_sae):
    x, W, bias, theta, pre = encoder(n, d, d_sae)
    found = run(
        *(testing.cuda_encode_tiles, x, W, dtype, bias, theta), arena=n * d_sae, window=1.0, seed=1
    )
    found.check(jumprelu_support(pre, theta, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_stages_than_the_pipeline_holds(dtype):
    x, W, bias, theta, pre = encoder(20, 330, 70)
    for seed in range(3):
        found = run(testing.cuda_encode_tiles, x, W, dtype, bias, theta, arena=1400, seed=seed)
        found.check(jumprelu_support(pre, theta, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_again_where_records_are_missing(dtype):
    x, W, bias, theta, pre = encoder(150, 17, 520)
    x[140, 3] = NAN
    pre[140] = NAN
    expected = jumprelu_support(pre, theta, 0.0)
    for arena in (0, 3000):
        found = run(testing.cuda_encode_tiles, x, W, dtype, bias, theta, arena=arena, seed=arena)
        assert found.reserved > arena
        found.check(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_a_range_of_latents(dtype):
    x, W, bias, _, pre = encoder(30, 20, 700)
    bound = torch.arange(30.0) / 3
    found = run(
        *(testing.cuda_encode_tiles, x, W, dtype, bias, bound),
        **{"per_token": True, "latents": (256, 650), "arena": 30 * 700},
    )
    found.check(candidates(pre, bound, 256, 650))


@pytest.mark.parametrize("n", [3, 17])
def test_more_groups_of_column_blocks_than_a_warp_has_lanes(n):
    x, W, bias, _, pre = encoder(n, 2, 16 * 32 * 32 + 700)
    theta = pre.flatten().sort().values[-2000].expand(len(bias)).clone()
    found = run(testing.cuda_encode_tiles, x, W, "float32:small", bias, theta, arena=n * len(bias))
    found.check(jumprelu_support(pre, theta, 0.0))


def test_row_blocks_that_sweep_the_latents_together():
    x, W, bias, theta, pre = encoder(17 * 128 + 3, 3, 258)
    found = run(testing.cuda_encode_tiles, x, W, "bfloat16", bias, theta, arena=x.shape[0] * 258)
    found.check(jumprelu_support(pre, theta, 0.0))


# ---- the kernel of few tokens: its swizzle, its order of k, its partial sums, its limits


HALVES = ["bfloat16", "float16"]


def assert_same_bits(found, expected):
    for name in ("offsets", "indices", "values", "gate"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), name
    assert found.needed == expected.needed


@pytest.mark.parametrize("n", range(1, 17))
def test_few_tokens_get_what_tiles_give_them(n):
    d, d_sae = 8 * n + 3, 60 + 17 * n
    x, W, bias, theta, pre = encoder(n, d, d_sae, seed=n)
    for dtype in HALVES:
        args = x, W, dtype + ":few", bias, theta
        found = run(testing.cuda_encode_tiles, *args, arena=n * d_sae, window=1.0, seed=n)
        found.check(jumprelu_support(pre, theta, 2.0))
        tiled = run(
            *(testing.cuda_encode_tiles, x, W, dtype + ":small", bias, theta),
            **{"arena": n * d_sae, "window": 1.0},
        )
        assert_same_bits(found, tiled)


@pytest.mark.parametrize("n, d, d_sae", [(1, 1, 1), (16, 0, 70), (7, 128, 64), (16, 1000, 257)])
@pytest.mark.parametrize("dtype", HALVES)
def test_few_tokens_of_any_size(n, d, d_sae, dtype):
    x, W, bias, theta, pre = encoder(n, d, d_sae)
    for seed in range(2):
        args = x, W, dtype + ":few", bias, theta
        found = run(testing.cuda_encode_tiles, *args, arena=n * d_sae, seed=seed)
        found.check(jumprelu_support(pre, theta, 0.0))


@pytest.mark.parametrize("window", [0.0, 0.25])
def test_few_tokens_at_the_last_place_of_the_threshold(window):
    x, W, bias, _, pre = encoder(16, 130, 96)
    at = pre[torch.arange(96) % 16, torch.arange(96)]  # pre of a token of each latent
    lower = at + window
    for theta in (lower, lower.nextafter(torch.tensor(INF)), lower.nextafter(torch.tensor(-INF))):
        args = x, W, "bfloat16:few", bias, theta
        found = run(testing.cuda_encode_tiles, *args, arena=16 * 96, window=window)
        found.check(jumprelu_support(pre, theta, 2 * window))


@pytest.mark.parametrize("seed", range(4))
def test_few_tokens_with_invalid_numbers(seed):
    x, W, bias, theta, pre = encoder(13, 40, 150, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for tensor in (bias, theta):
        at = torch.randint(150, (9,), generator=draw)
        tensor[at] = EXTREMES[torch.randint(len(EXTREMES), at.shape, generator=draw)]
    x[5, 7], x[2, 1] = NAN, INF
    pre = x @ W.t() + bias  # exact where finite, and no sum of these overflows
    for arena in (7, 13 * 150):
        args = x, W, "bfloat16:few", bias, theta
        found = run(testing.cuda_encode_tiles, *args, arena=arena, window=0.5, seed=seed)
        found.check(jumprelu_support(pre, theta, 1.0))


@pytest.mark.parametrize("tile", ["", ":few"])
@pytest.mark.parametrize("latent", [0, 149])
def test_only_the_first_or_the_last_latent_is_invalid(tile, latent):
    x, W, bias, theta, _ = encoder(13, 40, 150)
    theta[latent] = NAN
    found = run(testing.cuda_encode_tiles, x, W, "bfloat16" + tile, bias, theta, arena=13 * 150)
    found.check(jumprelu_support(x @ W.t() + bias, theta, 0.0))


@pytest.mark.parametrize("dtype", HALVES)
def test_few_tokens_again_where_records_are_missing(dtype):
    x, W, bias, theta, pre = encoder(16, 17, 520)
    theta -= 20
    x[9, 3] = NAN
    pre[9] = NAN
    expected = jumprelu_support(pre, theta, 0.0)
    records = int(expected[0].sum()) - 1  # the token with NaN has an entry, but no record
    for arena in (0, 1000, records - 1):  # none, some, all but one of the blocks are skipped
        args = x, W, dtype + ":few", bias, theta
        found = run(testing.cuda_encode_tiles, *args, arena=arena, seed=arena)
        assert found.reserved == records
        found.check(expected)


@pytest.mark.parametrize("latents", [(0, 700), (256, 650), (512, 513), (512, 600)])
def test_candidates_of_few_tokens(latents):
    x, W, bias, _, pre = encoder(11, 20, 700)
    bound = torch.arange(11.0) / 3
    found = run(
        *(testing.cuda_encode_tiles, x, W, "float16:few", bias, bound),
        **{"per_token": True, "latents": latents, "arena": 11 * 700},
    )
    found.check(candidates(pre, bound, *latents))


def test_few_tokens_have_the_same_bits_in_every_order_of_threads():
    draw = torch.Generator().manual_seed(1)
    x, W = (torch.randn(rows, 300, generator=draw).bfloat16().float() for rows in (16, 130))
    bias, theta = torch.randn(130, generator=draw), torch.zeros(130)
    args = x, W, "bfloat16:few", bias, theta
    runs = [run(testing.cuda_encode_tiles, *args, arena=2080, seed=seed) for seed in range(4)]
    for other in runs[1:]:
        assert_same_bits(other, runs[0])
    pre = x.double() @ W.double().t() + bias
    stored = runs[0].indices.long()
    rows = torch.repeat_interleave(torch.arange(16), runs[0].offsets.diff())
    assert (runs[0].values - pre[rows, stored]).abs().max() < 300 * 2**-22 * pre.abs().max()


# ---- the kernel of Hopper GPUs: its rings, its swizzle, its descriptors, its way for few hits


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "n, d, d_sae", [(1, 1, 1), (33, 8, 130), (129, 40, 257), (5, 0, 300), (140, 100, 300)]
)
def test_hopper_tiles_multiply_exactly(dtype, n, d, d_sae):
    x, W, bias, theta, pre = encoder(n, d, d_sae)
    found = run(
        *(testing.cuda_encode_sm90, x, W, dtype, bias, theta), arena=n * d_sae, window=1.0, seed=1
    )
    found.check(jumprelu_support(pre, theta, 2.0))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_hopper_has_more_stages_and_tiles_than_its_rings(dtype, seed):
    x, W, bias, theta, pre = encoder(260, 330, 520)
    arena = 260 * 520
    found = run(testing.cuda_encode_sm90, x, W, dtype, bias, theta, arena=arena, seed=seed)
    found.check(jumprelu_support(pre, theta, 0.0))


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.004, 0.02])
@pytest.mark.parametrize("odd", [False, True])
def test_hopper_strips_of_few_hits(density, odd):
    x, W, bias, theta, pre = encoder(64, 16, 600, seed=3)
    theta[:] = pre.flatten().sort().values[int((1 - density) * (pre.numel() - 1))]
    if odd:
        # At most two hits of a thread more, in each of the three column blocks; all of token 50.
        theta[300], theta[40], bias[530], W[20, 3] = NAN, -INF, INF, NAN
        pre[:, 530], pre[:, 20] = INF, NAN
        x[50, 3] = NAN
        pre[50] = NAN
    found = run(testing.cuda_encode_sm90, x, W, "bfloat16", bias, theta, arena=64 * 600, seed=5)
    found.check(jumprelu_support(pre, theta, 0.0))


@pytest.mark.parametrize("dtype", HALVES)
def test_hopper_tiles_again_where_records_are_missing(dtype):
    x, W, bias, theta, pre = encoder(300, 17, 520)
    x[140, 3] = NAN
    pre[140] = NAN
    expected = jumprelu_support(pre, theta, 0.0)
    records = int(expected[0].sum()) - 1  # the token with NaN has an entry, but no record
    for arena in (0, 3001, records - 1):  # none, some, all but one of the tiles are skipped
        found = run(testing.cuda_encode_sm90, x, W, dtype, bias, theta, arena=arena, seed=arena)
        assert found.reserved > arena
        found.check(expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_hopper_tiles_of_a_range_of_latents(dtype):
    x, W, bias, _, pre = encoder(30, 20, 700)
    bound = torch.arange(30.0) / 3
    found = run(
        *(testing.cuda_encode_sm90, x, W, dtype, bias, bound),
        **{"per_token": True, "latents": (256, 650), "arena": 30 * 700},
    )
    found.check(candidates(pre, bound, 256, 650))
