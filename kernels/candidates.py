"""Latents that may still belong to the largest of their row, from the fused encoder.

    all (i, j), start <= j < end, with pre[i, j] > 0 and pre[i, j] >= bound[i], or pre[i, j] NaN

Source: a lower bound on the k-th largest value keeps TopK exact, arXiv 2406.04093.
Algorithm: `encode_tiles`, `scan_rows`, `place_entries`, without a host synchronisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .encode_tiles import encode_tiles
from .place_entries import place_entries
from .scan_rows import scan_rows


class Candidates(NamedTuple):
    """CSR entries of fixed capacity, latents ascending inside a row."""

    offsets: Tensor
    """`[n + 1]` int64, at most the capacity."""
    indices: Tensor
    """`[capacity]` int32; zeros past `offsets[-1]`."""
    values: Tensor
    """`[capacity]` float32."""
    needed: Tensor
    """int64 scalar: the true count. Above the capacity, indices and values are all zero."""


def candidates(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    bound: Tensor,
    start: int,
    end: int,
    capacity: int,
) -> Candidates:
    """Candidates among the latents `[start, end)`.

    Args:
        x: `[n, d]`; W_enc: `[d, F]`, any strides; b_enc: `[F]` float32.
        bound: `[n]` float32, any stride (0: one bound for all rows).
        start: first latent; end: one past the last.
        capacity: number of entries to make room for.

    Returns:
        The entries; nothing waits for the device, so compare `needed` with the capacity.
    """
    tiles = encode_tiles(x, W_enc[:, start:end], b_enc[start:end], capacity, bound=bound)
    offsets = scan_rows(tiles.counts, None)
    needed = offsets[-1].clone()
    offsets.clamp_(max=capacity)
    indices = torch.zeros(capacity, dtype=torch.int32, device=x.device)
    values = torch.zeros(capacity, dtype=torch.float32, device=x.device)
    place_entries(tiles, offsets, needed, indices, values, first_latent=start)
    return Candidates(offsets, indices, values, needed)
