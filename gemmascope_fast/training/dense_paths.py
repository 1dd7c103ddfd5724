"""The dense path of a block: five matrix products on a `[rows, d_sae]` tile; JumpReLU only.

Two tiles in the accumulation dtype and three of booleans exist at once; up to three more for terms
over activations, or for semantics whose window is not the ops' own. The formulas are those of
`block_paths.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .entry_paths import ENCODER
from .evaluation import Gradients, Inputs

Gates = tuple[Tensor | None, Tensor | None]
"""Gradients of the gates: that of each token's l0 `[r]`, and of each latent's count `[d_sae]`."""


@dataclass
class Tile:
    """Pre-activations of some rows and all latents, in the accumulation dtype.

    Attributes:
        x: `[r, d_in]`.
        pre: `[r, d_sae]`; overwritten by `dense_backward`, as `acts` is.
        inactive: `[r, d_sae]` bool, `pre <= threshold`.
        acts: `[r, d_sae]`.
        l0: `[r]` active latents of each row.
    """

    x: Tensor
    pre: Tensor
    inactive: Tensor
    acts: Tensor
    l0: Tensor

    def counts(self) -> Tensor:
        """`[d_sae]`: rows on which each latent is active."""
        return self.x.shape[0] - self.inactive.sum(0)


def dense_tile(inputs: Inputs, rows: slice) -> Tile:
    """Encode rows by a matrix product; JumpReLU only."""
    x = inputs.tensors["x"][rows].to(inputs.acc)
    pre = pre_activations(inputs, x)
    inactive = pre <= inputs.wide("threshold")
    acts = torch.empty_like(pre)
    l0 = torch.logical_not(inactive, out=acts).sum(1)  # summing booleans would make int64 tiles
    torch.where(inactive, pre.new_zeros(()), pre, out=acts)
    return Tile(x, pre, inactive, acts, l0)


def pre_activations(inputs: Inputs, x: Tensor) -> Tensor:
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


def decode_prefixes(inputs: Inputs, acts: Tensor, ends: tuple[int, ...]) -> Tensor:
    """`[G, rows, d_out]` reconstructions by the first latents; each adds to the one before."""
    recon, start, found = inputs.wide("b_dec"), 0, []
    recon = recon if inputs.whole.first else torch.zeros_like(recon)
    for end in ends:
        recon = torch.addmm(recon, acts[:, start:end], inputs.wide("W_dec")[start:end])
        found.append(recon)
        start = end
    return found[0][None] if len(found) == 1 else torch.stack(found)


def dense_backward(
    inputs: Inputs,
    tile: Tile,
    ends: tuple[int, ...],
    incoming: tuple[Tensor, Tensor | None, Gates],
    gradients: Gradients,
) -> Tensor:
    """Add the weights' gradients; returns d_x, of size 0 when not wanted.

    Args:
        inputs: of the evaluation.
        tile: of the rows; of no use afterwards.
        ends: numbers of latents of each prefix.
        incoming: `d_recons [G, r, d_out]`, `d_values [r, d_sae]` or None, and the gradients of the
            gates.
        gradients: receives the sums.
    """
    d_recons, d_values, d_gates = incoming
    d_acts = _decode_backward(inputs, tile.acts, ends, d_recons, gradients)
    if not inputs.needs_any("x", *ENCODER):
        return tile.x.new_empty(0)
    if d_values is not None:
        d_acts += d_values
    through = None
    if inputs.bandwidth > 0:
        window = _window if inputs.semantics.own_gradient else _weighted_window
        through = window(inputs, tile.pre, tile.inactive, d_acts, d_gates, gradients)
    d_pre = d_acts.masked_fill_(tile.inactive, 0.0)
    d_pre = d_pre if through is None else d_pre.add_(through)
    return _encode_backward(inputs, tile.x, d_pre, gradients)


def _decode_backward(
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


def _window(
    inputs: Inputs,
    pre: Tensor,
    inactive: Tensor,
    d_acts: Tensor,
    d_gates: Gates,
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
    d_gates: Gates,
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


def _add_gates(tile: Tensor, d_gates: Gates) -> Tensor:
    """Add the gradients per token and per latent to the tile, in place."""
    d_l0, d_counts = d_gates
    if d_l0 is not None:
        tile.add_(d_l0[:, None])
    return tile if d_counts is None else tile.add_(d_counts)


def _encode_backward(inputs: Inputs, x: Tensor, d_pre: Tensor, gradients: Gradients) -> Tensor:
    """Gradients of W_enc and b_enc from `d_pre [rows, d_sae]`; returns d_x, or size 0."""
    if inputs.needs_any("W_enc"):
        gradients.buffer("W_enc").addmm_(x.t(), d_pre)
    if inputs.needs_any("b_enc"):
        gradients.buffer("b_enc").add_(d_pre.sum(0))
    if inputs.needs_any("x"):
        return d_pre @ inputs.wide("W_enc").t()
    return d_pre.new_empty(0)
