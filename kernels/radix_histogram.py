"""radix_histogram: how often each digit occurs in each block of keys, for one pass of a radix sort.

    table[1 + digit * blocks + block] = #{e in block : digit of keys[e]},   table[0] = 0
    starts[block, digit] = #{e in block : smaller digit}

The flat inclusive sum of `table` is then, at `digit * blocks + block`, where the block's first
entry of that digit goes in the sorted order, and its last element is the number of valid keys.
Keys past `count`, and keys outside `[0, features)`, are counted nowhere.
Bound by reading 4 bytes per key; the tables add `8 * DIGITS / BLOCK` bytes per key.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def radix_digits(e, keys_ptr, count_ptr, capacity, features, shift, DIGITS: tl.constexpr):
    """Digits of the keys at positions `e`, and which of them are valid."""
    count = tl.minimum(tl.load(count_ptr), capacity)
    key = tl.load(keys_ptr + e, mask=e < count, other=-1)  # [BLOCK]
    return (key >> shift) & (DIGITS - 1), (key >= 0) & (key < features)


@triton.jit
def _radix_histogram_kernel(
    keys_ptr,
    count_ptr,
    table_ptr,
    starts_ptr,
    capacity,
    features,
    shift,
    BLOCK: tl.constexpr,
    DIGITS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    e = pid * BLOCK + tl.arange(0, BLOCK)
    digit, valid = radix_digits(e, keys_ptr, count_ptr, capacity, features, shift, DIGITS)
    counts = tl.histogram(digit, DIGITS, mask=valid)  # [DIGITS]
    d = tl.arange(0, DIGITS).to(tl.int64)
    tl.store(table_ptr + 1 + d * tl.num_programs(0) + pid, counts)
    tl.store(starts_ptr + pid * DIGITS + d, tl.cumsum(counts, 0) - counts)
    if pid == 0:
        tl.store(table_ptr, 0)


def radix_histogram(
    keys: Tensor,
    count: Tensor,
    table: Tensor,
    starts: Tensor,
    features: int,
    shift: int,
    config: dict[str, int],
) -> None:
    """Fill `table` and `starts` for the digit at bit `shift`.

    Args:
        keys: `[capacity]` int32, contiguous.
        count: `[1]`, how many of them are entries.
        table: `[1 + digits * blocks]` int32, or int64 when positions need it.
        starts: `[blocks, digits]` int32; the digits are a power of two.
        features: keys outside `[0, features)` are left out.
        shift: lowest bit of the digit.
        config: BLOCK, num_warps.
    """
    blocks, digits = starts.shape
    pointers = (keys, count, table, starts)
    launch(
        _radix_histogram_kernel,
        blocks,
        *(*pointers, keys.shape[0], features, shift),
        DIGITS=digits,
        BLOCK=config["BLOCK"],
        num_warps=config["num_warps"],
    )
