"""decode_backward: gradients of `recon = acts @ W_dec + b_dec`.

    d_values[e] = <W_dec[j], d_recon[i]>
    d_W_dec[j] = sum values[e] d_recon[i]
    d_b_dec = sum_i d_recon[i]

Three passes: a dot product per entry in token order (`gathered_dot.py`), a weighted sum per latent
(`weight_gradient.py`), a sum of columns. Bound by two gathers of nnz * d_out * itemsize bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .by_feature import by_feature
from .dense import dots_pay, entry_dots, latent_gradient
from .gathered_dot import gathered_dot
from .latent_order import VALUES, latent_order
from .weight_gradient import gradient_rows, store_rows


def decode_backward(
    d_recon: Tensor,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    need_values: bool,
    need_W_dec: bool,
    need_b_dec: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`d_values [capacity]`, `d_W_dec` like W_dec, `d_b_dec [d_out]`; never waits."""
    d_values, d_W_dec, d_b_dec = (values.new_empty(0) for _ in range(3))
    if need_values:
        dots = entry_dots if dots_pay(indices.shape[0], W_dec, d_recon) else gathered_dot
        d_values = dots(offsets, indices, W_dec, d_recon)
    if need_W_dec:
        if feature_offsets is None or permutation is None:
            feature_offsets, permutation = by_feature(offsets, indices, W_dec.shape[0])
        order = latent_order(offsets, indices, feature_offsets, permutation, (values,))
        d_W_dec = torch.empty_like(W_dec)
        rows = gradient_rows(d_W_dec)
        latent_gradient(order, VALUES, False, d_recon, rows)
        store_rows(d_W_dec, rows)
    if need_b_dec:
        d_b_dec = d_recon.sum(0, dtype=torch.float32)
    return d_values, d_W_dec, d_b_dec
