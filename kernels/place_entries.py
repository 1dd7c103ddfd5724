"""Moves the records of the encoder's tiles to their places in canonical CSR order.

    indices[p], values[p], gate[p] with p = offsets[row] + before[column block, row] + rank

Algorithm: a program copies the chunk of one tile. A record carries its row and column in the tile
and its rank among the row's hits there, so its place is two small reads away; an entry behind its
row's first invalid pair moves up by one. When the result does not fit, nothing is placed.
Bound by memory and latency: about 30 bytes per entry.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .encode_tiles import Tiles
from .launching import choose, launch


@triton.jit
def _place_entries_kernel(
    chunk_start,
    chunk_count,
    arena,
    before,
    first_invalid,
    offsets,
    needed,
    indices,
    values,
    gate,
    n,
    capacity,
    first_latent,
    INVALID: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    count = tl.load(chunk_count + tile)
    if (count == 0) | (tl.load(needed) > capacity):
        return
    row_blocks = tl.cdiv(n, BLOCK_N)
    first_row = tile % row_blocks * BLOCK_N
    column_block = tile // row_blocks
    first_column = column_block * BLOCK_F
    start = tl.load(chunk_start + tile)
    for done in range(0, count, BLOCK):
        entry = done + tl.arange(0, BLOCK)
        mask = entry < count
        record = tl.load(arena + start + entry, mask=mask, other=0)  # [BLOCK]
        code = (record >> 32).to(tl.int32)
        value = record.to(tl.int32).to(tl.float32, bitcast=True)
        column = first_column + code % BLOCK_F
        row = first_row + code // BLOCK_F % BLOCK_N
        position = code // (BLOCK_F * BLOCK_N) + tl.load(offsets + row, mask=mask, other=0)
        position += tl.load(before + column_block * n + row, mask=mask, other=0)
        if INVALID:
            first = tl.load(first_invalid + row, mask=mask, other=0)
            position += (column > first).to(tl.int64)
        mask = mask & (position < capacity)
        tl.store(indices + position, (first_latent + column).to(tl.int32), mask=mask)
        if GATE:  # NaN marks an entry that only the window stores
            on = value == value
            value = tl.where(on, value, 0.0)
            tl.store(gate + position, on.to(tl.float32), mask=mask)
        tl.store(values + position, value, mask=mask)


def place_entries(
    tiles: Tiles,
    offsets: Tensor,
    needed: Tensor,
    indices: Tensor,
    values: Tensor,
    gate: Tensor | None = None,
    first_latent: int = 0,
) -> None:
    """Fill the CSR arrays, unless `needed` exceeds their size; the gap of an invalid pair stays."""
    launch(
        _place_entries_kernel,
        tiles.chunk_count.shape[0],
        *(tiles.chunk_start, tiles.chunk_count, tiles.arena, tiles.counts, tiles.first_invalid),
        *(offsets, needed, indices, values, gate),
        *(offsets.shape[0] - 1, indices.shape[0], first_latent),
        INVALID=tiles.first_invalid is not None,
        GATE=gate is not None,
        BLOCK_N=tiles.config["BLOCK_N"],
        BLOCK_F=tiles.config["BLOCK_F"],
        **choose("place_entries", indices.device, n=offsets.shape[0] - 1),
    )
