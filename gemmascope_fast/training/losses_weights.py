"""Terms that encode once more: AuxK, pre-activations of the dead, several k.

They are evaluated after the blocks of the others, in blocks of rows of their own, by autograd over
a dictionary that holds the latents they use and no other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_number
from ..entries import latent_ids
from ..functional import topk_encode
from ..losses.dead import (
    aux_denominator,
    aux_error,
    aux_scale,
    check_auxk,
    shortfall,
)
from ..losses.prefixes import check_prefixes, group_weights
from .losses import LossTerm
from .whole import WHOLE, Whole


@dataclass(frozen=True)
class Dictionary:
    """Some tokens, and the weights of the latents that a term uses.

    Attributes:
        x: `[r, d_in]`, centred if the module does.
        target: `[r, d_out]` in the accumulation dtype.
        residual: `[r, d_out]` target minus reconstruction, a constant; None where not asked for.
        W_enc: `[d_in, D]` for D latents.
        b_enc: `[D]`.
        threshold: `[D]` of a JumpReLU, else None.
        W_dec: `[D, d_out]`.
        b_dec: `[d_out]`.
        W_skip: `[d_in, d_out]` or None.
        whole: answers for the processes that have the other latents.
    """

    x: Tensor
    target: Tensor
    residual: Tensor | None
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor | None
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None
    whole: Whole = WHOLE


class WeightTerm(LossTerm):
    """A summand that autograd differentiates down to the weights.

    Attributes:
        needs_residual: whether it reads `Dictionary.residual`.
        layered: whether it has a meaning for the latents of several layers.
        among_peers: how it goes with latents on several processes: "apart", a sum over latents, of
            which each process makes its own; "joined", by `Dictionary.whole`; "" not at all.
    """

    needs_residual: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    among_peers: ClassVar[str] = ""

    @abstractmethod
    def latents(self, op: str, d_sae: int, device: torch.device) -> Tensor | None:
        """The latents it uses, different ones; None for all.

        Raises:
            ValueError: the term does not fit a dictionary of d_sae latents.
        """

    @abstractmethod
    def entries_per_token(self, latents: int) -> int:
        """Entries that a token makes in a layer when there are so many latents."""

    def scale(
        self, residual: Tensor | None, target: Tensor, latents: float, whole: Whole = WHOLE
    ) -> Tensor:
        """A constant factor, from the whole batch and the mean number of latents of a layer."""
        return target.new_ones(())

    @abstractmethod
    def total(self, *layers: Dictionary) -> Tensor:
        """Sum over the tokens of the dictionary, or of those of several layers, weighted."""


@dataclass(frozen=True)
class AuxK(WeightTerm):
    """Error of the dead latents' own reconstruction of the residual; see `losses.auxk`.

    Of several layers the residual is that of all outputs together: each layer's k_aux largest dead
    latents write to the outputs that the layer writes to. D is then the mean number of a layer's.

    Args:
        dead: `[d_sae]` bool, or integer latents, all different; of several layers `[L * d_sae]`.
        k_aux: latents per token (and layer), >= 1.
        coefficient: finite, >= 0; 1/32 is customary.
        normalisation: "none", "residual" or "target".
        scaled: whether few dead latents weigh less.
        encoder_gradient: whether W_enc, b_enc and x receive gradients.
        rectified: whether negative pre-activations count 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: arXiv 2406.04093, appendix A.2.
    """

    name: ClassVar[str] = "auxk"
    needs_residual: ClassVar[bool] = True
    layered: ClassVar[bool] = True
    among_peers: ClassVar[str] = "joined"
    dead: Tensor
    k_aux: int
    coefficient: float = 1 / 32
    normalisation: str = "none"
    scaled: bool = True
    encoder_gradient: bool = True
    rectified: bool = True

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)
        check_auxk(type(self).__name__, self.k_aux, self.normalisation)

    def latents(self, op: str, d_sae: int, device: torch.device) -> Tensor:
        """The dead."""
        return latent_ids(f"{op}: auxk", self.dead, d_sae, device)

    def entries_per_token(self, latents: int) -> int:
        """K of the auxiliary dictionary."""
        return min(self.k_aux, latents)

    def scale(
        self, residual: Tensor | None, target: Tensor, latents: float, whole: Whole = WHOLE
    ) -> Tensor:
        """Share of the dead over the denominator."""
        assert residual is not None
        factor = aux_scale(latents, self.k_aux, self.scaled)
        return factor / aux_denominator(self.normalisation, residual, target, whole.deviation)

    def total(self, *layers: Dictionary) -> Tensor:
        """Squared error, weighted."""
        residual, whole = layers[0].residual, layers[0].whole
        assert residual is not None
        dictionaries = [(d.x, d.W_enc, d.b_enc, d.W_dec) for d in layers]
        options = (self.rectified, self.encoder_gradient)
        keep = partial(whole.keep, k=self.k_aux, held=self.k_aux)
        error = aux_error(residual, dictionaries, self.k_aux, *options, keep, whole.join)
        return self.coefficient * error


@dataclass(frozen=True)
class PreAct(WeightTerm):
    """Pull of dead latents towards firing; see `losses.pre_act`.

    `coefficient * mean_i sum_{j dead} relu(threshold[j] - pre[i, j]) |W_dec[j]|`.

    Args:
        dead: `[d_sae]` bool, or integer latents, all different.
        coefficient: finite, >= 0.
        to_threshold: whether the threshold is what they shall reach, or 0.
        by_norm: whether a latent counts by the norm of its decoder row.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: Conerly et al., Transformer Circuits updates, January 2025.
    """

    name: ClassVar[str] = "pre_act"
    among_peers: ClassVar[str] = "apart"
    dead: Tensor
    coefficient: float
    to_threshold: bool = True
    by_norm: bool = True

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "coefficient", self.coefficient)

    def latents(self, op: str, d_sae: int, device: torch.device) -> Tensor:
        """The dead."""
        return latent_ids(f"{op}: pre_act", self.dead, d_sae, device)

    def entries_per_token(self, latents: int) -> int:
        """Every pre-activation of the dead."""
        return latents

    def total(self, *layers: Dictionary) -> Tensor:
        """What the tokens' pre-activations lack, weighted."""
        (d,) = layers
        wide = d.target.dtype
        theta = d.threshold.to(wide) if d.threshold is not None and self.to_threshold else None
        rows = d.W_dec.to(wide) if self.by_norm else None
        pre = (d.x.to(wide), d.W_enc.to(wide), d.b_enc.to(wide))
        return self.coefficient * shortfall(*pre, theta, rows)


