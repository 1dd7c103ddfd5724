"""What the processes that share one evaluation of a loss tell each other: nothing, where it is one.

Ranks may hold slices of the latents ("tp": the same rows) and of the rows ("dp": the same latents).
Entries, gates and gradients of weights stay where their latents are; what a block needs of all
latents, and a batch of all rows, passes through here. `distributed` has the class for a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations import TopK
from ..sparse import SparseActs
from .losses import LossTerm


class Exchange:
    """One process: it holds all latents and all rows, so every answer is the question.

    A subclass' methods are called by all its ranks, in the same order.

    Attributes:
        leads: whether this rank adds what its "tp" ranks have in common: b_dec, sums over tokens.
    """

    leads = True

    def check(self, op: str, terms: Sequence[LossTerm]) -> None:
        """Raise ValueError where a term cannot be computed from slices."""

    def whole(self, d_sae: int) -> int:
        """Latents of all slices."""
        return d_sae

    def widest(self, d_sae: int) -> int:
        """Latents of the largest slice."""
        return d_sae

    def tokens(self, n: int) -> int:
        """Rows of all ranks."""
        return n

    def mean(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """`[d]` mean over the rows of all ranks."""
        return target.mean(0, dtype=dtype)

    def over_rows(self, total: Tensor) -> Tensor:
        """Sum over "dp"."""
        return total

    def densest(self, density: float) -> float:
        """Largest over "tp", so that all cut the rows alike."""
        return density

    def every(self, condition: bool) -> bool:
        """Whether it holds on all ranks."""
        return condition

    def ends(self, ends: tuple[int, ...], d_sae: int) -> tuple[tuple[int, ...], Groups]:
        """Prefixes of this slice, and which of them each prefix of the whole ends with."""
        return ends, None

    def joined(self, recons: Tensor, l0: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions and L0 of some tokens by all latents, from those by this slice."""
        return recons, l0

    def joined_x(self, d_x: Tensor) -> Tensor:
        """Gradient of x through all latents."""
        return d_x

    def counts(self, counts: Tensor) -> Tensor:
        """`[whole]` firing counts of the whole batch from those of this slice and these rows."""
        return counts

    def own(self, by_latent: Tensor) -> Tensor:
        """This slice of `[whole]` values."""
        return by_latent

    def sums(self, sums: Tensor, apart: Sequence[bool]) -> Tensor:
        """Sums over all ranks; those not `apart` are the same on the ranks of "tp"."""
        return sums

    def select(self, op: Op, encoder: tuple[Tensor, ...], activation: Any, by_feature: bool) -> Any:
        """What `topk_encode` or `batchtopk_encode` returns, selected among all latents."""
        if isinstance(activation, TopK):
            return op("topk_encode")(*encoder, activation.k, by_feature)
        return op("batchtopk_encode")(*encoder, float(activation.k), None, None, by_feature)

    def smallest(self, value: Tensor | None) -> Tensor | None:
        """Smallest over all ranks that have one; None where none has."""
        return value

    def latents(self, own: int) -> int:
        """Sum over "tp" of a number of latents."""
        return own

    def top(self, acts: SparseActs, k: int) -> SparseActs:
        """Of each token's entries those among its k largest in all slices."""
        return acts

    def joined_recon(self, recon: Tensor) -> Tensor:
        """Sum over "tp" under autograd: each rank's share receives the whole's gradient."""
        return recon


Op = Callable[[str], Any]
Groups = tuple[int, ...] | None
"""For each prefix of the whole its prefix of the slice, -1 where that is empty; None: the same."""

ALONE = Exchange()


def spread(recons: Tensor, groups: Groups) -> Tensor:
    """`[G, r, d]` reconstructions by prefixes of the whole, from those by prefixes of a slice."""
    if groups is None:
        return recons
    return torch.stack([torch.zeros_like(recons[0]) if g < 0 else recons[g] for g in groups])


def gathered(d_recons: Tensor, groups: Groups, count: int) -> Tensor:
    """The transpose of `spread`: gradients of the slice's `count` prefixes."""
    if groups is None:
        return d_recons
    found = d_recons.new_zeros(count, *d_recons.shape[1:])
    for group, part in zip(groups, d_recons, strict=True):
        if group >= 0:
            found[group] += part
    return found
