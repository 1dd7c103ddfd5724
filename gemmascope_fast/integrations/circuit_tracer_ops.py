"""What circuit-tracer's transcoders compute, from the entries: codes, exports, sums of rows.

A host tensor of pre-activations is rounded to its dtype before the gate, and a cross-layer
transcoder adds its bias after a first rounding:

    acts = v * H(v - theta),   v = round(x @ W_enc.T + b_enc) or round(round(x @ W_enc.T) + b_enc)

Rounding is monotone, so candidates are the entries of the float32 sums above a bound below which v
cannot pass; the gate then decides on v. Weights are [d_sae, d_in] here, as the host has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..entries import row_offsets
from ..functional import decode, jumprelu_encode, topk_encode
from ..sparse import SparseActs
from ..training.planning import CROSSOVER, sampled_density

BLOCK = 2**22
"""Pre-activations that are dense at once, of rows that have fewer than k positive ones."""


class Gate(NamedTuple):
    """An activation function: TopK where k > 0, else a JumpReLU; a ReLU is one of threshold 0.

    Attributes:
        threshold: `[d_sae]` in the dtype of the weights.
        bandwidth: of the straight-through window, where the threshold requires grad.
    """

    threshold: Tensor
    bandwidth: float = 0.0
    k: int = 0


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, gate: Gate, *, late_bias: bool = False
) -> SparseActs | None:
    """Activations of `x [*batch, d_in]`, values in its dtype, window entries included.

    None where a dense product is faster, or where a value is not finite: a dense gate makes NaN of
    such pre-activations, off or not.

    Args:
        x: in the dtype of the weights.
        W_enc: `[d_sae, d_in]`.
        b_enc: `[d_sae]`.
        gate: the activation function.
        late_bias: whether the bias is added to rounded products.
    """
    if _dense_is_faster(x, W_enc, b_enc, gate):
        return None
    if gate.k:
        acts = _topk(x, W_enc, b_enc, gate.k)
    else:
        acts = _late_bias(x, W_enc, b_enc, gate) if late_bias else _jumprelu(x, W_enc, b_enc, gate)
    return acts if bool(acts.values.isfinite().all()) else None


def coo(acts: SparseActs, zeroed: slice = slice(0, 0)) -> tuple[Tensor, Tensor, Tensor]:
    """`(tokens, latents, values)` of the entries that are not 0, by token and then latent.

    Args:
        acts: activations.
        zeroed: tokens that have none.
    """
    tokens = acts.tokens()
    dropped = torch.zeros(acts.n, dtype=torch.bool, device=acts.device)
    dropped[zeroed] = True
    at = ((acts.values.detach() != 0) & ~dropped[tokens]).nonzero()[:, 0]
    return tokens[at], acts.indices[at].long(), acts.values[at]


def csr(tokens: Tensor, latents: Tensor, values: Tensor, shape: tuple[int, ...]) -> SparseActs:
    """Entries, by token, as activations."""
    offsets = row_offsets(tokens, torch.Size(shape[:-1]).numel())
    gate = torch.ones_like(values, requires_grad=False)
    return SparseActs(offsets, latents.to(torch.int32), values, gate, shape)


def fill(dense: Tensor, acts: SparseActs) -> Tensor:
    """Write the entries into the zeros of `dense [*batch, d_sae]`, differentiably."""
    where = (acts.tokens(), acts.indices.long())
    flat = dense.view(acts.n, acts.d_sae).index_put_(where, acts.values)
    return flat.view(acts.shape)


def sum_rows(rows: Tensor, at: Tensor, n: int) -> Tensor:
    """`[n, d]`: `rows [m, d]` added up by `at [m]`, in float32, rounded once."""
    order = at.argsort(stable=True)
    ones = torch.ones(at.shape[0], device=rows.device)
    return decode(csr(at[order], order, ones, (n, at.shape[0])), rows)


def compact(latents: Tensor) -> tuple[Tensor, Tensor]:
    """`(distinct, place)`: the distinct latents, and where each of `latents` stands among them."""
    distinct, place = latents.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return distinct, place


def _dense_is_faster(x: Tensor, W_enc: Tensor, b_enc: Tensor, gate: Gate) -> bool:
    limit = CROSSOVER[x.device.type]
    if gate.k:
        return gate.k > limit * W_enc.shape[0]
    if x.numel() == 0:
        return False
    theta = gate.threshold.detach()
    lowest = theta - gate.bandwidth / 2 if gate.threshold.requires_grad else theta
    flat = x.detach().reshape(-1, x.shape[-1])
    return sampled_density(flat, W_enc.detach().t(), b_enc.detach(), lowest) > limit


def _jumprelu(x: Tensor, W_enc: Tensor, b_enc: Tensor, gate: Gate) -> SparseActs:
    """`v = round(x @ W_enc.T + b_enc)`: v > theta only where the sum is, both of one dtype."""
    acts = jumprelu_encode(x, W_enc.t(), b_enc, gate.threshold, bandwidth=gate.bandwidth)
    return _gated(acts, acts.values.to(x.dtype), gate.threshold)


def _late_bias(x: Tensor, W_enc: Tensor, b_enc: Tensor, gate: Gate) -> SparseActs:
    """`v = round(q + b_enc)`, `q = round(x @ W_enc.T)`: v > theta only where q > theta - b_enc."""
    theta = gate.threshold.detach()
    bound = (theta.double() - b_enc.detach().double()).to(x.dtype)
    bound = torch.nextafter(bound, torch.full_like(bound, -torch.inf))
    acts = jumprelu_encode(x, W_enc.t(), torch.zeros_like(b_enc, requires_grad=False), bound)
    return _gated(acts, acts.values.to(x.dtype) + b_enc[acts.latents()], theta)


def _gated(acts: SparseActs, values: Tensor, threshold: Tensor) -> SparseActs:
    """The entries with these values, less those that the values put at or below the threshold."""
    off = (acts.gate.detach() > 0) & (values.detach() <= threshold.detach()[acts.latents()])
    acts = acts._replace(values=values)
    return acts._keep(~off) if bool(off.any()) else acts


def _topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> SparseActs:
    """The k largest pre-activations of each token, whatever their sign.

    The encoder selects among positive ones; tokens that have fewer than k are selected again.
    """
    acts = topk_encode(x, W_enc.t(), b_enc, k)
    short = (acts.gate.detach().view(-1, k) <= 0).any(1).nonzero()[:, 0]
    if short.numel():
        values, indices = (t.reshape(-1, k) for t in acts.as_topk())
        flat = x.reshape(-1, x.shape[-1])
        blocks = torch.split(short, max(BLOCK // W_enc.shape[0], 1))
        found = [torch.topk(F.linear(flat[rows], W_enc, b_enc), k, dim=-1) for rows in blocks]
        values = values.index_copy(0, short, torch.cat([v.float() for v, _ in found]))
        indices = indices.long().index_copy(0, short, torch.cat([i for _, i in found]))
        shape = (*x.shape[:-1], k)
        acts = SparseActs.from_topk(values.view(shape), indices.view(shape), W_enc.shape[0])
    return acts._replace(values=acts.values.to(x.dtype))
