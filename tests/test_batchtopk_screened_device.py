"""The screened BatchTopK encoder on a GPU: `pack(precision="screened")` against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_screened_device import DEVICE, absent, pack
from test_topk_screened_device import encoder

import gemmascope_fast as gsf

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent())

NAMES = ("offsets", "indices", "values", "gate", "threshold")


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy sizes have too few latents for it to pay."""
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "always")


def assert_as_plain(acts: gsf.SparseActs, data: Any, k: float) -> gsf.SparseActs:
    """Values agree in their order; sums in another order may swap entries that are next to it."""
    plain = gsf.batchtopk_encode(*data, k)
    assert acts.nnz == plain.nnz
    ours, theirs = (a.values.sort().values for a in (acts, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4, equal_nan=True)
    swapped = ((acts.to_dense() != 0) ^ (plain.to_dense() != 0)).sum()
    assert swapped <= 2 + 2 * acts.nnz // 1000
    torch.testing.assert_close(
        acts.threshold, plain.threshold, atol=1e-3, rtol=1e-4, equal_nan=True
    )
    assert bool((acts.gate == 1).all())
    return plain


def assert_screened(acts: gsf.SparseActs, data: Any, k: float) -> gsf.SparseActs:
    told = gsf.explain()
    assert (told.op, told.path) == ("batchtopk_encode", "screened"), told
    assert told.target == "cuda sm_90a"
    found = gsf.audit(acts, *data, tokens=10**6)
    assert found.missed == found.extra == 0 < found.entries + found.near, found
    return assert_as_plain(acts, data, k)


def assert_same_bits(acts: gsf.SparseActs, other: gsf.SparseActs) -> None:
    for name in NAMES:
        assert torch.equal(getattr(acts, name), getattr(other, name)), name


@pytest.mark.parametrize(
    ("n", "d", "f", "k"),
    [(1, 128, 40, 3), (17, 136, 700, 0.3), (130, 640, 3000, 31.7), (300, 1152, 9000, 64)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_entries(n: int, d: int, f: int, k: float, dtype: torch.dtype) -> None:
    data, center = encoder(n, d, f, dtype)
    packed = pack(data[1], center)
    acts = gsf.batchtopk_encode(data[0], packed, data[2], k)
    plain = assert_screened(acts, data, k)
    assert acts.nnz == int(k * n)
    for factor in (None, 1.0, 1.08, 0.7):
        guess = None if factor is None else factor * float(plain.threshold)
        again = gsf.batchtopk_encode(data[0], packed, data[2], k, guess=guess)
        told = gsf.explain()
        assert told.path == "screened" and acts.nnz <= told.rescored <= 2 * acts.nnz + 32
        assert_same_bits(again, acts)


@pytest.mark.parametrize("guess", [1e30, 1e-30, float("nan"), float("inf"), -1.0, 0.0, 50.0])
def test_a_bad_guess_is_harmless(guess: float) -> None:
    data, center = encoder(100, 256, 5000)
    packed = pack(data[1], center)
    acts = gsf.batchtopk_encode(data[0], packed, data[2], 10)
    found = gsf.batchtopk_encode(data[0], packed, data[2], 10, guess=guess)
    assert gsf.explain().path == "screened"
    assert_same_bits(found, acts)
    assert_as_plain(found, data, 10)


@pytest.mark.parametrize("guessed", [False, True])
def test_a_large_problem_decides_few_entries_more_than_it_keeps(
    monkeypatch: pytest.MonkeyPatch, guessed: bool
) -> None:
    monkeypatch.delenv("GEMMASCOPE_FAST_SCREEN")
    data, center = encoder(2048, 1152, 32768)
    packed, guess = pack(data[1], center), None
    if guessed:
        guess = 1.03 * float(gsf.batchtopk_encode(*data, 32).threshold)
    acts = gsf.batchtopk_encode(data[0], packed, data[2], 32, guess=guess)
    told = gsf.explain()
    assert told.path == "screened" and told.rescored <= 2 * 32 * 2048 + 32
    assert_screened(acts, data, 32)


def test_rows_in_blocks() -> None:
    """Chunks of 4,352 latents have room for 3,840 rows."""
    data, center = encoder(4500, 128, 5000)
    packed = pack(data[1], center)
    acts = gsf.batchtopk_encode(data[0], packed, data[2], 512)
    assert_screened(acts, data, 512)
    guess = float(acts.threshold)
    assert_same_bits(gsf.batchtopk_encode(data[0], packed, data[2], 512, guess=guess), acts)


@pytest.mark.parametrize("guess", [None, 2.0])
def test_a_token_that_codes_cannot_serve_is_the_plain_encoder_s(guess: float | None) -> None:
    data, center = encoder(200, 256, 3000, torch.float32)
    x, W, b = data
    packed = pack(W, center)
    for value in (torch.nan, torch.inf, 1e25):
        x[3, 5] = value
        acts = gsf.batchtopk_encode(x, packed, b, 20, guess=guess)
        assert gsf.explain().reason == "a token has no int8 codes"
        assert_same_bits_or_nan(acts, gsf.batchtopk_encode(x, W, b, 20, guess=guess))
    x[3], x[71] = 0, center
    acts = gsf.batchtopk_encode(x, packed, b, 20, guess=guess)
    assert_screened(acts, data, 20)


def assert_same_bits_or_nan(acts: gsf.SparseActs, other: gsf.SparseActs) -> None:
    for name in NAMES:
        ours, theirs = (torch.nan_to_num(getattr(a, name), nan=7.0) for a in (acts, other))
        assert torch.equal(ours, theirs), name


def test_what_is_not_finite_or_extreme() -> None:
    (x, W, b), center = encoder(100, 256, 2000, torch.float32)
    rows = W.t()
    rows[3, 5], rows[7], rows[8], rows[9] = torch.nan, 0.0, rows[8] * 1e25, rows[9] * 1e-25
    b[30], b[31], b[32] = torch.nan, torch.inf, -torch.inf
    codes = torch.ops.gemmascope_fast.pack_encoder(W, center)
    packed = gsf.PackedEncoder(W, codes)
    for k in (0.5, 2.0, 24.0):  # NaN entries are 2 k, so that at first all are NaN
        acts = gsf.batchtopk_encode(x, packed, b, k)
        assert gsf.explain().path == "screened"
        plain = assert_as_plain(acts, (x, W, b), k)
        assert bool(acts.values.isnan().any()) and acts.nnz == plain.nnz == int(100 * k)
        if k <= 2:
            assert torch.equal(acts.indices, plain.indices)


def test_latents_that_are_the_same_leave_the_selection_undecided() -> None:
    (x, W, b), center = encoder(60, 256, 3000)
    W.t()[:] = W.t()[:1]
    b[:] = b[:1].abs() + 100
    acts = gsf.batchtopk_encode(x, pack(W, center), b, 8)
    assert gsf.explain().reason == "int8 codes leave the selection undecided"
    assert_same_bits(acts, gsf.batchtopk_encode(x, W, b, 8))


def test_later_latents_that_beat_earlier_ones_overflow_and_are_found() -> None:
    (x, W, b), center = encoder(100, 256, 60_000)
    b += 0.002 * (torch.arange(60_000, device=DEVICE) - 5000).clamp(min=0)
    packed = pack(W, center)
    for guess in (None, 1.0):
        acts = gsf.batchtopk_encode(x, packed, b, 4, guess=guess)
        assert_screened(acts, (x, W, b), 4)


def test_fewer_positive_entries_than_asked() -> None:
    (x, W, b), center = encoder(60, 256, 2000)
    b = b - 3.2
    for guess in (None, 0.5):
        acts = gsf.batchtopk_encode(x, pack(W, center), b, 40, guess=guess)
        assert 0 < acts.nnz < 60 * 40 and acts.threshold == 0
        assert_screened(acts, (x, W, b), 40)


def test_capacity() -> None:
    (x, W, b), center = encoder(50, 256, 2000)
    packed = pack(W, center)
    exact = gsf.batchtopk_encode(x, packed, b, 4)
    wide = gsf.batchtopk_encode(x, packed, b, 4, max_nnz=209)
    assert int(wide.needed) == exact.nnz == 200 and torch.equal(wide.offsets, exact.offsets)
    assert torch.equal(wide.indices[:200], exact.indices) and not wide.values[200:].any()
    tight = gsf.batchtopk_encode(x, packed, b, 4, max_nnz=199)
    assert int(tight.needed) == 200 and bool(tight.values.isnan().all())
    assert gsf.batchtopk_encode(x, packed, b, 0).nnz == 0
    assert gsf.batchtopk_encode(x[:0], packed, b, 4).nnz == 0


def test_gradients_and_view_by_feature() -> None:
    data, center = encoder(60, 256, 2000)
    grads = []
    for screened in (False, True):
        leaves = [a.detach().clone(memory_format=torch.preserve_format) for a in data]
        x, W, b = (a.requires_grad_() for a in leaves)
        acts = gsf.batchtopk_encode(x, pack(W, center) if screened else W, b, 16)
        acts.values.square().sum().backward()
        grads.append([a.grad.float() for a in (x, W, b)])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=0.05, rtol=0.02)


def test_when_the_plain_encoder_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, W, b), center = encoder(50, 256, 3000)
    packed, plain = pack(W, center), gsf.batchtopk_encode(x, W, b, 16)
    for mode, tokens, reason in (
        ("auto", 50, "d_sae is small for this k"),
        ("auto", 16, "there are few tokens"),
        ("never", 50, "GEMMASCOPE_FAST_SCREEN=never"),
    ):
        monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)
        found = gsf.batchtopk_encode(x[:tokens], packed, b, 16)
        assert gsf.explain().reason == reason
        if tokens == 50:
            assert_same_bits(found, plain)


