"""Adam on rows that are too long for one program: biases, and decoders of crosscoders.

A row is cut into slabs of BLOCK columns, one program each. What the whole row decides is found by
launches before: whether it has a gradient, with the two sums of `remove_parallel`, and the norm of
the new row for `unit_norm`, which is computed, not stored, and computed again. Sums of slabs are
added in order. Bound as in `adam_step.py`, with w, v and the gradient read once more per launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam_matrix import AdamMatrix
from .adam_row import (
    decays,
    has_gradient,
    is_live,
    load_weight,
    moved,
    normalised,
    parallel_share,
    store_moments,
    store_weight,
    tree_sum,
)
from .launching import choose, launch

LOOK, MEASURE, STORE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a launch does: look for a gradient, measure the new row, store it."""


@triton.jit
def _row_sum(found, SLABS: tl.constexpr):
    """One number of every slab of a row, summed in order."""
    total = 0.0
    for _ in range(SLABS):
        total += tl.load(found)
        found += 4
    return total


@triton.jit(do_not_specialize=["step", "tail", "seed"])
def _adam_slabs_kernel(
    rows,  # adam_matrix.Rows
    gradient,  # [r, C], any strides
    found,  # [r, SLABS, 4] fp32: has a gradient, <g, w>, <w, w>, |new w|^2
    touched_before,  # [r] int64, rows.touched_at before this step
    gradient_row,
    gradient_column,
    step,
    tail,
    seed,
    C: tl.constexpr,
    SLABS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARALLEL: tl.constexpr,
    NORM: tl.constexpr,
    WORK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // SLABS
    first = (program % SLABS) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < C
    at = gradient + row * gradient_row + column * gradient_column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    w = load_weight(rows, row, column, inside)  # [BLOCK]
    mine = found + program * 4
    of_row = found + row * SLABS * 4
    if WORK == LOOK:
        tl.store(mine, has_gradient(g).to(tl.float32))
        if PARALLEL:
            tl.store(mine + 1, tree_sum(g * w))
            tl.store(mine + 2, tree_sum(w * w))
    else:
        touched = _row_sum(of_row, SLABS) > 0.0
        since = tl.load(touched_before + row)
        if touched | is_live(since, step, tail):
            decay1, decay2 = decays(rows, step - tl.minimum(since + tail, step - 1))
            share = 0.0
            if PARALLEL:
                share = parallel_share(_row_sum(of_row + 1, SLABS), _row_sum(of_row + 2, SLABS))
                share = tl.where(touched, share, 0.0)
            w, m, v = moved(rows, row, column, inside, w, g, share, decay1, decay2, C)
            if WORK == MEASURE:
                tl.store(mine + 3, tree_sum(w * w))
            else:
                if NORM:
                    w = normalised(w, _row_sum(of_row + 3, SLABS))
                store_moments(rows, row, first, column, inside, m, v, step, seed, C)
                store_weight(rows, row, first, column, inside, w, step, seed)
                if touched & (first == 0):
                    tl.store(rows.touched_at + row, tl.cast(step, tl.int64))


def adam_slabs(matrix: AdamMatrix, gradient: Tensor) -> None:
    """One step of every row of `matrix` from its gradient, `[r, c]`, any strides."""
    r, c = gradient.shape
    config = choose("adam_slabs", gradient.device, d=c)
    slabs = triton.cdiv(c, config["BLOCK"])
    found = torch.empty(r, slabs, 4, dtype=torch.float32, device=gradient.device)
    before = matrix.rows.touched_at.clone()
    for work in (LOOK, MEASURE, STORE) if matrix.options["NORM"] else (LOOK, STORE):
        launch(
            _adam_slabs_kernel,
            r * slabs,
            *(matrix.rows, gradient, found, before, *gradient.stride(), *matrix.clock),
            C=c,
            SLABS=slabs,
            WORK=work,
            enable_fp_fusion=False,
            **matrix.options,
            **config,
        )
