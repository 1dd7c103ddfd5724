"""The screened encoder on a GPU: `pack(precision="screened")` against the plain encoder."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops

DEVICE = os.environ.get("GEMMASCOPE_FAST_TEST_DEVICE", "")


def absent() -> str:
    if not DEVICE.startswith("cuda"):
        return "needs GEMMASCOPE_FAST_TEST_DEVICE=cuda"
    if ops.implementation("jumprelu_encode", "cuda") != "native":
        return "no compiled CUDA encoder"
    return "" if torch.cuda.get_device_capability() == (9, 0) else "not compute capability 9.0"


pytestmark = pytest.mark.skipif(bool(absent()), reason=absent())


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy sizes have more candidates per entry than pays."""
    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "always")


def draw(n: int, d: int, f: int, dtype: torch.dtype = torch.bfloat16, rank: float = 2.0) -> Any:
    """Gaussian tokens around a centre with massive dimensions; about 2 in 100 pairs fire."""
    g = torch.Generator().manual_seed(0)
    center = 0.3 * torch.randn(d, generator=g)
    center[:: max(d // 4, 1)] += 30
    x = (torch.randn(n, d, generator=g) + center).to(dtype)
    W = (torch.randn(f, d, generator=g) / d**0.5).to(dtype)
    b = 0.1 * torch.randn(f, generator=g) - W.float() @ center
    t = rank + 0.1 * torch.rand(f, generator=g)
    x, W, b, t, center = (a.to(DEVICE) for a in (x, W, b, t, center))
    return (x, W.t(), b, t), center


def pack(W: torch.Tensor, center: torch.Tensor | None = None) -> gsf.PackedEncoder:
    packed = gsf.pack(W, center=center, precision="screened")
    assert packed.codes is not None and packed.codes.numel() >= W.numel()
    return packed


def assert_audited(acts: gsf.SparseActs, data: Any, bandwidth: float = 0.0) -> None:
    assert gsf.explain().path == "screened" and gsf.explain().target == "cuda sm_90a"
    found = gsf.audit(acts, *data, bandwidth=bandwidth, tokens=10**6)
    assert found.missed == found.extra == 0 < found.entries, found
    plain = gsf.jumprelu_encode(*data, bandwidth=bandwidth)
    if acts.nnz == plain.nnz and torch.equal(acts.indices, plain.indices):
        torch.testing.assert_close(acts.values, plain.values, atol=2e-4, rtol=1e-5, equal_nan=True)
        assert torch.equal(acts.gate, plain.gate)
    assert abs(acts.nnz - plain.nnz) <= found.near + 2 * acts.offsets.shape[0] // 1000


@pytest.mark.parametrize(
    ("n", "d", "f"),
    [(1, 128, 1), (17, 136, 300), (130, 640, 1000), (300, 1152, 5000), (129, 5376, 700)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_entries(n: int, d: int, f: int, dtype: torch.dtype) -> None:
    data, center = draw(n, d, f, dtype, rank=0.1 if f == 1 else 2.0)
    if f == 1:
        data[3].fill_(-1e3)
    acts = gsf.jumprelu_encode(data[0], pack(data[1], center), *data[2:])
    assert_audited(acts, data)
    told = gsf.explain()
    assert acts.nnz <= told.candidates < 2 * acts.nnz + 50
    again = gsf.jumprelu_encode(data[0], pack(data[1], center), *data[2:])
    for name in ("offsets", "indices", "values", "gate"):
        assert torch.equal(getattr(acts, name), getattr(again, name)), name


def test_mixed_dtypes_and_strides() -> None:
    (x, W, b, t), center = draw(50, 640, 1000)
    wide = torch.randn(50, 1299, device=DEVICE)
    wide[:, 1:641] = x.float() + 1e-3
    odd = wide[:, 1:641]
    assert_audited(gsf.jumprelu_encode(odd, pack(W, center), b, t), (odd, W, b, t))
    padded = torch.full((1000, 656), torch.nan, dtype=W.dtype, device=DEVICE)
    padded[:, :640] = W.t()
    W2 = padded[:, :640].t()
    assert_audited(gsf.jumprelu_encode(x, pack(W2), b, t), (x, W2, b, t))


def test_window_gradients_and_view_by_feature() -> None:
    data, center = draw(60, 256, 900)
    grads, acts = [], []
    for screened in (False, True):
        x, W, b, t = (a.detach().clone(memory_format=torch.preserve_format) for a in data)
        leaves = [a.requires_grad_() for a in (x, W, b, t)]
        encoder = pack(leaves[1], center) if screened else leaves[1]
        acts.append(gsf.jumprelu_encode(leaves[0], encoder, *leaves[2:], bandwidth=0.2))
        (acts[-1].values.square().sum() + acts[-1].l0().sum()).backward()
        grads.append([a.grad.float() for a in leaves])
    assert gsf.explain().path == "screened"
    assert abs(acts[0].nnz - acts[1].nnz) <= 2
    if torch.equal(acts[0].indices, acts[1].indices):
        for ours, plain in zip(*grads, strict=True):
            torch.testing.assert_close(ours, plain, atol=0.05, rtol=0.02)


def test_what_is_not_finite_or_extreme() -> None:
    (x, W, b, t), center = draw(40, 256, 900, torch.float32)
    x[2, 5], x[3, 0], x[4], x[5], x[6] = torch.nan, torch.inf, 0.0, center, x[6] * 1e30
    rows = W.t()
    rows[3, 5], rows[7], rows[8], rows[9] = torch.nan, 0.0, rows[8] * 1e25, rows[9] * 1e-25
    t[20], t[21], t[22], b[30], b[31] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf
    codes = torch.ops.gemmascope_fast.pack_encoder(W, center)
    if codes.numel() == 0:
        pytest.fail("7 latents of 900 are few enough")
    acts = gsf.jumprelu_encode(x, gsf.PackedEncoder(W, codes), b, t)
    plain = gsf.jumprelu_encode(x, W, b, t)
    assert torch.equal(acts.offsets, plain.offsets) and torch.equal(acts.indices, plain.indices)
    torch.testing.assert_close(acts.values, plain.values, atol=1e-3, rtol=1e-4, equal_nan=True)
    assert torch.equal(acts.gate, plain.gate)


def test_weights_that_cannot_be_screened_are_not_packed() -> None:
    (_, W, _, _), _ = draw(1, 256, 900)
    W[3, ::50] = torch.inf
    assert gsf.pack(W, precision="screened").codes is None
    assert gsf.pack(torch.randn(64, 900, device=DEVICE), precision="screened").codes is None
    rows = torch.randn(256, 900, device=DEVICE)
    assert gsf.pack(rows, precision="screened").codes is None, "latents are not contiguous"
    assert gsf.pack(rows.t().contiguous().t()).codes is None, "nobody asked"


def test_more_candidates_than_the_first_arena_holds() -> None:
    data, center = draw(300, 256, 2000, rank=-0.5)
    acts = gsf.jumprelu_encode(data[0], pack(data[1], center), *data[2:])
    assert acts.nnz > 300_000
    assert_audited(acts, data)


def test_capacity_and_no_entries() -> None:
    (x, W, b, t), center = draw(50, 256, 900)
    packed = pack(W, center)
    exact = gsf.jumprelu_encode(x, packed, b, t)
    wide = gsf.jumprelu_encode(x, packed, b, t, max_nnz=exact.nnz + 9)
    assert int(wide.needed) == exact.nnz and torch.equal(wide.offsets, exact.offsets)
    assert (
        torch.equal(wide.indices[: exact.nnz], exact.indices) and not wide.values[exact.nnz :].any()
    )
    tight = gsf.jumprelu_encode(x, packed, b, t, max_nnz=exact.nnz - 1)
    assert int(tight.needed) == exact.nnz and bool(tight.values.isnan().all())
    none = gsf.jumprelu_encode(x, packed, b, torch.full_like(t, torch.inf))
    assert none.nnz == 0 and int(none.offsets[-1]) == 0
    assert gsf.jumprelu_encode(x[:0], packed, b, t).nnz == 0
    assert gsf.explain().reason == "there are no tokens"


def test_when_the_plain_encoder_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, W, b, t), center = draw(50, 256, 900, rank=0.0)
    packed, plain = pack(W, center), gsf.jumprelu_encode(x, W, b, t)
    for mode, reason in (
        ("auto", "too many candidates"),
        ("never", "GEMMASCOPE_FAST_SCREEN=never"),
    ):
        monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)
        found = gsf.jumprelu_encode(x, packed, b, t)
        assert gsf.explain().reason == reason
        assert torch.equal(found.indices, plain.indices) and torch.equal(found.values, plain.values)


def test_other_streams() -> None:
    (x, W, b, t), center = draw(200, 640, 2000)
    packed = pack(W, center)
    expected = gsf.jumprelu_encode(x, packed, b, t)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = torch.zeros_like(x)
        late.copy_(x)
        found = gsf.jumprelu_encode(late, packed, b, t)
    stream.synchronize()
    assert torch.equal(found.indices, expected.indices) and torch.equal(
        found.values, expected.values
    )


def test_packing_again() -> None:
    (x, W, b, t), center = draw(50, 256, 900)
    packed = pack(W, center)
    changed = torch.tensor([3, 500, 899], device=DEVICE)
    W.t()[changed] = torch.randn(3, 256, device=DEVICE).to(W.dtype)
    touched_at = torch.zeros(900, dtype=torch.int64, device=DEVICE)
    touched_at[changed] = 7
    torch.ops.gemmascope_fast.repack_encoder_(packed.codes, W, touched_at, 7, 0)
    assert torch.equal(packed.codes, pack(W, center).codes)
    assert_audited(gsf.jumprelu_encode(x, packed, b, t), (x, W, b, t))
    W.t().mul_(-1)
    torch.ops.gemmascope_fast.repack_encoder_(packed.codes, W)
    assert torch.equal(packed.codes, pack(W, center).codes)
    with pytest.raises(RuntimeError, match="touched_at must have shape"):
        torch.ops.gemmascope_fast.repack_encoder_(packed.codes, W, touched_at[1:], 7, 0)


def test_codes_of_other_weights_are_an_error() -> None:
    (x, W, b, t), _ = draw(20, 256, 900)
    other = pack(draw(1, 256, 901)[0][1]).codes
    wrong = torch.zeros_like(pack(W).codes)
    for codes in (other, wrong, wrong[:-1]):
        with pytest.raises(RuntimeError, match=r"packed must come from pack\(precision"):
            gsf.jumprelu_encode(x, gsf.PackedEncoder(W, codes), b, t)
