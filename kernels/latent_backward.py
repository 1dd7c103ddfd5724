"""Decoder's and encoder's gradients of one latent from a single reading of its tokens' rows.

    gradient[e] += <W_dec[j], g[token]>,   d_W_dec[j] = sum values[e] g[token],
    d_W_enc[:, j] = sum gradient[e] gate[e] x[token]

One program per latent holds W_dec[j] and both sums in registers; per entry it reads one row of g
and one of x, while the rows of the next entries are on their way into shared memory (STAGES): two
row reads per entry, where separate passes make four. D is a constant, so that the lanes between D
and the next power of two cost little. Long latents are cut as `segments.py` says. Nothing becomes
an fma, so that `fused_sparse_step.py`, which walks the same way, sums to the same bits.
At d = 5376 in bf16: 43 KB in flight per program, two programs per multiprocessor at 128 registers.
Bound by nnz * (d_in + d_out) * itemsize bytes of gathered rows, 11.3 GB at 0.5M entries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_order import LatentOrder
from .launching import block, choose, launch
from .segments import later_pieces

LARGEST_ROW = 8192
"""Longest row that fits in the registers of one program; crosscoders have 87,040."""


@triton.jit
def walk(
    start,
    stop,
    w,  # [1, BLOCK_OUT], row of W_dec
    sources,  # [4, capacity] fp32: values, gate, gradient (read and written), d_gate
    tokens,  # [capacity] int32
    g,  # [m, D_OUT], columns adjacent, as the next one
    x,  # [n, D_IN]
    capacity,
    n,
    g_stride,
    x_stride,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    STACKED: tl.constexpr,  # tokens of x wrap at n
):
    """Sums of a latent's entries [start, stop) of d_W_enc [BLOCK_IN] and d_W_dec [BLOCK_OUT]."""
    col_in = tl.arange(0, BLOCK_IN)
    col_out = tl.arange(0, BLOCK_OUT)
    enc = tl.zeros([BLOCK_IN], tl.float32)
    dec = tl.zeros([BLOCK_OUT], tl.float32)
    values = sources
    gate = values + capacity
    gradient = gate + capacity
    # W_dec stays 16-bit outside of the loop: hoisted, its conversion would take 11 more registers.
    for at in tl.range(start, stop, BLOCK_E, num_stages=STAGES, disable_licm=True):
        position = at + tl.arange(0, BLOCK_E)
        inside = position < stop
        token = tl.load(tokens + position, mask=inside, other=0).to(tl.int64)[:, None]
        g_rows = tl.load(  # [BLOCK_E, BLOCK_OUT]
            g + token * g_stride + col_out[None, :],
            mask=inside[:, None] & (col_out < D_OUT)[None, :],
            other=0.0,
        ).to(tl.float32)
        d = tl.load(gradient + position, mask=inside, other=0.0)  # [BLOCK_E]
        if BLOCK_OUT <= 512:  # no warp waits in the sum: one could store before another has read
            tl.debug_barrier()
        d += tl.sum(w.to(tl.float32) * g_rows, axis=1)
        tl.store(gradient + position, d, mask=inside)
        value = tl.load(values + position, mask=inside, other=0.0)  # [BLOCK_E]
        dec += tl.sum(value[:, None] * g_rows, axis=0)
        if STACKED:
            token = token % n
        x_rows = tl.load(  # [BLOCK_E, BLOCK_IN]
            x + token * x_stride + col_in[None, :],
            mask=inside[:, None] & (col_in < D_IN)[None, :],
            other=0.0,
        ).to(tl.float32)
        d *= tl.load(gate + position, mask=inside, other=0.0)
        enc += tl.sum(d[:, None] * x_rows, axis=0)
    return enc, dec


