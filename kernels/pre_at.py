"""pre_at: ungated pre-activations of given (token, latent) pairs.

    pre[p] = <x[rows[p]], W_enc[:, latents[p]]> + b_enc[latents[p]]       x [n, d], W_enc [d, F]

Programs own UNROLL pairs and walk along d, see `pair_dots`. Bound by reading a column of W_enc per
pair, contiguous in the feature-major layout; in the other one every element costs a 32-byte sector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gathered_dot import pair_dots
from .launching import block, choose, launch


@triton.jit
def _pre_at_kernel(
    x_ptr,
    W_ptr,
    b_ptr,
    rows_ptr,
    latents_ptr,
    pre_ptr,
    pairs,
    n,
    features,
    d,
    stride_x_row,
    stride_x_column,
    stride_W_row,
    stride_W_column,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * UNROLL + tl.arange(0, UNROLL)
    row = tl.load(rows_ptr + p, mask=p < pairs, other=-1)  # [UNROLL]
    latent = tl.load(latents_ptr + p, mask=p < pairs, other=-1)  # [UNROLL]
    valid = (row >= 0) & (row < n) & (latent >= 0) & (latent < features)
    W = W_ptr + latent * stride_W_column
    x = x_ptr + row * stride_x_row
    dots = pair_dots(W, x, valid, d, stride_W_row, stride_x_column, UNROLL, BLOCK_D)
    dots += tl.load(b_ptr + latent, mask=valid, other=0.0)  # [UNROLL]
    tl.store(pre_ptr + p, dots, mask=p < pairs)


def pre_at(x: Tensor, W_enc: Tensor, b_enc: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    """Return `pre [pairs]` float32; 0 where a row or a latent is out of range.

    The order of the sum is not the encoder's: the last bits may differ from `jumprelu_encode`'s.
    """
    (n, d), pairs = x.shape, rows.shape[0]
    pre = x.new_empty(pairs, dtype=torch.float32)
    config = choose("gathered_dot", x.device, n=pairs)
    config["BLOCK_D"] = block(d, config["BLOCK_D"], 16)
    pointers = (x, W_enc, b_enc.contiguous(), rows.contiguous(), latents.contiguous(), pre)
    launch(
        _pre_at_kernel,
        triton.cdiv(pairs, config["UNROLL"]),
        *(*pointers, pairs, n, W_enc.shape[1], d, *x.stride(), *W_enc.stride()),
        **config,
    )
    return pre
