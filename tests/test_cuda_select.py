"""The CUDA kernels that select entries for topk_encode and batchtopk_encode, run on the CPU.

The candidates come from a matrix of pre-activations instead of the encoder, so every number is
chosen, and what was asked for can be counted. The order of chunks is that of the host wrappers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracle import assert_entries, assert_same, batchtopk_support, topk_support

testing: Any = pytest.importorskip("gemmascope_fast._testing", reason="_testing is not built")
select = testing.cuda_select

NAN, INF = float("nan"), float("inf")
TEAMS = ("warp", "warp, from memory", "block", "block, from memory")
N, D_SAE, WIDTH = 7, 300, 32
POISON = 0xAB


@pytest.fixture(autouse=True)
def order():
    """Restore the order of threads."""
    yield
    testing.cuda_seed(0)


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

    def __init__(self, pre: torch.Tensor, width: int = WIDTH) -> None:
        self.pre, self.width = pre.numpy(), width
        self.n, self.d_sae = pre.shape
        self.capacity = self.n * min(width, self.d_sae)
        self.lost = np.full(1, self.d_sae, np.int64)
        self.chunks: list[Chunk] = []

    def run(self, best) -> None:
        for first, last in select.prefixes(self.d_sae, self.width):
            best.merge(self.candidates(best.bound, first, last), self.lost)
        begin, self.lost[0] = int(self.lost[0]), self.d_sae
        for first, last in select.equal_chunks(begin, self.d_sae, self.width):
            best.merge(self.candidates(best.bound, first, last), self.lost)
        assert self.lost[0] == self.d_sae

    def candidates(self, bound, first, last):
        pre = self.pre[:, first:last]
        with np.errstate(invalid="ignore"):
            stored = np.isnan(pre) | (pre > bound[:, None])
        offsets = np.concatenate([[0], stored.sum(1).cumsum()]).astype(np.int64)
        needed = int(offsets[-1])
        latents = np.full(self.capacity, 2**31 - 1, np.int32)
        values = np.full(self.capacity, NAN, np.float32)
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

    def merge(self, found, lost) -> None:
        state = self.latents, self.values, self.counts, self.bound
        select.select_rows(self.team, *state, found, lost)


class BatchBest:
    def __init__(self, n: int, count: int, capacity: int) -> None:
        self.count = count
        self.offsets, self.bound = np.zeros(n + 1, np.int64), np.zeros(n, np.float32)
        self.latents, self.values = poisoned(capacity, np.int32), poisoned(capacity, np.float32)
        self.threshold = np.zeros((), np.float32)

    def merge(self, found, lost) -> None:
        kept = self.offsets, self.latents, self.values
        merged = select.select_batch(*kept, self.count, found, lost)
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
    written = select.write_batch(*kept, d_sae, d_sae, room)
    return tensors([*written, best.threshold]) + NO_VIEW


def assert_topk(pre, k, team="warp", scan=None):
    assert_entries(topk(pre, k, team, scan), topk_support(pre, k))


def assert_batchtopk(pre, k, scan=None):
    expected, threshold = batchtopk_support(pre, k)
    result = batchtopk(pre, k, scan=scan)
    assert_entries(result, expected)
    assert_same(result[5], torch.tensor(threshold), "threshold")
    assert result[4] == result[0][-1] == result[1].shape[0]


def ascending() -> torch.Tensor:
    """Every latent beats all before it, so every chunk emits all it has."""
    return torch.arange(1.0, D_SAE + 1).repeat(N, 1) + torch.arange(N)[:, None] / 8


def matrices() -> dict[str, torch.Tensor]:
    random = torch.randn(N, D_SAE)
    one_row = -torch.ones(N, D_SAE)
    one_row[3] = torch.rand(D_SAE) + 0.5
    invalid = random.clone()
    invalid[0], invalid[1, ::3], invalid[2, 200:] = NAN, NAN, INF
    invalid[3, [5, 31, 32, 299]] = torch.tensor([NAN, INF, NAN, INF])
    # Two payloads of NaN, which tie, the second with its sign set.
    payloads = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    invalid[4, 40:60] = payloads.repeat(10)
    invalid[5, ::2], invalid[5, 1::2] = -0.0, -INF
    return {
        "random": random,
        "levels": (1.5 * random).round(),  # a few above, and ties at, the 7th largest
        "one value": torch.ones(N, D_SAE),
        "border": torch.where(torch.arange(D_SAE) % 32 >= 30, 2.0, 1.0).repeat(N, 1),
        "ascending": ascending(),
        "descending": ascending().flip(1),
        "none": -torch.ones(N, D_SAE),
        "one row": one_row,
        "sparse": torch.where(torch.rand(N, D_SAE) < 0.01, random.abs(), -1.0),
        "invalid": invalid,
        "denormal": random * 1e-44,
        "wide": random * 10.0 ** torch.randint(-40, 38, random.shape),
    }


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("name", matrices())
def test_topk_is_exact(name, team):
    pre = matrices()[name]
    for seed, k in enumerate((1, 7, 33, D_SAE - 1, D_SAE)):
        testing.cuda_seed(seed)
        assert_topk(pre, k, team)


@pytest.mark.parametrize("name", matrices())
def test_batchtopk_is_exact(name):
    pre = matrices()[name]
    for seed, k in enumerate((0.2, 7.5, D_SAE + 1.0)):
        testing.cuda_seed(seed)
        assert_batchtopk(pre, k)


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
        best.merge((offsets, latents, values, len(values), len(values), first), lost)
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
        best.merge((offsets, latents, values, len(values), len(values), first), lost)
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


@pytest.mark.parametrize("k", [2000, 2500, 5000])
def test_thousands_per_row(k):
    # 4 k rounded up is one chunk here; the kernel keeps 8,192 keys in shared memory.
    pre = torch.randn(2, 9000)
    pre[1] = (3 * pre[1]).round()
    for width in (2048, 9216):
        assert_topk(pre, k, "block", Scan(pre, width))


def test_ties_are_not_emitted_again():
    # Later latents lose them, in topk always, in batchtopk from the row on where they run out.
    scan = Scan(torch.ones(N, D_SAE))
    assert_topk(torch.ones(N, D_SAE), 7, scan=scan)
    assert [chunk.needed for chunk in scan.chunks] == [N * 32, 0, 0, 0, 0]
    scan = Scan(torch.ones(N, D_SAE))
    assert_batchtopk(torch.ones(N, D_SAE), 6.0, scan)
    # 42 entries: 32 of row 0, 10 of row 1; then only row 0 can take more, 10 of which it does.
    assert [chunk.needed for chunk in scan.chunks] == [N * 32, 32, 0, 0, 0]


def test_later_chunks_emit_about_k_per_row():
    # Exchangeable latents: the expectation is k = 8 per row and chunk, 56 in all.
    pre = torch.randn(N, 1024).abs()
    for assert_exact in (assert_topk, assert_batchtopk):
        scan = Scan(pre)
        assert_exact(pre, 8, scan=scan)
        assert [chunk[:2] for chunk in scan.chunks][-2:] == [(256, 512), (512, 1024)]
        assert all(20 < chunk.needed < 100 for chunk in scan.chunks[1:])


@pytest.mark.parametrize("encode", [topk, batchtopk])
def test_after_an_overflow_the_scan_goes_on_from_there(encode):
    # Rows rise from latent 128 on: the third wide chunk, [128, 256), has 128 candidates per row
    # and room for 32.
    pre = torch.where(torch.arange(D_SAE) < 128, 1.0, torch.arange(D_SAE)).repeat(N, 1)
    scan = Scan(pre)
    result = encode(pre, 4, scan=scan)
    assert result[1].tolist() == [296, 297, 298, 299] * N
    assert [chunk[:2] for chunk in scan.chunks] == [
        *[(0, 32), (32, 64), (64, 128), (128, 256), (256, 300)],
        *[(start, min(start + 32, 300)) for start in range(128, 300, 32)],
    ]
    assert scan.chunks[3].needed == N * 128  # lost
    assert all(chunk.needed <= scan.capacity for chunk in scan.chunks[5:])


def test_the_earliest_loss_is_remembered_and_nothing_after_it_is_merged():
    pre = ascending()
    for best in (RowBest(N, 4, "warp"), RowBest(N, 4, "block"), BatchBest(N, 4 * N, 4 * N)):
        scan = Scan(pre)
        best.merge(scan.candidates(best.bound, 0, 32), scan.lost)
        before = [np.copy(a) for a in (best.latents, best.values, best.bound)]
        best.merge(scan.candidates(best.bound, 32, 64), scan.lost)
        assert scan.lost[0] == D_SAE
        with pytest.raises(AssertionError):
            for mine, old in zip((best.latents, best.values), before, strict=False):
                np.testing.assert_array_equal(mine, old)
        before = [np.copy(a) for a in (best.latents, best.values, best.bound)]
        best.merge(scan.candidates(best.bound, 64, 128), scan.lost)
        best.merge(scan.candidates(best.bound, 128, 160), scan.lost)
        best.merge(scan.candidates(best.bound, 160, 300), scan.lost)
        assert scan.lost[0] == 64
        after = best.latents, best.values, best.bound
        for mine, old in zip(after, before, strict=True):
            np.testing.assert_array_equal(mine, old)


def test_rows_that_lost_candidates_are_nan():
    best = RowBest(3, 4, "warp")
    pre = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [-1.0] * 5, [2.0, -1.0, -1.0, -1.0, -1.0]])
    best.merge(Scan(pre).candidates(best.bound, 0, 5), np.full(1, 5, np.int64))
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
    lost = tensors(select.write_batch(*kept, 64, D_SAE, 40))
    assert lost[0].tolist() == exact[0].tolist() and lost[2].isnan().all()


def test_more_rows_than_one_block_scans():
    pre = torch.randn(2500, 40)
    assert_batchtopk(pre, 0.7, Scan(pre, 16))
    assert_batchtopk((2 * pre).round(), 6.0, Scan((2 * pre).round(), 16))


@pytest.mark.parametrize("encode", [topk, batchtopk])
def test_the_same_bits_in_every_order_of_threads(encode):
    pre = matrices()["invalid"]
    results = []
    for seed in range(6):
        testing.cuda_seed(seed)
        results.append(encode(pre, 40))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            as_bits = [t.view(torch.int32) if t.is_floating_point() else t for t in (a, b)]
            assert torch.equal(*as_bits)


class Encoder(Scan):
    """The candidates of the encoder's own kernels, at multiples of 256 latents."""

    def __init__(self, x, W, bias) -> None:
        super().__init__(x @ W.T + bias, 256)
        self.encoder = x.numpy(), W.numpy(), "bfloat16", bias.numpy()

    def candidates(self, bound, first, last):
        window, room = 0.0, self.capacity
        selection = np.asarray(bound), True, window, (first, last), room, room
        offsets, latents, values, _, needed, _ = testing.cuda_encode_tiles(
            *self.encoder, *selection
        )
        self.chunks.append(Chunk(first, last, needed))
        return offsets, latents, values, needed, room, first


