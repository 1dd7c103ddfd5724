"""Selection by rank, device side: order-preserving keys, rows in two parts, compaction of a tile.

Candidates are positive or NaN, so the bits of a value, read as an integer, order it; NaN becomes
the largest key whatever its payload, so that NaNs tie and go to the smaller latent. A row is the
entries kept of earlier latents followed by the new ones, so its latents ascend. Tiles are
[rows, positions]: one row per warp on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

ABSENT: tl.constexpr = tl.constexpr(-1)
"""Key of a position past the end of a row: below every cut."""
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
NAN: tl.constexpr = tl.constexpr(0x7FC00000)
"""Above Inf, a quiet NaN as bits, and not the last integer: one more is still a key."""


@triton.jit
def load_row(kept_ptr, found_ptr, position, kept, total):
    """Elements of rows at `position`; `found_ptr` is where position 0 would be if it had any."""
    inside = position < kept
    old = tl.load(kept_ptr + position, mask=inside, other=0)
    new = tl.load(found_ptr + position, mask=(position >= kept) & (position < total), other=0)
    return tl.where(inside, old, new)


@triton.jit
def to_keys(values, present):
    """Integers that order values which are positive or NaN."""
    keys = tl.where(values != values, NAN, values.to(tl.int32, bitcast=True))
    return tl.where(present, keys, ABSENT)


@triton.jit
def to_values(keys):
    """The values of keys; NaN for the key of NaN."""
    return keys.to(tl.float32, bitcast=True)


@triton.jit
def next_key(cut):
    """Smallest key that beats `cut`; Inf bounds both Inf and NaN, since no value exceeds NaN."""
    return tl.minimum(cut + 1, INFINITY)


@triton.jit
def ranks(keys, cut):
    """Which keys lie above the cut, which equal it, and how many of each precede in the row.

    One scan serves both: tiles are at most 16,384 long, so two counts fit an integer.
    """
    above = keys > cut
    equal = keys == cut
    ones = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(ones, 1) - ones
    return above, equal, before & 0xFFFF, before >> 16
