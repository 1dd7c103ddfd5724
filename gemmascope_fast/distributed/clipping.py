"""Clipping of the gradients of a slice by the norm of the whole dictionary's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_number
from .communication import all_reduce
from .layout import LATENTS, Layout

OP = "distributed.clip_grad_norm_"


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, layout: Layout, max_norm: float) -> Tensor:
    """Scale the gradients of all slices so that the norm of all of them is at most `max_norm`.

    `grad *= min(1, max_norm / (|all gradients| + 1e-6))`. One all-reduce of a number over "tp".

    Args:
        module: this rank's slice (`sharded.local`), its gradients summed over "dp"
            (`updates.sum_gradients_`) and not pending in a fused optimizer.
        layout: of the latents (`sharded.layout`).
        max_norm: finite, >= 0.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank.

    Raises:
        TypeError: `max_norm` is not a number.
        ValueError: it is out of range, or a gradient is pending in a fused step.
    """
    check_number(OP, "max_norm", max_norm)
    deferred = getattr(module, "deferred", None)
    if deferred is not None and deferred.pending is not None:
        raise ValueError(
            f"{OP}: the gradients of W_enc and W_dec are pending in an optimizer with fused=True, "
            "which never forms them: use fused=False to clip"
        )
    held = [(n.split(".")[0], p.grad) for n, p in module.named_parameters()]
    grads = [(name in LATENTS, g) for name, g in held if g is not None]
    squares = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros(())}
    for cut, g in grads:
        wide = torch.promote_types(g.dtype, torch.float32)
        square = torch.linalg.vector_norm(g, dtype=wide).double().square()
        squares[cut] = squares[cut].to(square.device, torch.float64) + square
    total = (all_reduce(squares[True], layout.tp_group) + squares[False]).sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for _, g in grads:
        g.mul_(factor.to(g.device, torch.promote_types(g.dtype, torch.float32)))
    return total
