"""The terms of a training loss, and those that have a value per token.

`Term`: `mean_i term.per_token(statistics)_i`. A term sees a few rows at a time, because `SAE.loss`
evaluates the batch in blocks. It states its value per token from the statistics of those tokens;
the gradients with respect to the reconstruction and to L0 follow by autograd on these small
tensors, and the block's evaluation carries them on to the weights. The other kinds of `LossTerm`
are in `losses_entries.py` (sums over activations), `losses_batch.py` (of the batch's firing rates)
and `losses_weights.py` (with activations of their own).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_number
from ..losses.prefixes import check_prefixes, group_weights
from ..losses.reconstruction import relative_error
from ..losses.sparsity import quadratic_weight


@dataclass(frozen=True)
class TokenStatistics:
    """What a term may use of `r` tokens; float32, or float64 where x or a weight is.

    Attributes:
        recon: `[r, d_out]` reconstruction, the affine skip included.
        target: `[r, d_out]` what it should be.
        l0: `[r]` active latents. Its gradient reaches the threshold of a JumpReLU and nothing else
            (straight-through window, arXiv 2407.14435, section 3); TopK has none.
        deviation: mean squared deviation of the whole batch's targets from their mean, a constant.
        prefixes: `[r, d_out]` reconstruction by the first latents, for every number of them that a
            term asks for, the affine skip included.
    """

    recon: Tensor
    target: Tensor
    l0: Tensor
    deviation: Tensor = field(default_factory=lambda: torch.ones((), device="cpu"))
    prefixes: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def squared_error(self) -> Tensor:
        """`[r]` squared error of each token's reconstruction."""
        return squared_errors(self.recon, self.target)


def squared_errors(recon: Tensor, target: Tensor) -> Tensor:
    """`[r]` sums over the last dimension of `(recon - target)^2`: two passes, three backwards."""
    return F.mse_loss(recon, target, reduction="none").sum(-1)


class LossTerm(ABC):
    """One summand of a loss. Subclasses are frozen dataclasses with a `name` of their own.

    Attributes:
        name: key of the term's value in the metrics of `SAE.loss`.
    """

    name: ClassVar[str]


class Term(LossTerm):
    """A summand with a value per token.

    Attributes:
        prefixes: numbers of leading latents whose reconstructions the term needs.
    """

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of leading latents whose reconstructions `per_token` reads."""
        return ()

    @abstractmethod
    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """`[r]`: the term for each token, coefficient included, differentiable by autograd."""


@dataclass(frozen=True)
class Reconstruction(Term):
    """Squared error: `coefficient * mean_i sum_o (recon[i, o] - target[i, o])^2 / v`.

    Args:
        coefficient: finite, >= 0.
        normalisation: v. "none": 1, the papers' form (`losses.squared_error`); "width": d_out
            (`losses.mse`); "token": the token's squared norm (`losses.normalised_mse`); "variance":
            the mean squared deviation of the batch's targets, a constant (`losses.fvu`).

    Raises:
        TypeError: the coefficient is not a number.
        ValueError: it is out of range, or the normalisation unknown.

    Source: arXiv 2407.14435, section 3.
    """

    name: ClassVar[str] = "reconstruction"
    coefficient: float = 1.0
    normalisation: str = "none"

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)
        known = ("none", "width", "token", "variance")
        if self.normalisation not in known:
            raise ValueError(
                f"{type(self).__name__}: normalisation must be one of {', '.join(known)}, got "
                f"{self.normalisation!r}"
            )

    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """Squared error of each token, weighted."""
        recon, target = statistics.recon, statistics.target
        if self.normalisation == "token":
            return self.coefficient * relative_error(recon, target)
        error = self.coefficient * statistics.squared_error
        if self.normalisation == "width":
            return error / max(target.shape[-1], 1)
        return error / statistics.deviation if self.normalisation == "variance" else error


@dataclass(frozen=True)
class Matryoshka(Term):
    """Squared error of nested dictionaries, `coefficient * sum_g w_g mean_i |recon_g - target|^2`.

    `recon_g` is made by the first `ends[g]` latents (and the affine skip), from one encode.

    Args:
        ends: numbers of leading latents, ascending; the last is d_sae where all are to take part.
        weights: w: "sum", "mean" or one number >= 0 per prefix, as for `losses.matryoshka`.
        coefficient: finite, >= 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `ends` do not ascend from 1, or a number is out of range.

    Source: arXiv 2503.17547, section 3.
    """

    name: ClassVar[str] = "matryoshka"
    ends: tuple[int, ...]
    weights: str | Sequence[float] = "sum"
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        op = type(self).__name__
        check_number(op, "coefficient", self.coefficient)
        ends = check_prefixes(op, self.ends, None, "ends")
        group_weights(op, self.weights, len(ends))
        object.__setattr__(self, "ends", ends)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The ends."""
        return self.ends

    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """Squared error of each token, summed over the prefixes with their weights."""
        total = torch.zeros_like(statistics.l0)
        weights = group_weights(self.name, self.weights, len(self.ends))
        for end, weight in zip(self.ends, weights, strict=True):
            error = squared_errors(statistics.prefixes[end], statistics.target)
            total = total + self.coefficient * weight * error
        return total


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
    """Pull of every token's L0 to a target: `coefficient * mean_i w (l0[i] - target)^2`.

    Squared per token, not on the batch mean (`QuadraticMeanL0`): it also narrows the spread of L0
    over the tokens.

    Args:
        target: wanted active latents per token, finite, > 0.
        coefficient: finite, >= 0.
        normalisation: w: "2/target" or "1/target^2", as for `losses.quadratic_l0`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: it is out of range, or the normalisation unknown.

    Source: Gemma Scope 2's training recipe; its text leaves open whether the square is taken per
    token or on the batch mean.
    """

    name: ClassVar[str] = "quadratic_l0"
    target: float
    coefficient: float
    normalisation: str = "2/target"

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)
        quadratic_weight(type(self).__name__, self.target, self.normalisation)

    def per_token(self, statistics: TokenStatistics) -> Tensor:
        """Squared distance of each token's L0 from the target, weighted."""
        weight = quadratic_weight(self.name, self.target, self.normalisation)
        return self.coefficient * weight * (statistics.l0 - self.target).square()


def check_terms(op: str, terms: Any) -> tuple[LossTerm, ...]:
    """Return `terms` as a tuple; TypeError or ValueError when it is not a sequence of terms."""
    if isinstance(terms, LossTerm):
        raise TypeError(
            f"{op}: terms must be a sequence, got one {type(terms).__name__}: ({terms},)"
        )
    if not isinstance(terms, Sequence):
        raise TypeError(f"{op}: terms must be a sequence of terms, got {type(terms).__name__}")
    for at, term in enumerate(terms):
        if not isinstance(term, LossTerm):
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

DEFAULT_TERMS: tuple[LossTerm, ...] = (Reconstruction(),)
