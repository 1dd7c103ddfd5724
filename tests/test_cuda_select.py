"""The CUDA kernels that select for topk_encode and batchtopk_encode, on the CPU: whole scans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from selection import (
    Chunk,
    Scan,
    assert_batchtopk,
    assert_topk,
    batchtopk,
    select,
    testing,
    topk,
)

NAN, INF = float("nan"), float("inf")
TEAMS = ("warp", "warp, from memory", "block", "block, from memory")
N, D_SAE = 7, 300


@pytest.fixture(autouse=True)
def order():
    """Restore the order of threads."""
    yield
    testing.cuda_seed(0)


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


@pytest.mark.parametrize("name", matrices())
def test_batchtopk_in_blocks_of_rows(name):
    pre = matrices()[name]
    for together, k in ((1, 7.5), (3, 7.5), (6, 0.2)):
        testing.cuda_seed(together)
        assert_batchtopk(pre, k, Scan(pre, 64, together))


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


def test_after_an_overflow_only_the_rows_that_lost_are_scanned_again():
    # As above in the last three rows; the others fall, so that their later chunks find nothing.
    pre = torch.where(torch.arange(D_SAE) < 128, 1.0, torch.arange(D_SAE)).repeat(N, 1)
    pre[:4] = torch.arange(D_SAE, 0, -1) / D_SAE
    scan = Scan(pre, together=4)
    assert_batchtopk(pre, 5, scan)
    chunks = [(0, 32), (32, 64), (64, 128), (128, 256), (256, 300)]
    assert [chunk[:2] for chunk in scan.chunks] == [
        *[chunk for chunk in chunks for _ in range(2)],
        *[(start, min(start + 32, 300)) for start in range(128, 300, 32)],
    ]


@pytest.mark.parametrize("capacity", [0, 5, 10**4])
@pytest.mark.parametrize("block", [0, 1, 700])
def test_lost_candidates_are_told(capacity, block):
    # While a graph is captured nothing can be scanned again.
    lost = np.full(701, D_SAE)
    lost[block] = 64
    kept = [0, 2, 3], np.array([1, 9, 4]), np.array([3.0, 2.0, 1.0])
    offsets, _, values, _, needed = select.write_batch(*kept, lost, D_SAE, capacity)
    assert needed > capacity and needed >= 2 * D_SAE and np.isnan(values).all()
    assert offsets.tolist() == [0, min(2, capacity), min(3, capacity)]
    lost[block] = D_SAE
    _, _, values, _, needed = select.write_batch(*kept, lost, D_SAE, capacity)
    assert needed == 3 and np.isnan(values).any() == (0 < capacity < 3)


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

    def candidates(self, rows, bound, first, last):
        window, room = 0.0, self.capacity
        selection = np.asarray(bound), True, window, (first, last), room, room
        x, *weights = self.encoder
        offsets, latents, values, _, needed, _ = testing.cuda_encode_tiles(
            x[rows], *weights, *selection
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
    assert select.prefixes(300, 32, 2) == list(zip(borders, borders[1:], strict=False))
    assert select.prefixes(300, 32, 8) == [(0, 32), (32, 256), (256, 300)]
    assert select.prefixes(32, 32, 2) == [(0, 32)]
    assert select.prefixes(5, 32, 2) == [(0, 5)]
    assert select.prefixes(0, 32, 2) == []
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


def test_prefixes_of_few_rows_grow_until_a_chunk_fills_half_of_its_room():
    assert select.prefix_growth(17, 1, 4096) == select.prefix_growth(8192, 64, 512) == 2
    assert select.prefix_growth(16, 64, 4096) == 32
    assert select.prefixes(65536, 4096, 32) == [(0, 4096), (4096, 65536)]
    for n, k in ((1, 0), (1, 1), (3, 100), (16, 1024), (16, 5000)):
        width = select.first_prefix(n, k)
        growth = select.prefix_growth(n, k, width)
        assert growth >= 2 and (growth == 2 or 2 * growth * k <= width)


@pytest.mark.parametrize("growth", [4, 32])
def test_prefixes_that_grow_faster_give_the_same_entries(growth):
    for pre in matrices().values():
        assert_topk(pre, 3, scan=Scan(pre, growth=growth))
        assert_batchtopk(pre, 3, Scan(pre, growth=growth))
    scan = Scan(ascending(), growth=growth)
    assert_topk(ascending(), 3, scan=scan)
    assert scan.chunks[1].needed > scan.capacity
