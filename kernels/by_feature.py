"""by_feature: the feature-major view of CSR entries, a stable sort of their positions by latent.

    permutation = stable argsort of indices[:nnz],   feature_offsets[j] = #{e : indices[e] < j}

Radix sort from the lowest digit, ceil(log2(d_sae) / 8) passes: digit counts per block, a sum over
(digit, block), a stable scatter. The first pass drops padding and latents out of range; the last
one writes the permutation. 16k and 65k latents take 2 passes, 1M takes 3.
Bytes per entry: 40 at 2 passes, 60 at 3 (`torch.sort` of 32-bit keys with 64-bit positions takes
four passes, at least 100). At 0.5M entries everything lies in the L2 and launches bound it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .launching import choose
from .radix_bounds import radix_bounds
from .radix_histogram import radix_histogram
from .radix_scatter import radix_scatter

RADIX_BITS = 8
"""Digits of at most 8 bits: a table of 256 rows per block, and a short histogram."""

NARROW_POSITIONS = 2**31
"""Positions are 32 bits wide below this many entries."""


def by_feature(offsets: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Return `feature_offsets [d_sae + 1]` and `permutation [capacity]`, both int64.

    Nothing waits for the device. Entries whose latent is out of range are in neither result;
    `feature_offsets[-1]` counts the others, and `permutation` is 0 past them.
    """
    capacity = indices.shape[0]
    feature_offsets = (
        offsets.new_zeros(d_sae + 1) if capacity == 0 else offsets.new_empty(d_sae + 1)
    )
    permutation = offsets.new_empty(capacity)
    if capacity > 0:
        keys, count = _sort(indices.contiguous(), offsets[-1:], permutation, d_sae)
        radix_bounds(keys, count, feature_offsets)
    return feature_offsets, permutation


def _sort(keys: Tensor, count: Tensor, permutation: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Fill `permutation`; return the sorted keys and how many there are."""
    capacity = keys.shape[0]
    config = choose("by_feature", keys.device, n=capacity)
    blocks = triton.cdiv(capacity, config["BLOCK"])
    shifts, digits = _digits(d_sae)
    wide = torch.int32 if capacity < NARROW_POSITIONS else torch.int64
    table = permutation.new_empty(1 + digits * blocks, dtype=wide)
    starts = keys.new_empty(blocks, digits)
    positions = None
    for shift in shifts:
        last = shift == shifts[-1]
        keys_out = torch.empty_like(keys)
        positions_out = permutation if last else torch.empty_like(keys, dtype=wide)
        radix_histogram(keys, count, table, starts, d_sae, shift, config)
        ends = table.cumsum(0, dtype=wide)
        outputs = (keys_out, positions_out)
        radix_scatter(keys, positions, count, ends, starts, *outputs, d_sae, shift, last, config)
        keys, positions, count = keys_out, positions_out, ends[-1:]
    return keys, count


def _digits(d_sae: int) -> tuple[list[int], int]:
    """Lowest bit of each pass's digit, and how many values a digit has."""
    bits = max((d_sae - 1).bit_length(), 1)
    passes = triton.cdiv(bits, RADIX_BITS)
    width = triton.cdiv(bits, passes)
    return [width * i for i in range(passes)], 2**width
