"""State of one parameter and its update, row by row of memory.

A matrix is updated along its contiguous rows of memory, so that `W_enc` (whose transpose is
contiguous) and `W_dec` both have one row per latent; any other tensor is one row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference import MOMENT_BLOCK
from ..screening import Screen

FOREVER = 2**62
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float64: 2.0**-53}
"""Half a unit in the last place of each dtype of weights."""


def as_rows(t: Tensor, like: Tensor) -> Tensor:
    """`t` seen as `[rows, columns]` along the rows of memory of `like`, which has its shape."""
    if like.dim() != 2:
        return t.reshape(1, -1)
    return t.t() if transposed(like) else t


def transposed(p: Tensor) -> bool:
    """The columns of the matrix `p` are what is contiguous in memory; an encoder's `[1, F]` too."""
    return p.dim() == 2 and p.stride(0) == 1 and (p.stride(1) != 1 or p.shape[0] == 1)


def new_state(p: Tensor, beta1: float, moments: str) -> dict[str, Any]:
    """State of `p` before its first step; `moments` "8bit" is for matrices only."""
    rows = as_rows(p.detach(), p)
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    codes = moments == "8bit" and p.dim() == 2
    blocks = -(-rows.shape[1] // MOMENT_BLOCK)
    state: dict[str, Any] = {"step": 0}
    if beta1 > 0:
        state["exp_avg"] = _zeros_like(p, wide)
    state["exp_avg_sq"] = _zeros_like(p, torch.uint8 if codes else wide)
    if codes:
        state["exponents"] = rows.new_zeros(rows.shape[0], blocks, dtype=torch.uint8)
    state["touched_at"] = rows.new_zeros(rows.shape[0], dtype=torch.int64)
    return state


def _zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the strides of `p` from `calloc`: rows that no step touches cost no memory."""
    if transposed(p):
        return torch.zeros(p.t().shape, dtype=dtype, device=p.device).t()
    return torch.zeros(p.shape, dtype=dtype, device=p.device)


def op_state(p: Tensor, state: dict[str, Any]) -> list[Tensor]:
    """What the ops take as the state of `p`: rows, and empty tensors for what is absent."""
    moment = as_rows(state["exp_avg_sq"], p)
    absent = moment.new_empty(0, dtype=torch.float32)
    first = as_rows(state["exp_avg"], p) if "exp_avg" in state else absent
    exponents = state.get("exponents", absent.to(torch.uint8))
    return [first, moment, exponents, state["touched_at"]]


def tail(p: Tensor, beta1: float, rows: str) -> int:
    """Steps after a touch during which the first moment still moves a row of `p`."""
    if beta1 == 0:
        return 0
    if rows == "exact":
        return FOREVER
    return math.ceil(math.log(ROUNDING[p.dtype]) / math.log(beta1))


def rates(group: dict[str, Any]) -> list[float]:
    """lr, beta1, beta2, eps of a group as the ops take them."""
    return [float(group["lr"]), *(float(b) for b in group["betas"]), float(group["eps"])]


def rule(p: Tensor, group: dict[str, Any], step: int, seed: int) -> list[int]:
    """step, tail, remove_parallel, unit_norm, seed of `p` as the ops take them."""
    matrix = p.dim() == 2
    flags = [int(matrix and group[name]) for name in ("remove_parallel", "unit_norm")]
    return [step, tail(p, float(group["betas"][0]), group["rows"]), *flags, seed]


def update(p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of `p` from its dense gradient."""
    state["step"] += 1
    weight = as_rows(p.detach(), p)
    in_place = weight.stride(1) == 1 and weight.data_ptr() == p.data_ptr()
    rows = weight if in_place else weight.contiguous()
    ops.overload("adam_step_", p)(
        *(rows, op_state(p, state), as_rows(gradient, p), rates(group)),
        rule(p, group, state["step"], state["seed"]),
    )
    if not in_place:
        p.detach().copy_(rows.view(p.shape))


def requantise(p: Tensor, screen: Screen, state: dict[str, Any], group: dict[str, Any]) -> None:
    """The codes of the rows that the last step of `p` moved, if there was one since they were."""
    if not screen.current(p):
        last = tail(p, float(group["betas"][0]), group["rows"])
        screen.follow(p, state["touched_at"], state["step"], last)
