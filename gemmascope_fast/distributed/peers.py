"""`Peers`: what a loss evaluation asks of its peers, answered by collectives.

A loss over (dp, tp) ranks is the loss of the whole batch, the same number on every rank. Rows of
blocks are agreed on within "tp", because every block sums its reconstruction there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import decode
from ..sparse import SparseActs
from ..training.whole import Encoder, Whole
from .communication import MAX, MIN, all_reduce, gather_parts, leave
from .layout import Layout
from .selection import batch_count, batch_share, keep_batchtopk, keep_topk


class Peers(Whole):
    """The ranks of a mesh, each with its latents ("tp") of its tokens ("dp")."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._device = layout, layout.device
        self.first = layout.rank == 0

    def d_sae(self, own: int) -> int:
        """Latents of the whole dictionary."""
        return self._layout.d_sae

    def n(self, own: int) -> int:
        """Tokens of all ranks of "dp"; one all-reduce of a number over them."""
        if self._layout.dp == 1:
            return own
        return int(self.over_tokens(torch.tensor(own, device=self._device)))

    def over_latents(self, t: Tensor) -> Tensor:
        """Sum over "tp"."""
        return all_reduce(t, self._layout.tp_group)

    def over_tokens(self, t: Tensor) -> Tensor:
        """Sum over "dp"."""
        return all_reduce(t, self._layout.dp_group)

    def mean(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """Mean over the tokens of all ranks of "dp"; one all-reduce of `[d_out + 1]` over them."""
        if self._layout.dp == 1:
            return super().mean(target, dtype)
        tokens = torch.full((1,), target.shape[0], dtype=dtype, device=target.device)
        sums = self.over_tokens(torch.cat([target.sum(0, dtype=dtype), tokens]))
        return sums[:-1] / sums[-1]

    def counts(self, own: Tensor) -> Tensor:
        """An all-reduce over "dp" and an all-gather over "tp" of the largest shard's counts."""
        layout = self._layout
        return gather_parts(self.over_tokens(own), layout.d_sae, layout.tp_group)

    def part(self, t: Tensor) -> Tensor:
        """This rank's latents."""
        return t[self._layout.latents]

    def smallest(self, numbers: list[int]) -> list[int]:
        """Least over "tp"; one all-reduce of as many numbers."""
        found = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        least: list[int] = all_reduce(found, self._layout.tp_group, MIN).tolist()
        return least

    def topk(
        self, op: Any, encoder: Encoder, k: int, by_feature: bool, codes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`selection.keep_topk` of the local op's candidates."""
        size = encoder[1].shape[1]
        acts = _acts(op("topk_encode")(*encoder, min(k, size), False, codes), encoder)
        (kept,) = keep_topk([acts], k, min(k, max(self._layout.sizes())), self._layout)
        return _tuple(kept, by_feature)

    def batchtopk(
        self,
        op: Any,
        encoder: Encoder,
        k: float,
        by_feature: bool,
        codes: Tensor | None,
        guess: float | None,
    ) -> tuple[Tensor, ...]:
        """`selection.keep_batchtopk` of the local op's candidates, whose threshold it tells."""
        (n, _), size = encoder[0].shape, encoder[1].shape[1]
        count = batch_count(k, n, self._layout, self._device)
        share = batch_share(count, n, size)
        found = op("batchtopk_encode")(*encoder, share, guess, None, False, codes)
        (kept,), _ = keep_batchtopk([_acts(found, encoder)], count, self._layout)
        entries = _tuple(kept, by_feature)
        return *entries[:4], *found[4:6], *entries[4:]

    def ends(self, ends: tuple[int, ...]) -> tuple[int, ...]:
        """Leading latents of the whole that are this rank's."""
        here = self._layout.latents
        return tuple(min(max(end, here.start), here.stop) - here.start for end in ends)

    def own(self, latents: Tensor) -> Tensor:
        """This rank's, counted from its first."""
        here = self._layout.latents
        mine = latents[(latents >= here.start) & (latents < here.stop)]
        return torch.sub(mine, here.start)

    def deviation(self, t: Tensor) -> Tensor:
        """Over the tokens of all ranks of "dp"; `mean`, `n` and one all-reduce of a number."""
        if self._layout.dp == 1:
            return super().deviation(t)
        total = self.over_tokens((t - self.mean(t, t.dtype)).square().sum())
        return total / max(self.n(t.shape[0]), 1)

    def keep(self, acts: SparseActs, k: int, held: int) -> SparseActs:
        """`selection.keep_topk`, and before it one all-reduce of the number of candidates."""
        most = torch.tensor(min(acts.d_sae, held), device=self._device)
        width = int(all_reduce(most, self._layout.tp_group, MAX))
        return keep_topk([acts], k, width, self._layout)[0]

    def join(self, partial: Tensor) -> Tensor:
        """Sum over "tp"; the gradient needs no collective."""
        return leave(partial, self._layout.tp_group)

    def decode(self, acts: SparseActs, W_dec: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
        """One all-reduce over "tp"."""
        return self.join(decode(acts, W_dec, None, dtype=dtype)) + b_dec.to(dtype)

    def alike(self, t: Tensor) -> Tensor:
        """The gradient is the first rank's."""
        return t if self.first else t.detach()

    def smallest_active(self, values: Tensor, gate: Tensor) -> Tensor | None:
        """Least over all ranks; one all-reduce of a number over "tp" and one over "dp"."""
        active = values[gate > 0]
        bounds = active.new_tensor([torch.inf])
        lowest = torch.cat([active, bounds]).nan_to_num(-torch.inf, torch.inf, -torch.inf).min()
        for group in (self._layout.tp_group, self._layout.dp_group):
            lowest = all_reduce(lowest, group, MIN)
        return lowest if bool(lowest.isfinite()) else None


def _acts(found: tuple[Tensor, ...], encoder: Encoder) -> SparseActs:
    offsets, indices, values, gate = found[:4]
    shape = encoder[0].shape[0], encoder[1].shape[1]
    return SparseActs(offsets, indices, values, gate, shape)


def _tuple(acts: SparseActs, by_feature: bool) -> tuple[Tensor, ...]:
    """Entries as the encoder ops return them."""
    view = acts.by_feature() if by_feature else (acts.offsets[:0], acts.offsets[:0])
    return acts.offsets, acts.indices, acts.values, acts.gate, *view
