"""What a dictionary over several layers computes: activations, and a loss with its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from ..activations import Activation, BatchTopK, JumpReLU
from ..checks import check_float
from ..effective import smallest_active
from ..functional import batchtopk_encode, jumprelu_encode, topk_encode
from ..modules import SAE
from ..sparse import SparseActs
from ..training.losses import DEFAULT_TERMS, LossTerm
from .converting import assembled, folded
from .weights import Weights


class MultiLayer(Weights):
    """Encoders of L layers, each of which writes to several layers; see its subclasses."""

    single: ClassVar[type[SAE]] = SAE

    @classmethod
    def from_layers(cls, dictionaries: Sequence[SAE]) -> Self:
        """One module of L single-layer dictionaries, to train on from or to use as it is.

        The latents of layer i have the encoder of dictionary i, write to output i what it writes,
        and zeros to the outputs after it: activations are the same, the reconstruction is up to
        rounding. Weights are copies. The layers share one bandwidth, the geometric mean of theirs,
        and Gemma Scope's gradients. `metadata` has the sum of their l0, the model's name, and hook
        points in braces, as far as they go together.

        Args:
            dictionaries: of layers 0 to L - 1, with JumpReLU, of one width, dtype and device:
                `SAE`s for a `Crosscoder`; `Transcoder`s for a `CrossLayerTranscoder`, all of them
                with an affine skip connection or none.

        Raises:
            TypeError: `dictionaries` is no sequence of that class.
            ValueError: there are none, their sizes differ, or one has another activation or other
                semantics (`to_jumprelu` may make it fit).
        """
        return cast("Self", assembled(cls, dictionaries))

    def encode(self, x: Tensor, *, max_nnz: int | None = None) -> list[SparseActs]:
        """Sparse activations of `x [*batch, L, d_model]`, one object per layer.

        Args:
            x: float32, bfloat16, float16 or float64, any strides; its layers are read in place.
            max_nnz: fixed capacity of each layer's entry arrays; None sizes them exactly.

        Returns:
            L `SparseActs` of shape `[*batch, d_sae]`.

        Raises:
            TypeError: x is not floating point.
            ValueError: x has the wrong shape, or `max_nnz` is given for TopK.
            CapacityError: more than `max_nnz` entries in a layer (CPU).
        """
        check_stack("encode", "x", x, self)
        return [
            self.encode_layer(layer, part, max_nnz=max_nnz)
            for layer, part in enumerate(x.unbind(-2))
        ]

    def encode_layer(self, layer: int, x: Tensor, *, max_nnz: int | None = None) -> SparseActs:
        """`encode(...)[layer]` from `x [*batch, d_model]` of that layer alone."""
        encoder = (x, self._encoder(layer), self.b_enc[layer])
        activation, threshold = self.gate(layer)
        if isinstance(activation, JumpReLU):
            assert threshold is not None
            width = activation.bandwidth
            return jumprelu_encode(*encoder, threshold, bandwidth=width, max_nnz=max_nnz)
        if isinstance(activation, BatchTopK):
            acts = batchtopk_encode(*encoder, activation.k, max_nnz=max_nnz)
            if self.training and self.ema_threshold is not None:
                self.observe(layer, smallest_active(acts.values.detach(), acts.gate))
            return acts
        if max_nnz is not None:
            raise ValueError("encode: TopK always stores k entries per token; drop max_nnz")
        return topk_encode(*encoder, activation.k)

    def gate(self, layer: int) -> tuple[Activation, Tensor | None]:
        """What selects in a layer, and the `[d_sae]` thresholds of a JumpReLU.

        A BatchTopK with running thresholds is a JumpReLU when evaluated.
        """
        activation = self.activation
        if isinstance(activation, JumpReLU):
            assert self.threshold is not None
            return activation, self.threshold[layer]
        if self.training or self.ema_threshold is None or not isinstance(activation, BatchTopK):
            return activation, None
        limit = self.ema_threshold[layer].clamp_min(0).to(self.b_enc[layer].dtype)
        return JumpReLU(0.0), limit.expand(self.d_sae)

    @torch.no_grad()
    def observe(self, layer: int, smallest: Tensor | None) -> None:
        """Move a layer's running threshold towards a batch's smallest active value, if finite."""
        if self.ema_threshold is not None and smallest is not None:
            running = self.ema_threshold[layer]
            running.copy_(self.semantics.moved(running, smallest))

    def to_jumprelu(self, *, bandwidth: float = 0.001) -> Self:
        """`SAE.to_jumprelu`: a BatchTopK becomes a JumpReLU at its running thresholds.

        Args:
            bandwidth: of the new module's straight-through window.

        Raises:
            ValueError: the module is a TopK, or a BatchTopK without running thresholds.
        """
        return cast("Self", folded(self, bandwidth))

    def loss(
        self, x: Tensor, target: Tensor | None = None, terms: Sequence[LossTerm] = DEFAULT_TERMS
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`SAE.loss` over all layers: in blocks of rows, with memory bounded at any density.

        A token's reconstruction, error and L0 are those of all layers together: the squared error
        is summed over layers and width, `l0` over the layers. Terms over activations (`L1`, `Tanh`)
        take the norm of a latent's whole decoder row, all outputs together. Firing rates are of
        `[L * d_sae]` latents, layer after layer.

        Args:
            x: `[*batch, L, d_model]` floating point.
            target: of the same shape; default x for a `Crosscoder`, needed by a
                `CrossLayerTranscoder`.
            terms: as for `SAE.loss`, but for prefixes of the latents (`Matryoshka`), `MultiTopK`
                and `PreAct`.

        Returns:
            The loss and metrics of `SAE.loss`; `fvu` is of all layers together, `density` is
            l0 / (L * d_sae), `blocks` counts each block once per layer.

        Raises:
            TypeError: a tensor is not floating point, or `terms` is not a sequence of terms.
            ValueError: shapes or devices disagree, target is missing, terms are empty, share a name
                or are for single layers, or bandwidth is 0 while a threshold requires grad.
        """
        from ..training.layered import layered_loss  # which needs this module

        return cast("tuple[Tensor, dict[str, Tensor]]", layered_loss(self, x, target, terms))

    def count_latents(self, x: Tensor) -> tuple[Tensor, int]:
        """Tokens of x on which each latent is active, `[L * d_sae]` int64, and tokens."""
        from ..training.layered import count_layered

        return cast("tuple[Tensor, int]", count_layered(self, x))

    @staticmethod
    def l0(acts: Sequence[SparseActs]) -> Tensor:
        """`[*batch, L]`: active latents per token and layer, differentiable in the thresholds.

        `l0(acts).sum(-1)` is the L0 of the whole dictionary.
        """
        return torch.stack([a.l0() for a in acts], -1)


def check_stack(op: str, name: str, t: Any, module: MultiLayer) -> None:
    """A floating-point tensor `[*batch, L, d_model]`."""
    check_float(op, name, t)
    if tuple(t.shape[-2:]) != (module.n_layers, module.d_model):
        raise ValueError(
            f"{op}: {name} must have shape [*batch, n_layers={module.n_layers}, "
            f"d_model={module.d_model}], got {tuple(t.shape)}"
        )
