"""Checks of single values: each message names op, argument, expectation and actual."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

INT64_END = 2**63


def check_number(
    op: str, name: str, value: Any, *, positive: bool = False, negative: bool = False
) -> float:
    """Return `value`, a finite int or float >= 0, numpy's too, as a float.

    Where it has to be `positive`, > 0; where it may be `negative`, any.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
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
    """Return `value`, an int (traced, or numpy's) >= 0 and, with a limit, not above it."""
    if not isinstance(value, (int, torch.SymInt)) and isinstance(value, Integral):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be {kind}, got {type(value).__name__}")
    if limit is not None and not 0 <= value <= limit:
        raise ValueError(f"{op}: {name} must be in [0, {limit_name}={limit}], got {value}")
    if value < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    if isinstance(value, int) and value >= INT64_END:
        raise ValueError(f"{op}: {name} must be below 2^63, got {value}")
    return value


def check_size(op: str, name: str, value: Any) -> int:
    """Return `value`, an int >= 1, numpy's too, as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)) or value < 1:
        raise ValueError(f"{op}: {name} must be an int >= 1, got {value!r}")
    return int(value)


def plain(value: Any) -> Any:
    """`value`, numpy's scalars as Python's; its bools stay, which are no numbers."""
    numpy = isinstance(value, np.generic) and not isinstance(value, np.bool_)
    return value.item() if numpy else value


def plain_fields(made: Any) -> None:
    """Make the fields of a dataclass, frozen or not, `plain`."""
    for name, value in list(vars(made).items()):
        object.__setattr__(made, name, plain(value))


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


def present_device(op: str, device: Any) -> torch.device:
    """The torch device that `device` names, on which tensors can be made.

    Raises:
        ValueError: it names none, or none that this machine and this build of torch have.
    """
    found = as_device(op, device)
    try:
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{op}: device must be one that is here, got {found}: {why}") from error
    return found


def as_path(op: str, argument: str, value: Any) -> Path:
    """`value` as a path.

    Raises:
        TypeError: it is no path, or one of bytes.
        ValueError: it is empty or holds a NUL character.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{op}: {argument} must be a str or a path, got {type(value).__name__}")
    if not os.fspath(value):
        raise ValueError(f'{op}: {argument} is empty; the folder one is in is "."')
    if "\0" in os.fspath(value):
        raise ValueError(f"{op}: {argument} must be a path, got a string with a NUL character")
    return Path(value)
