"""`SparseActs`: sparse latent activations in CSR, the result of every encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .arguments import check_count
from .entries import (
    OPTIONAL,
    TENSORS,
    Entries,
    check_topk,
    cumulative,
    distinct_tokens,
    latent_ids,
    pad_mask,
    register_pytree,
    row_offsets,
)


class SparseActs(Entries):
    """Activations of `n` tokens over `d_sae` latents, stored entries only.

    Attributes:
        offsets: `[n + 1]` int64; token i owns entries `offsets[i]:offsets[i + 1]`.
        indices: `[nnz]` int32 latent of each entry, ascending inside a token.
        values: `[nnz]` float32 activation, differentiable; 0 for a window entry that is off.
        gate: `[nnz]` float32, 1 active, 0 stored without being active; differentiable in the
            threshold of a JumpReLU through its straight-through window.
        shape: `(*batch, d_sae)`; n is the product of `batch`.
        needed: with a fixed capacity, the true number of entries (int64 scalar), else None.
        threshold: implied threshold of a BatchTopK batch (float32 scalar), else None.

    With a fixed capacity (`max_nnz`) the entry arrays are longer than `offsets[-1]`; the rest is
    padding that nothing reads.
    """

    __slots__ = ()

    # construction

    @staticmethod
    def from_dense(dense: Tensor) -> SparseActs:
        """Entries of `dense [*batch, d_sae]` that are not 0 (NaN counts); values stay attached.

        Raises:
            TypeError: `dense` is not a floating-point tensor.
            ValueError: `dense` has no dimension.
        """
        kind = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise TypeError(f"from_dense: dense must be a floating-point tensor, got {kind}")
        if dense.dim() == 0:
            raise ValueError("from_dense: dense must have at least one dimension, got a scalar")
        n = math.prod(dense.shape[:-1])
        flat = dense.reshape(n, dense.shape[-1])
        rows, latents = (flat.detach() != 0).nonzero(as_tuple=True)
        values = flat[rows, latents]
        values = values if dense.dtype == torch.float64 else values.float()
        gate = torch.ones_like(values, requires_grad=False)
        return SparseActs(
            row_offsets(rows, n), latents.to(torch.int32), values, gate, tuple(dense.shape)
        )

    @staticmethod
    def from_topk(values: Tensor, indices: Tensor, d_sae: int) -> SparseActs:
        """Entries given as `values [*batch, k]` and `indices [*batch, k]` in any order.

        A slot whose value is 0 is kept with gate 0, unless its latent stands in the row already
        (padding slots that all point at one latent): then it is dropped.

        Raises:
            TypeError: `values` is not a floating-point tensor or `indices` not an integer one.
            ValueError: shapes differ, an index is outside `[0, d_sae)`, or a row names a latent
                twice with non-zero values.
        """
        indices = check_topk(values, indices, d_sae)
        k = values.shape[-1]
        n = math.prod(values.shape[:-1])
        flat = values.reshape(n, k)
        flat = flat if values.dtype == torch.float64 else flat.float()
        off = (flat.detach() == 0).to(torch.int64)
        latents, order = (2 * indices.reshape(n, k) + off).sort(dim=1, stable=True)
        latents = latents // 2
        flat, off = flat.gather(1, order), off.gather(1, order)
        twice = torch.zeros_like(latents, dtype=torch.bool)
        twice[:, 1:] = latents[:, 1:] == latents[:, :-1]
        clash = twice & (off == 0)
        if bool(clash.any()):
            row, at = (int(v) for v in clash.nonzero()[0])
            raise ValueError(
                f"from_topk: row {row} names latent {int(latents[row, at])} twice with non-zero "
                "values; indices must be distinct inside a row"
            )
        rows = torch.arange(n, device=values.device)[:, None].expand(n, k)[~twice]
        gate = (1 - off)[~twice].to(flat.dtype)
        shape = (*values.shape[:-1], d_sae)
        return SparseActs(
            row_offsets(rows, n), latents[~twice].to(torch.int32), flat[~twice], gate, shape
        )

    # sums and selections

    def l0(self) -> Tensor:
        """`[*batch]`: active latents per token, differentiable in the threshold."""
        sums = self.gate.new_zeros(self.n + 1).index_add(0, self.tokens(), self.gate)
        return sums[: self.n].reshape(self.shape[:-1])

    def counts(self) -> Tensor:
        """`[d_sae]`: tokens on which each latent is active, differentiable in the threshold."""
        sums = self.gate.new_zeros(self.d_sae + 1).index_add(0, self.latents(), self.gate)
        return sums[: self.d_sae]

    def fired(self) -> Tensor:
        """`[d_sae]` bool: latents that are active on at least one token."""
        return self.counts().detach() > 0

    def max_over_tokens(self) -> Tensor:
        """`[d_sae]`: each latent's largest activation over the tokens, 0 where a token lacks it."""
        latents, values = self.latents(), self._valid(self.values)
        start = values.new_zeros(self.d_sae + 1)
        entries = start.long().index_add(0, latents, torch.ones_like(latents))
        start = start.masked_fill((entries == self.n) & (entries > 0), -torch.inf)
        return start.scatter_reduce(0, latents, values, "amax")[: self.d_sae]

    def topk(self, k: int) -> SparseActs:
        """Keep the k largest active entries of every token, ties to the smaller latent.

        Raises:
            TypeError: k is not an int.
            ValueError: k is negative.
        """
        k = check_count("topk", "k", k)
        tokens, active = self.tokens(), self._valid(self.gate) > 0
        ranked = torch.where(active, self.values.detach(), -torch.inf)
        order = ranked.argsort(descending=True, stable=True)
        order = order[tokens[order].argsort(stable=True)]
        starts = torch.cat([self.offsets, self.offsets[-1:]])[tokens[order]]
        rank = torch.arange(order.shape[0], device=self.device) - starts
        keep = torch.zeros_like(active).scatter(0, order, rank < k)
        return self._keep(keep & active)

    def __getitem__(self, rows: Any) -> SparseActs:
        """Tokens selected by `rows`, an index of the leading dimensions (int, slice, mask, ...)."""
        ids = torch.arange(self.n, device=self.device).reshape(self.shape[:-1])[rows]
        flat = ids.reshape(-1)
        lengths = self.offsets[1:][flat] - self.offsets[:-1][flat]
        offsets = cumulative(lengths)
        shift = self.offsets[:-1][flat] - offsets[:-1]
        source = torch.arange(int(offsets[-1]), device=self.device)
        source = source + shift.repeat_interleave(lengths)
        return self._entries(source, offsets, (*ids.shape, self.d_sae))

    def union(self, other: SparseActs) -> SparseActs:
        """Self on the union of both supports; what only `other` stores is an explicit 0, gate 0.

        The explicit zeros take part in `decode`, so their values receive gradients: the effect
        that switching a latent on would have.

        Raises:
            TypeError: `other` is not a `SparseActs`.
            ValueError: the shapes differ.
        """
        if not isinstance(other, SparseActs):
            raise TypeError(f"union: other must be a SparseActs, got {type(other).__name__}")
        if other.shape != self.shape:
            raise ValueError(f"union: other must have shape {self.shape}, got {other.shape}")
        mine, theirs = self._keys(), other._keys()
        extra = theirs[~torch.isin(theirs, mine)]
        return self._with_entries(mine, extra, self.values.new_zeros(extra.shape[0]))

    # edits: new objects, the originals stay as they are

    def set(self, latents: Any, value: float | Tensor, rows: Any = None) -> SparseActs:
        """Give `latents` the activation `value` on every token, or on those `rows` selects.

        Dense equivalent: `dense[rows][..., latents] = value`. `value` is a number or a tensor that
        broadcasts to `[selected tokens, latents]`. Entries set to the number 0 are removed; a 0
        inside a tensor is stored with gate 0, so that it receives a gradient.

        Raises:
            TypeError: `latents` are neither integers nor a mask.
            ValueError: a latent is out of range or named twice, a token selected twice, or `value`
                has another shape.
        """
        chosen = latent_ids("set", latents, self.d_sae, self.device)
        every = torch.arange(self.n, device=self.device).reshape(self.shape[:-1])
        tokens = every.reshape(-1) if rows is None else distinct_tokens("set", every[rows])
        new = (tokens[:, None] * self.d_sae + chosen).reshape(-1)
        mine = self._keys()
        kept = self._keep(pad_mask(~torch.isin(mine, new), self.indices.shape[0]))
        if not isinstance(value, Tensor) and value == 0:
            return kept
        filled = self._spread("set", "value", value, (tokens.shape[0], chosen.shape[0]))
        return kept._with_entries(kept._keys(), new, filled.reshape(-1))

    def ablate(self, latents: Any, value: float | Tensor = 0.0) -> SparseActs:
        """Replace `latents` by `value` on every token: zero or mean ablation."""
        return self.set(latents, value)

    def scale(self, latents: Any, factor: float | Tensor) -> SparseActs:
        """Multiply the activations of `latents` by `factor` (a number, or one per latent).

        Raises:
            TypeError: `latents` are neither integers nor a mask.
            ValueError: a latent is out of range or named twice, or `factor` has another shape.
        """
        chosen = latent_ids("scale", latents, self.d_sae, self.device)
        factors = self.values.new_ones(self.d_sae + 1)
        given = self._spread("scale", "factor", factor, (chosen.shape[0],))
        factors = factors.scatter(0, chosen, given)
        return self._replace(values=self.values * factors[self.latents()])

    def detach(self) -> SparseActs:
        """Return the same entries without autograd history."""
        return self._replace(values=self.values.detach(), gate=self.gate.detach())

    def requires_grad_(self, requires_grad: bool = True) -> SparseActs:
        """Make the values require gradients, in place; they must be leaves (`detach()` first)."""
        self.values.requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, **kwargs: Any) -> SparseActs:
        """Move to a device, or cast the values; arguments as in `torch.Tensor.to`.

        Raises:
            TypeError: the dtype is not floating point.
        """
        values = self.values.to(*args, **kwargs)
        if not values.is_floating_point():
            raise TypeError(f"to: dtype must be floating point, got {values.dtype}")
        moved = {
            name: None if t is None else t.to(values.device)
            for name in (*TENSORS, *OPTIONAL)
            if (t := getattr(self, name)) is not None and name != "values"
        }
        return self._replace(values=values, **moved)

    # exports: entries whose gate is 0 are left out

    def to_dense(self) -> Tensor:
        """`[*batch, d_sae]`; differentiable, window entries included (their value is 0)."""
        nnz = self.nnz
        where = (self.tokens()[:nnz], self.indices[:nnz].long())
        dense = self.values.new_zeros((self.n, self.d_sae)).index_put(where, self.values[:nnz])
        return dense.reshape(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """`[n, d_sae]` as a `torch.sparse_csr` tensor of the active entries."""
        active = self._keep(self._valid(self.gate) > 0)
        return torch.sparse_csr_tensor(
            active.offsets,
            active.indices.long(),
            active.values,
            size=(self.n, self.d_sae),
            check_invariants=False,
        )

    def as_topk(self) -> tuple[Tensor, Tensor]:
        """`(values [*batch, k], indices [*batch, k])` as views, when every row has k entries.

        Raises:
            ValueError: the rows differ in length.
        """
        n, nnz = self.n, self.nnz
        k = nnz // n if n else 0
        lengths = self.offsets[1:] - self.offsets[:-1]
        if bool((lengths != k).any()):
            raise ValueError("as_topk: rows have different numbers of entries")
        shape = (*self.shape[:-1], k)
        return self.values[:nnz].view(shape), self.indices[:nnz].view(shape)


register_pytree(SparseActs)
