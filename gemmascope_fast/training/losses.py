"""The terms of a training loss: `loss = sum over terms of mean_i term.per_token(statistics)_i`.

A term sees a few rows at a time, because `SAE.loss` evaluates the batch in blocks. It states its
value per token from the statistics of those tokens; the gradients with respect to the
reconstruction and to L0 follow by autograd on these small tensors, and the block's evaluation
carries them on to the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..arguments import check_number


@dataclass(frozen=True)
class TokenStatistics:
    """What a term may use of `r` tokens; float32, or float64 where x or a weight is.

    Attributes:
        recon: `[r, d_out]` reconstruction, the affine skip included.
        target: `[r, d_out]` what it should be.
        l0: `[r]` active latents. Its gradient reaches the threshold of a JumpReLU and nothing else
            (straight-through window, arXiv 2407.14435, section 3); TopK has none.
    """

    recon: Tensor
    target: Tensor
    l0: Tensor


class Term(ABC):
    """One summand of a loss. Subclasses are frozen dataclasses with a `name` of their own.

    Attributes:
        name: key of the term's value in the metrics of `SAE.loss`.
    """

    name: ClassVar[str]

    @abstractmethod
    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """`[r]`: the term for each token, coefficient included, differentiable by autograd."""


@dataclass(frozen=True)
class Reconstruction(Term):
    """Squared error: `coefficient * mean_i sum_o (recon[i, o] - target[i, o])^2`.

    The sum over `d_out` is the papers' form; `torch.nn.functional.mse_loss` divides by `d_out` too.

    Args:
        coefficient: finite, >= 0.

    Raises:
        TypeError: the coefficient is not a number.
        ValueError: it is out of range.

    Source: arXiv 2407.14435, section 3.
    """

    name: ClassVar[str] = "reconstruction"
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)

    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """Squared error of each token."""
        return self.coefficient * (statistics.recon - statistics.target).square().sum(-1)


@dataclass(frozen=True)
class L0(Term):
    """Step penalty: `coefficient * mean_i l0[i]`, `l0[i]` the number of active latents of token i.

    Its gradient is `-(1 / bandwidth) K((pre - threshold) / bandwidth)` in each threshold, K the
    unit rectangle, and 0 in everything else. TopK and BatchTopK have no threshold: there the
    term is constant.

    Args:
        coefficient: finite, >= 0.

    Raises:
        TypeError: the coefficient is not a number.
        ValueError: it is out of range.

    Source: arXiv 2407.14435, section 3.
    """

    name: ClassVar[str] = "l0_penalty"
    coefficient: float

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)

    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """Active latents of each token, weighted."""
        return self.coefficient * statistics.l0


@dataclass(frozen=True)
class QuadraticL0(Term):
    """Pull of every token's L0 to a target: `coefficient * mean_i (2 / target) (l0[i] - target)^2`.

    Squared per token, not on the batch mean: it also narrows the spread of L0 over the tokens.

    Args:
        target: wanted active latents per token, finite, > 0.
        coefficient: finite, >= 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: it is out of range.

    Source: Gemma Scope 2's training recipe; its text leaves open whether the square is taken per
    token or on the batch mean.
    """

    name: ClassVar[str] = "quadratic_l0"
    target: float
    coefficient: float

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)
        check_number(type(self).__name__, "target", self.target, positive=True)

    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """Squared distance of each token's L0 from the target, weighted."""
        weight = self.coefficient * 2 / self.target
        return weight * (statistics.l0 - self.target).square()


def check_terms(op: str, terms: Any) -> tuple[Term, ...]:
    """Return `terms` as a tuple; TypeError or ValueError when it is not a sequence of terms."""
    if isinstance(terms, Term):
        raise TypeError(
            f"{op}: terms must be a sequence, got one {type(terms).__name__}: ({terms},)"
        )
    if not isinstance(terms, Sequence):
        raise TypeError(f"{op}: terms must be a sequence of terms, got {type(terms).__name__}")
    for at, term in enumerate(terms):
        if not isinstance(term, Term):
            raise TypeError(
                f"{op}: terms[{at}] must be a term of gemmascope_fast.training, such as "
                f"Reconstruction(), got {type(term).__name__}"
            )
    if not terms:
        raise ValueError(
            f"{op}: terms must not be empty: pass at least one, such as Reconstruction()"
        )
    names = [getattr(term, "name", None) for term in terms]
    for term, name in zip(terms, names, strict=True):
        kind = type(term).__name__
        if not isinstance(name, str) or name in RESERVED:
            raise ValueError(
                f"{op}: {kind}.name must be a string other than {', '.join(RESERVED)}, got {name!r}"
            )
        if any(isinstance(v, Tensor) and v.requires_grad for v in vars(term).values()):
            raise ValueError(
                f"{op}: {kind} holds a tensor that requires grad, and terms are constants here: "
                "detach it"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"{op}: terms has {names.count(name)} terms named {name!r}: merge them into one"
            )
    return tuple(terms)


RESERVED = ("fvu", "l0", "density", "dense_blocks", "blocks")
"""Metrics of every evaluation; no term may take their names."""

DEFAULT_TERMS: tuple[Term, ...] = (Reconstruction(),)
