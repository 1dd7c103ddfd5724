"""Clipping of the gradients of a sharded module by the norm of the whole dictionary's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..arguments import check_number
from .base import Sharded, fused
from .communication import all_reduce
from .layout import LATENTS

OP = "distributed.clip_grad_norm_"


@torch.no_grad()
def clip_grad_norm_(module: Sharded, max_norm: float) -> Tensor:
    """Scale the gradients on all ranks so that the norm of all of them is at most `max_norm`.

    `grad *= min(1, max_norm / (|all gradients| + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`. One
    all-reduce of a number over "tp".

    Args:
        module: what `shard` or `load` returned. Its gradients are those of its parameters, or those
            that `hand_gradients` has given to `module.local`; with several ranks of "dp" they have
            to be summed over them first.
        max_norm: finite, >= 0.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank of "tp".

    Raises:
        TypeError: `module` is not sharded, or `max_norm` is not a number.
        ValueError: `max_norm` is out of range, or a gradient is pending in a fused step, is not
            summed over "dp" yet, or is there twice.
    """
    if not isinstance(module, Sharded):
        kind = type(module).__name__
        raise TypeError(f"{OP}: module must be what shard or load returned, got {kind}")
    check_number(OP, "max_norm", max_norm)
    deferred = fused(module.local)
    if deferred is not None and deferred.pending is not None:
        raise ValueError(
            f"{OP}: the gradients of W_enc and W_dec are pending in an optimizer with fused=True, "
            "which never forms them: use fused=False to clip"
        )
    grads = [(name.split(".")[0] in LATENTS, g) for name, g in _gradients(module)]
    cut, common = torch.zeros(2, dtype=torch.float64, device=module.layout.device)
    for over_latents, g in grads:
        wide = torch.promote_types(g.dtype, torch.float32)
        square = torch.linalg.vector_norm(g, dtype=wide).double().square()
        (cut if over_latents else common).add_(square)
    total: Tensor = (all_reduce(cut, module.tp_group) + common).sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for _, g in grads:
        g.mul_(factor.to(torch.promote_types(g.dtype, torch.float32)))
    return total


def _gradients(module: Sharded) -> Iterator[tuple[str, Tensor]]:
    """Name and this rank's memory of every gradient."""
    local = module.local
    for name, p in module.named_parameters():
        handed, own = local.get_parameter(name).grad, p.grad
        if handed is not None and own is not None:
            raise ValueError(f"{OP}: {name} has a gradient here and in local: call hand_gradients")
        found = handed if own is None else _summed(name, own, module)
        if found is not None:
            yield name, found


def _summed(name: str, grad: Any, module: Sharded) -> Tensor:
    assert isinstance(grad, DTensor)
    summands = [p.is_partial() and module.mesh.size(at) > 1 for at, p in enumerate(grad.placements)]
    if any(summands):
        raise ValueError(
            f"{OP}: the gradient of {name} is not summed over dp: first do "
            "p.grad = p.grad.redistribute(placements=p.placements) with every parameter"
        )
    mine: Tensor = grad.to_local()
    return mine
