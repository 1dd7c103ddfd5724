"""How many entries of each row lie above the cut of the batch, and how many equal it.

    counts[0, i + 1] = #{e in row i: key(e) > cut},  counts[1, i + 1] = #{e in row i: key(e) == cut}

Their running sums say where each row's selected entries begin (see `select_place.py`).
Algorithm: one warp per row, counts over tiles.
Bound: memory, 4 bytes per entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch
from .select_keys import load_row, to_keys


@triton.jit
def _select_count_kernel(
    kept_offsets_ptr,
    kept_values_ptr,
    found_offsets_ptr,
    found_values_ptr,
    cut_ptr,
    counts_ptr,
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
    old = kept_values_ptr + kept_at[:, None]
    new = found_values_ptr + (found_at - kept)[:, None]
    above = tl.full((ROWS,), 0, tl.int64)
    equal = tl.full((ROWS,), 0, tl.int64)
    for start in range(0, tl.max(total, 0), BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        held = load_row(old, new, at, kept[:, None], total[:, None])  # [ROWS, BLOCK]
        keys = to_keys(held, at < total[:, None])
        above += tl.sum((keys > cut).to(tl.int32), 1)
        equal += tl.sum((keys == cut).to(tl.int32), 1)
    tl.store(counts_ptr + row + 1, above, mask=inside)
    tl.store(counts_ptr + n + row + 2, equal, mask=inside)


def select_count(
    kept_offsets: Tensor,
    kept_values: Tensor,
    found_offsets: Tensor,
    found_values: Tensor,
    cut: Tensor,
    k: int,
) -> Tensor:
    """Count the selected entries of each row.

    Args:
        kept_offsets: `[n + 1]` int64.
        kept_values: float32, positive or NaN.
        found_offsets: `[n + 1]` int64.
        found_values: float32, positive or NaN.
        cut: `[2]` int64 of `select_cut`.
        k: selected entries per row on average, for the choice of the tile.

    Returns:
        `[2, n + 1]` int64, the first column 0.
    """
    n = kept_offsets.shape[0] - 1
    counts = torch.zeros((2, n + 1), dtype=torch.int64, device=cut.device)
    config = choose("select_batch", cut.device, k=k)
    args = kept_offsets, kept_values, found_offsets, found_values, cut, counts, n
    launch(_select_count_kernel, -(-n // config["ROWS"]), *args, **config)
    return counts
