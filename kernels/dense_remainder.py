"""dense_remainder: the entries that `densify` left, added to the dense product entry by entry.

    total[i] += sum_e coefficients[e] * matrix[left[e]]  over entries of row i with left[e] >= 0

One program per row, which ends at once where nothing was left: almost always everywhere. The rows
it does work on are rare enough to take the slabs of columns one after the other.
Bound by launch latency.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch
from .token_sum import sum_entries


@triton.jit
def _dense_remainder_kernel(
    total_ptr,  # [rows, d] fp32
    any_left_ptr,  # [rows] int32
    offsets_ptr,  # [rows + 1] int64
    left_ptr,  # [capacity] int32
    coefficients_ptr,  # [capacity] fp32
    matrix_ptr,  # [features, d]
    capacity,
    features,
    d,
    stride_row,
    stride_column,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(any_left_ptr + row) == 0:
        return
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), capacity)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D).to(tl.int64)
        total = sum_entries(
            begin,
            end,
            column,
            left_ptr,
            coefficients_ptr,
            matrix_ptr,
            features,
            d,
            stride_row,
            stride_column,
            UNROLL,
            BLOCK_D,
        )
        place = total_ptr + row * d + column
        total += tl.load(place, mask=column < d, other=0.0)  # [BLOCK_D]
        tl.store(place, total, mask=column < d)


def dense_remainder(
    offsets: Tensor,
    left: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    any_left: Tensor,
    total: Tensor,
) -> None:
    """Add what `densify` left to `total [rows, d]` float32, contiguous.

    Args:
        offsets: `[rows + 1]` int64, as `densify` got it.
        left: `[capacity]` int32 of `densify`.
        coefficients: `[capacity]` float32, contiguous.
        matrix: `[features, d]` as the caller has it, any dtype and strides.
        any_left: `[rows]` int32, what `densify` returned.
        total: the dense product.
    """
    rows, d = total.shape
    launch(
        _dense_remainder_kernel,
        rows,
        *(total, any_left, offsets, left, coefficients, matrix),
        *(left.shape[0], matrix.shape[0], d, *matrix.stride()),
        **choose("dense_remainder", total.device),
    )
