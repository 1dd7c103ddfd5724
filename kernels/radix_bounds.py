"""radix_bounds: where each key's run begins in sorted keys.

    bounds[j] = #{e < count : keys[e] < j},   j = 0 .. features

One binary search per j. Neighbours share all but the last steps, so that the reads come from L1 and
L2; a counting pass would need atomics and a table that is zeroed first.
Bound by latency: log2(capacity) dependent reads, 8 * (features + 1) bytes written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch


@triton.jit
def _radix_bounds_kernel(keys_ptr, count_ptr, bounds_ptr, features, steps, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int64)
    high = low + tl.load(count_ptr)
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        key = tl.load(keys_ptr + middle, mask=open_, other=0)  # [BLOCK]
        smaller = key < j
        low = tl.where(open_ & smaller, middle + 1, low)
        high = tl.where(open_ & ~smaller, middle, high)
    tl.store(bounds_ptr + j, low, mask=j <= features)


def radix_bounds(keys: Tensor, count: Tensor, bounds: Tensor) -> None:
    """Fill `bounds [features + 1]` int64 from ascending `keys [capacity]`, `count [1]` of them."""
    size = bounds.shape[0]
    config = choose("radix_bounds", bounds.device, n=size)
    programs = triton.cdiv(size, config["BLOCK"])
    steps = keys.shape[0].bit_length()
    launch(_radix_bounds_kernel, programs, keys, count, bounds, size - 1, steps, **config)
