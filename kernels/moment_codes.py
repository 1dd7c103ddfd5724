"""Second moments in 8 bits: the float's own bits, cut to 5 exponent and 3 mantissa bits.

    value = 2^(e - 31) 2^(code // 8) (1 + code % 8 / 8),   e the exponent of 128 columns; 0 is 0

What is cut is rounded up with its probability: the decay by 0.999, far below a code's step, is not
lost. A NaN is code 255 of a block whose exponent is 255. 1.01 bytes per element instead of 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOMENT_BLOCK = 128
"""Columns that share one exponent."""


@triton.jit
def decode_moment(code, exponent):
    """Float32 values of codes [BLOCK] uint8, each with the exponent of its block [BLOCK] uint8."""
    # At most (255 - 31) 2^23 + 255 2^20 = 0x7ff00000, a NaN: no overflow.
    bits = (exponent.to(tl.int32) - 31) * 8388608 + code.to(tl.int32) * 1048576
    return tl.where((bits < 0) | (code == 0), 0, bits).to(tl.float32, bitcast=True)


@triton.jit
def encode_moment(v, random, SHARED: tl.constexpr):
    """Codes [BLOCK] uint8 and exponents [BLOCK // SHARED] uint8 of v [BLOCK], 0 beyond the row."""
    BLOCKS: tl.constexpr = v.shape[0] // SHARED
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may be negative
    largest = tl.max(tl.reshape(bits, [BLOCKS, SHARED]), axis=1)  # [BLOCKS]
    field = (largest.to(tl.uint32) + 1048576) >> 23
    field = tl.minimum(field.to(tl.int32), 255)
    base = tl.broadcast_to(((field - 31) * 8388608)[:, None], [BLOCKS, SHARED])
    # By eighths of an octave: above the base at most 2^28, below it as little as -2^31.
    code = (bits - tl.reshape(base, v.shape) + (random >> 12).to(tl.int32)) >> 20
    code = tl.where((code < 0) | (bits == 0), 0, tl.minimum(code, 255))
    code = tl.where(bits > 0x7F800000, 255, code)
    return code.to(tl.uint8), field.to(tl.uint8)
