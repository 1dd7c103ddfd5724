"""`ShardedActs`: activations of which each rank has those of its own latents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..entries import cumulative
from ..sparse import SparseActs
from .communication import all_gather, leave
from .debugging import check_agreement
from .layout import Layout


@dataclass(frozen=True)
class ShardedActs:
    """The entries of this rank's latents, on all tokens of its part of the batch.

    Attributes:
        local: `[*batch, local latents]`, whose latents count from `latents.start`.
        layout: which latents those are.
        once: whether a token may have one NaN entry only, as after a JumpReLU.
    """

    local: SparseActs
    layout: Layout
    once: bool = False

    @property
    def latents(self) -> slice:
        """The latents of the entries held here."""
        return self.layout.latents

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*batch, d_sae)` of the whole."""
        return (*self.local.shape[:-1], self.layout.d_sae)

    @property
    def indices(self) -> Tensor:
        """`[capacity]` int32 global latent of each entry held here."""
        start: int = self.latents.start
        return self.local.indices + start

    def l0(self) -> Tensor:
        """`[*batch]`: active latents per token, of all ranks; one all-reduce.

        Differentiable in the thresholds; the gradient needs no collective.
        """
        own: Tensor = self.local.l0()
        return leave(own, self.layout.tp_group)

    def detach(self) -> ShardedActs:
        """Return the same entries without autograd history."""
        return replace(self, local=self.local.detach())

    def gathered(self) -> SparseActs:
        """The activations of all ranks in canonical order, the same on every rank of "tp".

        Two all-gathers: row lengths `[n]` int64, then the entries, padded to the longest rank's.
        Differentiable: what every rank computes from the result alike gives each rank the gradient
        of its own entries, without a collective.
        """
        local, group = self.local, self.layout.tp_group
        nnz, wide = local.nnz, local.dtype == torch.float64
        word = torch.int64 if wide else torch.int32
        lengths = all_gather(local.offsets.diff(), group)  # [tp, n]
        sizes = lengths.sum(1)
        capacity = int(sizes.max())
        packed = torch.zeros((3, capacity), dtype=word, device=local.device)
        packed[0, :nnz] = self.indices[:nnz].to(word)
        for at, t in enumerate((local.values, local.gate), 1):
            packed[at, :nnz] = t.detach()[:nnz].view(word)
        every = all_gather(packed, group)
        places = _places(lengths)
        total = int(sizes.sum())
        found = every.new_zeros((3, total))
        for words, place in zip(every, places, strict=True):
            found[:, place] = words[:, : place.shape[0]]
        floats = found[1:].view(local.dtype)
        if self.layout.debug:
            check_agreement("gathered", "indices", found[0], self.layout)
        mine = places[self.layout.rank]
        values = floats[0].index_copy(0, mine, local.values[:nnz])
        gate = floats[1].index_copy(0, mine, local.gate[:nnz])
        offsets = cumulative(lengths.sum(0))
        indices, threshold = found[0].to(torch.int32), local.threshold
        whole = SparseActs(offsets, indices, values, gate, self.shape, threshold=threshold)
        return _first_invalid(whole) if self.once else whole


def _places(lengths: Tensor) -> list[Tensor]:
    """Where the entries of each rank go, from `lengths [ranks, n]` of their rows."""
    starts = cumulative(lengths.sum(0))[:-1] + lengths.cumsum(0) - lengths
    found = []
    for start, length in zip(starts, lengths, strict=True):
        shift = start - (length.cumsum(0) - length)
        shift = shift.repeat_interleave(length)
        found.append(torch.arange(shift.shape[0], device=shift.device) + shift)
    return found


def _first_invalid(acts: SparseActs) -> SparseActs:
    """`acts` with a token's first NaN entry only: each rank stored the first of its own."""
    invalid = acts.values.detach().isnan()
    if not bool(invalid.any()):
        return acts
    before = cumulative(invalid.long())
    first = before[:-1] == before[acts.offsets[:-1]][acts.tokens()]
    return acts._keep(~invalid | first)
