"""gathered_dot: the dot product of every entry's feature vector with a vector of its token.

    out[e] = <W[indices[e]], g[i]>  for e in [offsets[i], offsets[i + 1])       W [F, d], g [n, d]

The decoder's gradient of values (`W = W_dec`, `g = d_recon`). Programs own UNROLL neighbouring
entries, wherever rows end: equal work however long a row is, and enough programs for one token. An
entry's token is found by binary search in `offsets`, 13 reads that hit the L1 for 8192 tokens. The
vector of a token is read once from memory and, since neighbours share it, again from the L1; rows
of W stream, the next block of columns on its way while one is multiplied.
Bound by reading nnz rows of d elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import column_parts
from .launching import block, choose, launch
from .token_sum_pieces import row_of


@triton.jit
def pair_dots(
    a_ptr, b_ptr, valid, d, stride_a, stride_b, UNROLL: tl.constexpr, BLOCK: tl.constexpr
):
    """Dot products of the vectors at `a_ptr` and `b_ptr`, [UNROLL] pointers each; b is reused."""
    column = tl.arange(0, BLOCK)
    valid = valid[:, None]
    a = a_ptr[:, None] + (column.to(tl.int64) * stride_a)[None, :]
    b = b_ptr[:, None] + (column.to(tl.int64) * stride_b)[None, :]
    step_a = tl.full([], BLOCK, tl.int64) * stride_a
    step_b = tl.full([], BLOCK, tl.int64) * stride_b
    acc = tl.zeros([UNROLL, BLOCK], tl.float32)
    block_a = tl.load(a, mask=valid & (column < d)[None, :], other=0.0)  # [UNROLL, BLOCK]
    for _ in range(0, d, BLOCK):
        inside = valid & (column < d)[None, :]
        block_b = tl.load(b, mask=inside, other=0.0)  # [UNROLL, BLOCK]
        column += BLOCK
        a += step_a
        b += step_b
        next_a = tl.load(a, mask=valid & (column < d)[None, :], other=0.0)  # [UNROLL, BLOCK]
        acc += block_a.to(tl.float32) * block_b.to(tl.float32)
        block_a = next_a
    return tl.sum(acc, 1)


@triton.jit
def _gathered_dot_kernel(
    offsets_ptr,
    indices_ptr,
    W_ptr,
    g_ptr,
    out_ptr,
    n,
    capacity,
    features,
    d,
    steps,
    stride_W_row,
    stride_W_column,
    stride_g_row,
    stride_g_column,
    ADD: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * UNROLL + tl.arange(0, UNROLL)
    stored = e < tl.minimum(tl.load(offsets_ptr + n), capacity)
    index = tl.load(indices_ptr + e, mask=stored, other=-1)  # [UNROLL]
    valid = (index >= 0) & (index < features)
    token = row_of(e, offsets_ptr, n, steps)
    W = W_ptr + index.to(tl.int64) * stride_W_row
    g = g_ptr + token * stride_g_row
    dots = pair_dots(W, g, valid, d, stride_W_column, stride_g_column, UNROLL, BLOCK_D)
    dots = tl.where(valid, dots, 0.0)
    if ADD:
        dots += tl.load(out_ptr + e, mask=e < capacity, other=0.0)  # [UNROLL]
    tl.store(out_ptr + e, dots, mask=e < capacity)


def gathered_dot(offsets: Tensor, indices: Tensor, W: Tensor, g: Tensor) -> Tensor:
    """Return `out [capacity]` float32; 0 for padding and for indices out of range.

    Nothing waits for the device.

    Args:
        offsets: `[n + 1]` int64.
        indices: `[capacity]` int32.
        W: `[F, d]` float32, bfloat16 or float16, any strides; see `decode.accumulate`.
        g: `[n, d]`, likewise; fast with contiguous rows.
    """
    capacity = indices.shape[0]
    out = W.new_empty(capacity, dtype=torch.float32)
    if g.shape[0] == 0 or W.numel() == 0:
        return out.zero_()
    offsets, indices = offsets.contiguous(), indices.contiguous()
    for start, rows in column_parts(W, capacity):
        _gathered_dot(offsets, indices, rows, g[:, start : start + rows.shape[1]], out, start > 0)
    return out


def _gathered_dot(
    offsets: Tensor, indices: Tensor, W: Tensor, g: Tensor, out: Tensor, add: bool
) -> None:
    (n, d), capacity = g.shape, indices.shape[0]
    config = choose("gathered_dot", W.device, n=capacity)
    config["BLOCK_D"] = block(d, config["BLOCK_D"], 16)
    launch(
        _gathered_dot_kernel,
        triton.cdiv(capacity, config["UNROLL"]),
        *(offsets, indices, W, g, out, n, capacity, W.shape[0], d, n.bit_length()),
        *(*W.stride(), *g.stride()),
        ADD=add,
        **config,
    )
