"""Reconstruction losses: squared error in the four normalisations in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_float


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """Squared error per token: `mean_i sum_o (recon[i, o] - target[i, o])^2`.

    Args:
        recon: `[*batch, d_out]` floating point.
        target: `[*batch, d_out]`, likewise.

    Returns:
        A scalar in the promoted dtype, float32 at least; 0 for an empty batch.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices disagree.

    Source: arXiv 2407.14435, section 3.
    """
    recon, target = _flat("squared_error", recon, target)
    return (recon - target).square().sum() / max(recon.shape[0], 1)


def mse(recon: Tensor, target: Tensor) -> Tensor:
    """Mean squared error: `mean_{i, o} (recon[i, o] - target[i, o])^2`.

    Args:
        recon: `[*batch, d_out]` floating point.
        target: `[*batch, d_out]`, likewise.

    Returns:
        A scalar in the promoted dtype, float32 at least; 0 for an empty batch.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices disagree.

    Source: arXiv 2406.04093, section 2.
    """
    recon, target = _flat("mse", recon, target)
    return (recon - target).square().sum() / max(recon.numel(), 1)


def normalised_mse(recon: Tensor, target: Tensor) -> Tensor:
    """Squared error relative to each token: `mean_i |recon_i - target_i|^2 / |target_i|^2`.

    A token whose target is exactly 0 counts 0.

    Args:
        recon: `[*batch, d_out]` floating point.
        target: `[*batch, d_out]`, likewise; differentiable too.

    Returns:
        A scalar in the promoted dtype, float32 at least; 0 for an empty batch.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices disagree.

    Source: arXiv 2406.04093, section 2.1 and its published training code.
    """
    recon, target = _flat("normalised_mse", recon, target)
    return relative_error(recon, target).sum() / max(recon.shape[0], 1)


def fvu(recon: Tensor, target: Tensor) -> Tensor:
    """Fraction of variance unexplained: `sum |recon - target|^2 / sum |target - mean_i target|^2`.

    Not linear in the batch: the denominator belongs to the tokens given.

    Args:
        recon: `[*batch, d_out]` floating point.
        target: `[*batch, d_out]`, likewise; differentiable too.

    Returns:
        A scalar in the promoted dtype, float32 at least; NaN for an empty or constant batch.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices disagree.

    Source: arXiv 2408.05147, section 4.
    """
    recon, target = _flat("fvu", recon, target)
    deviation = (target - target.mean(0)).square().sum()
    return (recon - target).square().sum() / deviation


def relative_error(recon: Tensor, target: Tensor) -> Tensor:
    """`[n]`: squared error of each token over the squared norm of its target, 0 where that is 0."""
    norms = target.square().sum(-1)
    errors = (recon - target).square().sum(-1)
    blank = norms == 0
    return (errors / norms.masked_fill(blank, 1.0)).masked_fill(blank, 0.0)


def _flat(op: str, recon: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as `[n, d_out]`, in float32 at least."""
    check_pair(op, recon, target)
    wide = torch.promote_types(torch.promote_types(recon.dtype, target.dtype), torch.float32)
    shape = (math.prod(recon.shape[:-1]), recon.shape[-1])
    return recon.to(wide).reshape(shape), target.to(wide).reshape(shape)


def check_pair(op: str, recon: Tensor, target: Tensor) -> None:
    """Two floating-point tensors of one shape `[*batch, d_out]` on one device."""
    check_float(op, "recon", recon)
    check_float(op, "target", target)
    if recon.dim() < 1:
        raise ValueError(f"{op}: recon must have shape [*batch, d_out], got a scalar")
    if recon.shape != target.shape:
        raise ValueError(
            f"{op}: recon and target must have the same shape [*batch, d_out], got "
            f"{tuple(recon.shape)} and {tuple(target.shape)}"
        )
    if recon.device != target.device:
        raise ValueError(f"{op}: recon is on {recon.device}, target on {target.device}")
