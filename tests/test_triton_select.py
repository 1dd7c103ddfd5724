"""Selection among candidates: adversarial orders, overflows, ties, guesses.

The candidates come from a matrix of pre-activations instead of the fused encoder, through the same
interface, so that every number is chosen and what was asked for can be counted.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from oracle import assert_entries, assert_same, batchtopk_support, topk_support

pytest.importorskip("triton", reason="triton is not installed")

from gemmascope_fast.kernels import (
    batchtopk_encode,
    launching,
    select_prefixes,
    topk_encode,
)
from gemmascope_fast.kernels.candidates import Candidates

DEVICE = os.environ.get("GEMMASCOPE_FAST_TEST_DEVICE", "")
if not (DEVICE or launching.INTERPRETED):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

NAN, INF = float("nan"), float("inf")
FIRST = 32
N, D_SAE = 6, 300


class Encoder:
    """Candidates of given pre-activations, which arrive in place of x; remembers each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int]] = []
        """start, end, capacity, needed."""

    def candidates(self, x, W_enc, b_enc, bound, start, end, capacity):
        pre = x[:, start:end]
        stored = pre.isnan() | ((pre > 0) & (pre >= bound[:, None]))
        offsets = torch.nn.functional.pad(stored.sum(1).cumsum(0), (1, 0))
        needed = offsets[-1].clone()
        self.calls.append((start, end, capacity, int(needed)))
        indices = torch.full((capacity,), 2**31 - 1, dtype=torch.int32, device=x.device)
        values = torch.full((capacity,), NAN, device=x.device)
        if needed <= capacity:
            rows, columns = stored.nonzero(as_tuple=True)
            indices[:needed] = (columns + start).int()
            values[:needed] = pre[rows, columns]
        return Candidates(offsets.clamp(max=capacity), indices, values, needed)


@pytest.fixture
def encoder(monkeypatch) -> Encoder:
    made = Encoder()
    monkeypatch.setattr(select_prefixes, "candidates", made.candidates)
    monkeypatch.setattr(batchtopk_encode, "candidates", made.candidates)
    table = {"default": [{"shape": {}, "config": {"FIRST": FIRST}}]}
    original = launching.table
    monkeypatch.setattr(
        launching, "table", lambda name: table if name == "select_prefixes" else original(name)
    )
    launching._nearest.cache_clear()
    yield made
    launching._nearest.cache_clear()


def on_cpu(result):
    return [t.cpu() for t in result]


def topk(pre, k):
    """topk_encode of the pre-activations, with the entries by feature left out."""
    pre = pre.to(DEVICE or "cpu")
    return on_cpu(topk_encode.topk_encode(pre, pre, pre[:0], k, False))


def batchtopk(pre, k, guess=None, max_nnz=None):
    pre = pre.to(DEVICE or "cpu")
    return on_cpu(batchtopk_encode.batchtopk_encode(pre, pre, pre[:0], k, guess, max_nnz, False))


def assert_topk(pre, k):
    assert_entries(topk(pre, k), topk_support(pre, k))


def assert_batchtopk(pre, k, guess=None):
    expected, threshold = batchtopk_support(pre, k)
    result = batchtopk(pre, k, guess)
    assert_entries(result, expected)
    assert_same(result[5], torch.tensor(threshold), f"threshold, guess {guess}")
    assert result[4] == result[0][-1] == result[1].shape[0]


def ascending() -> torch.Tensor:
    """Every latent beats all before it, so every chunk emits all it has."""
    return torch.arange(1.0, D_SAE + 1).repeat(N, 1) + torch.arange(N)[:, None] / 8


def matrices() -> dict[str, torch.Tensor]:
    random = torch.randn(N, D_SAE)
    levels = (1.5 * random).round()  # a few above, and ties at, the 7th largest
    one_row = -torch.ones(N, D_SAE)
    one_row[3] = torch.rand(D_SAE) + 0.5
    sparse = torch.where(torch.rand(N, D_SAE) < 0.01, random.abs(), -1.0)
    invalid = random.clone()
    invalid[0], invalid[1, ::3], invalid[2, 200:] = NAN, NAN, INF
    invalid[3, [5, 31, 32, 299]] = torch.tensor([NAN, INF, NAN, INF])
    # Two payloads of NaN, which tie, the second with its sign set.
    payloads = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    invalid[4, 40:60] = payloads.repeat(10)
    invalid[5, ::2], invalid[5, 1::2] = -0.0, -INF
    return {
        "random": random,
        "levels": levels,
        "one value": torch.ones(N, D_SAE),
        "border": torch.where(torch.arange(D_SAE) % 32 >= 30, 2.0, 1.0).repeat(N, 1),
        "ascending": ascending(),
        "descending": ascending().flip(1),
        "none": -torch.ones(N, D_SAE),
        "one row": one_row,
        "sparse": sparse,
        "invalid": invalid,
        "denormal": random * 1e-44,
    }


@pytest.mark.parametrize("name", matrices())
def test_topk_is_exact(encoder, name):
    pre = matrices()[name]
    for k in (7, 33, D_SAE - 1):
        assert_topk(pre, k)


@pytest.mark.parametrize("name", matrices())
def test_batchtopk_is_exact(encoder, name):
    pre = matrices()[name]
    for k in (0.2, 7.5, D_SAE + 1.0):
        assert_batchtopk(pre, k)


def test_prefixes_double_and_cover_every_latent_once():
    borders = [0, 32, 64, 128, 256, 300]
    assert select_prefixes.prefixes(300, 32) == list(zip(borders, borders[1:], strict=False))
    assert select_prefixes.prefixes(32, 32) == [(0, 32)]
    assert select_prefixes.prefixes(5, 32) == [(0, 5)]
    assert select_prefixes.prefixes(0, 32) == []


