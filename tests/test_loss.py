"""`SAE.loss`: values and gradients on both paths against composed ops and a float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle import (
    assert_close_to_truth,
    assert_same,
    batchtopk_support,
    dense_jumprelu,
    dense_selected,
    topk_support,
)
from samples import DTYPES, MIXED
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.training import L0, QuadraticL0, Reconstruction, entry_paths
from gemmascope_fast.training.blocked import sae_loss
from gemmascope_fast.training.planning import Limits

OPS = (
    *("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode"),
    *("encode_backward", "decode_backward", "sae_backward", "by_feature"),
)
TERMS = (Reconstruction(0.7), L0(0.3), QuadraticL0(target=9, coefficient=0.05))
PATHS = {
    "dense": Limits(crossover=0.0),
    "dense tiles": Limits(span_rows=16, tile_bytes=1 << 10, crossover=0.0),
    "sparse": Limits(crossover=1.0),
    "sparse blocks": Limits(span_rows=16, entry_bytes=2000, crossover=1.0),
}
BANDWIDTH = 0.4
pytestmark = pytest.mark.filterwarnings("ignore:float16 overflows at 65504")


def sae(activation: Any = None, dtype: torch.dtype = torch.float32) -> gsf.SAE:
    module = gsf.SAE(23, 37, activation or gsf.JumpReLU(BANDWIDTH, 0.3), dtype=dtype)
    return randomise(module)


def transcoder(dtype: torch.dtype = torch.float32) -> gsf.SAE:
    activation = gsf.JumpReLU(BANDWIDTH, 0.3)
    module = gsf.Transcoder(23, 37, activation, d_out=19, affine=True, dtype=dtype)
    return randomise(module)


@torch.no_grad()
def randomise(module: gsf.SAE) -> gsf.SAE:
    for name, p in module.named_parameters():
        if name in ("b_enc", "b_dec", "W_skip"):
            p.copy_(torch.randn_like(p) * 0.2)
        if name == "threshold":
            p.copy_(0.1 + 0.3 * torch.rand_like(p))
    return module


def batch(module: gsf.SAE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """`x [3, 13, d_in]` and a target, both leaves; no target for an SAE."""
    x = torch.randn(3, 13, module.d_in).to(dtype).requires_grad_()
    if not isinstance(module, gsf.Transcoder):
        return x, None
    return x, torch.randn(3, 13, module.d_out).to(dtype).requires_grad_()


def written_out(recon: Tensor, target: Tensor, l0: Tensor) -> Tensor:
    """`TERMS` by their formulas."""
    error = (recon - target).square().sum(-1)
    return (0.7 * error + 0.3 * l0 + 0.05 * 2 / 9 * (l0 - 9).square()).mean()


def composed(module: gsf.SAE, x: Tensor, target: Tensor | None) -> Tensor:
    """The loss by the public functions under autograd."""
    acts = module.encode(x)
    recon = gsf.decode(acts, module.W_dec, module.b_dec, dtype=torch.float32)
    if getattr(module, "W_skip", None) is not None:
        recon = recon + x.float() @ module.W_skip.float()
    return written_out(recon, (x if target is None else target).float(), acts.l0())


def leaves(module: gsf.SAE, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    found = {"x": x, **dict(module.named_parameters())}
    return found if target is None else {**found, "target": target}


def gradients(loss: Tensor, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return dict(
        zip(inputs, torch.autograd.grad(loss, list(inputs.values()), **options), strict=True)
    )


def truth(module: gsf.SAE, x: Tensor, target: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of dense autograd in float64."""
    inputs = {k: v.detach().double().requires_grad_() for k, v in leaves(module, x, target).items()}
    pre = inputs["x"] @ inputs["W_enc"] + inputs["b_enc"]
    activation = module.activation
    if isinstance(activation, gsf.JumpReLU):
        flat = pre.reshape(-1, module.d_sae)
        acts, gate = dense_jumprelu(flat, inputs["threshold"], activation.bandwidth)
        acts, gate = acts.reshape(pre.shape), gate.reshape(pre.shape)
    else:

        def support(pre: Tensor) -> Tensor:
            flat = pre.reshape(-1, module.d_sae)
            if isinstance(activation, gsf.TopK):
                return topk_support(flat, activation.k)[0].reshape(pre.shape)
            return batchtopk_support(flat, activation.k)[0][0].reshape(pre.shape)

        acts = dense_selected(pre, support)
        gate = (acts > 0).double()
    recon = acts @ inputs["W_dec"] + inputs["b_dec"]
    if "W_skip" in inputs:
        recon = recon + inputs["x"] @ inputs["W_skip"]
    loss = written_out(recon, inputs.get("target", inputs["x"]), gate.sum(-1))
    return loss, gradients(loss, inputs)


