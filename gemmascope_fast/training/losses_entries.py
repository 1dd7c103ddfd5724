"""Terms that sum a function of every activation: `mean_i sum_j h(acts[i, j], |W_dec[j]|)`.

h is 0 at an activation of 0. Its derivative there counts at entries that are stored but off: it is
what the threshold of a JumpReLU sees through the straight-through window.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import check_flag, check_number
from .losses import LossTerm


@dataclass(frozen=True)
class EntryTerm(LossTerm):
    """A sum over activations.

    Args:
        coefficient: finite, >= 0.
        by_norm: whether activations count times the norm of their decoder row, a function of W_dec.
    """

    coefficient: float
    by_norm: bool = True

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)
        check_flag(type(self).__name__, "by_norm", self.by_norm)

    @abstractmethod
    def per_entry(self, values: Tensor) -> Tensor:
        """The term, coefficient included, elementwise; 0 at 0; differentiable by autograd."""


@dataclass(frozen=True)
class L1(EntryTerm):
    """Activations weighted by their decoder norms: `coefficient * mean_i sum_j acts |W_dec[j]|`.

    Args:
        coefficient: finite, >= 0.
        by_norm: False for norms of 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the coefficient is out of range.

    Source: Conerly et al., Transformer Circuits updates, April 2024.
    """

    name: ClassVar[str] = "l1"

    def per_entry(self, values: Tensor) -> Tensor:
        """Weighted activations."""
        return self.coefficient * values


@dataclass(frozen=True)
class Tanh(EntryTerm):
    """Saturating L0: `coefficient * mean_i sum_j tanh(scale * acts |W_dec[j]|)`.

    Args:
        coefficient: finite, >= 0.
        by_norm: False for norms of 1.
        scale: inverse of the activation at which the penalty saturates, finite, >= 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Source: Conerly et al., Transformer Circuits updates, January 2025.
    """

    name: ClassVar[str] = "tanh"
    scale: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(type(self).__name__, "scale", self.scale)

    def per_entry(self, values: Tensor) -> Tensor:
        """Weighted saturated activations."""
        return self.coefficient * (self.scale * values).tanh()
