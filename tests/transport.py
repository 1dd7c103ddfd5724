"""Runs an op on another device behind CPU tensors, so that one test suite serves every device.

Arguments are moved with their storage: strides, offsets and therefore misalignment survive.
Results and gradients come back the same way; an argument that the op writes is copied back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


class _Move(torch.autograd.Function):
    """The same tensor, on another device, with the same strides and storage offset."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: torch.device) -> Tensor:
        ctx.source = t.device
        ctx.set_materialize_grads(False)
        return with_storage(t, device)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, None]:
        return (None if d is None else _Move.apply(d, ctx.source)), None


def with_storage(t: Tensor, device: torch.device) -> Tensor:
    """A copy of `t` and of the memory around it on `device`."""
    if t.is_neg() or t.is_conj():
        t = t.resolve_neg().resolve_conj()
    storage = t.detach().untyped_storage()
    copy = torch.empty(len(storage), dtype=torch.uint8, device=device)
    copy.copy_(torch.empty(0, dtype=torch.uint8).to(t.device).set_(storage))
    moved = torch.empty(0, dtype=t.dtype, device=device)
    return moved.set_(copy.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def on_device(op: Any, device: torch.device) -> Callable[..., Any]:
    """`op` computed on `device`, for CPU tensors."""
    schema = op._schema.arguments
    written = [
        i for i, a in enumerate(schema) if a.alias_info is not None and a.alias_info.is_write
    ]

    def move(value: Any, to: torch.device) -> Any:
        if isinstance(value, list):
            return [move(v, to) for v in value]
        return _Move.apply(value, to) if isinstance(value, Tensor) else value

    def copy_back(value: Any, moved: Any) -> None:
        for mine, theirs in zip(pytree.tree_leaves(value), pytree.tree_leaves(moved), strict=True):
            mine.copy_(theirs.to(mine.device))

    def run(*args: Any) -> Any:
        moved = [move(a, device) for a in args]
        results = op(*moved)
        for i in written:
            with torch.no_grad():
                copy_back(args[i], moved[i])
        return pytree.tree_map(lambda t: move(t, torch.device("cpu")), results)

    return run
