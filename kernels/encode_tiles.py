"""Encoder product with selection fused into its epilogue: no pre-activation reaches memory.

    pre [n, F] = x [n, d] @ W_enc [d, F] + b_enc [F];   records of the pairs that a rule selects

Source: JumpReLU, arXiv 2407.14435, section 3; the lower bound per row serves TopK, 2406.04093.
Algorithm: a program computes one tile of `pre`. The hits of a row become words of BITS latents
(`hit_words`), whose population counts give a hit its rank in its row and in the tile; one atomic
per tile reserves a contiguous chunk of an arena for the tile's records. A chunk is in (row, column)
order, so only the order of the chunks depends on timing, and `place_entries` undoes it. A full
arena loses nothing silently: counts stay exact.
Bound by the product, 2 n d F operations; by reading W_enc when n is small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hit_words import dealt, in_words, log2, pick, popcount
from .launching import INTERPRETED, choose, dot_precision, launch

NO_COLUMN = 2**31 - 1
"""`first_invalid` of a row without an invalid pair."""


class Tiles(NamedTuple):
    """What one pass over the tiles leaves behind; tile t covers rows t % row_blocks."""

    counts: Tensor
    """`[column_blocks, n]` int32: hits of each row in each column block."""
    chunk_start: Tensor
    """`[tiles]` int64: first record of each tile."""
    chunk_count: Tensor
    """`[tiles]` int32: number of records of each tile."""
    arena: Tensor
    """`[capacity]` int64 records: code in the upper half, float32 value in the lower."""
    used: Tensor
    """int64 scalar: number of records, those beyond the capacity included."""
    first_invalid: Tensor | None
    """`[n]` int32: first column of each row whose pair is invalid, `NO_COLUMN` without one."""
    config: dict[str, int]


@triton.jit
def _tile_of(program, n, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP_N: tl.constexpr):
    """Row block, column block: GROUP_N row blocks sweep the columns together and share W_enc."""
    row_blocks = tl.cdiv(n, BLOCK_N)
    group_size = tl.full((), GROUP_N, tl.int64) * tl.cdiv(F, BLOCK_F)
    first = program // group_size * GROUP_N
    height = tl.minimum(row_blocks - first, GROUP_N)
    inside = program % group_size
    return first + inside % height, inside // height


@triton.jit
def _encode_tiles_kernel(
    x,
    W_enc,
    b_enc,
    limit,
    counts,
    chunk_start,
    chunk_count,
    arena,
    used,
    first_invalid,
    n,
    d,
    F,
    arena_start,
    capacity,
    half_window,
    stride_xn,
    stride_xd,
    stride_wd,
    stride_wf,
    stride_limit,
    BY_THRESHOLD: tl.constexpr,
    WINDOW: tl.constexpr,
    AGAIN: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row_block, column_block = _tile_of(program, n, F, BLOCK_N, BLOCK_F, GROUP_N)
    tile = column_block * tl.cdiv(n, BLOCK_N) + row_block
    if AGAIN:  # only the tiles with a record beyond the first arena
        start = tl.load(chunk_start + tile)
        if start + tl.load(chunk_count + tile) <= arena_start:
            return

    WORDS: tl.constexpr = BLOCK_F // BITS
    local_rows = tl.arange(0, BLOCK_N)
    local_columns = dealt(BLOCK_F, BITS, LANES)
    rows = row_block * BLOCK_N + local_rows
    columns = column_block * BLOCK_F + local_columns
    row_ok = rows < n
    column_ok = columns < F

    inner = tl.arange(0, BLOCK_D).to(tl.int64)
    x_at = x + rows[:, None] * stride_xn + inner[None, :] * stride_xd
    w_at = W_enc + inner[:, None] * stride_wd + columns[None, :] * stride_wf
    step = tl.full((), BLOCK_D, tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for done in range(0, d, BLOCK_D):
        if EVEN_D:
            x_mask = row_ok[:, None]
            w_mask = column_ok[None, :]
        else:
            x_mask = row_ok[:, None] & (inner < d - done)[None, :]
            w_mask = column_ok[None, :] & (inner < d - done)[:, None]
        x_block = tl.load(x_at, mask=x_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        w_block = tl.load(w_at, mask=w_mask, other=0.0)  # [BLOCK_D, BLOCK_F]
        if WIDE:
            x_block = x_block.to(tl.float32)
            w_block = w_block.to(tl.float32)
        acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION)
        x_at += step * stride_xd
        w_at += step * stride_wd
    bias = tl.load(b_enc + columns, mask=column_ok, other=0.0)  # [BLOCK_F]
    pre = acc + bias[None, :]

    if BY_THRESHOLD:
        theta = tl.load(limit + columns * stride_limit, mask=column_ok, other=float("inf"))
        # One addition per element finds tiles with a NaN; a false alarm (Inf - Inf) is harmless.
        sums = tl.sum(tl.sum(pre, 1), 0)
        limits = tl.sum(theta, 0)
        if ((sums != sums) | (limits != limits)) & (not AGAIN):
            invalid = ((pre != pre) | (theta != theta)[None, :]) & column_ok[None, :]
            column = tl.where(invalid, columns[None, :].to(tl.int32), 2147483647)
            first = tl.min(column, 1)
            tl.atomic_min(first_invalid + rows, first, mask=row_ok & (first < F), sem="relaxed")
        hit = pre > (theta - half_window)[None, :]
    else:
        bound = tl.load(limit + rows * stride_limit, mask=row_ok, other=0.0)
        lowest = tl.where(bound > 0, bound, 1.401298464324817e-45)  # the least positive float32
        hit = (pre < lowest[:, None]) ^ True  # NaN included

    # Bits of a word are distinct: their sum is their union, the sign bit included.
    hit = in_words(hit, BLOCK_N, BLOCK_F, BITS, LANES)
    bit = (tl.full((BITS,), 1, tl.int32) << tl.arange(0, BITS))[None, None, :]
    word = tl.sum(tl.where(hit, bit, 0), 2)  # [BLOCK_N, WORDS]
    word = tl.where(row_ok[:, None], word, 0)
    if not BY_THRESHOLD:  # no limit of +Inf keeps columns past F out
        inside = F - column_block * BLOCK_F - BITS * tl.arange(0, WORDS)
        kept = (1 << tl.minimum(tl.maximum(inside, 0), BITS).to(tl.int64)) - 1
        word = word & kept.to(tl.int32)[None, :]
    value = pre
    if WINDOW:  # a gated value is never NaN, so NaN marks what only the window stores
        value = tl.where(pre > theta[None, :], pre, float("nan"))
    value = in_words(value, BLOCK_N, BLOCK_F, BITS, LANES)
    in_word = popcount(word)
    in_row = tl.sum(in_word, 1)
    in_tile = tl.sum(in_row, 0)
    if not AGAIN:
        tl.store(counts + column_block * n + rows, in_row, mask=row_ok)
        tl.store(chunk_count + tile, in_tile)
    if in_tile > 0:
        if not AGAIN:
            start = tl.atomic_add(used, in_tile.to(tl.int64), sem="relaxed")
            tl.store(chunk_start + tile, start)
        rank = tl.cumsum(in_word, 1) - in_word  # of the next hit of each word in its row
        at = (start - arena_start) + (tl.cumsum(in_row, 0) - in_row)[:, None] + rank
        code = local_rows[:, None] * BLOCK_F + BITS * tl.arange(0, WORDS)[None, :]
        for _ in range(tl.max(tl.max(in_word, 1), 0)):  # one hit of each word at a time
            index = log2(word & -word)
            found = pick(value, index, BLOCK_N, WORDS, BITS)
            upper = (rank * (BLOCK_N * BLOCK_F) + code + index).to(tl.int64) << 32
            record = upper | found.to(tl.uint32, bitcast=True).to(tl.int64)
            tl.store(arena + at, record, mask=(word != 0) & (at >= 0) & (at < capacity))
            word = word & (word - 1)
            rank += 1
            at += 1


def encode_tiles(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    capacity: int,
    *,
    threshold: Tensor | None = None,
    bandwidth: float = 0.0,
    bound: Tensor | None = None,
) -> Tiles:
    """Record the pairs above `threshold` (or its window), or not below the rows' `bound`.

    Args:
        x: `[n, d]`; W_enc: `[d, F]`, any strides; b_enc: `[F]` float32.
        capacity: size of the arena; records beyond it are counted, not kept.
        threshold: `[F]` float32: selects `pre > threshold - bandwidth / 2`.
        bandwidth: width of the window below and above the threshold.
        bound: `[n]` float32, instead of a threshold: selects `pre > 0` and `pre >= bound`, and NaN.
    """
    n, F = x.shape[0], W_enc.shape[1]
    config = _config(x, W_enc)
    row_blocks, column_blocks = -(-n // config["BLOCK_N"]), -(-F // config["BLOCK_F"])
    new: dict[str, Any] = {"device": x.device}
    tiles = Tiles(
        counts=torch.empty((column_blocks, n), dtype=torch.int32, **new),
        chunk_start=torch.zeros(row_blocks * column_blocks, dtype=torch.int64, **new),
        chunk_count=torch.empty(row_blocks * column_blocks, dtype=torch.int32, **new),
        arena=torch.empty(capacity, dtype=torch.int64, **new),
        used=torch.zeros((), dtype=torch.int64, **new),
        first_invalid=None
        if threshold is None
        else torch.full((n,), NO_COLUMN, dtype=torch.int32, **new),
        config=config,
    )
    _launch(tiles, tiles.arena, 0, x, W_enc, b_enc, threshold, bandwidth, bound)
    return tiles


def encode_missing(
    tiles: Tiles,
    records: int,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
) -> Tiles:
    """Compute again the tiles whose records did not fit; `records` is the value of `used`."""
    first = tiles.arena.shape[0]
    arena = tiles.arena.new_empty(records)
    arena[:first] = tiles.arena
    _launch(tiles, arena[first:], first, x, W_enc, b_enc, threshold, bandwidth, None)
    return tiles._replace(arena=arena)


def _config(x: Tensor, W_enc: Tensor) -> dict[str, int]:
    name = "encode_tiles"
    if x.dtype != W_enc.dtype or x.dtype == torch.float32:
        name = "encode_tiles_float32"
    elif not (_wide_loads(x) and _wide_loads(W_enc)):
        name = "encode_tiles_strided"
    return choose(name, x.device, n=x.shape[0], F=W_enc.shape[1])


def _wide_loads(matrix: Tensor) -> bool:
    """Whether 16-byte loads reach the whole matrix; else its loads take many registers."""
    line = 16 // matrix.element_size()
    small, large = sorted(matrix.stride())
    return small == 1 and large % line == 0 and matrix.data_ptr() % 16 == 0


def _launch(
    tiles: Tiles,
    arena: Tensor,
    arena_start: int,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | None,
    bandwidth: float,
    bound: Tensor | None,
) -> None:
    (n, d), F = x.shape, W_enc.shape[1]
    limit = bound if threshold is None else threshold
    assert limit is not None
    launch(
        _encode_tiles_kernel,
        tiles.chunk_count.shape[0],
        *(x, W_enc, b_enc.contiguous(), limit, tiles.counts, tiles.chunk_start, tiles.chunk_count),
        *(arena, tiles.used, tiles.first_invalid, n, d, F, arena_start, arena.shape[0]),
        *(bandwidth / 2, *x.stride(), *W_enc.stride(), *limit.stride()),
        BY_THRESHOLD=threshold is not None,
        WINDOW=bandwidth > 0,
        AGAIN=arena_start > 0,
        EVEN_D=d % tiles.config["BLOCK_D"] == 0,
        WIDE=INTERPRETED or x.dtype != W_enc.dtype,
        PRECISION=dot_precision(x, W_enc),
        **tiles.config,
    )
