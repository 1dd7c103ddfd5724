"""Random bits of the optimizer, and the stochastic rounding that uses them.

    word c % 4 of Philox 4x32-7 at the counter (c // 4, row, row // 2^32, step)

The key is the seed: the same bits as on every other backend. Source: Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3". One counter gives four columns: seven rounds of four
products. The lower 16 bits of a word round a weight, the upper 20 a second moment.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(row, first, step, seed, BLOCK: tl.constexpr):
    """Words of columns `first` (a multiple of 4) to `first + BLOCK`: [BLOCK] uint32."""
    quad = (tl.arange(0, BLOCK // 4) + first // 4).to(tl.uint32)
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    at = (tl.cast(step, tl.int64) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(seed, quad, low, high, at, 7)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])


@triton.jit
def round_stochastically(w, random):
    """Float32 `w` as bfloat16: up with the probability of the part that is cut off."""
    bits = w.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    cut = tl.where(finite, bits + (random & 0xFFFF), bits) >> 16
    cut = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, cut)  # a NaN must not become infinite
    return cut.to(tl.uint16).to(tl.bfloat16, bitcast=True)
