"""Rows of exactly k entries: the best of each row, and zeros where fewer than k are positive.

    result(i) = best(i) with the smallest other latents, at value 0, in ascending order

Algorithm: entry e of a row, at latent l, has l - e other latents below it, of which the row takes
the first k - m, where m is its number of best entries. So it lies at `e + min(l - e, k - m)`. The
remaining positions hold the fillers, and a filler lies at the position that is its own latent: all
latents below it are in the row. It is below k, since of the latents below k at most m are positive
and k - m are not. So positions are numbered first and the best entries written over them.
Bound: memory, 16 bytes per entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch


@triton.jit
def _select_fill_kernel(
    latents_ptr,
    values_ptr,
    counts_ptr,
    out_latents_ptr,
    out_values_ptr,
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    count = tl.load(counts_ptr + row, mask=row < n, other=0)  # [ROWS]
    most = tl.max(count, 0)
    count = count[:, None]
    first = (row * k)[:, None]
    for start in range(0, most, BLOCK):
        entry = start + tl.arange(0, BLOCK)[None, :]
        inside = entry < count
        latents = tl.load(latents_ptr + first + entry, mask=inside, other=0)  # [ROWS, BLOCK]
        values = tl.load(values_ptr + first + entry, mask=inside, other=0.0)  # [ROWS, BLOCK]
        target = first + entry + tl.minimum(latents - entry, k - count)
        tl.store(out_latents_ptr + target, latents, mask=inside)
        tl.store(out_values_ptr + target, values, mask=inside)


def select_fill(latents: Tensor, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Spread the best entries of each row over exactly k.

    Args:
        latents: `[n, k]` int32, contiguous: the first `counts[i]` of row i, ascending.
        values: `[n, k]` float32, contiguous.
        counts: `[n]` int32.

    Returns:
        `[n * k]` int32 latents and `[n * k]` float32 values.
    """
    n, k = latents.shape
    positions = torch.arange(k, dtype=torch.int32, device=latents.device)
    out_latents = positions.repeat(n)
    out_values = torch.zeros(n * k, dtype=torch.float32, device=latents.device)
    config = choose("select_fill", latents.device, k=k)
    args = latents, values, counts, out_latents, out_values, n, k
    launch(_select_fill_kernel, -(-n // config["ROWS"]), *args, **config)
    return out_latents, out_values
