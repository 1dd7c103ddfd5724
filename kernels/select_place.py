"""Selected entries of the batch, compacted into CSR, and what may still enter in each row.

    selected = keys above the cut, and of those equal to it the first `cut_rank` by (row, latent)
    offsets[i] = above_before(i) + min(equal_before(i), cut_rank)
    bound[i] = cut for rows before the one where the equal keys run out, else the next value

Algorithm: one warp per row. Ties are taken in order over the batch, so the running sums of both
counts give every row's begin. A later latent of an equal value only wins ties in earlier rows.
Bound: memory, 16 bytes per entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch
from .select_keys import load_row, next_key, ranks, to_keys, to_values


@triton.jit
def _select_place_kernel(
    kept_offsets_ptr,
    kept_latents_ptr,
    kept_values_ptr,
    found_offsets_ptr,
    found_latents_ptr,
    found_values_ptr,
    cut_ptr,
    before_ptr,
    offsets_ptr,
    latents_ptr,
    values_ptr,
    bound_ptr,
    n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    kept_at = tl.load(kept_offsets_ptr + row, mask=inside, other=0)  # [ROWS]
    kept_end = tl.load(kept_offsets_ptr + row + 1, mask=inside, other=0)  # [ROWS]
    found_at = tl.load(found_offsets_ptr + row, mask=inside, other=0)  # [ROWS]
    found_end = tl.load(found_offsets_ptr + row + 1, mask=inside, other=0)  # [ROWS]
    kept = (kept_end - kept_at).to(tl.int32)
    total = kept + (found_end - found_at).to(tl.int32)
    cut = tl.load(cut_ptr).to(tl.int32)
    cut_rank = tl.load(cut_ptr + 1)

    above_before = tl.load(before_ptr + row, mask=inside, other=0)  # [ROWS]
    above_after = tl.load(before_ptr + row + 1, mask=inside, other=0)  # [ROWS]
    equal_before = tl.load(before_ptr + n + 1 + row, mask=inside, other=0)  # [ROWS]
    equal_after = tl.load(before_ptr + n + 2 + row, mask=inside, other=0)  # [ROWS]
    begin = (above_before + tl.minimum(equal_before, cut_rank))[:, None]
    tl.store(offsets_ptr + row + 1, above_after + tl.minimum(equal_after, cut_rank), mask=inside)
    bound = tl.where((cut == 0) | (equal_after < cut_rank), cut, next_key(cut))
    tl.store(bound_ptr + row, to_values(bound), mask=inside)

    room = tl.maximum(cut_rank - equal_before, 0)[:, None]  # equal keys the row may take
    longest = tl.max(total, 0)
    found_start = (found_at - kept)[:, None]
    kept_start = kept_at[:, None]
    kept = kept[:, None]
    ends = total[:, None]
    above_seen = tl.full((ROWS, 1), 0, tl.int32)
    equal_seen = tl.full((ROWS, 1), 0, tl.int32)
    for start in range(0, longest, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        held = load_row(
            kept_values_ptr + kept_start, found_values_ptr + found_start, at, kept, ends
        )  # [ROWS, BLOCK]
        latents = load_row(
            kept_latents_ptr + kept_start, found_latents_ptr + found_start, at, kept, ends
        )  # [ROWS, BLOCK]
        keys = to_keys(held, at < ends)
        above, equal, above_rank, equal_rank = ranks(keys, cut)
        above_rank += above_seen
        equal_rank += equal_seen
        taken = above | (equal & (equal_rank < room))
        target = begin + above_rank + tl.minimum(equal_rank, room)
        tl.store(latents_ptr + target, latents, mask=taken)
        tl.store(values_ptr + target, held, mask=taken)
        above_seen += tl.sum(above.to(tl.int32), 1)[:, None]
        equal_seen += tl.sum(equal.to(tl.int32), 1)[:, None]


def select_place(
    kept: tuple[Tensor, Tensor, Tensor],
    found: tuple[Tensor, Tensor, Tensor],
    cut: Tensor,
    before: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compact the selected entries.

    Args:
        kept: offsets `[n + 1]` int64, latents int32, values float32, positive or NaN; the arrays
            have room for all entries that can be selected.
        found: the same of the new candidates, at larger latents.
        cut: `[2]` int64 of `select_cut`.
        before: `[2, n + 1]` int64, running sums of `select_count`.
        k: selected entries per row on average, for the choice of the tile.

    Returns:
        offsets, latents and values like `kept`, zero past the last offset, and `bound [n]`
        float32: a later latent of row i enters only with a value >= `bound[i]` or NaN.
    """
    n = before.shape[1] - 1
    device = cut.device
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=device)
    latents, values = torch.zeros_like(kept[1]), torch.zeros_like(kept[2])
    bound = torch.empty(n, dtype=torch.float32, device=device)
    out = offsets, latents, values, bound
    config = choose("select_batch", device, k=k)
    args = *kept, *found, cut, before, *out, n
    launch(_select_place_kernel, -(-n // config["ROWS"]), *args, **config)
    return out
