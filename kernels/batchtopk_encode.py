"""BatchTopK encoder: the `int(k n)` largest positive entries of a batch, without forming `pre`.

    pre = x @ W_enc + b_enc          x [n, d_in], W_enc [d_in, d_sae], b_enc [d_sae] float32
    result = the count largest entries of relu(pre), NaN largest, ties by (row, latent)

Source: Bussmann et al., arXiv 2412.06410.
Algorithm: the latents are scanned in prefixes that double; a chunk emits what reaches the best
entries so far, and a radix selection over the batch merges it. A guess of the threshold replaces
the scan by one chunk, when what it finds holds `count` entries and fits.
Bound: the product, 2 n d_in d_sae operations. Compulsory traffic: x, W_enc and 12 bytes per entry;
a merge reads its candidates six times, 24 bytes each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .by_feature import by_feature as feature_view
from .candidates import Candidates, candidates
from .select_count import select_count
from .select_cut import select_cut
from .select_histogram import BINS, LEVELS, select_histogram
from .select_place import select_place
from .select_prefixes import capturing, first_prefix, scan_prefixes

MARGIN = 0.9
"""A guess of the threshold is lowered by this factor: thresholds drift by a few % per step."""


class BatchBest:
    """The `count` best entries of a batch of n rows, as CSR of `capacity` elements."""

    def __init__(self, n: int, count: int, capacity: int, device: torch.device) -> None:
        self.count = count
        self.k = -(-capacity // max(n, 1))
        self.offsets = torch.zeros(n + 1, dtype=torch.int64, device=device)
        self.latents = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.values = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.bound = torch.zeros(n, dtype=torch.float32, device=device)
        self.threshold = torch.zeros((), dtype=torch.float32, device=device)

    def merge(self, found: Candidates) -> None:
        """Take candidates of later latents in."""
        kept = self.offsets, self.latents, self.values
        new = found.offsets, found.indices, found.values
        values = kept[0], kept[2], new[0], new[2]
        shape = LEVELS, BINS.value
        histograms = torch.zeros(shape, dtype=torch.int64, device=self.values.device)
        for level in range(LEVELS):
            select_histogram(*values, histograms, self.count, level)
        cut = select_cut(histograms, self.count)
        before = select_count(*values, cut, self.k).cumsum(1)
        self.threshold = cut[0].to(torch.int32).view(torch.float32)
        placed = select_place(kept, new, cut, before, self.k)
        self.offsets, self.latents, self.values, self.bound = placed


def batchtopk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: float,
    guess: float | None,
    max_nnz: int | None,
    by_feature: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Encode; see `ops.SCHEMAS` and docs/design.md.

    Reads from the device: whether the guess held, or one flag after the scan where `d_sae` is more
    than twice the first prefix; the number of entries without `max_nnz`. With `max_nnz` a CUDA
    graph can capture it: then the guess is not used, and lost candidates make all values NaN and
    `needed` the number of all pairs, as what was lost might have been anything. Too small a
    `max_nnz` clamps the offsets and makes all values NaN; `needed` is the true count.
    """
    n, d_sae = x.shape[0], W_enc.shape[1]
    count = int(k * n)
    best = BatchBest(n, count, min(count, n * d_sae), x.device)
    lost = None
    if best.k > 0 and not _follow(guess, x, W_enc, b_enc, best):
        lost = scan_prefixes(x, W_enc, b_enc, best, best.k)
    needed = best.offsets[-1].clone()
    offsets, indices, values = _resize(best, int(needed) if max_nnz is None else max_nnz)
    if lost is not None:
        needed.masked_fill_(lost, max(n * d_sae, values.shape[0] + 1))
    values.masked_fill_(needed > values.shape[0], float("nan"))
    gate = (values != 0).to(torch.float32)
    entries = offsets, indices, values, gate, needed, best.threshold
    if by_feature:
        return *entries, *feature_view(offsets, indices, d_sae)
    return *entries, offsets.new_empty(0), offsets.new_empty(0)


def _follow(guess: float | None, x: Tensor, W_enc: Tensor, b_enc: Tensor, best: BatchBest) -> bool:
    """Select among what reaches the guessed threshold; False, and `best` empty, if that fails."""
    if guess is None or not 0 < guess < math.inf or capturing(x):
        return False
    n, d_sae = x.shape[0], W_enc.shape[1]
    capacity = n * min(first_prefix(x, d_sae, best.k), d_sae)
    bound = torch.full((1,), MARGIN * guess, dtype=torch.float32, device=x.device).expand(n)
    found = candidates(x, W_enc, b_enc, bound, 0, d_sae, capacity)
    if not best.count <= int(found.needed) <= capacity:
        return False
    best.merge(found)
    return True


def _resize(best: BatchBest, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, latents and values of the best entries in arrays of `capacity` elements."""
    held = best.values.shape[0]
    if capacity <= held:
        return best.offsets.clamp(max=capacity), best.latents[:capacity], best.values[:capacity]
    latents, values = best.latents.new_zeros(capacity), best.values.new_zeros(capacity)
    latents[:held] = best.latents
    values[:held] = best.values
    return best.offsets, latents, values
