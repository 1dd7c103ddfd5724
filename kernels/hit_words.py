"""Hits of a tile as words of bits, and the values behind them, without leaving the registers.

    [BLOCK_N, BLOCK_F] -> [BLOCK_N, words, BITS], latents ascending

A store or a scan of the whole tile would cost a layout change and thousands of instructions; a tile
has a few hits in a thousand. The columns of the product are dealt so that the BITS elements of a
word lie in one thread: counting, ranking and picking them needs no exchange between threads. With
another layout than the table's LANES and BITS describe, results are the same and shuffles appear.
"""

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """Number of bits set in each int32."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit
def log2(bit):
    """Position of the only bit set in each int32: the exponent of its float32."""
    exact = bit.to(tl.uint32, bitcast=True).to(tl.float32)
    return (exact.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def dealt(BLOCK_F: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr):
    """Latent of each column of the product, relative to the tile.

    Tensor cores leave the columns 2 (i LANES + q) + {0, 1} of a row in thread q. Dealt columns
    make these the latents [q BITS, (q + 1) BITS): the registers of one thread hold a whole word.
    """
    column = tl.arange(0, BLOCK_F).to(tl.int64)
    inside = column % (LANES * BITS)
    lane = inside // 2 % LANES
    latent = lane * BITS + inside // (2 * LANES) * 2 + inside % 2
    return tl.max_contiguous(tl.multiple_of(column - inside + latent, 2), 2)


@triton.jit
def in_words(
    tile,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """`[BLOCK_N, BLOCK_F]` as `[BLOCK_N, words, BITS]`, latents ascending."""
    split = tl.reshape(tile, (BLOCK_N, BLOCK_F // (LANES * BITS), BITS // 2, LANES, 2))
    return tl.reshape(tl.permute(split, (0, 1, 3, 2, 4)), (BLOCK_N, BLOCK_F // BITS, BITS))


@triton.jit
def pick(value, index, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """`value[i, w, index[i, w]]` by a tree of BITS - 1 selections, without memory."""
    HALVINGS: tl.constexpr = (BITS // 2).bit_length()
    for level in tl.static_range(HALVINGS):
        odd_bit = ((index >> level) & 1)[:, :, None] == 1
        value = tl.reshape(value, (BLOCK_N, WORDS, BITS >> (level + 1), 2))
        even, odd = tl.split(value)
        value = tl.where(odd_bit, odd, even)
    return tl.reshape(value, (BLOCK_N, WORDS))
