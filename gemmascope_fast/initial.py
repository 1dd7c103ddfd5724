"""Initial weights of the modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unit_rows_(rows: Tensor, generator: torch.Generator | None) -> None:
    """Fill `rows [f, d]` He-uniform and scale each row to unit norm."""
    nn.init.kaiming_uniform_(rows, generator=generator)
    wide = torch.promote_types(rows.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
    rows.div_(norms.to(rows.dtype))
