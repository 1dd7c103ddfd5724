"""TopK encoder: the k largest of `relu(pre)` per row, without forming `pre`.

    pre = x @ W_enc + b_enc          x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae] float32
    result(i) = the k largest of relu(pre[i]), NaN largest, ties to the smaller latent

Source: Gao et al., arXiv 2406.04093, section 2.3.
Algorithm: the latents are scanned in prefixes that double; a chunk emits what exceeds the row's
k-th best so far, and an exact selection per row merges it.
Bound: the product, 2 n d_in d_sae operations. Compulsory traffic: x, W_enc and 12 bytes per entry;
candidates add about 16 k log2(d_sae / 1024) bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .by_feature import by_feature as feature_view
from .candidates import Candidates
from .select_fill import select_fill
from .select_prefixes import scan_prefixes
from .select_rows import select_rows


class RowBest:
    """The k best entries of every row."""

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.latents = torch.empty((n, k), dtype=torch.int32, device=device)
        self.values = torch.empty((n, k), dtype=torch.float32, device=device)
        self.counts = torch.zeros(n, dtype=torch.int32, device=device)
        self.bound = torch.zeros(n, dtype=torch.float32, device=device)

    def merge(self, found: Candidates) -> None:
        """Take candidates of later latents in."""
        kept = self.latents, self.values, self.counts
        new = found.offsets, found.indices, found.values
        self.latents, self.values, self.counts, self.bound = select_rows(*kept, *new)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    by_feature: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Encode; see `ops.SCHEMAS` and docs/design.md.

    Reads one flag from the device where `d_sae` is more than twice the first prefix; none while a
    CUDA graph is captured, where lost candidates make all values NaN instead.
    """
    n, d_sae = x.shape[0], W_enc.shape[1]
    offsets = torch.arange(n + 1, dtype=torch.int64, device=x.device) * k
    best = RowBest(n, k, x.device)
    lost = scan_prefixes(x, W_enc, b_enc, best, k) if n * k > 0 else None
    indices, values = select_fill(best.latents, best.values, best.counts)
    if lost is not None:
        values.masked_fill_(lost, float("nan"))
    gate = (values != 0).to(torch.float32)
    if by_feature:
        return offsets, indices, values, gate, *feature_view(offsets, indices, d_sae)
    return offsets, indices, values, gate, offsets.new_empty(0), offsets.new_empty(0)
