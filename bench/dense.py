"""The contenders: the same maths as dense PyTorch writes it, with the `[n, d_sae]` matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from problems import BANDWIDTH, Size
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.costs import Cost

LAMBDA = 1e-3
"""Coefficient of the mean L0 in every loss."""
COMPILED = "dense fp32, torch.compile"
ON_REQUEST = {COMPILED: "compile"}
"""Optional contenders, and how `--against` asks for them."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, whose first result must be that of `function`."""
    fast, checked = torch.compile(function), False

    def run(*args: Any) -> Any:
        nonlocal checked
        found = fast(*args)
        if not checked:
            torch.testing.assert_close(found, function(*args), rtol=1e-4, atol=1e-4)
            checked = True
        return found

    return run


def jumprelu(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: float) -> Tensor:
    pre = torch.addmm(b_enc, x, W_enc)
    return torch.where(pre > threshold, pre, 0)


def topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, latents = torch.addmm(b_enc, x, W_enc).relu_().topk(k)
    return values, latents


def batchtopk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acts = torch.addmm(b_enc, x, W_enc).relu_().flatten()
    values, positions = acts.topk(k * x.shape[0], sorted=False)
    return values, positions


class Gate(torch.autograd.Function):
    """JumpReLU with the rectangle pseudo-derivative."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < BANDWIDTH / 2
        d_threshold = torch.where(window, grad, 0.0).sum(0) * (threshold / -BANDWIDTH)
        return torch.where(pre > threshold, grad, 0.0), d_threshold


class L0Gate(torch.autograd.Function):
    """Active latents, with the rectangle pseudo-derivative in the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < BANDWIDTH / 2
        return None, torch.where(window, grad, 0.0).sum(0) / -BANDWIDTH


def loss(sae: Any, x: Tensor, encoded: Callable[[str], None] | None = None) -> Tensor:
    """`mean |recon - x|^2 + LAMBDA mean L0`, for any module with a JumpReLU SAE's parameters.

    `encoded("encode")` is called when the activations are there.
    """
    pre = torch.addmm(sae.b_enc, x, sae.W_enc)
    acts = Gate.apply(pre, sae.threshold)
    if encoded is not None:
        encoded("encode")
    recon = torch.addmm(sae.b_dec, acts, sae.W_dec)
    l0 = L0Gate.apply(pre, sae.threshold).sum(-1).mean()
    return (recon - x).square().sum(-1).mean() + LAMBDA * l0


def cost(chain: Sequence[str], size: Size, nnz: int, touched: int) -> Cost:
    """Of these ops of the table one after the other, in float32; an encoder reads all latents."""
    total = Cost(0, 0)
    for name in chain:
        latents = size.d_sae if name.endswith("_encode") else touched
        total += ops.TABLE[name].cost(n=size.n, d=size.d, d_sae=latents, nnz=nnz)
    return total
