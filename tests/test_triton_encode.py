"""The Triton encoder beyond its op: candidates, full arenas, fixed capacities, all 32 bits."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED
from oracle import assert_entries, assert_same, exact_pre, jumprelu_support
from samples import problem, weight_layouts

pytest.importorskip("triton")

from gemmascope_fast.kernels import encode_tiles as tiles_module
from gemmascope_fast.kernels import jumprelu_encode as encode_module
from gemmascope_fast.kernels import launching
from gemmascope_fast.kernels.candidates import candidates
from gemmascope_fast.kernels.jumprelu_encode import jumprelu_encode

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="needs TRITON_INTERPRET=1 GEMMASCOPE_FAST_BACKEND=triton"
)


def expected_candidates(p, bound, start, end):
    """`(stored, values)` of the candidates, each `[n, d_sae]`."""
    pre = exact_pre(*p.encoder).float()
    stored = ~(pre <= 0) & ~(pre < bound[:, None])
    stored[:, :start] = False
    stored[:, end:] = False
    return stored, torch.where(stored, pre, 0.0)


def entries(result):
    """CSR candidates in the form of `assert_entries`."""
    gate = torch.zeros_like(result.values)
    gate[: int(result.offsets[-1])] = 1
    empty = result.offsets.new_empty(0)
    return result.offsets, result.indices, result.values, gate, empty, empty


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_candidates_are_those_at_or_above_the_bound(layout):
    p = weight_layouts(problem(19, 6, 70, integer=True), layout)
    W_enc = p.W_enc.clone()
    W_enc[2, 40], W_enc[2, 41] = float("nan"), float("inf")
    p = p.with_(W_enc=weight_layouts(p.with_(W_enc=W_enc), layout).W_enc)
    rows = torch.randint(-3, 6, (19,)).float()
    rows[:5] = torch.tensor([0.0, -0.0, -1e30, float("inf"), 1e-45])
    for bound in (rows, torch.tensor(2.0).expand(19), rows.repeat(2)[::2]):
        for start, end in ((0, 70), (33, 70), (5, 38), (9, 9)):
            stored, values = expected_candidates(p, bound, start, end)
            count = int(stored.sum())
            result = candidates(*p.encoder, bound, start, end, count + 3)
            assert int(result.needed) == count and result.indices.shape == (count + 3,)
            assert_entries(entries(result), (stored, values, stored.float()))


@interpreted
def test_candidates_beyond_the_capacity_are_counted_and_not_kept():
    p = problem(19, 6, 70, integer=True)
    bound = torch.zeros(19)
    stored, _ = expected_candidates(p, bound, 0, 70)
    for capacity in (0, 7, int(stored.sum()) - 1):
        result = candidates(*p.encoder, bound, 0, 70, capacity)
        assert int(result.needed) == int(stored.sum())
        lengths = torch.cat([torch.zeros(1), stored.sum(1).cumsum(0)]).long()
        assert_same(result.offsets, lengths.clamp(max=capacity))
        assert not result.indices.any() and not result.values.any()


@interpreted
@pytest.mark.parametrize("room", [1, 100])
def test_a_full_arena_loses_nothing(monkeypatch, room):
    monkeypatch.setattr(encode_module, "SMALLEST_ARENA", room)
    monkeypatch.setattr(encode_module, "GUESSED_PER_ROW", 0)
    p = problem(21, 6, 70, integer=True)
    x = p.x.clone()
    x[3, 2] = float("nan")
    p = p.with_(x=x)
    pre = exact_pre(*p.encoder).float()
    result = jumprelu_encode(*p.encoder, p.threshold, 2.0, None, False)
    assert_entries(result, jumprelu_support(pre, p.threshold, 2.0))


@interpreted
@pytest.mark.parametrize("capacity", [0, 1, -1])
def test_capacity_overflow_is_nan_and_the_true_count(capacity):
    p = problem(21, 6, 70, integer=True)
    stored = jumprelu_support(exact_pre(*p.encoder).float(), p.threshold, 2.0)[0]
    needed = int(stored.sum())
    capacity = needed - 1 if capacity < 0 else capacity
    offsets, indices, values, gate, count, *_ = jumprelu_encode(
        *p.encoder, p.threshold, 2.0, capacity, False
    )
    assert int(count) == needed
    lengths = torch.cat([torch.zeros(1), stored.sum(1).cumsum(0)]).long()
    assert_same(offsets, lengths.clamp(max=capacity))
    assert indices.shape == values.shape == gate.shape == (capacity,)
    assert not indices.any() and values.isnan().all() and gate.eq(1).all()


@interpreted
@pytest.mark.parametrize("bits", [2, 16, 32])
def test_every_bit_of_a_word(monkeypatch, bits):
    config = {"BLOCK_N": 16, "BLOCK_F": 128, "BLOCK_D": 16, "BITS": bits, "LANES": 4, "GROUP_N": 1}
    monkeypatch.setattr(tiles_module, "choose", lambda *_, **__: dict(config))
    p = problem(5, 3, 200, integer=True)
    x = torch.zeros(5, 3)
    x[:4, 0] = torch.tensor([1.0, 1.0, 0.0, 2.0])
    W_enc = torch.zeros(200, 3).t()
    W_enc[0] = 1 + torch.arange(200)
    p = p.with_(x=x, W_enc=W_enc, b_enc=torch.zeros(200), threshold=torch.zeros(200))
    for layout in ("contiguous", "transposed"):
        q = weight_layouts(p, layout)
        result = jumprelu_encode(*q.encoder, q.threshold, 0.0, None, False)
        assert_entries(result, jumprelu_support(exact_pre(*q.encoder).float(), q.threshold, 0.0))


def test_a_fixed_capacity_waits_for_nothing(monkeypatch):
    """Meta tensors hold no numbers: any read of the device by the host would raise."""
    launched = []
    monkeypatch.setattr(launching, "_run", lambda kernel, *_: launched.append(kernel.__name__))
    monkeypatch.setattr(launching, "COMPILE_TARGET", "sm_90")
    p = problem().map(lambda t: t.to("meta"))
    result = jumprelu_encode(*p.encoder, p.threshold, 0.4, 50, False)
    assert result[1].shape == (50,) and result[0].shape == (14,)
    assert launched == [
        "_encode_tiles_kernel",
        "_scan_rows_kernel",
        "_place_entries_kernel",
        "_insert_invalid_kernel",
    ]
    found = candidates(*p.encoder, p.b_dec[:1].expand(13), 0, 37, 20)
    assert found.values.shape == (20,) and found.offsets.shape == (14,)


@interpreted
@pytest.mark.parametrize("name", ["topk_encode", "batchtopk_encode"])
def test_a_narrow_last_chunk_behind_an_overflow_is_taken_once(name):
    # Chunks end at 32, 64, 128, 256, 266: [128, 256) overflows, [256, 266) is no wider than 32.
    rising = torch.where(torch.arange(266) < 128, 1.0, torch.arange(266.0))
    args = (torch.ones(3, 1), rising[None], torch.zeros(266))
    rest = (4, False) if name == "topk_encode" else (4.0, None, None, False)
    result = getattr(torch.ops.gemmascope_fast, name)(*args, *rest)
    assert result[1].tolist() == [262, 263, 264, 265] * 3
