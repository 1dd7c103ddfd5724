"""Adam on one row of a weight matrix, or on a slab of its columns, held in registers.

    g' = g - share w;  m = m decay1 + one_minus1 g';  v = v decay2 + (one_minus2 g') g'
    w = w - (step_size m) / (sqrt(v) scale + eps)

Every operation is rounded on its own, in this order (kernels that use it are compiled without fma),
root and quotient correctly: the bits of every other backend. Sums, of `remove_parallel` and
`unit_norm`, are trees of pairs: no bit depends on how the row is spread over threads, so both
optimizer ops agree. A row moves when its gradient has an element other than 0 (NaN counts), or had
one at most `tail` steps ago; moments decay by the steps since they were last brought up to date.
Bound by w and v, read and written: 16 bytes per element in float32, 8 of them also for m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .moment_codes import decode_moment, encode_moment
from .random_words import random_words, round_stochastically

DIGIT = 12
"""Bits of a gap that one level of the table of powers covers."""
LEVELS = 3
_SIZE = tl.constexpr(1 << DIGIT)
_DIGIT = tl.constexpr(DIGIT)
_LONGEST = tl.constexpr((1 << DIGIT * LEVELS) - 1)
_CHUNK = tl.constexpr(1024)


@triton.jit
def tree_sum(values):
    """Sum of [BLOCK], BLOCK <= 2^13, in pairs half a block apart: the same bits in any layout."""
    for _ in tl.static_range(13):
        if values.shape[0] > 1:
            values = tl.sum(tl.reshape(values, [2, values.shape[0] // 2]), axis=0)
    return tl.sum(values, axis=0)


@triton.jit
def decay(powers, gap):
    """beta^gap, rounded once up to 4095 steps: the product of the powers of its three digits."""
    gap = tl.minimum(gap, _LONGEST)
    power = tl.load(powers + (gap & (_SIZE - 1)))
    power *= tl.load(powers + _SIZE + ((gap >> _DIGIT) & (_SIZE - 1)))
    power *= tl.load(powers + 2 * _SIZE + (gap >> 2 * _DIGIT))
    return power.to(tl.float32)


@triton.jit
def has_gradient(g):
    """Whether an element of [BLOCK] is not 0; NaN is not."""
    return tl.max((g != 0.0).to(tl.int32), axis=0) > 0


@triton.jit
def is_live(at, step, tail):
    """Whether a row that had a gradient in step `at` (0: never) still moves without one."""
    return (at > 0) & (step - at <= tail)


@triton.jit
def parallel_share(gw, ww):
    """How much of w is in g: <g, w> / <w, w>, 0 for w = 0."""
    return tl.where(ww == 0.0, 0.0, tl.div_rn(gw, ww))


@triton.jit
def load_weight(rows, row, column, inside):
    """Float32 weights of one row [BLOCK]."""
    w = tl.load(rows.weight + row * rows.weight_stride + column, mask=inside, other=0.0)
    return w.to(tl.float32)


@triton.jit
def decays(rows, gap):
    """What the first and the second moment of a row are multiplied by."""
    first = 0.0
    if rows.exp_avg is not None:
        first = decay(rows.powers1, gap)
    return first, decay(rows.powers2, gap)


@triton.jit
def moved(rows, row, column, inside, w, g, share, decay1, decay2, C: tl.constexpr):
    """What Adam makes of w, m (g without a first moment) and v: [BLOCK] float32 each."""
    g = tl.where(share == 0.0, g, g - share * w)
    at = row * rows.exp_avg_sq_stride + column
    v = tl.load(rows.exp_avg_sq + at, mask=inside, other=0)  # [BLOCK]
    if rows.exponents is not None:
        BLOCKS: tl.constexpr = (C + 127) // 128
        exponent = tl.load(rows.exponents + row * BLOCKS + column // 128, mask=inside, other=0)
        v = decode_moment(v, exponent)
    v = v * decay2 + (rows.one_minus2 * g) * g
    m = g
    if rows.exp_avg is not None:
        at = row * rows.exp_avg_stride + column
        m = tl.load(rows.exp_avg + at, mask=inside, other=0.0)  # [BLOCK]
        m = m * decay1 + rows.one_minus1 * g
    root = tl.sqrt_rn(v) * rows.scale + rows.eps
    w = tl.where(inside, w - tl.div_rn(rows.step_size * m, root), 0.0)  # eps may be 0
    return w, m, v


@triton.jit
def normalised(w, square):
    """w / |w|, or w = 0."""
    return tl.where(square == 0.0, w, tl.div_rn(w, tl.sqrt_rn(square) + tl.zeros_like(w)))


@triton.jit
def store_moments(rows, row, first, column, inside, m, v, step, seed, C: tl.constexpr):
    """Write m and v of columns from `first` on, a multiple of 128.

    A warp may hold copies of what another one stores: it must have read them.
    """
    BLOCK: tl.constexpr = v.shape[0]
    tl.debug_barrier()
    if rows.exp_avg is not None:
        tl.store(rows.exp_avg + row * rows.exp_avg_stride + column, m, mask=inside)
    at = row * rows.exp_avg_sq_stride + column
    if rows.exponents is not None:
        BLOCKS: tl.constexpr = (C + 127) // 128
        SHARED: tl.constexpr = min(BLOCK, 128)
        random = random_words(row, first, step, seed, BLOCK)
        code, exponent = encode_moment(tl.where(inside, v, 0.0), random, SHARED)
        tl.store(rows.exp_avg_sq + at, code, mask=inside)
        block = first // 128 + tl.arange(0, BLOCK // SHARED)
        tl.store(rows.exponents + row * BLOCKS + block, exponent, mask=block < BLOCKS)
    else:
        tl.store(rows.exp_avg_sq + at, v, mask=inside)


@triton.jit
def store_weight(rows, row, first, column, inside, w, step, seed):
    """Write w of columns from `first` on, behind `store_moments`."""
    if rows.weight.dtype.element_ty == tl.bfloat16:
        w = round_stochastically(w, random_words(row, first, step, seed, w.shape[0]))
    tl.store(rows.weight + row * rows.weight_stride + column, w, mask=inside)


@triton.jit
def halves(values):
    """The two halves of [BLOCK]: [BLOCK // 2] each."""
    return tl.split(tl.permute(tl.reshape(values, [2, values.shape[0] // 2]), [1, 0]))


@triton.jit
def chunks(values):
    """[BLOCK] as a tuple of [CHUNK], or of one shorter one."""
    if values.shape[0] <= _CHUNK:
        return (values,)
    elif values.shape[0] == 0:
        return halves(values)
    else:
        a, b = halves(values)
        return chunks(a) + chunks(b)


@triton.jit
def update_row(
    rows,  # adam_matrix.Rows
    row,
    g,  # [BLOCK] fp32, 0 beyond C
    step,
    tail,
    seed,
    C: tl.constexpr,
    PARALLEL: tl.constexpr,  # remove_parallel
    NORM: tl.constexpr,  # unit_norm
):
    """One step of one row whose C columns one program holds, chunk by chunk: fewer registers."""
    at = tl.load(rows.touched_at + row)
    touched = has_gradient(g)
    if touched | is_live(at, step, tail):
        decay1, decay2 = decays(rows, step - tl.minimum(at + tail, step - 1))
        parts = chunks(g)
        SIZE: tl.constexpr = parts[0].shape[0]
        COUNT: tl.constexpr = (C + SIZE - 1) // SIZE
        share = 0.0
        if PARALLEL:
            gw = tl.zeros([SIZE], tl.float32)
            ww = tl.zeros([SIZE], tl.float32)
            for i in tl.static_range(COUNT):
                column = i * SIZE + tl.arange(0, SIZE)
                w = load_weight(rows, row, column, column < C)  # [SIZE]
                gw += parts[i] * w
                ww += w * w
            share = tl.where(touched, parallel_share(tree_sum(gw), tree_sum(ww)), 0.0)
        new = ()
        square = tl.zeros([SIZE], tl.float32)
        for i in tl.static_range(COUNT):
            column = i * SIZE + tl.arange(0, SIZE)
            inside = column < C
            w = load_weight(rows, row, column, inside)  # [SIZE]
            w, m, v = moved(rows, row, column, inside, w, parts[i], share, decay1, decay2, C)
            store_moments(rows, row, i * SIZE, column, inside, m, v, step, seed, C)
            if NORM:
                square += w * w
                new = new + (w,)
            else:
                store_weight(rows, row, i * SIZE, column, inside, w, step, seed)
        if NORM:
            norm = tree_sum(square)
            for i in tl.static_range(COUNT):
                column = i * SIZE + tl.arange(0, SIZE)
                w = normalised(new[i], norm)
                store_weight(rows, row, i * SIZE, column, column < C, w, step, seed)
        if touched:
            tl.store(rows.touched_at + row, tl.cast(step, tl.int64))
