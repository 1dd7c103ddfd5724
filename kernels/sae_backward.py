"""sae_backward: encoder's and decoder's gradients together, over stacked entry sets and groups.

    q[e] = <W_dec[j], S[i]> + d_values[e],   S = sum of d_recon[g] over the groups with latent j
    d_W_dec[j] = sum values[e] S[i],   d_b_dec = sum over g and i of d_recon[g][i]
    the rest as encode_backward does with d_values = q and the rows x[i % n]

Groups are nested prefixes, so latents between two ends share one S: a launch per group, the last
first, with S accumulated in float32 on the way. One pass over the entries (`latent_backward.py`)
while rows fit in registers, else a dot product and two weight gradients. The sums per latent and
d_x follow from q. Bound by nnz * (d_in + d_out) * itemsize gathered bytes, and as many for d_x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .decode import accumulate
from .dense import backward_pays, dots_pay, entry_dots, latent_gradient
from .gathered_dot import gathered_dot
from .latent_backward import fits, latent_backward
from .latent_order import GRADIENT, VALUES, LatentOrder, latent_order
from .latent_sums import latent_sums
from .token_order import token_order
from .weight_gradient import adjacent_columns, gradient_rows, store_rows

Groups = Iterator[tuple[int, int, Tensor]]
"""First latent, last plus one, S `[m, d_out]`."""


def sae_backward(
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor | None,
    bandwidth: float,
    W_dec: Tensor,
    d_recon: Tensor,
    group_ends: list[int],
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    gate: Tensor,
    d_values: Tensor | None,
    d_gate: Tensor | None,
    feature_offsets: Tensor,
    permutation: Tensor,
    need_x: bool,
) -> tuple[Tensor, ...]:
    """`d_x`, `d_W_enc`, `d_b_enc`, `d_threshold`, `d_W_dec`, `d_b_dec`; never waits."""
    sources = (values, gate, d_values, d_gate)
    order = latent_order(offsets, indices, feature_offsets, permutation, sources)
    d_W_enc, d_W_dec = torch.empty_like(W_enc), torch.empty_like(W_dec)
    enc, dec = gradient_rows(d_W_enc.t()), gradient_rows(d_W_dec)
    dense = backward_pays(order, W_dec, d_recon[-1], x)
    backward = _fused if fits(x.shape[1], W_dec.shape[1]) and not dense else composed_gradients
    order = backward(order, offsets, x, W_dec, groups_of(d_recon, group_ends), enc, dec)
    store_rows(d_W_enc.t(), enc)
    store_rows(d_W_dec, dec)
    sums = latent_sums(order, threshold if bandwidth > 0 else None, bandwidth)
    d_x = _input_gradient(order, offsets, x, W_enc) if need_x else x.new_empty(0)
    return d_x, d_W_enc, *sums, d_W_dec, d_recon.sum((0, 1), dtype=torch.float32)


def groups_of(d_recon: Tensor, group_ends: list[int]) -> Groups:
    """The groups that have latents of their own, last first.

    From the second on, S is one float32 buffer: it changes after everything launched before.
    """
    seen = d_recon[-1]
    starts = [0, *group_ends[:-1]]
    for g in reversed(range(len(group_ends))):
        if g == len(group_ends) - 2:
            seen = seen.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if g <= len(group_ends) - 2:
            seen.add_(d_recon[g])
        if starts[g] < group_ends[g]:
            yield starts[g], group_ends[g], seen


def _fused(
    order: LatentOrder,
    offsets: Tensor,
    x: Tensor,
    W_dec: Tensor,
    groups: Groups,
    enc: Tensor,
    dec: Tensor,
) -> LatentOrder:
    """Fill `enc` and `dec` in one pass; the gradients in `order` become complete."""
    x, W_dec = adjacent_columns(x), adjacent_columns(W_dec)
    for first, last, seen in groups:
        seen = adjacent_columns(seen)
        latent_backward(order, W_dec, seen, x, enc[first:last], dec[first:last], first)
    return order


def composed_gradients(
    order: LatentOrder,
    offsets: Tensor,
    x: Tensor,
    W_dec: Tensor,
    groups: Groups,
    enc: Tensor,
    dec: Tensor,
) -> LatentOrder:
    """The same for rows of any length: dot products in token order, then two weight gradients."""
    dots = torch.zeros_like(order.sources[GRADIENT])
    for first, last, seen in groups:
        # Latents of other groups are out of range of the slice, and contribute 0.
        W = W_dec[first:last]
        share = order.indices.shape[0] * W.shape[0] // W_dec.shape[0]
        dot = entry_dots if dots_pay(share, W, seen) else gathered_dot
        dots += dot(offsets, order.indices - first, W, seen)
        latent_gradient(order, VALUES, False, seen, dec[first:last], first)
    view = (order.feature_offsets, order.permutation)
    order.sources[GRADIENT] += latent_order(offsets, order.indices, *view, (dots,)).sources[VALUES]
    latent_gradient(order, GRADIENT, True, x, enc)
    return order


def _input_gradient(order: LatentOrder, offsets: Tensor, x: Tensor, W_enc: Tensor) -> Tensor:
    """`d_x`, summed over the entry sets in float32."""
    d_pre, n = token_order(order), x.shape[0]
    d_x = x.new_empty(x.shape)
    if order.rows == n:
        accumulate(offsets, order.indices, d_pre, W_enc.t(), None, d_x, False)
        return d_x
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for start in range(0, order.rows, max(n, 1)):
        rows = offsets[start : start + n + 1]
        accumulate(rows, order.indices, d_pre, W_enc.t(), None, total, start > 0)
    return d_x.copy_(total)