def test_from_x_and_weights_to_entries():
    # Small integers: every sum is exact in bfloat16 products, and ties abound.
    n, d, d_sae = 37, 24, 900
    x = torch.randint(-2, 3, (n, d)).float()
    W = torch.randint(-2, 3, (d_sae, d)).float()
    bias = torch.randint(-3, 2, (d_sae,)).float()
    bias[700], x[5, 0] = NAN, INF  # one latent and one token are NaN or infinite
    for k in (3, 64):
        for team in ("warp", "block"):
            scan = Encoder(x, W, bias)
            assert_topk(torch.from_numpy(scan.pre), k, team, scan)
            assert [chunk[:2] for chunk in scan.chunks] == [(0, 256), (256, 512), (512, 900)]
        scan = Encoder(x, W, bias)
        assert_batchtopk(torch.from_numpy(scan.pre), k, scan)


def test_an_encoder_whose_candidates_do_not_fit():
    # Later latents beat earlier ones: 388 of a chunk for 256, so the scan starts again at 512.
    x = torch.ones(20, 8)
    W = torch.arange(900.0)[:, None].expand(-1, 8).contiguous().bfloat16().float()
    for assert_exact in (assert_topk, assert_batchtopk):
        scan = Encoder(x, W, torch.zeros(900))
        assert_exact(torch.from_numpy(scan.pre), 4, scan=scan)
        assert [chunk.first for chunk in scan.chunks] == [0, 256, 512, 512, 768]


def test_prefixes_double_and_cover_every_latent_once():
    borders = [0, 32, 64, 128, 256, 300]
    assert select.prefixes(300, 32) == list(zip(borders, borders[1:], strict=False))
    assert select.prefixes(32, 32) == [(0, 32)]
    assert select.prefixes(5, 32) == [(0, 5)]
    assert select.prefixes(0, 32) == []
    assert select.equal_chunks(64, 130, 32) == [(64, 96), (96, 128), (128, 130)]
    assert select.equal_chunks(300, 300, 32) == []


def test_a_first_prefix_holds_k_and_all_chunks_fit_the_same_room():
    assert select.first_prefix(8192, 64) == 512
    assert select.first_prefix(65536, 64) == 256
    assert select.first_prefix(1, 64) == 4096
    assert select.first_prefix(8192, 2000) == 8192
    assert select.first_prefix(1, 2**30) == 2**32
    for n in (1, 100, 8192, 10**6):
        for k in (1, 64, 65, 300, 2000, 10**5):
            width = select.first_prefix(n, k)
            rows = select.rows_at_once(n, width)
            assert width % 256 == 0 and width >= 4 * k
            assert rows == n or rows * width <= 2**24 or rows == 64
