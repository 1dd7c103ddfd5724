"""`TopActivations`: the tokens on which each latent was most active, over a stream of batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count
from ..entries import latent_ids
from ..sparse import SparseActs
from .activations import active_entries, check_acts, ranked

EMPTY = torch.iinfo(torch.int64).max
"""Token of an empty slot while sorting: after all others."""


class TopActivations:
    """For every latent, or chosen ones, the n tokens of its largest activations so far.

    The result is that of sorting all activations by (value descending, token ascending), whatever
    the batches and their order, bit for bit; NaN ranks largest. Memory is about `12 m n` bytes, and
    during an update a few times that of the rows that it changes.

    Args:
        d_sae: number of latents.
        n: tokens to keep for each.
        latents: m distinct latents, or a `[d_sae]` mask; default all, `m = d_sae`.
        device: of the state; batches may be anywhere.

    Attributes:
        latents: `[m]` int64, the latent of each row.
        values: `[m, n]` float32 activations, largest first, 0 in empty slots.
        tokens: `[m, n]` int64 tokens, -1 in empty slots.
        seen: the token after the last one that `update` has seen.

    Raises:
        TypeError: a count is not an int, or `latents` are neither integers nor a mask.
        ValueError: a count is negative, or a latent out of range or named twice.
    """

    def __init__(
        self,
        d_sae: int,
        n: int,
        latents: Any = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        op = type(self).__name__
        self.d_sae, self.n = check_count(op, "d_sae", d_sae), check_count(op, "n", n)
        where = torch.empty(0, device=device).device
        every = torch.arange(d_sae, device=where)
        self.latents = every if latents is None else latent_ids(op, latents, d_sae, where)
        m = self.latents.shape[0]
        self.values = torch.zeros(m, n, device=where)
        self.tokens = torch.full((m, n), -1, device=where)
        self.seen = 0
        self._row = torch.full((d_sae,), -1, device=where)
        self._row[self.latents] = torch.arange(m, device=where)

    @torch.no_grad()
    def update(self, acts: SparseActs, first_token: int | None = None) -> None:
        """Take in a batch.

        Args:
            acts: activations over d_sae latents, any leading dimensions.
            first_token: number of its first token, the others counting on in flattened order;
                default `seen`. Numbers must not repeat between batches.

        Raises:
            TypeError: `acts` is not a `SparseActs`, or `first_token` not an int.
            ValueError: `acts` has another number of latents, or `first_token` is negative.
        """
        op = "TopActivations.update"
        check_acts(op, acts)
        if acts.d_sae != self.d_sae:
            raise ValueError(f"{op}: acts must have d_sae={self.d_sae} latents, got {acts.d_sae}")
        first = self.seen if first_token is None else check_count(op, "first_token", first_token)
        tokens, latents, values = active_entries(acts)
        rows = self._row.to(acts.device)[latents]
        chosen = rows >= 0
        self._insert(rows[chosen], values[chosen], tokens[chosen] + first)
        self.seen = max(self.seen, first + acts.n)

    @torch.no_grad()
    def merge(self, other: TopActivations) -> None:
        """Take in what another stream found: other shards of the same numbering of tokens.

        Raises:
            TypeError: `other` is not a `TopActivations`.
            ValueError: it is of other latents, or keeps another number of tokens.
        """
        op = "TopActivations.merge"
        if not isinstance(other, TopActivations):
            raise TypeError(f"{op}: other must be a TopActivations, got {type(other).__name__}")
        latents = other.latents.to(self.latents.device)
        if (other.d_sae, other.n) != (self.d_sae, self.n) or not latents.equal(self.latents):
            raise ValueError(f"{op}: other must have the same d_sae, n and latents")
        rows, slots = (other.tokens >= 0).nonzero(as_tuple=True)
        self._insert(rows, other.values[rows, slots], other.tokens[rows, slots])
        self.seen = max(self.seen, other.seen)

    def _insert(self, rows: Tensor, values: Tensor, tokens: Tensor) -> None:
        """Merge entries into the state; equal values of a row come by token."""
        if self.n == 0:
            return
        rows, tokens = rows.to(self.values.device), tokens.to(self.values.device)
        values = values.to(self.values)
        last, at = self.values[rows, -1], self.tokens[rows, -1]
        enters = (at < 0) | ~((values < last) | ((values == last) & (tokens > at)))
        rows, values, tokens = rows[enters], values[enters], tokens[enters]
        order, rank = ranked(values, rows)
        order, rank = order[rank < self.n], rank[rank < self.n]
        changed, place = rows[order].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        size = (changed.shape[0], self.n + (int(rank.max()) + 1 if rank.numel() else 0))
        all_values, all_tokens = self.values.new_zeros(size), self.tokens.new_full(size, EMPTY)
        held = self.tokens[changed]
        all_values[:, : self.n] = self.values[changed]
        all_tokens[:, : self.n] = held.masked_fill(held < 0, EMPTY)
        all_values[place, self.n + rank] = values[order]
        all_tokens[place, self.n + rank] = tokens[order]
        all_tokens, by_token = all_tokens.sort(dim=1)
        all_values = all_values.gather(1, by_token)
        keys = all_values.masked_fill(all_tokens == EMPTY, -torch.inf)
        best = keys.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        kept = all_tokens.gather(1, best)
        self.values[changed] = all_values.gather(1, best)
        self.tokens[changed] = kept.masked_fill(kept == EMPTY, -1)
