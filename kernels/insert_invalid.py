"""Stores the first invalid pair of each row: the gap that `place_entries` left becomes NaN.

    indices[p], values[p], gate[p] = first_invalid[row], NaN, 1
    with p = offsets[row] + number of the row's entries below first_invalid[row]

Algorithm: a program returns at once if its BLOCK_N rows are sound, else counts the smaller latents
of each row that is not. The gap holds latent 0 and counts as one of them, unless the invalid latent
is itself 0.
Bound by launch latency: almost no row has an invalid pair.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch


@triton.jit
def _insert_invalid_kernel(
    first_invalid,
    offsets,
    needed,
    indices,
    values,
    gate,
    n,
    capacity,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    firsts = tl.load(first_invalid + rows, mask=rows < n, other=2147483647)  # [BLOCK_N]
    if (tl.min(firsts, 0) == 2147483647) | (tl.load(needed) > capacity):
        return
    for i in range(BLOCK_N):
        row = first_row + i
        first = tl.load(first_invalid + row, mask=row < n, other=2147483647)
        if first != 2147483647:
            start = tl.load(offsets + row)
            end = tl.load(offsets + row + 1)
            below = tl.zeros((BLOCK,), tl.int64)
            for done in range(start, end, BLOCK):
                entry = done + tl.arange(0, BLOCK)
                latent = tl.load(indices + entry, mask=entry < end, other=2147483647)  # [BLOCK]
                below += (latent < first).to(tl.int64)
            position = start + tl.sum(below, 0) - (first > 0).to(tl.int64)
            tl.store(indices + position, first)
            tl.store(values + position, float("nan"))
            tl.store(gate + position, 1.0)


def insert_invalid(
    first_invalid: Tensor,
    offsets: Tensor,
    needed: Tensor,
    indices: Tensor,
    values: Tensor,
    gate: Tensor,
) -> None:
    """Fill the gaps of rows with an invalid pair; `indices` must hold 0 there."""
    n = first_invalid.shape[0]
    config = choose("insert_invalid", indices.device)
    launch(
        _insert_invalid_kernel,
        triton.cdiv(n, config["BLOCK_N"]),
        *(first_invalid, offsets, needed, indices, values, gate, n, indices.shape[0]),
        **config,
    )
