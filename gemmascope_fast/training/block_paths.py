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
from .entry_paths import ENCODER, Block, backward, decode_prefixes
from .evaluation import Gradients, Inputs
from .objective import Objective


def sparse_block(inputs: Inputs, rows: slice, objective: Objective, gradients: Gradients) -> None:
    """Add the rows' terms to `objective` and their gradients to `gradients`, entry by entry."""
    x = inputs.tensors["x"][rows]
    block = _encode(inputs, x, inputs.emission)
    if isinstance(inputs.activation, BatchTopK):
        inputs.smallest.append(inputs.whole.smallest_active(block.values, block.gate))
    ends = inputs.whole.ends(objective.ends)
    recons = decode_prefixes(inputs, block, ends)
    _add_skip(inputs, x, recons)
    l0 = torch.segment_reduce(block.gate, "sum", offsets=block.offsets, unsafe=True, initial=0)
    d_recons, d_l0 = objective.tokens(recons, l0, rows, gradients)
    del recons
    d_counts = objective.latents(lambda: _counts(inputs, block))
    d_values = objective.entries(block.values, block.indices.long(), gradients)
    d_gate = _per_entry(d_l0, d_counts, block)
    d_x = backward(inputs, block, ends, (d_recons, d_values, d_gate), gradients)
    _finish(inputs, x, rows, d_recons.sum(0), d_x, gradients)


def dense_block(inputs: Inputs, rows: slice, objective: Objective, gradients: Gradients) -> None:
    """Add the rows' terms and gradients by matrix products; JumpReLU only.

    Holds two `[rows, d_sae]` tiles in the accumulation dtype and three of booleans; up to three
    more for terms over activations, or for semantics whose window is not the ops' own.
    """
    x = inputs.tensors["x"][rows].to(inputs.acc)
    pre = _pre(inputs, x)
    inactive = pre <= inputs.wide("threshold")
    acts = torch.empty_like(pre)
    l0 = torch.logical_not(inactive, out=acts).sum(1)  # summing booleans would make int64 tiles
    torch.where(inactive, pre.new_zeros(()), pre, out=acts)
    ends = inputs.whole.ends(objective.ends)
    recons = _dense_prefixes(inputs, acts, ends)
    _add_skip(inputs, x, recons)
    d_recons, d_l0 = objective.tokens(recons, l0, rows, gradients)
    del recons
    d_counts = objective.latents(lambda: inactive.shape[0] - inactive.sum(0))
    d_values = objective.entries(acts, None, gradients)
    d_x = x.new_empty(0)
    d_acts = _dense_decode_backward(inputs, acts, ends, d_recons, gradients)
    if inputs.needs_any("x", *ENCODER):
        if d_values is not None:
            d_acts += d_values
        del d_values
        through = None
        if inputs.bandwidth > 0:
            tile = _window if inputs.semantics.own_gradient else _weighted_window
            through = tile(inputs, pre, inactive, d_acts, (d_l0, d_counts), gradients)
        del pre
        d_pre = d_acts.masked_fill_(inactive, 0.0)
        d_pre = d_pre if through is None else d_pre.add_(through)
        d_x = _dense_encode_backward(inputs, x, d_pre, gradients)
    _finish(inputs, x, rows, d_recons.sum(0), d_x, gradients)


def count_block(inputs: Inputs, rows: slice, dense: bool) -> Tensor:
    """`[d_sae]`: tokens of the block on which each latent is active, as its path finds it."""
    x = inputs.tensors["x"][rows]
    if dense:
        pre = _pre(inputs, x.to(inputs.acc))
        return x.shape[0] - (pre <= inputs.wide("threshold")).sum(0)
    return _counts(inputs, _encode(inputs, x, 0.0, by_feature=False))


def _counts(inputs: Inputs, block: Block) -> Tensor:
    return torch.bincount(block.indices[block.gate > 0], minlength=inputs.d_sae)


def _encode(inputs: Inputs, x: Tensor, window: float, by_feature: bool = True) -> Block:
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


def _per_entry(d_l0: Tensor | None, d_counts: Tensor | None, block: Block) -> Tensor | None:
    """Gradient of every entry's gate: that of its token's l0 and of its latent's count."""
    found = None if d_counts is None else d_counts[block.indices.long()]
    if d_l0 is None:
        return found
    lengths, size = block.offsets.diff(), block.indices.shape[0]
    by_token = d_l0.repeat_interleave(lengths, output_size=size)
    return by_token if found is None else by_token + found


def _dense_prefixes(inputs: Inputs, acts: Tensor, ends: tuple[int, ...]) -> Tensor:
    """`[G, rows, d_out]` reconstructions by the first latents; each adds to the one before."""
    recon, start, found = inputs.wide("b_dec"), 0, []
    recon = recon if inputs.whole.first else torch.zeros_like(recon)
    for end in ends:
        recon = torch.addmm(recon, acts[:, start:end], inputs.wide("W_dec")[start:end])
        found.append(recon)
        start = end
    return found[0][None] if len(found) == 1 else torch.stack(found)


