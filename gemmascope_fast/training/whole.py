"""What a loss evaluation asks of the processes that share its batch and its latents.

`Whole` is one process with all of both: every sum is complete as it is. In
`gemmascope_fast.distributed` the same questions are answered by collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..effective import smallest_active
from ..functional import decode
from ..losses.dead import mean_deviation
from ..sparse import SparseActs

Encoder = tuple[Tensor, Tensor, Tensor]
"""x `[n, d_in]`, W_enc, b_enc."""


class Whole:
    """All latents and all tokens.

    Attributes:
        first: whether this process adds what its peers compute alike, as b_dec, to a sum of theirs.
    """

    first = True

    def d_sae(self, own: int) -> int:
        """Latents of all, of which `own` are here."""
        return own

    def n(self, own: int) -> int:
        """Tokens of all, of which `own` are here."""
        return own

    def over_latents(self, t: Tensor) -> Tensor:
        """Sum of what each made of its latents; may overwrite `t`."""
        return t

    def over_tokens(self, t: Tensor) -> Tensor:
        """Sum of what each made of its tokens; may overwrite `t`."""
        return t

    def mean(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """`[d_out]` mean over all tokens of `target [n, d_out]`."""
        return target.mean(0, dtype=dtype)

    def counts(self, own: Tensor) -> Tensor:
        """`[d_sae]` over all tokens and latents, from counts `own` of those here."""
        return own

    def part(self, t: Tensor) -> Tensor:
        """The latents that are here of `t [d_sae]`."""
        return t

    def smallest(self, numbers: list[int]) -> list[int]:
        """The smallest of each over those who share the tokens: the rows of their common blocks."""
        return numbers

    def topk(
        self, op: Any, encoder: Encoder, k: int, by_feature: bool, codes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The entries here of `topk_encode`."""
        return op("topk_encode")(*encoder, k, by_feature, codes)  # type: ignore[no-any-return]

    def batchtopk(
        self,
        op: Any,
        encoder: Encoder,
        k: float,
        by_feature: bool,
        codes: Tensor | None,
        guess: float | None,
    ) -> tuple[Tensor, ...]:
        """The entries here of `batchtopk_encode`, and its other outputs."""
        return op("batchtopk_encode")(*encoder, k, guess, None, by_feature, codes)  # type: ignore[no-any-return]

    def ends(self, ends: tuple[int, ...]) -> tuple[int, ...]:
        """How many of the first `ends[g]` latents are here."""
        return ends

    def own(self, latents: Tensor) -> Tensor:
        """Those of the `latents` that are here, counted from the first that is."""
        return latents

    def deviation(self, t: Tensor) -> Tensor:
        """Mean squared deviation of `t [n, d]` from its mean, over all tokens."""
        return mean_deviation(t)

    def keep(self, acts: SparseActs, k: int, held: int) -> SparseActs:
        """The entries here among the k largest per token, of acts that have up to `held`."""
        return acts if k == held else acts.topk(k)

    def join(self, partial: Tensor) -> Tensor:
        """`over_latents`, differentiable; what follows is computed alike by each."""
        return partial

    def decode(self, acts: SparseActs, W_dec: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
        """Reconstruction by the latents of all, differentiable."""
        return decode(acts, W_dec, b_dec, dtype=dtype)

    def alike(self, t: Tensor) -> Tensor:
        """`t` where each computes the same with it: one of them has the gradient."""
        return t

    def smallest_active(self, values: Tensor, gate: Tensor) -> Tensor | None:
        """Smallest active value; not finite, or None, where nothing is active or one is NaN."""
        return smallest_active(values, gate)


WHOLE = Whole()
