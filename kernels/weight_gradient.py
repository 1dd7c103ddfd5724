"""Gradient of a weight matrix, one row per latent.

    G[j] = sum over the entries of latent j, tokens ascending, of c[e] M[token(e)],   G [d_sae, d]

c is `values` and M is d_recon for W_dec; c is `d_values * gate` and M is x for W_enc.
One program per latent and slab of BLOCK_D columns: tiles of BLOCK_E gathered rows, each column
summed inside one thread. Latents beyond SEGMENT entries are cut as `segments.py` says: a first
launch sums the later pieces into a float32 workspace, the second adds them in order. Slabs are the
outer dimension of the grid: one of x (17 MB at 8192 tokens, 1024 bf16 columns) stays in the L2.
Latents without entries are written as zeros by the same program.
Bound by nnz * d * itemsize bytes of gathered rows (from the L2) and d_sae * d * itemsize written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_order import GATE, LatentOrder
from .launching import INTERPRETED, block, choose, launch
from .segments import later_pieces


@triton.jit
def _weight_gradient_kernel(
    gradient,  # [last - first, D]
    partial,  # [windows, D] fp32
    owners,  # [windows] int32
    feature_offsets,  # [d_sae + 1] int64
    tokens,  # [capacity] int32
    coefficients,  # [capacity] fp32
    gate,  # [capacity] fp32 or None
    matrix,  # [n, D], columns adjacent
    rows,  # programs per slab: windows or latents
    first,
    capacity,
    n,
    stride,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    STACKED: tl.constexpr,  # tokens wrap at n
    PIECES: tl.constexpr,  # sum the later pieces of long latents
):
    program = tl.program_id(0).to(tl.int64)
    row = program % rows
    columns = program // rows * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < D
    if PIECES:
        latent = tl.load(owners + row).to(tl.int64)
        if latent < 0:
            return
    else:
        latent = row + first
    begin = tl.maximum(tl.load(feature_offsets + latent), 0)
    end = tl.minimum(tl.load(feature_offsets + latent + 1), capacity)
    start = begin
    if PIECES:
        start += (row - begin // SEGMENT) * SEGMENT
    stop = tl.minimum(start + SEGMENT, end)
    total = tl.zeros([BLOCK_D], tl.float32)
    for at in tl.range(start, stop, BLOCK_E, num_stages=STAGES):
        position = at + tl.arange(0, BLOCK_E)
        inside = position < stop
        token = tl.load(tokens + position, mask=inside, other=0).to(tl.int64)  # [BLOCK_E]
        if STACKED:
            token = token % n
        c = tl.load(coefficients + position, mask=inside, other=0.0)  # [BLOCK_E]
        if gate is not None:
            c *= tl.load(gate + position, mask=inside, other=0.0)  # [BLOCK_E]
        tile = tl.load(  # [BLOCK_E, BLOCK_D]
            matrix + token[:, None] * stride + columns[None, :],
            mask=inside[:, None] & in_row[None, :],
            other=0.0,
        )
        total += tl.sum(c[:, None] * tile.to(tl.float32), axis=0)
    if PIECES:
        tl.store(partial + row * D + columns, total, mask=in_row)
    else:
        piece = partial + (begin // SEGMENT + 1) * D + columns
        for _ in range(begin + SEGMENT, end, SEGMENT):
            total += tl.load(piece, mask=in_row, other=0.0)  # [BLOCK_D]
            piece += D
        tl.store(gradient + row * D + columns, total.to(gradient.dtype.element_ty), mask=in_row)


def weight_gradient(
    order: LatentOrder,
    coefficients: int,
    gated: bool,
    matrix: Tensor,
    gradient: Tensor,
    first: int = 0,
) -> None:
    """Write the gradient of latents `first` to `first + gradient.shape[0]`.

    Args:
        order: the entries in latent order.
        coefficients: the row of `order.sources` that holds c ...
        gated: ... times the gate.
        matrix: M, `[n, d]`, any strides; the tokens of `order` wrap at n.
        gradient: `[latents, d]` contiguous, written in its dtype.
        first: its first latent.
    """
    latents, d = gradient.shape
    if latents == 0 or d == 0:
        return
    matrix = adjacent_columns(matrix)
    capacity, n = order.tokens.shape[0], matrix.shape[0]
    config = choose("weight_gradient", gradient.device, d=d, bytes=matrix.element_size())
    config["BLOCK_D"] = block(d, config["BLOCK_D"])
    owners = later_pieces(order, first, first + latents, config["SEGMENT"])
    windows = owners.shape[0]
    partial = torch.empty(windows, d, dtype=torch.float32, device=gradient.device)
    gate = order.sources[GATE] if gated else None
    for pieces, rows in ((True, windows), (False, latents)):
        launch(
            _weight_gradient_kernel,
            rows * triton.cdiv(d, config["BLOCK_D"]),
            *(gradient, partial, owners, order.feature_offsets, order.tokens),
            *(order.sources[coefficients], gate, matrix, rows, first, capacity, n),
            matrix.stride(0),
            D=d,
            STACKED=order.rows != n,
            PIECES=pieces,
            **config,
        )


def adjacent_columns(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy of it, with the columns of a row adjacent in memory."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def gradient_rows(features: Tensor) -> Tensor:
    """Where the kernels write a gradient, one contiguous row per latent.

    The gradient itself in the feature-major layout. In any other layout a row would be d isolated
    elements, 16 times the traffic: a buffer, which `store_rows` transposes at streaming speed.
    """
    if INTERPRETED and features.dtype == torch.bfloat16:  # the interpreter truncates to bfloat16
        return torch.empty(features.shape, dtype=torch.float32, device=features.device)
    if features.is_contiguous():
        return features
    return torch.empty_like(features, memory_format=torch.contiguous_format)


def store_rows(features: Tensor, rows: Tensor) -> None:
    """Copy the buffer of `gradient_rows` into the gradient, where there is one."""
    if rows is not features:
        features.copy_(rows)