@dataclass(frozen=True)
class MultiTopK(WeightTerm):
    """Squared error of the reconstructions by several k; see `losses.multi_topk`.

    Args:
        ks: latents per token, each in `[1, d_sae]`, ascending.
        weights: "sum", "mean" or one number >= 0 per k.
        coefficient: finite, >= 0.
        encoder_gradient: whether W_enc, b_enc and x receive gradients.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: arXiv 2406.04093, section 5.3.
    """

    name: ClassVar[str] = "multi_topk"
    among_peers: ClassVar[str] = "joined"
    ks: tuple[int, ...]
    weights: str | Sequence[float] = "sum"
    coefficient: float = 1.0
    encoder_gradient: bool = True

    def __post_init__(self) -> None:
        op = type(self).__name__
        check_number(op, "coefficient", self.coefficient)
        ks = check_prefixes(op, self.ks, None, "ks")
        group_weights(op, self.weights, len(ks))
        object.__setattr__(self, "ks", ks)

    def latents(self, op: str, d_sae: int, device: torch.device) -> None:
        """All of them."""
        check_prefixes(f"{op}: multi_topk", self.ks, d_sae, "ks")

    def entries_per_token(self, latents: int) -> int:
        """All sets together."""
        return sum(self.ks)

    def total(self, *layers: Dictionary) -> Tensor:
        """Squared error, weighted."""
        (d,) = layers
        last = self.ks[-1]
        widest = topk_encode(d.x, d.W_enc, d.b_enc, min(last, d.W_enc.shape[1]))
        widest = widest if self.encoder_gradient else widest.detach()
        goal = d.target
        if d.W_skip is not None:
            goal = goal - d.whole.alike(d.x).to(goal.dtype) @ d.W_skip.to(goal.dtype)
        total = goal.new_zeros(())
        for k, weight in zip(
            self.ks, group_weights(self.name, self.weights, len(self.ks)), strict=True
        ):
            acts = d.whole.keep(widest, k, last)
            recon = d.whole.decode(acts, d.W_dec, d.b_dec, goal.dtype)
            total = total + self.coefficient * weight * F.mse_loss(recon, goal, reduction="sum")
        return total
