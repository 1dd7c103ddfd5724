"""What a format makes of a module before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .writing_tensors import OP, Stored

__all__ = ["OP", "Plan", "merged", "present"]


@dataclass(frozen=True)
class Plan:
    """What a folder is to hold.

    Attributes:
        tensors: the files of tensors by name, in the order of their renames.
        config: name of the config file.
        text: its contents.
    """

    tensors: dict[str, dict[str, Stored]]
    config: str
    text: bytes


def merged(module: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`module.metadata`, and what is given (not None) in its place.

    Raises:
        TypeError: `module.metadata` is no dict.
    """
    if not isinstance(module.metadata, Mapping):
        raise TypeError(
            f"{OP}: module.metadata must be a dict, got {type(module.metadata).__name__}"
        )
    given = {key: value for key, value in metadata.items() if value is not None}
    return {**module.metadata, **given}


def present(parameter: str, t: Tensor) -> Tensor:
    """The values of a parameter.

    Raises:
        ValueError: it has none.
    """
    if t.is_meta:
        raise ValueError(f"{OP}: {parameter} is on the meta device and has no values")
    return t.detach()
