"""The contenders: the same maths as dense PyTorch writes it, with the `[n, d_sae]` matrices."""

from __future__ import annotations

from typing import Any

import torch
from problems import BANDWIDTH
from torch import Tensor

LAMBDA = 1e-3
"""Coefficient of the mean L0 in every loss."""


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


def loss(sae: Any, x: Tensor) -> Tensor:
    """`mean |recon - x|^2 + LAMBDA mean L0`, for any module with a JumpReLU SAE's parameters."""
    pre = torch.addmm(sae.b_enc, x, sae.W_enc)
    recon = torch.addmm(sae.b_dec, Gate.apply(pre, sae.threshold), sae.W_dec)
    l0 = L0Gate.apply(pre, sae.threshold).sum(-1).mean()
    return (recon - x).square().sum(-1).mean() + LAMBDA * l0
