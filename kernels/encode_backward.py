"""encode_backward: gradients of the encoder from those of its `values` and `gate`.

    d_pre[e] = d_values[e] gate[e],   d_x[i] = sum d_pre[e] W_enc[:, j]
    d_W_enc[:, j] = sum d_pre[e] x[i],   d_b_enc[j] = sum d_pre[e]
    d_threshold[j]: see `latent_sums.py`

d_x is a decode with the columns of W_enc; the others are sums over a latent's entries, tokens
ascending. Source: arXiv 2407.14435, section 3. Bound by two gathers of nnz * d_in * itemsize bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .by_feature import by_feature
from .decode import accumulate
from .dense import latent_gradient
from .latent_order import GRADIENT, LatentOrder, latent_order
from .latent_sums import latent_sums
from .weight_gradient import gradient_rows, store_rows


def encode_backward(
    d_values: Tensor | None,
    d_gate: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor | None,
    bandwidth: float,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    gate: Tensor,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    need_x: bool,
    need_W_enc: bool,
    need_b_enc: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`d_x`, `d_W_enc` like W_enc, `d_b_enc [d_sae]`, `d_threshold [d_sae]`; never waits."""
    d_x, d_W_enc = x.new_empty(0), x.new_empty(0)
    d_b_enc, d_threshold = values.new_empty(0), values.new_empty(0)
    if need_x:
        d_pre = torch.zeros_like(gate) if d_values is None else d_values * gate
        d_x = x.new_empty(x.shape)
        accumulate(offsets, indices, d_pre, W_enc.t(), None, d_x, False)
    if need_W_enc or need_b_enc or need_threshold:
        if feature_offsets is None or permutation is None:
            feature_offsets, permutation = by_feature(offsets, indices, W_enc.shape[1])
        sources = (values, gate, d_values, d_gate)
        order = latent_order(offsets, indices, feature_offsets, permutation, sources)
        if need_W_enc:
            d_W_enc = encoder_gradient(order, x, W_enc)
        if need_b_enc or need_threshold:
            d_b_enc, d_threshold = latent_sums(
                order, threshold if need_threshold else None, bandwidth
            )
    return d_x, d_W_enc, d_b_enc if need_b_enc else values.new_empty(0), d_threshold


def encoder_gradient(order: LatentOrder, x: Tensor, W_enc: Tensor) -> Tensor:
    """`d_W_enc`, in the dtype and the strides of W_enc."""
    d_W_enc = torch.empty_like(W_enc)
    rows = gradient_rows(d_W_enc.t())
    latent_gradient(order, GRADIENT, True, x, rows)
    store_rows(d_W_enc.t(), rows)
    return d_W_enc
