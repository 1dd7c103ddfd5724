"""grad_format="coo" and clip_grad_norm_: sparse gradients equal the dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_same
from test_optim import batch, loss_of, sae
from torch import nn

import gemmascope_fast as gsf

ACTIVATIONS = [gsf.JumpReLU(0.2, 1.5), gsf.TopK(3), gsf.BatchTopK(2.5)]


def gradients(module: gsf.SAE, steps: int = 1) -> gsf.SAE:
    for step in range(steps):
        loss_of(module, batch(step, 4)).backward()
    return module


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_sparse_gradients_are_the_dense_ones(activation, dtype, steps):
    dense, coo = sae(activation, dtype), sae(activation, dtype)
    gsf.optim.set_grad_format(coo, "coo")
    for module in (dense, coo):
        for step in range(steps):
            loss_of(module, batch(step, 4, dtype)).backward()
    touched = (dense.W_dec.grad != 0).any(1)
    assert touched.any() and not touched.all()
    for name, p in coo.named_parameters():
        grad, expected = p.grad, dense.get_parameter(name).grad
        assert grad.is_sparse == name.startswith("W_")
        if grad.is_sparse:
            assert grad.is_coalesced()
            assert int(touched.sum()) <= grad._values().shape[0] / (12 if name == "W_enc" else 1)
            grad = grad.to_dense()
        if dtype == torch.float64:
            torch.testing.assert_close(grad, expected)
        else:
            assert_same(grad, expected, name)


def test_x_and_float64_get_their_gradients():
    results = []
    for grad_format in ("dense", "coo"):
        module, x = sae(dtype=torch.float64), batch(0, dtype=torch.float64).requires_grad_()
        gsf.optim.set_grad_format(module, grad_format)
        loss_of(module, x).backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["sgd", "sparse adam"])
def test_torch_optimizers_take_them(kind):
    runs = []
    for grad_format in ("dense", "coo"):
        module = sae(ACTIVATIONS[0])
        gsf.optim.set_grad_format(module, grad_format)
        matrices = [module.W_enc, module.W_dec]
        optimizer = torch.optim.SGD(matrices, 0.01)
        if kind == "sparse adam" and grad_format == "coo":
            optimizer = torch.optim.SparseAdam(matrices, 0.01, (0.0, 0.999), eps=1e-30)
        elif kind == "sparse adam":
            optimizer = torch.optim.Adam(matrices, 0.01, (0.0, 0.999), eps=1e-30)
        for step in range(1 if kind == "sparse adam" else 5):
            optimizer.zero_grad()
            loss_of(module, batch(step)).backward()
            optimizer.step()
        runs.append(module)
    for name in ("W_enc", "W_dec"):
        pair = [m.get_parameter(name).detach() for m in runs]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
        assert not torch.equal(pair[1], sae(ACTIVATIONS[0]).get_parameter(name))


def test_back_to_dense_and_bad_arguments():
    module = sae()
    gsf.optim.set_grad_format(module, "coo")
    assert module.W_enc.is_contiguous()
    gsf.optim.set_grad_format(module, "dense")
    assert module.W_enc.t().is_contiguous()
    assert not gradients(module).W_dec.grad.is_sparse
    with pytest.raises(ValueError, match='^set_grad_format: grad_format must be "dense" or "coo"'):
        gsf.optim.set_grad_format(module, "csr")
    with pytest.raises(TypeError, match="^set_grad_format: module must be an SAE, got Linear"):
        gsf.optim.set_grad_format(nn.Linear(2, 2), "coo")
    optimizer = gsf.optim.Adam(module, 1e-3, fused=True)
    with pytest.raises(ValueError, match="^set_grad_format: the module has a fused optimizer"):
        gsf.optim.set_grad_format(module, "coo")
    del optimizer
    gsf.optim.set_grad_format(module, "coo")


def test_loss_stays_dense():
    module = sae(ACTIVATIONS[1])
    gsf.optim.set_grad_format(module, "coo")
    module.loss(batch(0))[0].backward()
    assert not module.W_dec.grad.is_sparse and module.W_dec.grad.any()


# ---- clipping


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_equals_torch_and_takes_sparse_gradients(max_norm, norm_type):
    dense, coo = sae(ACTIVATIONS[0]), sae(ACTIVATIONS[0])
    gsf.optim.set_grad_format(coo, "coo")
    gradients(dense, 2), gradients(coo, 2)
    ours = gsf.clip_grad_norm_(coo.parameters(), max_norm, norm_type)
    theirs = nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type)
    torch.testing.assert_close(ours, theirs)
    for p, q in zip(coo.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad)


def test_clipping_refuses_what_it_cannot_do():
    p = nn.Parameter(torch.ones(3))
    assert gsf.clip_grad_norm_(p, 1.0) == 0
    p.grad = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(RuntimeError, match="^clip_grad_norm_: the norm of the gradients is nan"):
        gsf.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert p.grad[0] == 1
    with pytest.raises(ValueError, match="^clip_grad_norm_: max_norm must be finite and >= 0"):
        gsf.clip_grad_norm_([p], -1.0)
    with pytest.raises(ValueError, match="^clip_grad_norm_: norm_type must be > 0, got 0"):
        gsf.clip_grad_norm_([p], 1.0, 0)
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-3, fused=True)
    gsf.clip_grad_norm_(module.parameters(), 1.0)
    gradients(module)
    with pytest.raises(ValueError, match="^clip_grad_norm_: .* pending .*fused=False"):
        gsf.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    gsf.clip_grad_norm_(module.parameters(), 1.0)
