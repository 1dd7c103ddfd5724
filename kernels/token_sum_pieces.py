"""token_sum_pieces: the sums of long rows' entries beyond the first PIECE, PIECE at a time.

    pieces[p // PIECE] = sum of coefficients[e] * matrix[indices[e]] over e = p .. p + PIECE - 1

for every cut `p = offsets[i] + k * PIECE < offsets[i + 1]`, k >= 1. A row's cuts are PIECE apart,
and the next row's first cut is further than that, so no two cuts share `p // PIECE`: the slots need
no list of long rows, which the host would have to wait for. Slot s belongs to the row that holds
position `s * PIECE`, found by binary search; where that row has no cut in the slot, nothing is done
and nothing will be read. A row of 5000 entries costs PIECE / UNROLL round trips to memory, not
5000 / UNROLL. Bound like `token_sum`, or by the search when there are no long rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .token_sum import sum_entries


@triton.jit
def row_of(position, offsets_ptr, n, steps):
    """Row that holds entry `position`: the last i < n with offsets[i] <= position, or 0."""
    low = position * 0
    high = low + n
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(offsets_ptr + middle) <= position
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _token_sum_pieces_kernel(
    offsets_ptr,
    indices_ptr,
    coefficients_ptr,
    matrix_ptr,
    pieces_ptr,
    n,
    capacity,
    features,
    d,
    stride_row,
    stride_column,
    slots,
    steps,
    PIECE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    slot = (pid % slots).to(tl.int64) + 1  # slot 0 holds no cut
    column = (pid // slots).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = row_of(slot * PIECE, offsets_ptr, n, steps)
    first = tl.maximum(tl.load(offsets_ptr + i), 0)
    end = tl.minimum(tl.load(offsets_ptr + i + 1), capacity)
    cut = first + tl.cdiv(slot * PIECE - first, PIECE) * PIECE
    if (cut > first) & (cut < end):
        total = sum_entries(
            cut,
            tl.minimum(end, cut + PIECE),
            column,
            indices_ptr,
            coefficients_ptr,
            matrix_ptr,
            features,
            d,
            stride_row,
            stride_column,
            UNROLL,
            BLOCK_D,
        )
        tl.store(pieces_ptr + slot * d + column, total, mask=column < d)


def token_sum_pieces(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    pieces: Tensor,
    config: dict[str, int],
) -> None:
    """Fill the slots of `pieces [cdiv(capacity, PIECE), d]` that hold a cut; see `token_sum`."""
    slots, d = pieces.shape
    n = offsets.shape[0] - 1
    sizes = (n, indices.shape[0], matrix.shape[0], d)
    launch(
        _token_sum_pieces_kernel,
        (slots - 1) * triton.cdiv(d, config["BLOCK_D"]) if n else 0,
        *(offsets, indices, coefficients, matrix, pieces, *sizes, *matrix.stride()),
        *(slots - 1, n.bit_length()),
        **config,
    )
