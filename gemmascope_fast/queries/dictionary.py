"""`Dictionary`: one encoder and its decoder, the whole of a single-layer module or one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from ..activations import Activation, BatchTopK, JumpReLU
from ..arguments import check_count
from ..effective import decoder_norms, encode
from ..modules import SAE
from ..multilayer.base import MultiLayer
from ..packing import PackedEncoder
from ..semantics import Semantics
from ..sparse import SparseActs

Module = SAE | MultiLayer


@dataclass(frozen=True)
class Dictionary:
    """What `effective.encode` reads of a module; encoding with it moves no running threshold.

    Attributes:
        W_enc: `[d_in, d_sae]`. b_enc: `[d_sae]`. W_dec: `[d_sae, columns]`.
        threshold: `[d_sae]` parameter, or None.
        width: shape of a decoder row: `(d_out,)`, or `(outputs, d_model)` of several layers.
    """

    activation: Activation
    semantics: Semantics
    training: bool
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    ema_threshold: Tensor | None
    centred: bool
    packed: PackedEncoder | None
    width: tuple[int, ...]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def rescaled(self) -> bool:
        """Whether activations are pre-activations times decoder norms."""
        return self.semantics.rescale and not isinstance(self.activation, JumpReLU)

    @property
    def independent(self) -> bool:
        """Whether the gate decides about each latent by itself."""
        if isinstance(self.activation, BatchTopK):
            return self.ema_threshold is not None and not self.training
        return isinstance(self.activation, JumpReLU)

    def part(self, latents: Tensor) -> Self:
        """The dictionary of these latents alone."""
        threshold = None if self.threshold is None else self.threshold[latents]
        return replace(
            self,
            W_enc=self.W_enc.t()[latents].t(),
            b_enc=self.b_enc[latents],
            W_dec=self.W_dec[latents],
            threshold=threshold,
            packed=None,
        )

    def encode(self, x: Tensor) -> SparseActs:
        """Sparse activations of `x [*batch, d_in]`."""
        return encode(cast("SAE", self), x)

    def encoder_rows(self, latents: Tensor) -> Tensor:
        """`[m, d_in]`: gradients of pre-activations with respect to x."""
        rows = self.W_enc.t()[latents]
        if not self.rescaled:
            return rows
        return (rows * decoder_norms(self.W_dec[latents])[:, None]).to(rows.dtype)

    def decoder_rows(self, latents: Tensor) -> Tensor:
        """`[m, *width]`: what one unit of activation adds to the reconstruction."""
        rows = self.W_dec[latents]
        if self.rescaled:
            rows = (rows / decoder_norms(rows)[:, None]).to(rows.dtype)
        return rows.reshape(rows.shape[0], *self.width)

    def theta(self) -> Tensor:
        """As `SAE.theta`."""
        return SAE.theta(cast("SAE", self))

    def observe(self, smallest: Tensor | None) -> None:
        """Move nothing: a query leaves the module as it is."""


def dictionary(op: str, module: Any, layer: int | None = None) -> Dictionary:
    """The dictionary of a single-layer module, or of `layer` of one with several."""
    if isinstance(module, SAE):
        if layer is not None:
            raise ValueError(f"{op}: layer is for modules of several layers, got {layer!r}")
        return _single(module)
    if not isinstance(module, MultiLayer):
        raise TypeError(
            f"{op}: module must be an SAE, Transcoder, Crosscoder or CrossLayerTranscoder, got "
            f"{type(module).__name__}"
        )
    if layer is None:
        raise ValueError(f"{op}: {type(module).__name__} has {module.n_layers} layers: pass layer")
    check_count(op, "layer", layer, module.n_layers - 1, "n_layers - 1")
    return _layer(module, layer)


def _single(module: SAE) -> Dictionary:
    return Dictionary(
        activation=module.activation,
        semantics=module.semantics,
        training=module.training,
        W_enc=module.W_enc,
        b_enc=module.b_enc,
        W_dec=module.W_dec,
        b_dec=module.b_dec,
        threshold=module.threshold,
        ema_threshold=module.ema_threshold,
        centred=module.centred,
        packed=module.packed,
        width=(module.d_out,),
    )


def _layer(module: MultiLayer, layer: int) -> Dictionary:
    W_enc: Tensor = module.W_enc[layer]
    running = module.ema_threshold
    packed = None if module.packed is None else module.packed[layer]
    return Dictionary(
        activation=module.activation,
        semantics=module.semantics,
        training=module.training,
        W_enc=W_enc,
        b_enc=module.b_enc[layer],
        W_dec=module.W_dec[layer],
        b_dec=module.b_dec,
        threshold=None if module.threshold is None else module.threshold[layer],
        ema_threshold=None if running is None else running[layer],
        centred=False,
        packed=packed if packed is not None and packed.W_enc is W_enc else None,
        width=(len(module.outputs(layer)), module.d_model),
    )
