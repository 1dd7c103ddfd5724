"""Initial weights: rows drawn He-uniform, scaled to unit norm (arXiv 2408.05147, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DROPPED_ROWS = 1024


def unit_rows_(
    rows: Tensor, generator: torch.Generator | None, before: int = 0, after: int = 0
) -> None:
    """Fill `rows [f, d]` He-uniform and scale each row to unit norm.

    Args:
        rows: some of `[before + f + after, d]`.
        generator: gives the same rows whichever of them are wanted.
        before: rows that are drawn and dropped first.
        after: rows that are drawn and dropped then.
    """
    _drop(before, rows, generator)
    nn.init.kaiming_uniform_(rows, generator=generator)
    _drop(after, rows, generator)
    wide = torch.promote_types(rows.dtype, torch.float32)
    for part in torch.split(rows, 1024):  # of 16-bit rows torch would hold float32 copies
        norms = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=wide)
        part.div_(norms)  # the norm itself not rounded: all of a row would be off by its error


def _drop(count: int, like: Tensor, generator: torch.Generator | None) -> None:
    """Draw `count` rows and forget them."""
    unwanted = like.new_empty(min(count, DROPPED_ROWS), like.shape[1])
    for start in range(0, count, DROPPED_ROWS):
        part = unwanted[: min(count - start, DROPPED_ROWS)]
        nn.init.kaiming_uniform_(part, generator=generator)
