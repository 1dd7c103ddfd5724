"""densify: the entries of some rows as a dense matrix, split into terms of a shorter dtype.

    dense[0, i, j] + ... + dense[PARTS - 1, i, j] = coefficients[e]  for the entry e = (i, j)

`dense [PARTS, rows, width]` arrives as zeros. A float32 coefficient is PARTS bfloat16 terms, each
the rounded rest of those before it: 2 leave 2^-17 of it, 3 nothing.
What a dense product would get wrong is not placed but named in `left`, for `dense_remainder`:
entries whose feature vector is not finite (0 * inf is NaN), coefficients that are not finite or
could overflow bfloat16, and every entry of a row whose indices do not ascend (a repeated index is a
sum). One program per row reads its indices twice, first to see whether they ascend.
Bound by 16 bytes per entry and by the 32-byte sectors that its terms touch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch


@triton.jit
def _densify_kernel(
    dense_ptr,  # [PARTS, rows, width]
    left_ptr,  # [capacity] int32
    any_left_ptr,  # [rows] int32
    offsets_ptr,  # [rows + 1] int64
    indices_ptr,  # [capacity] int32
    coefficients_ptr,  # [capacity] fp32
    finite_ptr,  # [width] uint8
    capacity,
    width,
    plane,  # rows * width
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), capacity)
    falls = tl.zeros([BLOCK], tl.int32)
    for at in range(begin, end, BLOCK):
        e = at + tl.arange(0, BLOCK)
        later = (e < end) & (e > begin)
        index = tl.load(indices_ptr + e, mask=later, other=1)  # [BLOCK]
        before = tl.load(indices_ptr + e - 1, mask=later, other=0)  # [BLOCK]
        falls |= (index <= before).to(tl.int32)
    ascends = tl.zeros([BLOCK], tl.int32) == tl.max(falls, 0)
    any_left = tl.zeros([BLOCK], tl.int32)
    for at in range(begin, end, BLOCK):
        e = at + tl.arange(0, BLOCK)
        inside = e < end
        index = tl.load(indices_ptr + e, mask=inside, other=-1)  # [BLOCK]
        valid = (index >= 0) & (index < width)
        rest = tl.load(coefficients_ptr + e, mask=valid, other=0.0)  # [BLOCK]
        finite = tl.load(finite_ptr + index, mask=valid, other=0) != 0  # [BLOCK]
        placed = valid & finite & ascends & (tl.abs(rest) < 1e38)  # bfloat16 ends at 3.39e38
        left = valid & (placed == 0)
        tl.store(left_ptr + e, tl.where(left, index, -1), mask=inside)
        any_left |= left.to(tl.int32)
        place = dense_ptr + row * width + index.to(tl.int64)
        for _ in tl.static_range(PARTS):
            term = rest.to(dense_ptr.dtype.element_ty)
            tl.store(place, term, mask=placed)
            rest -= term.to(tl.float32)
            place += plane
    tl.store(any_left_ptr + row, tl.max(any_left, 0))


def densify(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    finite: Tensor,
    dense: Tensor,
    left: Tensor,
) -> Tensor:
    """Fill `dense`, and `left` at the entries of its rows.

    Padding is not read; an index out of range is neither placed nor left.

    Args:
        offsets: `[rows + 1]` int64, a stretch of the batch's, contiguous.
        indices: `[capacity]` int32, contiguous.
        coefficients: `[capacity]` float32, contiguous.
        finite: `[width]` bool, which feature vectors are finite.
        dense: `[PARTS, rows, width]` contiguous zeros; bfloat16, or float32 with one part.
        left: `[capacity]` int32; the index of an entry that was not placed, -1 for the others.

    Returns:
        `[rows]` int32, not 0 where a row has entries that were not placed.
    """
    parts, rows, width = dense.shape
    any_left = offsets.new_empty(rows, dtype=left.dtype)
    config = choose("densify", dense.device)
    launch(
        _densify_kernel,
        rows,
        *(dense, left, any_left, offsets, indices, coefficients, finite.view(torch.uint8)),
        *(indices.shape[0], width, rows * width),
        PARTS=parts,
        **config,
    )
    return any_left
