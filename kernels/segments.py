"""Entries of one latent in pieces, so that no program is long where a latent always fires.

In latent order, latent j owns positions `feature_offsets[j]` to `feature_offsets[j + 1]`. Its first
SEGMENT entries belong to the program of latent j; the rest is cut every SEGMENT entries after its
start. Window w covers positions `[w SEGMENT, (w + 1) SEGMENT)`. A latent with a later piece is
longer than SEGMENT, so at most one later piece starts in a window, and its latent owns position
`w SEGMENT`: the pieces are found, and their sums stored, by window, without a list or a count on
the host. Piece k of a latent that begins at b starts at `b + k SEGMENT`, in window
`b // SEGMENT + k`.
Bound by latency: three dependent loads per window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_order import LatentOrder
from .launching import launch


@triton.jit
def _owners_kernel(
    owners,  # [windows] int32
    feature_offsets,  # [d_sae + 1] int64
    permutation,  # [capacity] int64
    indices,  # [capacity] int32
    windows,
    capacity,
    first,
    last,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = window * SEGMENT  # [BLOCK]
    stored = tl.load(feature_offsets + last)
    inside = (window < windows) & (at < tl.minimum(stored, capacity))
    entry = tl.load(permutation + at, mask=inside, other=-1)
    inside &= (entry >= 0) & (entry < capacity)
    latent = tl.load(indices + entry, mask=inside, other=-1).to(tl.int64)
    inside &= (latent >= first) & (latent < last)
    begin = tl.load(feature_offsets + latent, mask=inside, other=0)
    end = tl.minimum(tl.load(feature_offsets + latent + 1, mask=inside, other=0), capacity)
    start = begin + (window - begin // SEGMENT) * SEGMENT  # of the piece that starts here
    inside &= (begin >= 0) & (start > begin) & (start < end)
    tl.store(owners + window, tl.where(inside, latent, -1).to(tl.int32), mask=window < windows)


def later_pieces(order: LatentOrder, first: int, last: int, size: int) -> Tensor:
    """The latent of the later piece that starts in each window of `size` positions, or -1.

    Args:
        order: the entries in latent order.
        first: only latents from here on ...
        last: ... to before here count.
        size: SEGMENT, a power of two.

    Returns:
        `[windows]` int32; no windows when no latent can be longer than `size`.
    """
    capacity = order.indices.shape[0]
    windows = triton.cdiv(capacity, size) if capacity > size else 0
    owners = torch.empty(windows, dtype=torch.int32, device=order.indices.device)
    launch(
        _owners_kernel,
        triton.cdiv(windows, 128),
        *(owners, order.feature_offsets, order.permutation, order.indices),
        *(windows, capacity, first, last),
        BLOCK=128,
        SEGMENT=size,
        num_warps=4,
    )
    return owners
