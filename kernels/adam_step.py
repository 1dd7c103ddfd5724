"""adam_step_: Adam on the touched and live rows of a matrix; formula and state in `reference.py`.

One program per row (`adam_row.py`) reads its gradient once, and nothing else of a row that neither
has a gradient nor is live. Rows beyond 8,192 columns go in slabs (`adam_slabs.py`). Bound by the
gradient, all of it read to find the touched rows, and 16 bytes per element of those in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam_matrix import AdamMatrix, adam_matrix
from .adam_row import update_row
from .adam_slabs import adam_slabs
from .latent_backward import LARGEST_ROW
from .launching import block, choose, launch


@triton.jit(do_not_specialize=["step", "tail", "seed"])
def _adam_step_kernel(
    rows,  # adam_matrix.Rows
    gradient,  # [r, C], any strides
    gradient_row,
    gradient_column,
    step,
    tail,
    seed,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PARALLEL: tl.constexpr,
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = gradient + row * gradient_row + column.to(tl.int64) * gradient_column
    g = tl.load(at, mask=column < C, other=0.0).to(tl.float32)  # [BLOCK]
    update_row(rows, row, g, step, tail, seed, C, PARALLEL, NORM)


def adam_step_(
    weight: Tensor,
    state: Sequence[Tensor],
    gradient: Tensor,
    rates: Sequence[float],
    rule: Sequence[int],
) -> None:
    """Update `weight` and `state` in place; never waits."""
    matrix = adam_matrix("adam_step_", "weight", weight, state, rates, rule)
    if gradient.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(
            "adam_step_: gradient must be float32, bfloat16 or float16, got "
            f"{str(gradient.dtype).removeprefix('torch.')}"
        )
    if gradient.shape != weight.shape:
        raise RuntimeError(
            f"adam_step_: gradient must have shape {list(weight.shape)}, got {list(gradient.shape)}"
        )
    step_rows(matrix, gradient)


def step_rows(matrix: AdamMatrix, gradient: Tensor) -> None:
    """One step of every row of a checked matrix from its gradient, `[r, c]`, any strides."""
    r, c = gradient.shape
    if r == 0 or c == 0:
        return
    if c > LARGEST_ROW:
        adam_slabs(matrix, gradient)
        return
    config = choose("adam_step", gradient.device, d=c)
    launch(
        _adam_step_kernel,
        r,
        *(matrix.rows, gradient, *gradient.stride(), *matrix.clock),
        C=c,
        BLOCK=block(c, LARGEST_ROW, 4),
        enable_fp_fusion=False,
        **matrix.options,
        **config,
    )
