"""Collectives of the library: every byte that a rank sends passes through here.

Tensor parallelism has two conjugate operators (arXiv 1909.08053, section 3). With x and everything
made of the reconstruction equal on all ranks of "tp",

    enter    x -> x                                d_x = sum over ranks of their d_x
    leave    sum over ranks of their partial       d_partial = d_recon, which all ranks have

`scatter` is `leave` with the result cut over the tokens; its gradient is gathered from them.
A group of one rank communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import part

Group = dist.ProcessGroup
SUM, MIN, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX

# named `*_single` since torch 2.13, which warns about the older names
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(t: Tensor, group: Group | None, op: Any = SUM) -> Tensor:
    """Reduce `t` over the ranks, in place where it is contiguous; returns the result."""
    if group is None or group.size() == 1:
        return t
    t = t.contiguous()
    dist.all_reduce(t, op=op, group=group)
    return t


def all_gather(t: Tensor, group: Group | None) -> Tensor:
    """`[ranks, *t.shape]` of the tensors of all ranks, which have one shape."""
    if group is None or group.size() == 1:
        return t[None]
    found = t.new_empty(group.size() * t.numel())
    _all_gather(found, t.contiguous().view(-1), group=group)
    return found.view(group.size(), *t.shape)


def gather_parts(t: Tensor, size: int, group: Group) -> Tensor:
    """`[size, ...]` from the ranks' parts of `range(size)` (`layout.part`), in their order."""
    width = -(-size // group.size())
    return all_gather(_padded(t, width), group).flatten(0, 1)[:size]


def scatter_sum(t: Tensor, group: Group) -> Tensor:
    """This rank's rows (`layout.part`) of the sum over ranks of `t [n, ...]`."""
    size, width = t.shape[0], -(-t.shape[0] // group.size())
    mine = part(size, group.size(), group.rank())
    if group.size() == 1:
        return t
    found = t.new_empty((width, *t.shape[1:]))
    _reduce_scatter(found, _padded(t, width * group.size()), group=group)
    return found[: mine.stop - mine.start]


def _padded(t: Tensor, rows: int) -> Tensor:
    missing = rows - t.shape[0]
    return torch.cat([t, t.new_zeros((missing, *t.shape[1:]))]) if missing else t.contiguous()


def enter(t: Tensor, group: Group) -> Tensor:
    """`t`, equal on all ranks, where the ranks begin to use it for different things."""
    if not (torch.is_grad_enabled() and t.requires_grad):
        return t
    return _Enter.apply(t, group)  # type: ignore[no-any-return, no-untyped-call]


def leave(partial: Tensor, group: Group) -> Tensor:
    """Sum of the ranks' `partial`, which is overwritten."""
    summed: Tensor = _Leave.apply(partial, group)  # type: ignore[no-untyped-call]
    return summed


def scatter(partial: Tensor, whole: Tensor, group: Group) -> Tensor:
    """This rank's rows of `whole [n, d]`, equal on all ranks, plus the ranks' `partial [n, d]`."""
    return _Scatter.apply(partial, whole, group)  # type: ignore[no-any-return, no-untyped-call]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return all_reduce(d.clone(memory_format=torch.contiguous_format), ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        return all_reduce(partial.detach(), group)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return d, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, whole: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.size = group, partial.shape[0]
        mine = part(ctx.size, group.size(), group.rank())
        return scatter_sum(partial, group) + whole[mine]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        every = gather_parts(d, ctx.size, ctx.group)
        return every, every, None