def check(module: gsf.SAE, x: Tensor, target: Tensor | None, limits: Limits) -> dict[str, Tensor]:
    """Loss and every gradient against the composed ops and the float64 truth; the metrics."""
    inputs = leaves(module, x, target)
    loss, metrics = sae_loss(module, x, target, TERMS, limits)
    ours = gradients(loss, inputs)
    other = composed(module, x, target)
    theirs = gradients(other, inputs)
    true_loss, true = truth(module, x, target)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close_to_truth(loss, other, true_loss, torch.float32, "loss")
    for name, t in inputs.items():
        assert ours[name].dtype == t.dtype and ours[name].stride() == t.stride(), name
        assert_close_to_truth(ours[name], theirs[name], true[name], t.dtype, name)
    return metrics


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [sae, transcoder])
def test_value_and_gradients(backend: Any, make: Any, path: str) -> None:
    module = make()
    metrics = check(module, *batch(module), PATHS[path])
    blocks, dense = int(metrics["blocks"]), int(metrics["dense_blocks"])
    assert dense == (blocks if "dense" in path else 0)
    assert blocks == 1 if path in ("dense", "sparse") else blocks >= 6


@pytest.mark.parametrize("path", ["dense tiles", "sparse blocks"])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), MIXED)
def test_mixed_dtypes(backend: Any, path: str, x_dtype: Any, w_dtype: Any) -> None:
    module = transcoder(w_dtype)
    check(module, *batch(module, x_dtype), PATHS[path])


@pytest.mark.parametrize("path", ["sparse", "sparse blocks"])
def test_gradients_of_reconstructions_in_bfloat16(path: str, monkeypatch: Any) -> None:
    module = sae(dtype=torch.bfloat16)
    x = batch(module, torch.bfloat16)[0]
    exact, inputs = truth(module, x, None)[1], leaves(module, x, None)
    del inputs["x"]

    def found(x: Tensor) -> dict[str, Tensor]:
        return gradients(sae_loss(module, x, None, TERMS, PATHS[path])[0], inputs)

    plain = found(x.detach())
    monkeypatch.setattr(entry_paths, "NARROW", ("cpu",))
    narrow, kept = found(x.detach()), found(x)
    for name, gradient in narrow.items():
        assert gradient.dtype == inputs[name].dtype
        largest = exact[name].abs().max()
        assert (gradient - exact[name]).abs().max() <= 2**-7 * largest, name
        assert_same(kept[name], plain[name], f"{name}, where x is differentiable")
    assert_same(narrow["b_dec"], plain["b_dec"], "b_dec")
    assert not torch.equal(narrow["b_enc"], plain["b_enc"])


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("activation", [gsf.TopK(5), gsf.TopK(0), gsf.BatchTopK(4.5)])
def test_topk_and_batchtopk(backend: Any, activation: Any, blocks: int) -> None:
    module = sae(activation)
    limits = Limits(entry_bytes=40 * 5 * 39 // blocks)
    metrics = check(module, *batch(module), limits)
    assert int(metrics["dense_blocks"]) == 0
    if activation == gsf.TopK(5):
        assert int(metrics["blocks"]) >= blocks
    if isinstance(activation, gsf.BatchTopK):
        assert int(metrics["blocks"]) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [sae, transcoder])
def test_float64_equals_the_truth(make: Any, path: str) -> None:
    module = make(dtype=torch.float64)
    x, target = batch(module, torch.float64)
    loss, metrics = sae_loss(module, x, target, TERMS, PATHS[path])
    true_loss, true = truth(module, x, target)
    torch.testing.assert_close(loss, true_loss, rtol=1e-12, atol=1e-12)
    for name, found in gradients(loss, leaves(module, x, target)).items():
        torch.testing.assert_close(found, true[name], rtol=1e-11, atol=1e-12, msg=name)
    assert metrics["fvu"].dtype == torch.float64


def test_a_dense_start_takes_many_tiles(backend: Any) -> None:
    module = gsf.SAE(32, 256)  # threshold 0.001, unit rows: half of the latents fire
    x = torch.nn.functional.normalize(torch.randn(300, 32), dim=1).requires_grad_()
    limits = Limits(span_rows=64, tile_bytes=1 << 14, crossover=1 / 8)
    metrics = check(module, x, None, limits)
    assert metrics["density"] > 0.4
    assert metrics["blocks"] == metrics["dense_blocks"] == 19


