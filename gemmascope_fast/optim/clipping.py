"""Clipping of gradients by their global norm, dense and sparse ones together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..arguments import check_number
from .deferred import pending_parameters

OP = "clip_grad_norm_"


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients in place so that their global norm is at most `max_norm`.

    `grad *= min(1, max_norm / (|all gradients| + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`, for
    dense and sparse COO gradients together (`grad_format="coo"`); a sparse one is coalesced first.

    Args:
        parameters: those whose `.grad` counts; ones without a gradient are skipped.
        max_norm: finite, >= 0.
        norm_type: p of the norm, > 0; may be infinite.
        error_if_nonfinite: raise when the norm is NaN or infinite, before anything is scaled.

    Returns:
        The norm before clipping, a float32 scalar (float64 where a gradient is).

    Raises:
        TypeError: `max_norm` is not a number.
        ValueError: `max_norm` or `norm_type` is out of range, or a parameter's gradient is pending
            inside a fused step, where no norm exists before the update.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
    """
    check_number(OP, "max_norm", max_norm)
    if not norm_type > 0:
        raise ValueError(f"{OP}: norm_type must be > 0, got {norm_type}")
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(pending_parameters(p) for p in listed):
        raise ValueError(
            f"{OP}: the gradients of W_enc and W_dec are pending in an optimizer with fused=True, "
            "which never forms them: use fused=False to clip"
        )
    grads = []
    for p in listed:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()
        grads.append(p.grad._values() if p.grad.is_sparse else p.grad)
    if not grads:
        return torch.tensor(0.0, device="cpu")
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=_wide(g)) for g in grads]
    kind = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([n.to(norms[0].device, kind) for n in norms]), norm_type
    )
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"{OP}: the norm of the gradients is {float(total)}; nothing was scaled")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.to(g.device, _wide(g)))
    return total


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
