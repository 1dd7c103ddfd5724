"""Scan of the latents in prefixes that double: what every TopK encoder does with the candidates.

    best of [0, 2 c) = best of (best of [0, c) and the candidates of [c, 2 c))

The k-th best of any prefix bounds the final k-th best from below, so a chunk emits only what
exceeds it: about k per row for exchangeable latents, whatever its width. Doubling makes that
k log2(d_sae / first) candidates and as many launches, exactly, without state between calls.
A chunk no wider than the first has room for all its pairs, a wider one for 4 k + 64 per row on
average. All chunks run without a look at the device; one that overflowed left `best` as it was.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .candidates import Candidates, candidates
from .launching import block, choose


class Best(Protocol):
    """Best entries so far."""

    bound: Tensor
    """`[n]` float32: smaller values of later latents cannot enter."""

    def merge(self, found: Candidates) -> None:
        """Take candidates of later latents in; no candidates change nothing."""


def scan_prefixes(x: Tensor, W_enc: Tensor, b_enc: Tensor, best: Best, k: int) -> Tensor | None:
    """Merge all latents into `best`, whose initial bound is 0.

    Reads one flag from the device at the end when `d_sae` exceeds twice the first prefix; not while
    a CUDA graph is captured, where it is returned instead. After an overflow the scan goes on in
    chunks that cannot overflow: at worst everything is encoded twice.

    Args:
        x: `[n, d_in]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]` float32.
        best: the selection.
        k: how many entries per row it keeps on average.

    Returns:
        While capturing: a bool scalar, true when candidates were lost. Else None.
    """
    n, d_sae = x.shape[0], W_enc.shape[1]
    first = first_prefix(x, d_sae, k)
    chunks = prefixes(d_sae, first)
    lost = torch.zeros((), dtype=torch.bool, device=x.device)
    flags = []
    for start, end in chunks:
        wide = end - start > first
        room = n * (min(first, 4 * k + 64) if wide else end - start)
        found = candidates(x, W_enc, b_enc, best.bound, start, end, room)
        if wide:
            lost = lost | (found.needed > room)
            flags.append((start, lost))
        if flags:  # what follows a loss would be out of order, a narrow last chunk too
            found.offsets.masked_fill_(lost, 0)
        best.merge(found)
    if capturing(x):
        return lost
    if flags:
        failed = torch.stack([flag for _, flag in flags]).tolist()
        restart = next((s for (s, _), f in zip(flags, failed, strict=True) if f), d_sae)
        for start in range(restart, d_sae, first):
            end = min(start + first, d_sae)
            best.merge(candidates(x, W_enc, b_enc, best.bound, start, end, n * (end - start)))
    return None


def capturing(x: Tensor) -> bool:
    """A CUDA graph is being captured where x is: nothing can be read from the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def first_prefix(x: Tensor, d_sae: int, k: int) -> int:
    """Width of the first prefix: at least 4 k, so that it has k positive entries as a rule."""
    config = choose("select_prefixes", x.device, d_sae=d_sae)
    return max(config["FIRST"], block(4 * k, 2**30))


def prefixes(d_sae: int, first: int) -> list[tuple[int, int]]:
    """`[0, first), [first, 2 first), [2 first, 4 first), ...` up to `d_sae`."""
    ends = [0]
    while ends[-1] < d_sae:
        ends.append(max(first, 2 * ends[-1]))
    return [(a, min(b, d_sae)) for a, b in zip(ends, ends[1:], strict=False)]
