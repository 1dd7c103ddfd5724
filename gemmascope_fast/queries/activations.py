"""Queries of activations that are there: the best latents, the best of each token, chosen ones.

Only active entries (gate above 0) count. Work and memory are those of the entries and the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_count
from ..entries import latent_ids
from ..sparse import SparseActs


class TopLatents(NamedTuple):
    """Latents by their largest activation, best first.

    Attributes:
        values: `[m]` largest activation of each latent, differentiable.
        latents: `[m]` int64.
        tokens: `[m]` int64, token of that activation in flattened order.
    """

    values: Tensor
    latents: Tensor
    tokens: Tensor


def top_latents(acts: SparseActs, n: int) -> TopLatents:
    """The n latents of largest `max_i acts[i, j]`, i over the tokens on which latent j is active.

    NaN ranks largest; ties go to the smaller latent, and for one latent to the smaller token.

    Args:
        acts: activations over d_sae latents, any leading dimensions; `acts[:, 1:]` leaves out BOS.
        n: latents wanted, >= 0.

    Returns:
        `TopLatents` of `m = min(n, latents active on at least one token)` rows.

    Raises:
        TypeError: `acts` is not a `SparseActs`, or n not an int.
        ValueError: n is negative.
    """
    op = "top_latents"
    check_acts(op, acts)
    n = check_count(op, "n", n)
    tokens, latents, values = active_entries(acts)
    order, rank = ranked(values, latents)
    best = order[rank == 0]
    best = best[values.detach()[best].argsort(descending=True, stable=True)[:n]]
    return TopLatents(values[best], latents[best], tokens[best])


def top_per_token(acts: SparseActs, k: int) -> tuple[Tensor, Tensor]:
    """The k largest activations of every token as matrices, largest first.

    Slots of tokens with fewer than k active latents hold value 0 and index -1, which is no latent:
    `SparseActs.from_topk(values, indices.clamp_min(0), d_sae)` drops them, or keeps one with gate
    0. NaN ranks largest; ties go to the smaller latent.

    Args:
        acts: activations over d_sae latents, any leading dimensions.
        k: slots per token, >= 0.

    Returns:
        `values [*batch, k]`, differentiable, and `indices [*batch, k]` int64.

    Raises:
        TypeError: `acts` is not a `SparseActs`, or k not an int.
        ValueError: k is negative.
    """
    op = "top_per_token"
    check_acts(op, acts)
    k = check_count(op, "k", k)
    tokens, latents, values = active_entries(acts)
    order, rank = ranked(values, tokens)
    order, rank = order[rank < k], rank[rank < k]
    slots = tokens[order] * k + rank
    top = values.new_zeros(acts.n * k).index_put((slots,), values[order])
    indices = torch.full_like(top, -1, dtype=torch.int64, requires_grad=False)
    indices[slots] = latents[order]
    shape = (*acts.shape[:-1], k)
    return top.reshape(shape), indices.reshape(shape)


def activations_of(acts: SparseActs, latents: Any) -> Tensor:
    """`acts[..., latents]` as a dense matrix, 0 where a latent is off.

    Args:
        acts: activations over d_sae latents, any leading dimensions.
        latents: m distinct latents in the wanted order, or a `[d_sae]` mask.

    Returns:
        `[*batch, m]`, differentiable; entries that are stored without being active have value 0
        and pass their gradients, as in `to_dense`.

    Raises:
        TypeError: `acts` is not a `SparseActs`, or `latents` are neither integers nor a mask.
        ValueError: a latent is out of range or named twice.
    """
    op = "activations_of"
    check_acts(op, acts)
    chosen = latent_ids(op, latents, acts.d_sae, acts.device)
    m = chosen.shape[0]
    column = torch.full((acts.d_sae + 1,), -1, device=acts.device)
    column[chosen] = torch.arange(m, device=acts.device)
    columns = column[acts.latents()]
    at = (columns >= 0).nonzero()[:, 0]
    where = (acts.tokens()[at], columns[at])
    dense = acts.values.new_zeros((acts.n, m)).index_put(where, acts.values[at])
    return dense.reshape(*acts.shape[:-1], m)


def check_acts(op: str, acts: Any) -> None:
    """`acts` is a `SparseActs`."""
    if not isinstance(acts, SparseActs):
        raise TypeError(f"{op}: acts must be a SparseActs, got {type(acts).__name__}")


def active_entries(acts: SparseActs) -> tuple[Tensor, Tensor, Tensor]:
    """`(tokens, latents, values)` of the active entries, by token and then latent."""
    at = (acts._valid(acts.gate.detach()) > 0).nonzero()[:, 0]
    return acts.tokens()[at], acts.indices[at].long(), acts.values[at]


def ranked(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """`(order, rank)`: entries by group, largest value first, and the place of each in its group.

    NaN counts as largest; equal values keep the order they came in.
    """
    order = values.detach().argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    starts = torch.searchsorted(ordered, ordered)
    return order, torch.arange(order.shape[0], device=order.device) - starts
