"""What a loss evaluation asks of the processes that share its batch and its latents.

`Whole` is one process with all of both: every sum is complete as it is. In
`gemmascope_fast.distributed` the same questions are answered by collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..effective import smallest_active

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

    def topk(self, op: Any, encoder: Encoder, k: int, by_feature: bool) -> tuple[Tensor, ...]:
        """The entries here of `topk_encode`."""
        return op("topk_encode")(*encoder, k, by_feature)  # type: ignore[no-any-return]

    def batchtopk(
        self, op: Any, encoder: Encoder, k: float, by_feature: bool
    ) -> tuple[Tensor, ...]:
        """The entries here of `batchtopk_encode`."""
        return op("batchtopk_encode")(*encoder, k, None, None, by_feature)  # type: ignore[no-any-return]

    def smallest_active(self, values: Tensor, gate: Tensor) -> Tensor | None:
        """Smallest active value, None where nothing is active or a value is NaN."""
        return smallest_active(values, gate)


WHOLE = Whole()
