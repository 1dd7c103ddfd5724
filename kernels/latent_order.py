"""Entries in latent order: the token and the numbers of each entry, side by side per latent.

    tokens[p] = row of entry permutation[p],   sources[k][p] = source_k[permutation[p]]

The weight gradients read each entry once per column slab: gathered once here, they are contiguous
there, one dependent load less before each row. The row of an entry comes from a binary search in
`offsets`, which lies in the L1. Past the last entry tokens and numbers are 0.
Bound by 8 + 8 K bytes per entry, and the latency of log2(n) cached loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch

VALUES, GATE, GRADIENT, D_GATE = range(4)
"""Rows of `LatentOrder.sources`."""


@dataclass(frozen=True)
class LatentOrder:
    """Entries sorted by latent, tokens ascending inside a latent."""

    feature_offsets: Tensor
    """`[d_sae + 1]` int64"""
    permutation: Tensor
    """`[capacity]` int64, the entry at each position"""
    indices: Tensor
    """`[capacity]` int32, latent of each entry, in entry order"""
    tokens: Tensor
    """`[capacity]` int32, row of the entry at each position"""
    sources: Tensor
    """`[K, capacity]` float32, numbers of the entry at each position"""
    rows: int
    """tokens are below it"""


@triton.jit
def _gather(source, entry, inside, out, position, held):
    """One source in latent order; an absent one is zeros."""
    if source is None:
        number = tl.zeros(entry.shape, tl.float32)
    else:
        number = tl.load(source + entry, mask=inside, other=0.0)
    tl.store(out + position, number, mask=held)


@triton.jit
def _latent_order_kernel(
    tokens,  # [capacity] int32
    sources,  # [K, capacity] fp32
    permutation,  # [capacity] int64
    offsets,  # [n + 1] int64
    feature_end,  # [1] int64, feature_offsets[d_sae]
    values,  # [capacity] fp32
    gate,  # [capacity] fp32 or None, as the next two
    d_values,
    d_gate,
    capacity,
    n,
    steps,  # bits of n
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = position < capacity
    inside = held & (position < tl.load(feature_end))
    entry = tl.load(permutation + position, mask=inside, other=-1)  # [BLOCK]
    inside &= (entry >= 0) & (entry < tl.minimum(tl.load(offsets + n), capacity))
    low = tl.zeros([BLOCK], tl.int32)
    high = low + n
    for _ in range(steps):  # the first row that ends after `entry`
        middle = low + ((high - low) >> 1)
        searching = inside & (low < high)
        ends = tl.load(offsets + 1 + middle, mask=searching, other=0)
        low = tl.where(searching & (ends <= entry), middle + 1, low)
        high = tl.where(searching & (ends > entry), middle, high)
    low = tl.where(inside & (low < n), low, 0)
    tl.store(tokens + position, low, mask=held)
    _gather(values, entry, inside, sources, position, held)
    if K > 1:
        row = tl.cast(capacity, tl.int64)
        _gather(gate, entry, inside, sources + row, position, held)
        _gather(d_values, entry, inside, sources + 2 * row, position, held)
        _gather(d_gate, entry, inside, sources + 3 * row, position, held)


def latent_order(
    offsets: Tensor,
    indices: Tensor,
    feature_offsets: Tensor,
    permutation: Tensor,
    sources: Sequence[Tensor | None],
) -> LatentOrder:
    """Sort what the weight gradients read of each entry by latent.

    Args:
        offsets: `[n + 1]` int64.
        indices: `[capacity]` int32.
        feature_offsets: `[d_sae + 1]` int64.
        permutation: `[capacity]` int64.
        sources: `(values,)`, or `(values, gate, d_values or None, d_gate or None)`; `[capacity]`
            float32 each.
    """
    capacity, n = indices.shape[0], offsets.shape[0] - 1
    held = [None if s is None else s.contiguous() for s in sources]
    permutation, indices = permutation.contiguous(), indices.contiguous()
    tokens = torch.empty(capacity, dtype=torch.int32, device=indices.device)
    ordered = torch.empty(len(held), capacity, dtype=torch.float32, device=indices.device)
    config = choose("latent_order", indices.device)
    launch(
        _latent_order_kernel,
        triton.cdiv(capacity, config["BLOCK"]),
        *(tokens, ordered, permutation, offsets.contiguous(), feature_offsets[-1:]),
        *(*held, None, None, None)[:4],
        *(capacity, n, n.bit_length()),
        K=len(held),
        **config,
    )
    return LatentOrder(feature_offsets.contiguous(), permutation, indices, tokens, ordered, n)
