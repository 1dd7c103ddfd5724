"""Compaction of dense pre-activations into rows of entries, and of the rows into CSR.

One program per row: chunks arrive in order of latents, so entries ascend without a sort, and
nothing is shared between programs. Bound by the read of `pre`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemmascope_fast.kernels.launching import launch

BLOCK = 1024


@triton.jit
def _append_kernel(
    pre,  # [n, width] fp32
    b_enc,  # [F] fp32
    threshold,  # [F] fp32
    filled,  # [n] int32
    latents,  # [n, room] int32
    values,  # [n, room] fp32
    first,
    width,
    room,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(filled + row)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(pre + row * width + column, mask=inside, other=0.0)  # [BLOCK]
        value += tl.load(b_enc + first + column, mask=inside, other=0.0)
        hit = inside & (value > tl.load(threshold + first + column, mask=inside, other=0.0))
        one = hit.to(tl.int32)
        place = count + tl.cumsum(one, 0) - one
        fits = hit & (place < room)
        tl.store(latents + row * room + place, first + column, mask=fits)
        tl.store(values + row * room + place, value, mask=fits)
        count += tl.sum(one, 0)
    tl.store(filled + row, count)


@triton.jit
def _pack_rows_kernel(
    offsets,  # [n + 1] int64
    latents,  # [n, room] int32
    values,  # [n, room] fp32
    packed_latents,  # [nnz] int32
    packed_values,  # [nnz] fp32
    nnz,
    room,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - begin
    for done in range(0, tl.minimum(count, room), BLOCK):
        e = done + tl.arange(0, BLOCK)
        inside = (e < count) & (e < room) & (begin + e < nnz)
        latent = tl.load(latents + row * room + e, mask=inside, other=0)  # [BLOCK]
        tl.store(packed_latents + begin + e, latent, mask=inside)
        value = tl.load(values + row * room + e, mask=inside, other=0.0)
        tl.store(packed_values + begin + e, value, mask=inside)


def append(
    pre: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    first: int,
    filled: Tensor,
    latents: Tensor,
    values: Tensor,
) -> None:
    """Append the entries of latents `first ... first + width` to the rows; `filled` counts on."""
    n, width = pre.shape
    args = (pre, b_enc, threshold, filled, latents, values, first, width, latents.shape[1])
    launch(_append_kernel, n, *args, BLOCK=BLOCK, num_warps=4)


def pack_rows(offsets: Tensor, latents: Tensor, values: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """Rows of `room` places as `[nnz]` indices and values."""
    packed = latents.new_empty(nnz), values.new_empty(nnz)
    n, room = latents.shape
    launch(
        _pack_rows_kernel, n, offsets, latents, values, *packed, nnz, room, BLOCK=64, num_warps=2
    )
    return packed
