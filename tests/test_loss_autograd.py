"""`SAE.loss` inside autograd: scaling, accumulation, new terms; special values, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same
from test_loss import OPS as LOSS_OPS
from test_loss import PATHS, TERMS, batch, gradients, leaves, sae, transcoder
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.activations import parts
from gemmascope_fast.training import L0, QuadraticL0, Reconstruction, Term
from gemmascope_fast.training.blocked import sae_loss

OPS = LOSS_OPS
BOTH = ["dense tiles", "sparse blocks"]

# ---- backward


@pytest.mark.parametrize("path", BOTH)
def test_scaled_and_added_to_another_loss(backend: Any, path: str) -> None:
    module = sae()
    x, _ = batch(module)
    inputs = leaves(module, x, None)
    loss, _ = sae_loss(module, x, None, TERMS, PATHS[path])
    once = gradients(loss, inputs, retain_graph=True)
    other = gradients(3 * loss + module.W_dec.sum() + x.square().sum(), inputs)
    for name, plain in once.items():
        extra = {"W_dec": torch.ones_like(plain), "x": 2 * x.detach()}.get(name, 0)
        torch.testing.assert_close(other[name], 3 * plain + extra, msg=name)


def test_backward_accumulates_and_can_be_retained(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    inputs = leaves(module, x, None)
    loss, _ = sae_loss(module, x, None, TERMS)
    once = gradients(loss, inputs, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, t in inputs.items():
        torch.testing.assert_close(t.grad, 2 * once[name], msg=name)
    module.loss(x, terms=TERMS)[0].backward()
    for name, t in inputs.items():
        torch.testing.assert_close(t.grad, 3 * once[name], msg=name)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_retained_gradient_is_not_shared() -> None:
    module = sae()
    x, _ = batch(module)
    loss, _ = module.loss(x)
    loss.backward(retain_graph=True)
    kept = module.W_dec.grad.clone()
    module.W_dec.grad.zero_()
    loss.backward()
    assert_same(module.W_dec.grad, kept)


def test_second_derivatives_raise() -> None:
    module = sae()
    x, _ = batch(module)
    with pytest.raises(RuntimeError, match="loss: second derivatives are not supported"):
        torch.autograd.grad(module.loss(x)[0], x, create_graph=True)


def test_weights_in_any_layout_keep_it_in_their_gradient(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    wanted = gradients(module.loss(x)[0], leaves(module, x, None))
    for limits in (PATHS["dense tiles"], PATHS["sparse blocks"]):
        with torch.no_grad():
            module.W_enc = torch.nn.Parameter(module.W_enc.contiguous())
            module.W_dec = torch.nn.Parameter(module.W_dec.t().contiguous().t())
        sliced = torch.cat([x, x], dim=-1)[..., :23]
        sae_loss(module, sliced, None, (Reconstruction(),), limits)[0].backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name], msg=name)
            assert p.grad.stride() == p.stride()
            p.grad = None


@pytest.mark.parametrize("path", BOTH)
def test_autocast_casts_x_and_weights_only(backend: Any, path: str) -> None:
    module = sae()
    x, _ = batch(module)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = sae_loss(module, x, None, TERMS, PATHS[path])
    found = gradients(loss, leaves(module, x, None))
    low = sae(dtype=torch.bfloat16)
    low.load_state_dict(module.state_dict())
    rounded = x.detach().bfloat16()
    expected, _ = sae_loss(low, rounded, x.detach(), TERMS, PATHS[path])
    assert_same(loss.detach(), expected.detach())
    wanted = gradients(expected, dict(low.named_parameters()))
    for name, t in wanted.items():
        assert found[name].dtype == torch.float32
        assert_same(found[name], t.float(), name)


def test_a_target_of_another_dtype(backend: Any) -> None:
    module = transcoder()
    x, target = batch(module)
    expected = module.loss(x, target.bfloat16().float())[0]
    assert_same(module.loss(x, target.bfloat16())[0].detach(), expected.detach())
    doubled = target.detach().double().requires_grad_()
    loss, _ = module.loss(x, doubled)
    assert loss.dtype == torch.float32
    loss.backward()
    assert doubled.grad.dtype == torch.float64


def test_compiled_code_may_call_it(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    plain = module.loss(x * 2)[0].detach()
    compiled = torch.compile(lambda x: module.loss(x * 2)[0] + 1, backend="eager")
    assert_same(compiled(x).detach(), plain + 1)


# ---- terms


class _LogCosh(Term):
    """A term written by a user."""

    name = "log_cosh"

    def per_token(self, statistics: Any) -> Tensor:
        return (statistics.recon - statistics.target).cosh().log().sum(-1)


@pytest.mark.parametrize("path", ["dense tiles", "sparse blocks"])
def test_a_new_term_needs_its_value_only(backend: Any, path: str) -> None:
    module = sae()
    x, _ = batch(module)
    loss, metrics = sae_loss(module, x, None, (_LogCosh(), L0(0.1)), PATHS[path])
    acts = module.encode(x)
    expected = (module.decode(acts) - x).cosh().log().sum(-1).mean() + 0.1 * acts.l0().mean()
    torch.testing.assert_close(loss, expected)
    inputs = leaves(module, x, None)
    for name, wanted in gradients(expected, inputs).items():
        torch.testing.assert_close(gradients(loss, inputs, retain_graph=True)[name], wanted)
    assert metrics["log_cosh"] > 0


class _Mean(Term):
    name = "mean"

    def per_token(self, statistics: Any) -> Tensor:
        return statistics.l0.mean()


# ---- special values and sizes


def poison_row(module: gsf.SAE, x: Tensor) -> None:
    x[1, 4, 2] = math.nan


def poison_threshold(module: gsf.SAE, x: Tensor) -> None:
    module.threshold[3] = math.nan


def poison_weight(module: gsf.SAE, x: Tensor) -> None:
    module.W_enc[2, 5:9] = math.nan


@pytest.mark.parametrize("poison", [poison_row, poison_threshold, poison_weight])
def test_nan_reaches_the_loss_alike_on_both_paths(
    backend: Any, poison: Callable[..., None]
) -> None:
    module = sae()
    x, _ = batch(module)
    with torch.no_grad():
        poison(module, x)
    found = []
    for path in BOTH:
        loss, metrics = sae_loss(module, x, None, TERMS, PATHS[path])
        assert loss.isnan() and metrics["fvu"].isnan() and metrics["reconstruction"].isnan()
        found.append([metrics["l0"], *gradients(loss, leaves(module, x, None)).values()])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(dense[~dense.isnan()], sparse[~dense.isnan()])
        assert bool(dense[sparse.isnan()].isnan().all())  # 0 * NaN in the products adds some


def test_infinite_thresholds_switch_latents_off(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    with torch.no_grad():
        module.threshold.fill_(math.inf)
    for path in BOTH:
        loss, metrics = sae_loss(module, x, None, TERMS, PATHS[path])
        found = gradients(loss, leaves(module, x, None))
        assert metrics["l0"] == 0
        assert not found["threshold"].any() and not found["W_enc"].any()
        assert bool(found["b_dec"].any())


@pytest.mark.parametrize("activation", [None, gsf.TopK(5), gsf.BatchTopK(4.5)])
def test_no_tokens_give_zero(backend: Any, activation: Any) -> None:
    module = sae(activation)
    loss, metrics = module.loss(torch.zeros(0, 7, 23), terms=TERMS)
    assert loss == 0 and metrics["l0"] == 0 and metrics["blocks"] == 0
    assert metrics["fvu"].isnan()
    loss.backward()
    for p in module.parameters():
        assert p.grad.shape == p.shape and not p.grad.any()


def test_one_token_without_leading_dimensions(backend: Any) -> None:
    module = sae()
    x = torch.randn(23)
    torch.testing.assert_close(module.loss(x)[0], (module(x) - x).square().sum())


# ---- errors


def bad_target(shape: tuple[int, ...], **kind: Any) -> Callable[[], Any]:
    return lambda: transcoder().loss(torch.zeros(3, 23), torch.zeros(shape, **kind))


def with_terms(terms: Any) -> Callable[[], Any]:
    return lambda: sae().loss(torch.zeros(3, 23), terms=terms)


def with_activation(activation: Any) -> Callable[[], Any]:
    def call() -> Any:
        module = sae()
        with parts():  # as if it were one of a larger dictionary
            module.activation = activation
        return module.loss(torch.zeros(3, 23))

    return call


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: transcoder().loss(torch.zeros(3, 23)),
        ValueError,
        r"loss: target is needed.*\(3, 19\)",
    ),
    (
        lambda: gsf.SAE(4, 8, d_out=5).loss(torch.zeros(3, 4)),
        ValueError,
        r"loss: target is needed.*\(3, 5\)",
    ),
    (bad_target((3, 23)), ValueError, r"loss: target must have shape \(3, 19\), got \(3, 23\)"),
    (bad_target((3, 19), dtype=torch.int64), TypeError, "loss: target must be float32.*int64"),
    (bad_target((3, 19), device="meta"), ValueError, "loss: target is on meta"),
    (lambda: sae().loss(torch.zeros(3, 22)), ValueError, r"loss: x must have shape"),
    (lambda: sae().loss([1.0]), TypeError, "loss: x must be a torch.Tensor, got list"),
    (with_terms(Reconstruction()), TypeError, "loss: terms must be a sequence, got one Reconstr"),
    (with_terms(3), TypeError, "loss: terms must be a sequence of terms, got int"),
    (with_terms(["l0"]), TypeError, r"loss: terms\[0\] must be a term.*got str"),
    (with_terms([L0]), TypeError, r"loss: terms\[0\] must be a term.*got ABCMeta"),
    (with_terms([]), ValueError, "loss: terms must not be empty"),
    (with_terms([L0(1), L0(2)]), ValueError, "loss: terms has 2 terms named 'l0_penalty'"),
    (with_terms([_Mean()]), ValueError, r"per_token of the term 'mean'.*\(3,\), got \(\)"),
    (with_activation(gsf.JumpReLU(0.0)), ValueError, "loss: threshold requires grad but the acti"),
    (with_activation(gsf.TopK(38)), ValueError, r"loss: k must be in \[0, d_sae=37\], got 38"),
    (lambda: QuadraticL0(0, 1.0), ValueError, "QuadraticL0: target must be finite and > 0, got 0"),
    (lambda: QuadraticL0(5, -1.0), ValueError, "QuadraticL0: coefficient must be finite and >= 0"),
    (lambda: L0(math.nan), ValueError, "L0: coefficient must be finite and >= 0, got nan"),
    (lambda: L0("1"), TypeError, "L0: coefficient must be a number, got str"),
    (lambda: Reconstruction(True), TypeError, "Reconstruction: coefficient must be a number"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_the_argument(call: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_bandwidth_0_serves_a_frozen_threshold(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    module.threshold.requires_grad_(False)
    expected = gradients(module.loss(x)[0], {"x": x, "W_enc": module.W_enc})
    module.activation = gsf.JumpReLU(0.0)
    for name, found in gradients(module.loss(x)[0], {"x": x, "W_enc": module.W_enc}).items():
        assert_same(found, expected[name])
