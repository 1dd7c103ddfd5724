"""Initial weights: rows drawn He-uniform, scaled to unit norm (arXiv 2408.05147, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unit_rows_(rows: Tensor, generator: torch.Generator | None) -> None:
    """Fill `rows [f, d]` He-uniform and scale each row to unit norm."""
    nn.init.kaiming_uniform_(rows, generator=generator)
    wide = torch.promote_types(rows.dtype, torch.float32)
    for part in torch.split(rows, 1024):  # of 16-bit rows torch would hold float32 copies
        norms = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=wide)
        part.div_(norms)  # the norm itself not rounded: all of a row would be off by its error
