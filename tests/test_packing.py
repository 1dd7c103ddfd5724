"""`pack` and `freeze`: the same results, errors for changed weights and bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import native_absent
from screening import ENCODERS, assert_bits, draw, entries_of

import gemmascope_fast as gsf
from gemmascope_fast import ops

ABSENT = native_absent(ENCODERS)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda mode: monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", mode)


# ---- pack


def test_pack_in_place_of_the_weights(screen: Callable[[str], None]) -> None:
    x, W, b, t = draw(30, 200, 300)
    packed = gsf.pack(W)
    screen("always")
    pairs = [
        (
            gsf.jumprelu_encode(x, w, b, t),
            gsf.topk_encode(x, w, b, 5),
            gsf.batchtopk_encode(x, w, b, 5),
        )
        for w in (W, packed)
    ]
    for ours, plain in zip(*pairs, strict=True):
        assert_bits(entries_of(ours), entries_of(plain), "packed")
    assert packed.shape == W.shape and gsf.explain().packed


def test_on_a_cpu_packing_is_exact_whatever_was_asked() -> None:
    W = torch.randn(64, 100)
    assert torch.equal(gsf.pack(W, precision="screened").codes, gsf.pack(W).codes)
    with pytest.raises(ValueError, match='precision must be "exact" or "screened", got 8'):
        gsf.pack(W, precision=8)  # type: ignore[arg-type]


def test_packed_bytes() -> None:
    W = torch.empty(1152, 65536)
    assert gsf.packing.packed_bytes(1152, 65536) <= 1.05 * W.numel()
    assert gsf.pack(torch.randn(640, 480)).nbytes == gsf.packing.packed_bytes(640, 480)


@pytest.mark.parametrize("f", [1, 17, 49])
def test_packing_twice_gives_the_same_bytes(f: int) -> None:
    """Past the last latent too, whatever was in the memory before."""
    W, found = torch.randn(200, f), []
    for byte in (1, 2, 3, 4):
        stale = torch.full((gsf.packing.packed_bytes(200, f),), byte, dtype=torch.uint8)
        del stale
        found.append(gsf.pack(W))
    assert all(torch.equal(found[0].codes, other.codes) for other in found)
    assert found[0] == found[0] != found[1]  # compared as objects: tensors have no single truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_finds_edits(dtype: torch.dtype) -> None:
    x, W, b, t = draw(5, 64, 100)
    W = W.t().to(dtype).t()
    packed = gsf.pack(W, check=True)
    gsf.jumprelu_encode(x, packed, b, t)
    W.data[3, 17] += 0.25
    with pytest.raises(RuntimeError, match=r"weights of 1 latents changed .* being 17; pack again"):
        gsf.jumprelu_encode(x, packed, b, t)


def test_check_finds_exchanged_weights() -> None:
    W = torch.randn(64, 100)
    packed = gsf.pack(W, check=True)
    W.data[:, 5] = W[:, 5].flip(0).clone()
    with pytest.raises(RuntimeError, match="being 5;"):
        packed.verify()


def test_float64_weights_pack_to_themselves() -> None:
    x, W, b, t = (a.double() for a in draw(5, 64, 100))
    packed = gsf.pack(W)
    assert packed.codes is None
    ours = gsf.jumprelu_encode(x, packed, b, t)
    assert torch.equal(ours.values, gsf.jumprelu_encode(x, W, b, t).values)


def test_bad_input_of_pack() -> None:
    W = torch.randn(64, 100)
    with pytest.raises(TypeError, match="pack: W_enc must be a torch.Tensor, got list"):
        gsf.pack([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pack: W_enc must have shape \[d_in, d_sae\]"):
        gsf.pack(W[0])
    with pytest.raises(ValueError, match="pack: center must have shape"):
        gsf.pack(W, center=torch.zeros(3))
    with pytest.raises(RuntimeError, match="center must be finite"):
        gsf.pack(W, center=torch.full((64,), torch.nan))
    codes = gsf.pack(W).codes
    args = (*draw(5, 64, 101), 0.0, None, False, codes)
    with pytest.raises(RuntimeError, match=r"packed must come from pack\(\) of a W_enc of shape"):
        torch.ops.gemmascope_fast.jumprelu_encode(*args)
    for wrong in (torch.zeros(3, dtype=torch.uint8), codes[:-1], torch.zeros(100)):
        with pytest.raises(RuntimeError, match="packed must"):
            torch.ops.gemmascope_fast.jumprelu_encode(*draw(5, 64, 100), 0.0, None, False, wrong)


def test_gradients_pass_through_a_packed_encoder() -> None:
    x, W, b, t = draw(30, 64, 100)
    grads = []
    for pack in (False, True):
        leaves = [a.clone().requires_grad_() for a in (x, W, b, t)]
        encoder = gsf.pack(leaves[1]) if pack else leaves[1]
        acts = gsf.jumprelu_encode(leaves[0], encoder, *leaves[2:], bandwidth=0.3)
        (acts.values.square().sum() + acts.l0().sum()).backward()
        grads.append([a.grad for a in leaves])
    assert_bits(grads[1], grads[0], "gradients")


# ---- freeze


@pytest.mark.parametrize(
    "module",
    [
        gsf.SAE(64, 200, gsf.JumpReLU(0.1, 1.0)),
        gsf.SAE(64, 200, gsf.TopK(5), semantics="saelens_6"),
        gsf.SAE(64, 200, gsf.BatchTopK(5)),
        gsf.Transcoder(64, 200, gsf.JumpReLU(0.1, 1.0), d_out=32, affine=True),
    ],
    ids=["jumprelu", "topk saelens", "batchtopk", "transcoder"],
)
def test_frozen_modules_encode_the_same(module: gsf.SAE) -> None:
    x = torch.randn(30, 64)
    module.eval()
    with torch.no_grad():
        expected, recon = entries_of(module.encode(x)), module(x)
    assert module.freeze(center=x.mean(0)) is module and module.packed is not None
    assert_bits(entries_of(module.encode(x)), expected, "frozen")
    assert torch.equal(module(x), recon)
    assert not any(p.requires_grad for p in module.parameters())
    module.unfreeze()
    assert module.packed is None and all(p.requires_grad for p in module.parameters())


def test_what_changes_weights_unfreezes() -> None:
    x = torch.randn(10, 64)
    other = gsf.SAE(64, 200, gsf.JumpReLU(0.1, 1.0))
    module = gsf.SAE(64, 200, gsf.JumpReLU(0.1, 1.0)).freeze()
    module.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_bits(entries_of(module.encode(x)), entries_of(other.encode(x)), "loaded")
    for change in (
        lambda: module.to(torch.bfloat16),
        lambda: module.load_state_dict(other.state_dict()),
        lambda: setattr(module, "W_enc", torch.nn.Parameter(torch.zeros(64, 200))),
        lambda: module.reset_parameters(),
    ):
        module.freeze()
        change()
        assert module.packed is None and all(p.requires_grad for p in module.parameters())


def test_a_frozen_module_that_wants_gradients_is_an_error() -> None:
    module = gsf.SAE(64, 200, gsf.TopK(5), semantics="saelens_6").freeze()
    module.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"encode: frozen parameters require .* unfreeze\(\)"):
        module.encode(torch.randn(3, 64))


def test_freeze_that_fails_changes_nothing() -> None:
    module = gsf.SAE(64, 200, gsf.JumpReLU(0.1, 1.0))
    with pytest.raises(ValueError, match="center must have shape"):
        module.freeze(center=torch.zeros(3))
    assert module.packed is None and module.training
    assert all(p.requires_grad for p in module.parameters())


def test_no_packing_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "NATIVE_MISSING", "not built")
    assert gsf.pack(torch.randn(64, 10)).codes is None
    assert gsf.explain().reason == "not built" == str(gsf.explain())
