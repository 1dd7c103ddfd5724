"""radix_scatter: moves keys and positions to where one pass of a stable radix sort puts them.

    to(e) = table[digit * blocks + block] + #{e' < e in the block : same digit}

`digit << log2(BLOCK) | place in the block` are distinct integers: sorting them in registers groups
a block by digit and keeps the order inside a digit, so no atomic decides a rank and every digit's
entries are stored as one run. `table` is the inclusive sum of `radix_histogram`'s.
Bound by 4 to 8 bytes read and 8 to 12 written per key; the sort costs log2(BLOCK)^2 / 2 exchanges.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .radix_histogram import radix_digits


@triton.jit
def _radix_scatter_kernel(
    keys_ptr,
    positions_ptr,
    count_ptr,
    table_ptr,
    starts_ptr,
    keys_out_ptr,
    positions_out_ptr,
    capacity,
    features,
    shift,
    LAST: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACE_BITS: tl.constexpr,
    DIGITS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0).to(tl.int64)
    first = pid * BLOCK
    place = tl.arange(0, BLOCK)
    digit, valid = radix_digits(
        first + place, keys_ptr, count_ptr, capacity, features, shift, DIGITS
    )
    packed = (tl.where(valid, digit, DIGITS) << PLACE_BITS) | place  # what is not valid comes last
    if SORT:
        packed = tl.sort(packed)  # [BLOCK]
        rank = place
    else:
        rank = tl.sum((packed[None, :] < packed[:, None]).to(tl.int32), 1)
    digit = (packed >> PLACE_BITS).to(tl.int64)
    source = first + (packed & (BLOCK - 1))
    valid = digit < DIGITS
    start = tl.load(starts_ptr + pid * DIGITS + digit, mask=valid, other=0)  # [BLOCK]
    to = tl.load(table_ptr + digit * blocks + pid, mask=valid, other=0).to(tl.int64)  # [BLOCK]
    to += rank - start
    if positions_ptr is None:
        position = source
    else:
        position = tl.load(positions_ptr + source, mask=valid, other=0)  # [BLOCK]
    key = tl.load(keys_ptr + source, mask=valid, other=0)  # [BLOCK], in L1 since radix_digits
    tl.store(keys_out_ptr + to, key, mask=valid)
    tl.store(positions_out_ptr + to, position, mask=valid)
    if LAST:
        e = first + place
        sorted_ = tl.load(table_ptr + DIGITS * blocks)
        tl.store(positions_out_ptr + e, 0, mask=(e >= sorted_) & (e < capacity))


def radix_scatter(
    keys: Tensor,
    positions: Tensor | None,
    count: Tensor,
    table: Tensor,
    starts: Tensor,
    keys_out: Tensor,
    positions_out: Tensor,
    features: int,
    shift: int,
    last: bool,
    config: dict[str, int],
) -> None:
    """Write `keys_out` and `positions_out`, ordered by the digit at bit `shift`.

    Args:
        keys: `[capacity]` int32, contiguous.
        positions: what travels with them; None: their own places.
        count: `[1]`, how many keys are entries.
        table: inclusive sum of `radix_histogram`'s table.
        starts: `[blocks, digits]` of `radix_histogram`.
        keys_out: `[capacity]` int32; past the valid keys it stays as it was.
        positions_out: `[capacity]` int32 or int64.
        features: keys outside `[0, features)` are left out.
        shift: lowest bit of the digit.
        last: zero `positions_out` past the valid keys.
        config: BLOCK, num_warps, and SORT; without it places are found by counting in
            BLOCK^2 steps, which suits the interpreter (its `tl.sort` takes 1 ms per key).
    """
    blocks, digits = starts.shape
    pointers = (keys, positions, count, table, starts, keys_out, positions_out)
    launch(
        _radix_scatter_kernel,
        blocks,
        *(*pointers, keys.shape[0], features, shift),
        LAST=last,
        PLACE_BITS=config["BLOCK"].bit_length() - 1,
        DIGITS=digits,
        **config,
    )
