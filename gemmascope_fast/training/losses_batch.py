"""Terms of the batch's firing rates, which are not linear in the batch.

`p_j` is the share of the batch's tokens on which latent j is active; its gradient reaches the
threshold of a JumpReLU through the straight-through window. A batch in several blocks is encoded
once more, first, to count. A part of a larger batch (gradient accumulation, data parallelism) needs
the totals of the whole: `SAE.count_latents` of every part, added up, are a term's `counts` and
`tokens`. The mean over equal parts of the parts' losses and gradients is then the whole batch's.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import check_number
from ..losses.sparsity import check_totals, quadratic_weight
from .losses import LossTerm


@dataclass(frozen=True)
class BatchTerm(LossTerm):
    """A function of the firing rates of the whole batch.

    Args:
        counts: `[d_sae]` tokens on which each latent is active in the whole batch, of which the
            loss sees a part; None where it sees all.
        tokens: tokens of the whole batch; goes with `counts`.
    """

    coefficient: float
    counts: Tensor | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)
        check_totals(type(self).__name__, self.counts, self.tokens)

    @abstractmethod
    def of_rates(self, p: Tensor) -> Tensor:
        """The term, coefficient included, from `p [d_sae]`; differentiable by autograd."""


@dataclass(frozen=True)
class QuadraticMeanL0(BatchTerm):
    """Pull of the batch's mean L0 to a target: `coefficient * w (sum_j p_j - target)^2`.

    Args:
        coefficient: finite, >= 0.
        counts: as for every `BatchTerm`.
        tokens: likewise.
        target: wanted mean of active latents, finite, > 0.
        normalisation: w: "2/target" or "1/target^2", as for `losses.quadratic_l0`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or one of `counts` and `tokens` is missing.

    Source: Gemma Scope 2's training recipe, which leaves open where the square is taken.
    """

    name: ClassVar[str] = "quadratic_mean_l0"
    target: float = 0.0
    normalisation: str = "2/target"

    def __post_init__(self) -> None:
        super().__post_init__()
        quadratic_weight(type(self).__name__, self.target, self.normalisation)

    def of_rates(self, p: Tensor) -> Tensor:
        """Squared distance of the mean L0 from the target, weighted."""
        weight = quadratic_weight(self.name, self.target, self.normalisation)
        return self.coefficient * weight * (p.sum() - self.target).square()


@dataclass(frozen=True)
class Frequency(BatchTerm):
    """Penalty on latents that fire often: `coefficient * sum_j p_j^2 / w0`.

    Args:
        coefficient: finite, >= 0.
        counts: as for every `BatchTerm`.
        tokens: likewise.
        w0: rate around which the penalty sets in, as a share of tokens, finite, > 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or one of `counts` and `tokens` is missing.

    Source: Gemma Scope 2's training recipe, the second penalty beside an L0 term.
    """

    name: ClassVar[str] = "frequency"
    w0: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(type(self).__name__, "w0", self.w0, positive=True)

    def of_rates(self, p: Tensor) -> Tensor:
        """Sum of squared rates, weighted."""
        return self.coefficient * p.square().sum() / self.w0


@dataclass(frozen=True)
class FrequencyL0(Frequency):
    """L0 and frequency penalty in one: `coefficient * sum_j p_j (1 + p_j / w0)`.

    Args:
        coefficient: finite, >= 0.
        counts: as for every `BatchTerm`.
        tokens: likewise.
        w0: rate at which the penalty of a latent has doubled, finite, > 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or one of `counts` and `tokens` is missing.

    Source: Gemma Scope 2's training recipe; the penalty that replaces the L0 term.
    """

    name: ClassVar[str] = "frequency_l0"

    def of_rates(self, p: Tensor) -> Tensor:
        """Mean L0 plus the sum of squared rates, weighted."""
        return self.coefficient * (p * (1 + p / self.w0)).sum()
