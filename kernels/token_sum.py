"""token_sum: for every token, a weighted sum of the rows of a matrix that its entries name.

    out[i] = (out[i] +) bias + sum_e coefficients[e] * matrix[indices[e]]     out [n, d]

The decoder (`matrix = W_dec`) and the encoder's gradient of x (`matrix = W_enc.t()`).
One program, of one warp, per (token, slab of BLOCK_D columns), slab after slab: a slab of 65k rows
of 512 bytes fits the L2, and is then read from DRAM once. UNROLL entries are summed at a time, in
the same order in every run, while the rows of the next UNROLL are on their way: at 96 registers 21
warps of 8 rows of 512 bytes are 84 KB in flight per multiprocessor, where 4.3 TB/s need 25 KB.
Only a row's first PIECE entries are summed here; `token_sum_pieces` has summed the others, so that
a row of thousands is not a tail. Bound by reading nnz rows of d elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def sum_entries(
    begin,
    end,
    column,
    indices_ptr,
    coefficients_ptr,
    matrix_ptr,
    features,
    d,
    stride_row,
    stride_column,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weighted sum of the rows that entries [begin, end) name, at `column` [BLOCK_D]."""
    indices_ptr += begin
    coefficients_ptr += begin
    count = tl.maximum(end - begin, 0).to(tl.int32)  # at most PIECE
    slab = matrix_ptr + column[None, :] * stride_column
    inside = (column < d)[None, :]
    acc = tl.zeros([BLOCK_D], tl.float32)
    e = tl.arange(0, UNROLL)
    index = tl.load(indices_ptr + e, mask=e < count, other=-1)  # [UNROLL]
    valid = (index >= 0) & (index < features)
    weight = tl.load(coefficients_ptr + e, mask=valid, other=0.0)  # [UNROLL]
    row = slab + (index.to(tl.int64) * stride_row)[:, None]
    block = tl.load(row, mask=valid[:, None] & inside, other=0.0)  # [UNROLL, BLOCK_D]
    e += UNROLL
    index = tl.load(indices_ptr + e, mask=e < count, other=-1)  # [UNROLL]
    for _ in range(0, count, UNROLL):
        # Carried to the next round, so that no compiler makes this load wait for its use.
        valid = (index >= 0) & (index < features)
        next_weight = tl.load(coefficients_ptr + e, mask=valid, other=0.0)  # [UNROLL]
        row = slab + (index.to(tl.int64) * stride_row)[:, None]
        next_block = tl.load(row, mask=valid[:, None] & inside, other=0.0)  # [UNROLL, BLOCK_D]
        e += UNROLL
        index = tl.load(indices_ptr + e, mask=e < count, other=-1)  # [UNROLL]
        acc += tl.sum(weight[:, None] * block.to(tl.float32), 0)
        weight = next_weight
        block = next_block
    return acc


@triton.jit
def _token_sum_kernel(
    offsets_ptr,
    indices_ptr,
    coefficients_ptr,
    matrix_ptr,
    bias_ptr,
    pieces_ptr,
    out_ptr,
    n,
    capacity,
    features,
    d,
    stride_row,
    stride_column,
    stride_out_row,
    stride_out_column,
    ADD: tl.constexpr,
    PIECE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)  # n * slabs < 2^31: a 32-bit division, then 64 bits
    i = (pid % n).to(tl.int64)
    column = (pid // n).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    begin = tl.maximum(tl.load(offsets_ptr + i), 0)
    end = tl.minimum(tl.load(offsets_ptr + i + 1), capacity)
    total = sum_entries(
        begin,
        tl.minimum(end, begin + PIECE),
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
    if pieces_ptr is not None:
        for at in range(begin + PIECE, end, PIECE):
            piece = pieces_ptr + at // PIECE * d + column
            total += tl.load(piece, mask=inside, other=0.0)  # [BLOCK_D]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0)  # [BLOCK_D]
    out = out_ptr + i * stride_out_row + column * stride_out_column
    if ADD:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def token_sum(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    pieces: Tensor | None,
    out: Tensor,
    add: bool,
    config: dict[str, int],
) -> None:
    """Write every row of `out`, or add to it.

    Args:
        offsets: `[n + 1]` int64, contiguous.
        indices: `[capacity]` int32, contiguous; an index outside the matrix contributes nothing.
        coefficients: `[capacity]` float32, contiguous.
        matrix: `[F, d]`, any dtype and strides; fast with contiguous rows.
        bias: `[d]` float32, contiguous.
        pieces: `[cdiv(capacity, PIECE), d]` float32 of `token_sum_pieces`; None while
            `capacity <= PIECE`.
        out: `[n, d]`, any dtype and strides.
        add: add to what is there.
        config: PIECE, UNROLL, BLOCK_D, num_warps.
    """
    n, d = out.shape
    sizes = (n, indices.shape[0], matrix.shape[0], d)
    launch(
        _token_sum_kernel,
        n * triton.cdiv(d, config["BLOCK_D"]),
        *(offsets, indices, coefficients, matrix, bias, pieces, out),
        *(*sizes, *matrix.stride(), *out.stride()),
        ADD=add,
        **config,
    )
