"""The arguments of one matrix under Adam: checked, and as the kernels take them.

Messages are those of the compiled library. beta^k for the k steps since a row was brought up to
date comes from a table, since a GPU's power of a float64 has other bits than the host's: three
levels of 4096 powers cover 2^36 steps, 96 KB in pinned memory, copied behind the launches before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adam_row import DIGIT, LEVELS
from .moment_codes import MOMENT_BLOCK


class Rows(NamedTuple):
    """One kernel argument: a matrix, its state, and the numbers of this step."""

    weight: Tensor
    """`[r, c]` float32 or bfloat16, columns adjacent, as the next two"""
    exp_avg: Tensor | None
    """`[r, c]` float32, None when beta1 = 0"""
    exp_avg_sq: Tensor
    """`[r, c]` float32, or uint8 codes"""
    exponents: Tensor | None
    """`[r, ceil(c / 128)]` uint8 contiguous, None without codes"""
    touched_at: Tensor
    """`[r]` int64 contiguous"""
    powers1: Tensor | None
    """`[3, 4096]` float64, as the next one"""
    powers2: Tensor
    weight_stride: int
    exp_avg_stride: int
    exp_avg_sq_stride: int
    step_size: float
    one_minus1: float
    one_minus2: float
    scale: float
    eps: float


@dataclass(frozen=True)
class AdamMatrix:
    """What a kernel needs to update rows of one matrix."""

    rows: Rows
    clock: tuple[int, int, int]
    """step, tail, seed: numbers that change from step to step, which no kernel is compiled for"""
    options: dict[str, bool]
    """PARALLEL and NORM"""


def adam_matrix(
    op: str,
    name: str,
    weight: Tensor,
    state: Sequence[Tensor],
    rates: Sequence[float],
    rule: Sequence[int],
) -> AdamMatrix:
    """Check and pack; `name` is the weight's in messages, the rest as `adam_step_` takes it.

    Raises:
        RuntimeError: an argument is out of range, or has a wrong shape, dtype or layout.
    """
    _check_weight(op, name, weight)
    _check_rates(op, rates)
    _check_rule(op, rule)
    lr, beta1, beta2, eps = (float(rate) for rate in rates)
    step, tail, remove_parallel, unit_norm, seed = rule
    _check_state(op, weight, state, beta1 > 0)
    exp_avg, exp_avg_sq, exponents, touched_at = state
    first = exp_avg if beta1 > 0 else None
    rows = Rows(
        weight,
        first,
        exp_avg_sq,
        exponents if exp_avg_sq.dtype == torch.uint8 else None,
        touched_at,
        powers(beta1, weight.device) if beta1 > 0 else None,
        powers(beta2, weight.device),
        weight.stride(0),
        first.stride(0) if first is not None else 0,
        exp_avg_sq.stride(0),
        step_size=lr / (1 - beta1**step),
        one_minus1=1 - beta1,
        one_minus2=1 - beta2,
        scale=1 / math.sqrt(1 - beta2**step),
        eps=eps,
    )
    options = {"PARALLEL": bool(remove_parallel), "NORM": bool(unit_norm)}
    return AdamMatrix(rows, (step, min(tail, step), seed), options)


def powers(beta: float, device: torch.device) -> Tensor:
    """`[3, 4096]` float64: beta^(4096^level i)."""
    if device.type == "meta":
        return torch.empty(LEVELS, 1 << DIGIT, dtype=torch.float64, device=device)
    return _powers(beta, device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _powers(beta: float, pinned: bool) -> Tensor:
    levels = [[beta ** (i << DIGIT * k) for i in range(1 << DIGIT)] for k in range(LEVELS)]
    table = torch.tensor(levels, dtype=torch.float64)
    return table.pin_memory() if pinned else table


def _check_weight(op: str, name: str, weight: Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeError(f"{op}: {name} must be float32 or bfloat16, got {_kind(weight)}")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise RuntimeError(f"{op}: {name} must have one contiguous row of memory per latent")


def _check_rates(op: str, rates: Sequence[float]) -> None:
    if len(rates) != 4:
        raise RuntimeError(
            f"{op}: rates must be [lr, beta1, beta2, eps], got {len(rates)} elements"
        )
    if not rates[0] >= 0 or math.isinf(rates[0]):
        raise RuntimeError(f"{op}: lr must be >= 0, got {rates[0]:g}")
    for i in (1, 2):
        if not 0 <= rates[i] < 1:
            raise RuntimeError(f"{op}: beta{i} must be in [0, 1), got {rates[i]:g}")
    if not rates[3] >= 0:
        raise RuntimeError(f"{op}: eps must be >= 0, got {rates[3]:g}")


def _check_rule(op: str, rule: Sequence[int]) -> None:
    if len(rule) != 5:
        raise RuntimeError(
            f"{op}: rule must be [step, tail, remove_parallel, unit_norm, seed], got {len(rule)} "
            "elements"
        )
    if rule[0] < 1:
        raise RuntimeError(f"{op}: step must be >= 1, got {rule[0]}")
    if rule[1] < 0:
        raise RuntimeError(f"{op}: tail must be >= 0, got {rule[1]}")


def _check_state(op: str, weight: Tensor, state: Sequence[Tensor], momentum: bool) -> None:
    if len(state) != 4:
        raise RuntimeError(
            f"{op}: state must be [exp_avg, exp_avg_sq, exponents, touched_at], got {len(state)} "
            "tensors"
        )
    exp_avg, exp_avg_sq, exponents, touched_at = state
    r, c = weight.shape
    if momentum:
        _check_rows(op, "exp_avg", exp_avg, torch.float32, (r, c))
    codes = exp_avg_sq.dtype == torch.uint8
    _check_rows(op, "exp_avg_sq", exp_avg_sq, torch.uint8 if codes else torch.float32, (r, c))
    if codes:
        blocks = -(-c // MOMENT_BLOCK)
        _check_rows(op, "exponents", exponents, torch.uint8, (r, blocks))
        if blocks > 0 and r > 1 and exponents.stride(0) != blocks:
            raise RuntimeError(f"{op}: exponents must be contiguous")
    _check_tensor(op, "touched_at", touched_at, torch.int64, (r,))
    if r > 1 and touched_at.stride(0) != 1:
        raise RuntimeError(f"{op}: touched_at must be contiguous")
    for name, t in zip(("exp_avg", "exp_avg_sq", "exponents", "touched_at"), state, strict=True):
        if t.numel() and t.device != weight.device:
            raise RuntimeError(f"{op}: {name} must be on {weight.device}, got {t.device}")


def _check_rows(op: str, name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _check_tensor(op, name, t, dtype, shape)
    if shape[1] > 1 and t.stride(1) != 1:
        raise RuntimeError(f"{op}: {name} must have contiguous rows")


def _check_tensor(
    op: str, name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if t.dtype != dtype:
        raise RuntimeError(f"{op}: {name} must be {_NAMES[dtype]}, got {_kind(t)}")
    if tuple(t.shape) != shape:
        raise RuntimeError(f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}")


_NAMES = {
    **{torch.float32: "Float", torch.float64: "Double", torch.float16: "Half"},
    **{torch.bfloat16: "BFloat16", torch.uint8: "Byte", torch.int64: "Long", torch.int32: "Int"},
}


def _kind(t: Tensor) -> Any:
    """The dtype as the compiled library calls it."""
    return _NAMES.get(t.dtype, t.dtype)
