"""Where each tile's entries begin inside their row, and how many entries a row has.

    counts[c, i] <- sum over b < c of counts[b, i];   totals[i] = the row's sum

Algorithm: a program owns BLOCK_N rows and walks down the column blocks, BLOCK_C at a time, with a
cumulative sum inside the block and a carry between blocks. A row with an invalid pair has one
entry more. Bound by memory: every count is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch


@triton.jit
def _scan_rows_kernel(
    counts,
    first_invalid,
    totals,
    n,
    column_blocks,
    INVALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n
    blocks = tl.arange(0, BLOCK_C).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.int32)
    for done in range(0, column_blocks, BLOCK_C):
        at = counts + (done + blocks)[:, None] * n + rows[None, :]
        mask = (blocks < column_blocks - done)[:, None] & row_ok[None, :]
        count = tl.load(at, mask=mask, other=0)  # [BLOCK_C, BLOCK_N]
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    if INVALID:
        first = tl.load(first_invalid + rows, mask=row_ok, other=2147483647)  # [BLOCK_N]
        total += (first != 2147483647).to(tl.int32)
    tl.store(totals + rows, total.to(tl.int64), mask=row_ok)


def scan_rows(counts: Tensor, first_invalid: Tensor | None) -> Tensor:
    """Turn counts `[column_blocks, n]` into exclusive sums, in place; return offsets `[n + 1]`."""
    column_blocks, n = counts.shape
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=counts.device)
    totals = torch.empty(n, dtype=torch.int64, device=counts.device)
    config = choose("scan_rows", counts.device, n=n, blocks=column_blocks)
    launch(
        _scan_rows_kernel,
        triton.cdiv(n, config["BLOCK_N"]),
        *(counts, first_invalid, totals, n, column_blocks),
        INVALID=first_invalid is not None,
        **config,
    )
    torch.cumsum(totals, 0, out=offsets[1:])
    return offsets