def test_later_chunks_emit_about_k_per_row(encoder):
    # Exchangeable latents: the expectation is k = 8 per row and chunk, 48 in all.
    assert_topk(torch.randn(N, 1024).abs(), 8)
    assert [call[:2] for call in encoder.calls][-2:] == [(256, 512), (512, 1024)]
    assert all(20 < needed < 80 for *_, needed in encoder.calls[1:])


def test_ties_are_not_emitted_again(encoder):
    # Later latents lose them, in topk always, in batchtopk from the row on where they run out.
    assert_topk(torch.ones(N, D_SAE), 7)
    assert [needed for *_, needed in encoder.calls] == [N * 32, 0, 0, 0, 0]
    encoder.calls.clear()
    assert_batchtopk(torch.ones(N, D_SAE), 7.0)
    # 42 entries: 32 of row 0, 10 of row 1; then only row 0 can take more, 10 of which it does.
    assert [needed for *_, needed in encoder.calls] == [N * 32, 32, 0, 0, 0]


@pytest.mark.parametrize("encode", [topk, batchtopk])
def test_after_an_overflow_the_scan_goes_on_from_there(encoder, encode):
    # Rows rise from latent 128 on: the third wide chunk, [128, 256), has 128 candidates per row
    # and room for 32.
    pre = torch.where(torch.arange(D_SAE) < 128, 1.0, torch.arange(D_SAE)).repeat(N, 1)
    k = 4
    result = encode(pre, k)
    assert result[1].tolist() == [296, 297, 298, 299] * N
    assert [call[:2] for call in encoder.calls] == [
        *[(0, 32), (32, 64), (64, 128), (128, 256), (256, 300)],
        *[(start, min(start + 32, 300)) for start in range(128, 300, 32)],
    ]
    assert all(capacity <= N * 32 for _, _, capacity, _ in encoder.calls)
    assert encoder.calls[3][3] == N * 128  # lost
    assert all(needed <= capacity for _, _, capacity, needed in encoder.calls[5:])


def test_no_room_is_asked_for_beyond_the_first_chunk(encoder):
    topk(ascending(), 100)
    widest = select_prefixes.first_prefix(torch.empty(0, device=DEVICE or "cpu"), D_SAE, 100)
    assert widest == 512  # 4 k, rounded up
    assert [call[:3] for call in encoder.calls] == [(0, D_SAE, N * D_SAE)]


def test_while_a_graph_is_captured_an_overflow_is_nan_and_nothing_is_read(encoder, monkeypatch):
    for module in (select_prefixes, batchtopk_encode):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    for pre, fails in ((torch.randn(N, D_SAE), False), (ascending(), True)):
        encoder.calls.clear()
        found = batchtopk(pre, 4.0, 1.0, 4 * N)
        assert (found[4] > 4 * N) == fails
        for values in (found[2], topk(pre, 4)[2]):
            assert values.shape == (4 * N,) and values.isnan().all() == fails
            assert values.isnan().any() == fails
        assert [call[0] for call in encoder.calls] == 2 * [0, 32, 64, 128, 256]


def test_a_good_guess_is_one_chunk(encoder):
    pre = torch.randn(N, D_SAE)
    _, threshold = batchtopk_support(pre, 10.0)
    for guess in (threshold, 0.95 * threshold, 1.1 * threshold):
        encoder.calls.clear()
        assert_batchtopk(pre, 10.0, guess)
        assert [call[:2] for call in encoder.calls] == [(0, D_SAE)]


@pytest.mark.parametrize("guess", [0.0, -1.0, 1e-30, 1e30, INF, -INF, NAN, 5e-324, math.pi])
def test_a_bad_guess_is_harmless(encoder, guess):
    pre = torch.randn(N, D_SAE)
    for k in (1.0, 60.0, 200.0):
        assert_batchtopk(pre, k, guess)


def test_a_guess_above_all_with_fewer_positives_than_asked(encoder):
    assert_batchtopk(matrices()["sparse"], 50.0, 2.0)


def test_fixed_capacity_of_batchtopk(encoder):
    pre = torch.randn(N, D_SAE)
    exact = batchtopk(pre, 5.0)
    assert exact[4] == 30
    padded = batchtopk(pre, 5.0, None, 40)
    for mine, wanted in zip(padded[1:4], exact[1:4], strict=True):
        assert torch.equal(mine[:30], wanted) and not mine[30:].any() and mine.shape == (40,)
    small = batchtopk(pre, 5.0, None, 20)
    assert small[4] == 30 and small[0].tolist() == exact[0].clamp(max=20).tolist()
    assert small[1].shape == (20,) and small[2].isnan().all() and (small[3] == 1).all()


def test_the_same_bits_every_time(encoder):
    pre = matrices()["invalid"]
    for encode, k in ((topk, 40), (batchtopk, 40.0)):
        first, second = encode(pre, k), encode(pre, k)
        for a, b in zip(first, second, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            as_bits = [t.view(torch.int32) if t.is_floating_point() else t for t in (a, b)]
            assert torch.equal(*as_bits)


@pytest.mark.parametrize("shape", [(0, D_SAE), (N, 0), (0, 0), (1, 1)])
def test_empty_and_single(encoder, shape):
    pre = torch.ones(shape)
    for k in {0, min(1, shape[1])}:
        assert_topk(pre, k)
    for k in (0.0, 1.0, 3.0):
        assert_batchtopk(pre, k)
