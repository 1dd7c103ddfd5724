"""What the public functions hand to the ops: leading dimensions folded, dtypes as autocast asks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def encoder_args(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as `[n, d_in]`, the weights as autocast wants them, the bias in float32."""
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    flat, W_enc = autocast(flat, W_enc)
    return flat, W_enc, widen(b_enc)


def codes_of(packed: Tensor | None, W_enc: Tensor, used: Tensor) -> Tensor | None:
    """The codes of `W_enc`, unless autocast has put other weights in its place."""
    return packed if used is W_enc else None


def widen(t: Tensor) -> Tensor:
    """`t` in float32, or float64 if it is that."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast x and weights as an enclosing `torch.autocast` asks; float64 is left alone."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def weights_need_grad(*tensors: Tensor) -> bool:
    """Whether a backward pass will want the entries by feature."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_one(scale: Tensor, *, small: bool) -> bool:
    """Whether the scalar is known to be 1; for what is `small` a GPU is not asked, which waits."""
    return not (small and scale.is_cuda) and bool(scale == 1)
