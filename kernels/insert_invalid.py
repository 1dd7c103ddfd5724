"""Stores the first invalid pair of each row: the gap that `place_entries` left becomes NaN.

    indices[p], values[p], gate[p] = first_invalid[row], NaN, 1
    with p = offsets[row] + number of the row's entries below first_invalid[row]

Algorithm: a program per row returns at once when the row is sound, else counts the smaller latents.
The gap holds latent 0 and counts as one of them, unless the invalid latent is itself 0.
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
    capacity,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(first_invalid + row)
    if (first == 2147483647) | (tl.load(needed) > capacity):
        return
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
    launch(
        _insert_invalid_kernel,
        first_invalid.shape[0],
        *(first_invalid, offsets, needed, indices, values, gate, indices.shape[0]),
        **choose("insert_invalid", indices.device),
    )
