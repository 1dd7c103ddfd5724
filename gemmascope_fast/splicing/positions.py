"""Chosen tokens: `positions` of `splice`, checked once and applied to each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .passes import PADDING, Pass

Positions = int | slice | Sequence[int] | Tensor | None
"""A position, a slice or a list of them, a bool mask `[batch, columns]`, or None for all tokens."""

EXPECTED = "an int, a slice, a list of ints, or a bool mask [batch, columns]"


def check_positions(op: str, positions: Any) -> Positions:
    """Return `positions`; a tensor of integers as a list.

    Raises:
        TypeError: it is none of what `Positions` names.
        ValueError: a slice has a step below 1, or a mask not two dimensions.
    """
    if isinstance(positions, Tensor):
        if positions.dtype == torch.bool:
            if positions.dim() != 2:
                raise ValueError(
                    f"{op}: positions as a mask must have shape [batch, columns], got "
                    f"{tuple(positions.shape)}"
                )
            return positions
        if positions.is_floating_point() or positions.dim() > 1:
            raise TypeError(f"{op}: positions must be {EXPECTED}, got {positions.dtype}")
        positions = positions.tolist()
    if positions is None or _is_int(positions):
        return positions  # type: ignore[no-any-return]
    if isinstance(positions, slice):
        if not all(v is None or _is_int(v) for v in (positions.start, positions.stop)):
            raise TypeError(f"{op}: positions must be a slice of ints, got {positions}")
        if positions.step is not None and not (_is_int(positions.step) and positions.step >= 1):
            raise ValueError(f"{op}: positions must have a step >= 1, got {positions.step}")
        return positions
    if isinstance(positions, (list, tuple, range)) and all(map(_is_int, positions)):
        return list(positions)
    raise TypeError(f"{op}: positions must be {EXPECTED}, got {positions!r:.80}")


def chosen(op: str, positions: Positions, at: Pass) -> Tensor | None:
    """`[batch, length]` bool: the new tokens of a pass that `positions` names; None for all.

    Padding is never chosen. Negative positions count from the end of each prompt.

    Raises:
        ValueError: a negative position is in front of a prompt, or a mask is of another batch.
    """
    if positions is None:
        return None
    if isinstance(positions, Tensor):
        return _columns(op, positions, at)
    own, prompts = at.positions, at.prompts[:, None]
    if isinstance(positions, slice):
        start, step = _bound(positions.start or 0, prompts), positions.step or 1
        inside = (own >= start) & ((own - start) % step == 0)
        if positions.stop is not None:
            inside &= own < _bound(positions.stop, prompts)
        return inside  # start is not negative, so no padding
    wanted = [positions] if isinstance(positions, int) else positions
    inside = torch.zeros_like(own, dtype=torch.bool)
    for position in wanted:
        if position < 0 and bool((prompts + position < 0).any()):
            raise ValueError(
                f"{op}: positions must be inside of the prompt, got {position} for a prompt of "
                f"{int(prompts.min())} tokens"
            )
        inside |= own == (prompts + position if position < 0 else position)
    return inside


def _bound(value: int, prompts: Tensor) -> Tensor:
    """An end of a slice, `[batch, 1]`; cut off at 0 as Python's slices are."""
    return torch.full_like(prompts, value) if value >= 0 else (prompts + value).clamp_min(0)


def _columns(op: str, mask: Tensor, at: Pass) -> Tensor:
    batch, length = at.shape
    if mask.shape[0] != batch:
        raise ValueError(
            f"{op}: positions as a mask must have the batch of the forward pass, {batch}, got "
            f"{mask.shape[0]} (generate repeats each prompt for its beams and returned sequences: "
            "repeat_interleave the mask likewise)"
        )
    part = mask[:, at.start : at.start + length].to(at.positions.device)
    inside = torch.nn.functional.pad(part, (0, length - part.shape[1]))
    return inside & (at.positions != PADDING)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
