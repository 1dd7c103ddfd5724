"""The optimizer of one rank's slice of the latents, and the sum of gradients over "dp".

Over "tp" nothing is exchanged: a rank has the whole gradient of its own latents, and that of b_dec
and W_skip follows from a reconstruction that all ranks have. Over "dp" every rank has the summands
of its tokens. A latent that no token of the batch has touched has a gradient of 0 on every rank:
the union of the touched rows is agreed on, and unless it is all of them, only those travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..optim.rows import as_rows
from ..training.settings import Settings
from ..training.updates import Updates
from .communication import MAX, Group, all_reduce
from .layout import LATENTS, Layout

BUFFER_BYTES = 64 << 20
"""Of the rows that travel at a time."""

SPREAD = 0x9E3779B97F4A7C15
"""Odd factor that tells the stochastic rounding of the slices apart."""


class MeshUpdates(Updates):
    """Adam over one rank's slice; equal bits on the ranks of "dp".

    A fused step never forms the gradients that "dp" has to sum, so it serves where dp is 1.

    Args:
        module: the slice.
        settings: of the run.
        layout: of the latents.
    """

    def __init__(self, module: Any, settings: Settings, layout: Layout) -> None:
        super().__init__(module, replace(settings, fused=settings.fused and layout.dp == 1))
        self._group = layout.dp_group
        self.optimizer.prepare()
        for name, p in module.named_parameters():
            if name in LATENTS:
                seed = self.optimizer.state[p]["seed"] + SPREAD * layout.latents.start
                self.optimizer.state[p]["seed"] = seed % 2**63

    @torch.no_grad()
    def fired(self, active: Sequence[Tensor] = ()) -> Tensor:
        """`[local latents]` bool: active somewhere in the batch of all ranks."""
        return all_reduce(super().fired(active).to(torch.uint8), self._group, MAX).bool()

    def step(self, lr: float) -> None:
        """Sum the gradients over "dp", then update."""
        if self._group is not None and self._group.size() > 1:
            sum_gradients_(self._module, self._group)
        super().step(lr)


@torch.no_grad()
def sum_gradients_(module: Any, group: Group) -> int:
    """Sum the dense gradients of a slice over the ranks of `group`, in place.

    Sent: the vectors and W_skip in one all-reduce, one byte per latent of which rows are touched,
    and the touched rows of W_enc and W_dec in float32, or all of both in place.

    Returns:
        The number of rows that travelled.
    """
    matrices = [as_rows(p.grad, p) for p in (module.W_enc, module.W_dec)]
    others = [p.grad for n, p in module.named_parameters() if n not in ("W_enc", "W_dec")]
    _sum_vectors_([g for g in others if g is not None], group)
    touched = torch.zeros(matrices[0].shape[0], dtype=torch.uint8, device=matrices[0].device)
    for g in matrices:  # the norm makes no copy, and is NaN where an element is
        touched |= (torch.linalg.vector_norm(g, float("inf"), dim=1) != 0).to(torch.uint8)
    rows = all_reduce(touched, group, MAX).nonzero()[:, 0]
    if rows.shape[0] == touched.shape[0] and matrices[0].dtype.itemsize >= 4:
        for g in matrices:
            all_reduce(g, group)
    else:
        _sum_rows_(matrices, rows, group)
    return rows.shape[0]


def _sum_vectors_(gradients: list[Tensor], group: Group) -> None:
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    flat = all_reduce(torch.cat([g.reshape(-1).to(wide) for g in gradients]), group)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):  # type: ignore[no-untyped-call]
        g.copy_(part.view(g.shape))


def _sum_rows_(matrices: list[Tensor], rows: Tensor, group: Group) -> None:
    """Sum `rows` of the matrices, side by side, so many at a time that a buffer holds them."""
    wide = torch.promote_types(matrices[0].dtype, torch.float32)
    width = sum(g.shape[1] for g in matrices)
    for part in rows.split(max(BUFFER_BYTES // (width * wide.itemsize), 1)):  # type: ignore[no-untyped-call]
        packed = all_reduce(torch.cat([g[part].to(wide) for g in matrices], 1), group)
        first = 0
        for g in matrices:
            g[part] = packed[:, first : first + g.shape[1]].to(g.dtype)
            first += g.shape[1]