def _dense_decode_backward(
    inputs: Inputs, acts: Tensor, ends: tuple[int, ...], d_recons: Tensor, gradients: Gradients
) -> Tensor:
    """Gradient of W_dec, and `d_acts`, which overwrites `acts`, where it is wanted."""
    start = 0
    for group, end in enumerate(ends):
        seen = d_recons[group:].sum(0) if len(ends) > 1 else d_recons[0]
        part = acts[:, start:end]
        if inputs.needs_any("W_dec"):
            gradients.buffer("W_dec")[start:end].addmm_(part.t(), seen)
        if inputs.needs_any("x", *ENCODER):
            torch.mm(seen, inputs.wide("W_dec")[start:end].t(), out=part)
        start = end
    return acts


def _pre(inputs: Inputs, x: Tensor) -> Tensor:
    """Pre-activations `[rows, d_sae]`; of a row's invalid (NaN) ones all but the first are -inf.

    The encoder ops store the first only, so that one bad token cannot fill the batch with entries.
    """
    pre = torch.addmm(inputs.wide("b_enc"), x, inputs.wide("W_enc"))
    suspect = pre.sum(1).isnan()  # every row with a NaN, and some with infinities
    if bool(suspect.any()):
        part = pre[suspect]
        invalid = part.isnan()
        first = invalid.to(torch.uint8).argmax(1, keepdim=True)
        kept = part.gather(1, first)
        pre[suspect] = part.masked_fill_(invalid, -torch.inf).scatter_(1, first, kept)
    return pre


def _window(
    inputs: Inputs,
    pre: Tensor,
    inactive: Tensor,
    d_acts: Tensor,
    d_gates: tuple[Tensor | None, Tensor | None],
    gradients: Gradients,
) -> None:
    """Add the threshold's pseudo-gradient over the tile; `pre` is overwritten.

    The comparisons are those of `reference.py`, to the last bit: in the window when above its lower
    end, and off or below its upper end.
    """
    threshold, half = inputs.wide("threshold"), inputs.bandwidth / 2
    outside = (pre < threshold + half).logical_or_(inactive)
    outside = outside.logical_and_(pre > threshold - half).logical_not_()
    summand = _add_gates(torch.mul(d_acts, threshold, out=pre), d_gates)
    part = summand.masked_fill_(outside, 0.0).sum(0).div_(-inputs.bandwidth)
    gradients.buffer("threshold").add_(part)


def _weighted_window(
    inputs: Inputs,
    pre: Tensor,
    inactive: Tensor,
    d_acts: Tensor,
    d_gates: tuple[Tensor | None, Tensor | None],
    gradients: Gradients,
) -> Tensor | None:
    """The same by another kernel or slope; returns what reaches pre, where anything does."""
    semantics, threshold = inputs.semantics, inputs.wide("threshold")
    weight = semantics.weight(pre, threshold, inputs.bandwidth)
    step = d_acts * (pre if semantics.slope == "pre" else threshold)
    gates = _add_gates(torch.zeros_like(step), d_gates)
    if semantics.gate_window == "active":
        gates.masked_fill_(inactive, 0.0)
    step = step.add_(gates).mul_(weight).masked_fill_(weight == 0, 0.0)
    if inputs.needs_any("threshold"):
        gradients.buffer("threshold").sub_(step.sum(0))
    return step if semantics.gradient_to_x else None


def _add_gates(tile: Tensor, d_gates: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Add the gradients per token and per latent to the tile, in place."""
    d_l0, d_counts = d_gates
    if d_l0 is not None:
        tile.add_(d_l0[:, None])
    return tile if d_counts is None else tile.add_(d_counts)


def _dense_encode_backward(
    inputs: Inputs, x: Tensor, d_pre: Tensor, gradients: Gradients
) -> Tensor:
    """Gradients of W_enc and b_enc from `d_pre [rows, d_sae]`; returns d_x, or size 0."""
    if inputs.needs_any("W_enc"):
        gradients.buffer("W_enc").addmm_(x.t(), d_pre)
    if inputs.needs_any("b_enc"):
        gradients.buffer("b_enc").add_(d_pre.sum(0))
    if inputs.needs_any("x"):
        return d_pre @ inputs.wide("W_enc").t()
    return d_pre.new_empty(0)


def _add_skip(inputs: Inputs, x: Tensor, recons: Tensor) -> None:
    """Add the affine skip connection, where there is one, to every reconstruction in place."""
    if "W_skip" in inputs.tensors and inputs.whole.first:
        for recon in recons:
            recon.addmm_(x.to(inputs.acc), inputs.wide("W_skip"))


def _finish(
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
