"""Checks of single values: each message names op, argument, expectation and actual."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

INT64_END = 2**63


def check_number(
    op: str, name: str, value: Any, *, positive: bool = False, negative: bool = False
) -> float:
    """Return `value`, a finite int or float >= 0, as a float.

    Where it has to be `positive`, > 0; where it may be `negative`, any.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = negative or number > 0 or (number == 0 and not positive)
    if not (inside and abs(number) < math.inf):  # what torch.compile traces, unlike isfinite
        wanted = "finite" if negative else f"finite and {'>' if positive else '>='} 0"
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")
    return number


def check_count(
    op: str, name: str, value: Any, limit: Any = None, limit_name: str = "", kind: str = "an int"
) -> Any:
    """Return `value`, an int (or traced int) >= 0 and, with a limit, not above it."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be {kind}, got {type(value).__name__}")
    if limit is not None and not 0 <= value <= limit:
        raise ValueError(f"{op}: {name} must be in [0, {limit_name}={limit}], got {value}")
    if value < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    if isinstance(value, int) and value >= INT64_END:
        raise ValueError(f"{op}: {name} must be below 2^63, got {value}")
    return value


def check_flag(op: str, name: str, value: Any) -> bool:
    """Return `value`, True or False: any string would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value!r}")
    return value


def as_device(op: str, device: Any) -> torch.device:
    """The torch device that `device` names.

    Raises:
        ValueError: it names none.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{op}: device must name a torch device, got {device!r}") from error


def as_path(op: str, argument: str, value: Any) -> Path:
    """`value` as a path.

    Raises:
        TypeError: it is no path, or one of bytes.
        ValueError: it holds a NUL character.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{op}: {argument} must be a str or a path, got {type(value).__name__}")
    if "\0" in os.fspath(value):
        raise ValueError(f"{op}: {argument} must be a path, got a string with a NUL character")
    return Path(value)
