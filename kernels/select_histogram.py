"""Histogram of one 8-bit digit of the keys of a batch: one pass of a radix selection.

    histograms[level, b] = how many keys equal the cut in their first `level` digits, then have b

Algorithm: four passes, most significant digit first; each finds the cut so far from the histograms
before it (1 KiB per level, from the cache), so that nothing is decided on the host. A fixed number
of programs strides over the entries; each adds its histogram once with integer atomics, whose order
no result can show.
Bound: memory, 4 bytes per entry and pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch, processors
from .select_keys import load_row, to_keys

BINS: tl.constexpr = tl.constexpr(256)
LEVELS = 4
"""Digits of a key: 31 bits, 8 at a time, so the first digit stays below 128."""


@triton.jit
def find_cut(histograms_ptr, rank, LEVEL: tl.constexpr):
    """First LEVEL digits of the rank-th largest key, and its rank among the keys that share them.

    With fewer than `rank` keys in all: (0, what is missing), and no key is 0.
    """
    bins = tl.arange(0, BINS)
    cut = tl.full((), 0, tl.int32)
    rank += tl.full((), 0, tl.int64)
    for level in tl.static_range(LEVEL):
        sizes = tl.load(histograms_ptr + level * BINS + bins)  # [BINS] int64
        at_least = tl.sum(sizes, 0) - tl.cumsum(sizes, 0) + sizes  # falls from bin to bin
        digit = tl.maximum(tl.sum((at_least >= rank).to(tl.int32), 0) - 1, 0)
        rank -= tl.sum(tl.where(bins > digit, sizes, 0), 0)
        cut = (cut << 8) | digit
    return cut, rank


@triton.jit
def _select_histogram_kernel(
    kept_offsets_ptr,
    kept_values_ptr,
    found_offsets_ptr,
    found_values_ptr,
    histograms_ptr,
    n,
    rank,
    programs,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    kept = tl.load(kept_offsets_ptr + n)
    total = kept + tl.load(found_offsets_ptr + n)
    found_values_ptr -= kept
    cut, _ = find_cut(histograms_ptr, rank, LEVEL)
    shift: tl.constexpr = 24 - 8 * LEVEL
    sizes = tl.full((BINS,), 0, tl.int32)
    step = tl.full((), BLOCK, tl.int64) * programs
    for start in range(program * BLOCK, total, step):
        at = start + tl.arange(0, BLOCK)
        held = load_row(kept_values_ptr, found_values_ptr, at, kept, total)  # [BLOCK]
        inside = at < total
        keys = to_keys(held, inside)
        if LEVEL > 0:
            inside &= (keys >> (shift + 8)) == cut
        digits = (keys >> shift) & (BINS - 1)
        sizes += tl.histogram(digits, BINS, mask=inside)
    bins = tl.arange(0, BINS)
    target = histograms_ptr + LEVEL * BINS + bins
    tl.atomic_add(target, sizes.to(tl.int64), mask=sizes > 0, sem="relaxed")


def select_histogram(
    kept_offsets: Tensor,
    kept_values: Tensor,
    found_offsets: Tensor,
    found_values: Tensor,
    histograms: Tensor,
    rank: int,
    level: int,
) -> None:
    """Fill `histograms[level]`, which is zero, from the levels before it.

    Args:
        kept_offsets: `[n + 1]` int64.
        kept_values: float32, positive or NaN; those past the last offset are not read.
        found_offsets: `[n + 1]` int64.
        found_values: float32, likewise.
        histograms: `[LEVELS, BINS]` int64.
        rank: which key is sought, 1 the largest.
        level: which digit, 0 the most significant.
    """
    n = kept_offsets.shape[0] - 1
    config = choose("select_histogram", kept_values.device, count=rank)
    entries = kept_values.shape[0] + found_values.shape[0]
    programs = min(-(-entries // config["BLOCK"]), 4 * processors(kept_values.device))
    args = kept_offsets, kept_values, found_offsets, found_values, histograms, n, rank, programs
    launch(_select_histogram_kernel, programs, *args, LEVEL=level, **config)
