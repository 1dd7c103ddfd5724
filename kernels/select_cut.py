"""The cut of a radix selection: the rank-th largest key, and its rank among the keys equal to it.

    cut[0] = the key, 0 when there are fewer than `rank` keys;  cut[1] = rank - #{keys > cut[0]}

Bound: latency, one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .select_histogram import LEVELS, find_cut


@triton.jit
def _select_cut_kernel(histograms_ptr, cut_ptr, rank, LEVEL: tl.constexpr):
    cut, remaining = find_cut(histograms_ptr, rank, LEVEL)
    tl.store(cut_ptr, cut.to(tl.int64))
    tl.store(cut_ptr + 1, remaining)


def select_cut(histograms: Tensor, rank: int) -> Tensor:
    """Return `[2]` int64 from `histograms [LEVELS, BINS]` int64; see the file's header."""
    cut = torch.empty(2, dtype=torch.int64, device=histograms.device)
    launch(_select_cut_kernel, 1, histograms, cut, rank, LEVEL=LEVELS, num_warps=4)
    return cut