def test_a_captured_graph_gets_the_plain_encoder() -> None:
    (x, W, b), center = encoder(64, 256, 3000)
    packed = pack(W, center)
    plain = gsf.batchtopk_encode(x, W, b, 16, max_nnz=1024)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gsf.batchtopk_encode(x, packed, b, 16, max_nnz=1024)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        acts = gsf.batchtopk_encode(x, packed, b, 16, max_nnz=1024)
    assert gsf.explain().reason == "a CUDA graph cannot wait for the candidates"
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(acts, plain)


def test_other_streams() -> None:
    (x, W, b), center = encoder(200, 640, 4000)
    packed = pack(W, center)
    expected = gsf.batchtopk_encode(x, packed, b, 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = torch.zeros_like(x)
        late.copy_(x)
        found = gsf.batchtopk_encode(late, packed, b, 16)
    stream.synchronize()
    assert_same_bits(found, expected)


def test_codes_of_other_weights_are_an_error() -> None:
    (x, W, b), _ = encoder(20, 256, 900)
    other = pack(encoder(1, 256, 901)[0][1]).codes
    wrong = torch.zeros_like(pack(W).codes)
    for codes in (other, wrong, wrong[:-1]):
        with pytest.raises(RuntimeError, match=r"packed must come from pack\(precision"):
            gsf.batchtopk_encode(x, gsf.PackedEncoder(W, codes), b, 8)


@pytest.mark.parametrize("fused", [True, False])
def test_a_module_that_trains_guesses_its_threshold(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    monkeypatch.delenv("GEMMASCOPE_FAST_SCREEN")
    make = {"device": DEVICE, "dtype": torch.bfloat16}
    g = torch.Generator(DEVICE).manual_seed(1)
    module = gsf.SAE(256, 16384, gsf.BatchTopK(16), generator=g, **make).screen()
    optimizer = gsf.optim.Adam(module, 1e-3, fused=fused)
    x = torch.randn(512, 256, device=DEVICE, generator=g).bfloat16()
    assert module.screened is not None and module.screened.guess() is None
    for step in range(3):
        optimizer.zero_grad()
        if step < 2:
            acts = module.encode(x)
            threshold = acts.threshold
            loss = (module.decode(acts).float() - x.float()).square().sum(-1).mean()
        else:
            loss, _ = module.loss(x)
        assert gsf.explain().op == "batchtopk_encode" and gsf.explain().path == "screened"
        assert module.screened.guess() is not None
        if step < 2:
            assert module.screened.guess() == float(threshold)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        acts = module.encode(x)
    assert_screened(acts, (x, module.W_enc.detach(), module.b_enc.detach()), 16)
