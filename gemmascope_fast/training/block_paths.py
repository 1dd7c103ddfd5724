"""Loss and gradients on one block of rows, by two paths with the same result.

*Sparse*: an encoder op with its straight-through window, `decode`, then one feature-major
`sae_backward`; work and memory follow the stored entries. *Dense*: five matrix products on a
`[rows, d_sae]` tile. With `G = H(pre - threshold)` and K the unit rectangle,

    recon_g = (pre * G)[:, :ends[g]] @ W_dec[:ends[g]] + b_dec (+ x @ W_skip)     l0 = sum_j G
    d_acts  = d_values + sum_g d_recon_g @ W_dec.T     d_gate = d_l0[token] + d_counts[latent]
    d_pre   = d_acts * G                               d_W_enc += x.T @ d_pre
    d_threshold -= sum_i K((pre - threshold) / bandwidth) (threshold d_acts + d_gate) / bandwidth

`Semantics` change K, its factor `threshold`, and whether it reaches pre: `window_gradients`.
Sums run in float32, or in float64 where x or a weight is. Source of the pseudo-derivatives:
arXiv 2407.14435, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules import BatchTopK, TopK
from . import dense_paths
from .entry_paths import ENCODER, Block, backward, decode_prefixes, gathered
from .evaluation import Gradients, Inputs
from .objective import Objective


def sparse_block(inputs: Inputs, rows: slice, objective: Objective, gradients: Gradients) -> None:
    """Add the rows' terms to `objective` and their gradients to `gradients`, entry by entry."""
    x = inputs.tensors["x"][rows]
    block = observed_block(inputs, x)
    ends = inputs.whole.ends(objective.ends)
    recons = decode_prefixes(inputs, block, ends)
    add_skip(inputs, x, recons)
    l0 = torch.segment_reduce(block.gate, "sum", offsets=block.offsets, unsafe=True, initial=0)
    d_recons, d_l0 = objective.tokens(recons, l0, rows, gradients)
    del recons
    d_counts = objective.latents(lambda: entry_counts(inputs, block))
    d_values = objective.entries(inputs, block.values, block.indices.long(), gradients)
    d_gate = per_entry(d_l0, d_counts, block)
    incoming = (gathered(inputs, d_recons), d_values, d_gate)
    d_x = backward(inputs, block, ends, incoming, gradients)
    finish(inputs, x, rows, over_prefixes(d_recons), d_x, gradients)


def dense_block(inputs: Inputs, rows: slice, objective: Objective, gradients: Gradients) -> None:
    """Add the rows' terms and gradients by matrix products; JumpReLU only."""
    tile = dense_paths.dense_tile(inputs, rows)
    ends = inputs.whole.ends(objective.ends)
    recons = dense_paths.decode_prefixes(inputs, tile.acts, ends)
    add_skip(inputs, tile.x, recons)
    d_recons, d_l0 = objective.tokens(recons, tile.l0, rows, gradients)
    del recons
    d_gates = d_l0, objective.latents(tile.counts)
    d_values = objective.entries(inputs, tile.acts, None, gradients)
    d_x = dense_paths.dense_backward(inputs, tile, ends, (d_recons, d_values, d_gates), gradients)
    finish(inputs, tile.x, rows, over_prefixes(d_recons), d_x, gradients)


def count_block(inputs: Inputs, rows: slice, dense: bool) -> Tensor:
    """`[d_sae]`: tokens of the block on which each latent is active, as its path finds it."""
    x = inputs.tensors["x"][rows]
    if dense:
        pre = dense_paths.pre_activations(inputs, x.to(inputs.acc))
        return x.shape[0] - (pre <= inputs.wide("threshold")).sum(0)
    return entry_counts(inputs, encode_block(inputs, x, 0.0, by_feature=False))


def entry_counts(inputs: Inputs, block: Block) -> Tensor:
    """`[d_sae]`: rows on which each latent is active."""
    return torch.bincount(block.indices[block.gate > 0], minlength=inputs.d_sae)


def observed_block(inputs: Inputs, x: Tensor) -> Block:
    """`encode_block` with the window; what a BatchTopK's running threshold follows is noted."""
    block = encode_block(inputs, x, inputs.emission)
    if isinstance(inputs.activation, BatchTopK):
        inputs.smallest.append(inputs.whole.smallest_active(block.values, block.gate))
    return block


def encode_block(inputs: Inputs, x: Tensor, window: float, by_feature: bool = True) -> Block:
    """Entries of the block, and their feature-major view when a weight needs a gradient."""
    tensors, activation = inputs.tensors, inputs.activation
    args = (x, tensors["W_enc"], tensors["b_enc"])
    by_feature = by_feature and inputs.needs_any("W_dec", *ENCODER)
    if isinstance(activation, TopK):
        found = inputs.whole.topk(inputs.op, args, activation.k, by_feature, inputs.codes)
    elif isinstance(activation, BatchTopK):
        guess = None if inputs.screen is None else inputs.screen.guess()
        given = (float(activation.k), by_feature, inputs.codes, guess)
        found = inputs.whole.batchtopk(inputs.op, args, *given)
        if inputs.screen is not None:
            inputs.screen.learn(found[5])
    else:
        how = (tensors["threshold"], window, None, by_feature, inputs.codes)
        found = inputs.op("jumprelu_encode")(*args, *how)
    transpose = (found[-2], found[-1]) if by_feature else (None, None)
    return Block(x, *found[:4], *transpose)


def per_entry(d_l0: Tensor | None, d_counts: Tensor | None, block: Block) -> Tensor | None:
    """Gradient of every entry's gate: that of its token's l0 and of its latent's count."""
    found = None if d_counts is None else d_counts[block.indices.long()]
    if d_l0 is None:
        return found
    lengths, size = block.offsets.diff(), block.indices.shape[0]
    by_token = d_l0.repeat_interleave(lengths, output_size=size)
    return by_token if found is None else by_token + found


def add_skip(inputs: Inputs, x: Tensor, recons: Tensor) -> None:
    """Add the affine skip connection, where there is one, to every reconstruction in place."""
    if "W_skip" in inputs.tensors and inputs.whole.first:
        for recon in recons:
            recon.addmm_(x.to(inputs.acc), inputs.wide("W_skip"))


def over_prefixes(d_recons: Tensor) -> Tensor:
    """Sum of `[G, r, d_out]` over the prefixes, of which there is one as a rule."""
    return d_recons[0] if d_recons.shape[0] == 1 else d_recons.sum(0)


def finish(
    inputs: Inputs, x: Tensor, rows: slice, d_recon: Tensor, d_x: Tensor, gradients: Gradients
) -> None:
    """Gradients of b_dec, W_skip and x, which both paths share."""
    if inputs.needs_any("b_dec"):
        gradients.add("b_dec", d_recon.sum(0))
    if inputs.needs_any("W_skip"):
        gradients.buffer("W_skip").addmm_(x.to(inputs.acc).t(), d_recon)
    if inputs.needs_any("x"):
        if "W_skip" in inputs.tensors and inputs.whole.first:
            d_x = d_x.to(inputs.acc) + d_recon @ inputs.wide("W_skip").t()
        gradients.write("x", rows, d_x)
