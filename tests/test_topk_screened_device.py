"""The screened TopK encoder on a GPU: `pack(precision="screened")` against the plain encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_screened_device import DEVICE, absent, draw, pack

import gemmascope_fast as gsf

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent())


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy sizes have too few latents for it to pay."""
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "always")


def encoder(*args: Any, **options: Any) -> tuple[Any, torch.Tensor]:
    data, center = draw(*args, **options)
    return data[:3], center


def assert_as_plain(acts: gsf.SparseActs, plain: gsf.SparseActs) -> None:
    """Values agree in their order; sums in another order may swap latents that are next to it."""
    assert torch.equal(acts.offsets, plain.offsets)
    ours, theirs = (a.as_topk()[0].sort(-1).values for a in (acts, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4, equal_nan=True)
    swapped = ((acts.to_dense() != 0) ^ (plain.to_dense() != 0)).sum()
    assert swapped <= 2 + 2 * acts.nnz // 1000
    assert abs(acts.gate.sum() - plain.gate.sum()) <= 2


def assert_screened(acts: gsf.SparseActs, data: Any, k: int) -> None:
    told = gsf.explain()
    assert (told.op, told.path, told.target) == ("topk_encode", "screened", "cuda sm_90a"), told
    found = gsf.audit(acts, *data, tokens=10**6)
    assert found.missed == found.extra == 0 < found.entries + found.near, found
    assert_as_plain(acts, gsf.topk_encode(*data, k))


@pytest.mark.parametrize(
    ("n", "d", "f", "k"),
    [(1, 128, 40, 3), (17, 136, 700, 8), (130, 640, 3000, 32), (300, 1152, 9000, 64)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows(n: int, d: int, f: int, k: int, dtype: torch.dtype) -> None:
    data, center = encoder(n, d, f, dtype)
    packed = pack(data[1], center)
    acts = gsf.topk_encode(data[0], packed, data[2], k)
    assert_screened(acts, data, k)
    again = gsf.topk_encode(data[0], packed, data[2], k)
    told = gsf.explain()
    assert n * k <= told.rescored <= n * (2 * k + 32)
    for name in ("offsets", "indices", "values", "gate"):
        assert torch.equal(getattr(acts, name), getattr(again, name)), name


def test_a_large_problem_decides_few_entries_more_than_it_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "auto")
    data, center = encoder(2048, 1152, 32768)
    acts = gsf.topk_encode(data[0], pack(data[1], center), data[2], 64)
    told = gsf.explain()
    assert told.path == "screened" and told.rescored < 1.7 * 64 * 2048
    assert_screened(acts, data, 64)


def test_rows_that_codes_cannot_decide_are_the_plain_encoder_s() -> None:
    data, center = encoder(200, 256, 3000, torch.float32)
    x, W, b = data
    x[3, 5], x[70], x[71] = torch.nan, 1e25, center
    W.t()[1500:] = W.t()[:1500]
    b[1500:] = b[:1500]
    acts = gsf.topk_encode(x, pack(W, center), b, 20)
    assert gsf.explain().path == "screened"
    plain = gsf.topk_encode(x, W, b, 20)
    assert_as_plain(acts, plain)
    assert acts.as_topk()[1][3].tolist() == list(range(20)), "all are NaN"


def test_what_is_not_finite_or_extreme() -> None:
    (x, W, b), center = encoder(100, 256, 2000, torch.float32)
    rows = W.t()
    rows[3, 5], rows[7], rows[8], rows[9] = torch.nan, 0.0, rows[8] * 1e25, rows[9] * 1e-25
    b[30], b[31], b[32] = torch.nan, torch.inf, -torch.inf
    codes = torch.ops.gemmascope_fast.pack_encoder(W, center)
    acts = gsf.topk_encode(x, gsf.PackedEncoder(W, codes), b, 24)
    assert gsf.explain().path == "screened"
    assert_as_plain(acts, gsf.topk_encode(x, W, b, 24))


def test_later_latents_that_beat_earlier_ones_overflow_and_are_found() -> None:
    (x, W, b), center = encoder(100, 256, 60_000)
    b += 0.002 * (torch.arange(60_000, device=DEVICE) - 5000).clamp(min=0)
    acts = gsf.topk_encode(x, pack(W, center), b, 4)
    assert_screened(acts, (x, W, b), 4)


def test_fewer_positive_entries_than_k() -> None:
    (x, W, b), center = encoder(60, 256, 2000)
    b = b - 3.2
    acts = gsf.topk_encode(x, pack(W, center), b, 40)
    assert 0 < acts.gate.sum() < 60 * 40
    assert_screened(acts, (x, W, b), 40)


def test_gradients_and_view_by_feature() -> None:
    data, center = encoder(60, 256, 2000)
    grads = []
    for screened in (False, True):
        leaves = [a.detach().clone(memory_format=torch.preserve_format) for a in data]
        x, W, b = (a.requires_grad_() for a in leaves)
        acts = gsf.topk_encode(x, pack(W, center) if screened else W, b, 16)
        acts.values.square().sum().backward()
        grads.append([a.grad.float() for a in (x, W, b)])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=0.05, rtol=0.02)


def test_when_the_plain_encoder_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, W, b), center = encoder(50, 256, 3000)
    packed, plain = pack(W, center), gsf.topk_encode(x, W, b, 16)
    for mode, tokens, reason in (
        ("auto", 50, "d_sae is small for this k"),
        ("auto", 16, "there are few tokens"),
        ("never", 50, "GEMMASCOPE_FAST_SCREEN=never"),
    ):
        monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)
        found = gsf.topk_encode(x[:tokens], packed, b, 16)
        assert gsf.explain().reason == reason
        if tokens == 50:
            assert torch.equal(found.indices, plain.indices)
            assert torch.equal(found.values, plain.values)
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "always")
    gsf.topk_encode(x, packed, b, 1500)
    assert gsf.explain().reason == "k is above 1008"
    assert gsf.topk_encode(x[:0], packed, b, 16).nnz == 0


def test_a_captured_graph_gets_the_plain_encoder() -> None:
    (x, W, b), center = encoder(64, 256, 3000)
    packed = pack(W, center)
    plain = gsf.topk_encode(x, W, b, 16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gsf.topk_encode(x, packed, b, 16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        acts = gsf.topk_encode(x, packed, b, 16)
    assert gsf.explain().reason == "a CUDA graph cannot wait for the candidates"
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(acts.indices, plain.indices) and torch.equal(acts.values, plain.values)


def test_other_streams() -> None:
    (x, W, b), center = encoder(200, 640, 4000)
    packed = pack(W, center)
    expected = gsf.topk_encode(x, packed, b, 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = torch.zeros_like(x)
        late.copy_(x)
        found = gsf.topk_encode(late, packed, b, 16)
    stream.synchronize()
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)


def test_codes_of_other_weights_are_an_error() -> None:
    (x, W, b), _ = encoder(20, 256, 900)
    other = pack(encoder(1, 256, 901)[0][1]).codes
    wrong = torch.zeros_like(pack(W).codes)
    for codes in (other, wrong, wrong[:-1]):
        with pytest.raises(RuntimeError, match=r"packed must come from pack\(precision"):
            gsf.topk_encode(x, gsf.PackedEncoder(W, codes), b, 8)
