"""The k best of each row, out of those kept so far and new candidates: exact, in latent order.

    best(i) = the k largest of kept(i) followed by found(i), ties to the earlier position
    bound[i] = the smallest value that would still enter best(i), 0 while it holds fewer than k

Algorithm: one warp per row. The k-th largest key is found by bisection of the 31-bit keys, with
counts of the keys above the middle; it ends as soon as exactly k lie above, about 12 steps instead
of 31. A row that fits a tile stays in registers, a longer one is read from the cache at each step.
A last pass compacts in order, taking the first `k - above` of the keys that equal the cut.
Bound: latency of the reductions; the traffic is 8 bytes per candidate, 0.1 % of the encoder's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch
from .select_keys import NAN, load_row, next_key, ranks, to_keys, to_values


@triton.jit
def _select_rows_kernel(
    kept_latents_ptr,
    kept_values_ptr,
    kept_counts_ptr,
    found_offsets_ptr,
    found_latents_ptr,
    found_values_ptr,
    latents_ptr,
    values_ptr,
    counts_ptr,
    bound_ptr,
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    kept = tl.load(kept_counts_ptr + row, mask=inside, other=0)  # [ROWS]
    found_at = tl.load(found_offsets_ptr + row, mask=inside, other=0)  # [ROWS]
    found_end = tl.load(found_offsets_ptr + row + 1, mask=inside, other=0)  # [ROWS]
    total = kept + (found_end - found_at).to(tl.int32)
    longest = tl.max(total, 0)
    out = (row * k)[:, None]
    found_start = (found_at - kept)[:, None]
    old = kept_values_ptr + out
    new = found_values_ptr + found_start
    kept = kept[:, None]
    ends = total[:, None]
    lane = tl.arange(0, BLOCK)[None, :]

    # `count` keys are >= low: at least k, or all there are. No key above high is needed. A row
    # that is done (one value left, or exactly k keys) may go on narrowing: its keys stay the same.
    low = tl.full((ROWS,), 1, tl.int32)
    high = tl.full((ROWS,), NAN, tl.int32)
    count = total
    exceeding = tl.full((ROWS,), 0, tl.int32)
    if longest <= BLOCK:
        held = load_row(old, new, lane, kept, ends)  # [ROWS, BLOCK]
        keys = to_keys(held, lane < ends)
        high = tl.maximum(tl.max(keys, 1), 1)
        low = tl.minimum(tl.min(tl.where(keys < 0, NAN, keys), 1), high)
        while tl.max(((low < high) & (count > k)).to(tl.int32), 0) > 0:
            middle = low + (high - low + 1) // 2
            reached = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
            low, high, count = _narrow(low, high, count, middle, reached, k)
        exceeding = tl.sum((keys > low[:, None]).to(tl.int32), 1)
    else:
        while tl.max(((low < high) & (count > k)).to(tl.int32), 0) > 0:
            middle = low + (high - low + 1) // 2
            reached = _count(old, new, kept, ends, longest, middle, ROWS, BLOCK)
            low, high, count = _narrow(low, high, count, middle, reached, k)
        exceeding = _count(old, new, kept, ends, longest, low + 1, ROWS, BLOCK)

    room = (k - exceeding)[:, None]  # how many keys equal to the cut fit
    cut = low[:, None]
    smallest = tl.full((ROWS,), NAN, tl.int32)
    above_seen = tl.full((ROWS, 1), 0, tl.int32)
    equal_seen = tl.full((ROWS, 1), 0, tl.int32)
    for start in range(0, longest, BLOCK):
        at = start + lane
        held = load_row(old, new, at, kept, ends)  # [ROWS, BLOCK]
        latents = load_row(
            kept_latents_ptr + out, found_latents_ptr + found_start, at, kept, ends
        )  # [ROWS, BLOCK]
        keys = to_keys(held, at < ends)
        above, equal, above_rank, equal_rank = ranks(keys, cut)
        above_rank += above_seen
        equal_rank += equal_seen
        taken = above | (equal & (equal_rank < room))
        target = out + above_rank + tl.minimum(equal_rank, room)
        tl.store(latents_ptr + target, latents, mask=taken)
        tl.store(values_ptr + target, held, mask=taken)
        smallest = tl.minimum(smallest, tl.min(tl.where(taken, keys, NAN), 1))
        above_seen += tl.sum(above.to(tl.int32), 1)[:, None]
        equal_seen += tl.sum(equal.to(tl.int32), 1)[:, None]
    tl.store(counts_ptr + row, tl.minimum(total, k), mask=inside)
    # Later latents lose ties, so only what exceeds the k-th best can still enter.
    bound = tl.where(total >= k, next_key(smallest), 0)
    tl.store(bound_ptr + row, to_values(bound), mask=inside)


@triton.jit
def _narrow(low, high, count, middle, reached, k):
    """One step of the bisection: `reached` keys are >= middle."""
    enough = reached >= k
    low = tl.where(enough, middle, low)
    high = tl.where(enough, high, middle - 1)
    return low, high, tl.where(enough, reached, count)


@triton.jit
def _count(old, new, kept, ends, longest, cut, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys of each row are >= cut, for rows longer than a tile."""
    reached = tl.full((ROWS,), 0, tl.int32)
    for start in range(0, longest, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        keys = to_keys(load_row(old, new, at, kept, ends), at < ends)  # [ROWS, BLOCK]
        reached += tl.sum((keys >= cut[:, None]).to(tl.int32), 1)
    return reached


def select_rows(
    latents: Tensor,
    values: Tensor,
    counts: Tensor,
    found_offsets: Tensor,
    found_latents: Tensor,
    found_values: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge new candidates into the k best of each row.

    Args:
        latents: `[n, k]` int32, contiguous, k >= 1: the first `counts[i]` of row i are its best.
        values: `[n, k]` float32, contiguous; positive or NaN.
        counts: `[n]` int32, at most k.
        found_offsets: `[n + 1]` int64; the candidates of row i, at larger latents than the kept.
        found_latents: int32, ascending in a row.
        found_values: float32; positive or NaN.

    Returns:
        latents, values, counts as above, and `bound [n]` float32: a later latent enters the best
        of row i only with a value >= `bound[i]` or NaN.
    """
    n, k = latents.shape
    out = torch.empty_like(latents), torch.empty_like(values), torch.empty_like(counts)
    bound = torch.empty(n, dtype=torch.float32, device=values.device)
    config = choose("select_rows", values.device, k=k)
    found = found_offsets, found_latents, found_values
    args = latents, values, counts, *found, *out, bound, n, k
    launch(_select_rows_kernel, -(-n // config["ROWS"]), *args, **config)
    return *out, bound
