"""Autocast, mixed dtypes, and edits of weights behind autograd's back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same
from samples import DTYPES, MIXED, Problem, problem
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import SparseActs

OPS = ("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode", "pre_at", "decode_")
LOW = [torch.bfloat16, torch.float16]
ENCODERS = ["jumprelu", "topk", "batchtopk"]
pytestmark = pytest.mark.filterwarnings("ignore:float16 overflows at 65504")


def encode(kind: str, p: Problem) -> SparseActs:
    if kind == "jumprelu":
        return gsf.jumprelu_encode(*p.encoder, p.threshold, bandwidth=0.4)
    if kind == "topk":
        return gsf.topk_encode(*p.encoder, 5)
    return gsf.batchtopk_encode(*p.encoder, 4.5)


def in_dtype(p: Problem, dtype: torch.dtype) -> Problem:
    """What autocast makes of a problem: x and weights cast, biases and thresholds float32."""
    return p.with_(x=p.x.to(dtype), W_enc=p.W_enc.to(dtype), W_dec=p.W_dec.to(dtype))


def assert_same_acts(ours: SparseActs, expected: SparseActs) -> None:
    for name in ("offsets", "indices", "values", "gate"):
        assert_same(getattr(ours, name).detach(), getattr(expected, name).detach(), name)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ENCODERS)
def test_autocast_casts_x_and_weights_only(backend: Any, kind: str, dtype: torch.dtype) -> None:
    p = problem()
    with torch.autocast("cpu", dtype):
        found = encode(kind, p)
    assert found.values.dtype == found.gate.dtype == torch.float32
    assert_same_acts(found, encode(kind, in_dtype(p, dtype)))
    low = in_dtype(p, dtype)
    pre = low.x.float() @ low.W_enc.float() + p.b_enc  # neither bias nor sum is rounded to dtype
    expected = pre[found.tokens(), found.latents()] * found.gate
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_autocast_reaches_decode_and_pre_at(backend: Any, dtype: torch.dtype) -> None:
    p = problem()
    acts, low = encode("topk", p), in_dtype(p, dtype)
    at = torch.tensor([3, 0]), torch.tensor([30, 2])
    with torch.autocast("cpu", dtype):
        recon, pre = gsf.decode(acts, p.W_dec, p.b_dec), gsf.pre_at(*p.encoder, *at)
        added = gsf.decode_(torch.zeros(13, 19), acts, p.W_dec)
    assert_same(recon, gsf.decode(acts, low.W_dec, p.b_dec, dtype=torch.float32))
    expected = acts.to_dense() @ low.W_dec.float() + p.b_dec
    torch.testing.assert_close(recon, expected, rtol=1e-5, atol=1e-5)
    assert_same(pre, gsf.pre_at(*low.encoder, *at))
    assert_same(added, gsf.decode_(torch.zeros(13, 19), acts, p.W_dec))  # in place: as given


@pytest.mark.parametrize("kind", ENCODERS)
def test_autocast_gradients_have_the_dtype_of_their_parameter(backend: Any, kind: str) -> None:
    p = problem().leaves()
    with torch.autocast("cpu", torch.bfloat16):
        recon = gsf.decode(encode(kind, p), p.W_dec, p.b_dec)
        recon.square().sum().backward()
    low = in_dtype(problem(), torch.bfloat16).leaves()
    gsf.decode(
        encode(kind, low), low.W_dec, low.b_dec, dtype=torch.float32
    ).square().sum().backward()
    for name in ("x", "W_enc", "b_enc", "W_dec", "b_dec"):
        ours, expected = getattr(p, name).grad, getattr(low, name).grad
        assert ours.dtype == torch.float32
        assert_same(ours, expected.float(), name)
    if kind == "jumprelu":
        assert_same(p.threshold.grad, low.threshold.grad, "threshold")


def test_autocast_leaves_float64_alone() -> None:
    p = problem().double()
    with torch.autocast("cpu", torch.bfloat16):
        acts = encode("jumprelu", p)
        recon = gsf.decode(acts, p.W_dec, p.b_dec)
    assert_same_acts(acts, encode("jumprelu", p))
    assert_same(recon, gsf.decode(acts, p.W_dec, p.b_dec))
    assert recon.dtype == torch.float64


@pytest.mark.parametrize(("x_dtype", "w_dtype"), MIXED)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_mixed_dtypes(backend: Any, kind: str, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """Whole numbers are exact in every dtype, so every mixture gives the float32 result."""
    p = problem(integer=True, x_dtype=x_dtype, w_dtype=w_dtype).leaves()
    exact = problem(integer=True).leaves()
    acts, expected = encode(kind, p), encode(kind, exact)
    assert_same_acts(acts, expected)
    recon = gsf.decode(acts, p.W_dec, p.b_dec)
    assert recon.dtype == w_dtype
    assert_same(recon, gsf.decode(expected, exact.W_dec, exact.b_dec).to(w_dtype))
    for dtype in DTYPES:
        assert gsf.decode(acts, p.W_dec, p.b_dec, dtype=dtype).dtype == dtype
    acts.values.sum().backward()
    expected.values.sum().backward()
    for name in ("x", "W_enc", "b_enc"):
        ours, other = getattr(p, name), getattr(exact, name)
        assert_same(ours.grad, other.grad.to(ours.dtype), name)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_modules_return_the_dtype_of_x(x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(x_dtype)
    sae = gsf.SAE(8, 16, dtype=w_dtype)
    skip = gsf.Transcoder(8, 16, d_out=5, affine=True, dtype=w_dtype)
    assert sae(x).dtype == skip(x).dtype == x_dtype
    assert sae.decode(sae.encode(x)).dtype == w_dtype
    assert sae.b_enc.dtype == sae.threshold.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sae(x).dtype == skip(x).dtype == x_dtype


# ---- `.data` edits do not change version counters; host libraries make them at every step


def fresh(sae: gsf.SAE) -> gsf.SAE:
    """A new module with copies of the parameters."""
    other = gsf.SAE(sae.d_in, sae.d_sae, sae.activation)
    other.load_state_dict({name: t.clone() for name, t in sae.state_dict().items()})
    return other


def step_gradients(sae: gsf.SAE, x: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    acts = sae.encode(x)
    (sae.decode(acts).sub(x).square().sum() + acts.l0().mean()).backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "activation", [gsf.JumpReLU(bandwidth=0.5), gsf.TopK(4), gsf.BatchTopK(3.5)]
)
def test_data_edits_leave_no_stale_result(backend: Any, activation: Any) -> None:
    torch.manual_seed(1)
    sae, x = gsf.SAE(8, 16, activation), torch.randn(6, 8)
    before = sae.encode(x).values.detach().clone()
    step_gradients(sae, x)
    norms = sae.W_dec.data.norm(dim=1) * torch.linspace(0.5, 2, 16)
    sae.W_dec.data /= norms[:, None]  # fold the decoder's norms into the encoder
    sae.W_enc.data *= norms
    sae.b_enc.data.add_(0.25)
    if sae.threshold is not None:
        sae.threshold.data.mul_(-3).clamp_(min=0.1)
    acts = sae.encode(x)
    assert acts.values.shape != before.shape or not torch.equal(acts.values, before)
    assert_same_acts(acts, fresh(sae).encode(x))
    assert_same(sae(x).detach(), fresh(sae)(x).detach())
    expected = step_gradients(fresh(sae), x)
    found = step_gradients(sae, x)
    assert set(found) == set(expected) == set(dict(sae.named_parameters()))
    for name, gradient in expected.items():
        assert_same(found[name], gradient, name)