def test_both_paths_in_one_call(backend: Any) -> None:
    module = sae()
    with torch.no_grad():
        module.b_enc.fill_(-0.5)
    x = torch.randn(90, 23)
    x[30:60] *= 0.1  # no latent reaches its threshold
    limits = Limits(span_rows=30, tile_bytes=1 << 10, crossover=1 / 8)
    metrics = check(module, x.requires_grad_(), None, limits)
    assert 0 < metrics["dense_blocks"] == metrics["blocks"] - 1


def test_metrics(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    loss, metrics = module.loss(x, terms=TERMS)
    acts = module.encode(x)
    error = (module.decode(acts) - x).square().sum(-1)
    flat, l0 = x.reshape(-1, 23), acts.l0()
    expected = {
        "reconstruction": 0.7 * error.mean(),
        "l0_penalty": 0.3 * l0.mean(),
        "quadratic_l0": (0.05 * 2 / 9 * (l0 - 9).square()).mean(),
        "fvu": error.sum() / (flat - flat.mean(0)).square().sum(),
        "l0": l0.mean(),
        "density": l0.mean() / 37,
    }
    assert set(metrics) == {*expected, "dense_blocks", "blocks"}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), msg=name)
    torch.testing.assert_close(loss, sum(metrics[term.name] for term in TERMS))
    assert all(m.shape == () and not m.requires_grad for m in metrics.values())


def test_default_terms_and_target(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    loss, metrics = module.loss(x)
    torch.testing.assert_close(loss, (module(x) - x).square().sum(-1).mean())
    assert "reconstruction" in metrics and "l0_penalty" not in metrics


@pytest.mark.parametrize("path", PATHS)
def test_no_grad_gives_the_same_value_only(backend: Any, path: str) -> None:
    module = sae()
    x, _ = batch(module)
    loss, metrics = sae_loss(module, x, None, TERMS, PATHS[path])
    with torch.no_grad():
        value, again = sae_loss(module, x, None, TERMS, PATHS[path])
    assert value.grad_fn is None and not value.requires_grad
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(again["l0"], metrics["l0"])


FROZEN: list[Sequence[str]] = [
    ("W_dec",),
    ("W_enc",),
    ("W_enc", "b_enc", "threshold"),
    ("W_dec", "b_dec", "W_skip", "x", "target"),
    ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "x", "target"),
    ("W_enc", "b_enc", "W_dec", "threshold", "W_skip", "x", "target"),
    ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip", "target"),
    ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip", "x"),
]


@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
@pytest.mark.parametrize("path", ["dense tiles", "sparse blocks"])
def test_frozen_tensors(backend: Any, path: str, frozen: Sequence[str]) -> None:
    module = transcoder()
    x, target = batch(module)
    inputs = leaves(module, x, target)
    everything = gradients(sae_loss(module, x, target, TERMS, PATHS[path])[0], inputs)
    for name in frozen:
        inputs[name].requires_grad_(False)
    sae_loss(module, x, target, TERMS, PATHS[path])[0].backward()
    for name, t in inputs.items():
        if name in frozen:
            assert t.grad is None, name
        else:
            torch.testing.assert_close(t.grad, everything[name], msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(backend: Any, dtype: torch.dtype) -> None:
    module = sae(dtype=dtype)
    x, _ = batch(module, dtype)
    limits = Limits(span_rows=16, tile_bytes=1 << 10, crossover=0.3)
    runs = []
    for _ in range(2):
        loss, metrics = sae_loss(module, x, None, TERMS, limits)
        runs.append((loss, *gradients(loss, leaves(module, x, None)).values(), *metrics.values()))
    for first, second in zip(*runs, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("bandwidth", [1e-7, 2.0])
def test_pre_activations_on_the_threshold_and_the_window_ends(
    backend: Any, bandwidth: float
) -> None:
    module = sae(gsf.JumpReLU(bandwidth))  # 1 - 5e-8 rounds to below 1, 1 + 5e-8 to 1
    x = torch.randint(-2, 3, (3, 13, 23)).float()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randint(-2, 3, p.shape))
        module.threshold.fill_(1.0)
    dense, sparse = (
        gradients(sae_loss(module, x, None, TERMS, PATHS[path])[0], dict(module.named_parameters()))
        for path in ("dense tiles", "sparse blocks")
    )
    assert dense["threshold"].count_nonzero() > 20
    for name, found in dense.items():
        torch.testing.assert_close(found, sparse[name], rtol=1e-5, atol=1e-4, msg=name)