@triton.jit
def add_pieces(
    enc,
    dec,
    partial,  # [windows, D_IN + D_OUT] fp32
    begin,
    end,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The sums of a latent's first piece plus those of its later ones, in order."""
    col_in = tl.arange(0, enc.shape[0])
    col_out = tl.arange(0, dec.shape[0])
    piece = partial + (begin // SEGMENT + 1) * (D_IN + D_OUT)
    for _ in range(begin + SEGMENT, end, SEGMENT):
        enc += tl.load(piece + col_in, mask=col_in < D_IN, other=0.0)  # [BLOCK_IN]
        dec += tl.load(piece + D_IN + col_out, mask=col_out < D_OUT, other=0.0)  # [BLOCK_OUT]
        piece += D_IN + D_OUT
    return enc, dec


@triton.jit
def _latent_backward_kernel(
    d_W_enc,  # [last - first, D_IN], None with PIECES, as the next one
    d_W_dec,  # [last - first, D_OUT]
    partial,  # [windows, D_IN + D_OUT] fp32
    sources,  # [4, capacity] fp32: values, gate, gradient (read and written), d_gate
    owners,  # [windows] int32
    feature_offsets,  # [d_sae + 1] int64
    tokens,  # [capacity] int32
    W_dec,  # [d_sae, D_OUT], columns adjacent, as the next two
    g,  # [m, D_OUT]
    x,  # [n, D_IN]
    first,
    capacity,
    n,
    w_stride,
    g_stride,
    x_stride,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    STACKED: tl.constexpr,  # tokens of x wrap at n
    PIECES: tl.constexpr,  # sum the later pieces of long latents
):
    program = tl.program_id(0).to(tl.int64)
    if PIECES:
        owner = tl.load(owners + program).to(tl.int64)
        latent = tl.maximum(owner, 0)
    else:
        latent = program + first
    begin = tl.maximum(tl.load(feature_offsets + latent), 0)
    end = tl.minimum(tl.load(feature_offsets + latent + 1), capacity)
    start = begin
    if PIECES:
        start += (program - begin // SEGMENT) * SEGMENT
        end = tl.where(owner < 0, start, end)
    stop = tl.minimum(start + SEGMENT, end)
    col_in = tl.arange(0, BLOCK_IN)
    col_out = tl.arange(0, BLOCK_OUT)
    in_row = col_in < D_IN
    out_row = col_out < D_OUT
    read = tl.where(start < stop, D_OUT, 0)  # nothing of a latent without entries
    w = tl.load(  # [1, BLOCK_OUT], spread over threads as the rows of g
        W_dec + latent * w_stride + col_out[None, :],
        mask=(out_row & (col_out < read))[None, :],
        other=0.0,
    )
    # fmt: off
    enc, dec = walk(
        start, stop, w, sources, tokens, g, x, capacity, n, g_stride, x_stride,
        D_IN, D_OUT, BLOCK_IN, BLOCK_OUT, BLOCK_E, STAGES, STACKED,
    )
    # fmt: on
    if PIECES:
        piece = partial + program * (D_IN + D_OUT)
        tl.store(piece + col_in, enc, mask=in_row)
        tl.store(piece + D_IN + col_out, dec, mask=out_row)
    else:
        enc, dec = add_pieces(enc, dec, partial, begin, end, D_IN, D_OUT, SEGMENT)
        kind_in = d_W_enc.dtype.element_ty
        kind_out = d_W_dec.dtype.element_ty
        tl.store(d_W_enc + program * D_IN + col_in, enc.to(kind_in), mask=in_row)
        tl.store(d_W_dec + program * D_OUT + col_out, dec.to(kind_out), mask=out_row)


def fits(d_in: int, d_out: int) -> bool:
    """Both rows fit in the registers of one program, and there is something to read."""
    return 0 < min(d_in, d_out) and max(d_in, d_out) <= LARGEST_ROW


def uncapped(options: dict[str, Any]) -> dict[str, Any]:
    """Later pieces run long enough at one program per multiprocessor; capped, they spill."""
    return {key: value for key, value in options.items() if key != "maxnreg"}


def latent_backward(
    order: LatentOrder,
    W_dec: Tensor,
    g: Tensor,
    x: Tensor,
    d_W_enc: Tensor,
    d_W_dec: Tensor,
    first: int = 0,
) -> None:
    """Write the weight gradients of latents `first` to `first + d_W_dec.shape[0]`.

    The dot products are added to the gradients in `order.sources`.

    Args:
        order: the entries in latent order, with all four sources.
        W_dec: `[d_sae, d_out]`, columns adjacent.
        g: gradient of what these latents reconstruct, `[m, d_out]`, columns adjacent.
        x: `[n, d_in]`, columns adjacent; row r of the entries reads row r % n.
        d_W_enc: `[latents, d_in]` contiguous.
        d_W_dec: `[latents, d_out]` contiguous.
        first: first latent of the gradients.
    """
    latents = d_W_dec.shape[0]
    partial, options = later_sums(order, W_dec, g, x, first, first + latents)
    launch(
        _latent_backward_kernel,
        latents,
        *(d_W_enc, d_W_dec, partial, order.sources, None, order.feature_offsets),
        *(order.tokens, W_dec, g, x, first, order.tokens.shape[0], x.shape[0]),
        *(W_dec.stride(0), g.stride(0), x.stride(0)),
        PIECES=False,
        **options,
    )


def later_sums(
    order: LatentOrder, W_dec: Tensor, g: Tensor, x: Tensor, first: int, last: int
) -> tuple[Tensor, dict[str, Any]]:
    """Sum the pieces of latents `first` to `last` that lie behind the first piece of each.

    The arguments are those of `latent_backward`.

    Returns:
        The sums, `[windows, d_in + d_out]` float32, and the options of the kernel that sums the
        first pieces.
    """
    d_in, d_out, n, capacity = x.shape[1], W_dec.shape[1], x.shape[0], order.tokens.shape[0]
    width = max(g.element_size(), x.element_size())
    config = choose("latent_backward", x.device, d=max(d_in, d_out), bytes=width)
    options = {
        **{"D_IN": d_in, "D_OUT": d_out, "STACKED": order.rows != n},
        **{"BLOCK_IN": block(d_in, LARGEST_ROW, 4), "BLOCK_OUT": block(d_out, LARGEST_ROW, 4)},
        **{"enable_fp_fusion": False, **config},
    }
    owners = later_pieces(order, first, last, config["SEGMENT"])
    windows = owners.shape[0]
    partial = torch.empty(windows, d_in + d_out, dtype=torch.float32, device=x.device)
    launch(
        _latent_backward_kernel,
        windows,
        *(None, None, partial, order.sources, owners, order.feature_offsets),
        *(order.tokens, W_dec, g, x, first, capacity, n),
        *(W_dec.stride(0), g.stride(0), x.stride(0)),
        PIECES=True,
        **uncapped(options),
    )
    return partial, options
