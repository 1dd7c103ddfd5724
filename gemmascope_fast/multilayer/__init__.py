"""`Crosscoder` and `CrossLayerTranscoder`: one dictionary over several layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..modules import Transcoder
from ..sparse import SparseActs
from .base import MultiLayer, check_stack
from .decoding import multi_decode

__all__ = ["CrossLayerTranscoder", "Crosscoder", "MultiLayer", "multi_decode"]


class Crosscoder(MultiLayer):
    """Weakly causal crosscoder: latents of layer i reconstruct layer i and those after it.

    `f_i = act(x_i @ W_enc[i] + b_enc[i])`,
    `recon_j = b_dec[j] + sum_{i <= j} f_i @ W_dec[i][:, j]`.

    Args:
        n_layers: number of layers L.
        d_model: width of each layer.
        d_sae: latents per layer; the published width is `L * d_sae`.
        activation: `JumpReLU`, `TopK` or `BatchTopK`. They select inside each layer: a TopK or
            BatchTopK keeps k per token of every layer, and layers do not compete for entries.
        packed: whether a decoder holds only the outputs of its own and later layers; one flag for
            all, or one per layer. A decoder that is not packed has all L and may write backwards.
        ema_decay: of the running thresholds of a BatchTopK, in [0, 1): training mode moves each
            layer's towards the smallest active value of its batch, evaluation mode encodes with it
            as a JumpReLU. None: BatchTopK in evaluation mode too.
        device: of the parameters.
        dtype: of the matrices; biases and thresholds are float32 (float64 if this is).
        generator: source of the initial weights.

    Attributes:
        W_enc: L of `[d_model, d_sae]`, one contiguous row of memory per latent.
        b_enc: L of `[d_sae]`.
        threshold: L of `[d_sae]` for `JumpReLU`, else None.
        W_dec: L of `[d_sae, m * d_model]` for the last m layers: `(L - i) * d_model` columns in
            layer i where packed, else `L * d_model`. `decoder(i)` views it as
            `[d_sae, m, d_model]`, and `outputs(i)` names the m layers.
        b_dec: `[L, d_model]`.
        ema_threshold: running thresholds (`[L]` float64 buffer) of a BatchTopK that has an
            `ema_decay`, else None; negative before the first batch.
        metadata: what `load` found beyond the weights; `save_pretrained` writes it.

    The module starts as L single-layer dictionaries: rows of the own layer's decoder He-uniform
    with unit norm, the encoder their transpose, everything else 0.

    Source: Lindsey et al. 2024, Sparse Crosscoders for Cross-Layer Features and Model Diffing.
    """

    def decode(self, acts: Sequence[SparseActs], *, dtype: torch.dtype | None = None) -> Tensor:
        """Reconstruction `[*batch, L, d_model]`; `dtype` defaults to that of `W_dec`."""
        return multi_decode(acts, list(self.W_dec), self.b_dec, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, L, d_model]` in the dtype of x."""
        return self.decode(self.encode(x), dtype=x.dtype)


class CrossLayerTranscoder(MultiLayer):
    """Cross-layer transcoder: latents read the MLP input of layer i and write MLP outputs j >= i.

    `f_i = act(x_i @ W_enc[i] + b_enc[i])`,
    `recon_j = b_dec[j] + sum_{i <= j} f_i @ W_dec[i][:, j] (+ x_j @ W_skip[j])`.

    Arguments, attributes and initial weights are those of a `Crosscoder`, and:

    Args:
        n_layers: number of layers L.
        d_model: width of each layer.
        d_sae: latents per layer; the published width is `L * d_sae`.
        activation: as for a `Crosscoder`.
        affine: whether there is a skip connection inside each layer, initially 0.
        packed: as for a `Crosscoder`.
        ema_decay: as for a `Crosscoder`.
        device: of the parameters.
        dtype: of the matrices.
        generator: source of the initial weights.

    Attributes:
        W_skip: L of `[d_model, d_model]`, applied as `x_j @ W_skip[j]`, or None.

    Source: Ameisen et al. 2025, Circuit Tracing: Revealing Computational Graphs in Language Models.
    """

    single = Transcoder
    W_skip: nn.ParameterList | None

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        d_sae: int,
        activation: Activation | None = None,
        *,
        affine: bool = False,
        packed: bool | Sequence[bool] = True,
        ema_decay: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        options = {"packed": packed, "device": device, "dtype": dtype, "generator": generator}
        sizes = n_layers, d_model, d_sae, activation
        super().__init__(*sizes, ema_decay=ema_decay, **options)  # type: ignore[arg-type]
        shape = (d_model, d_model)
        self.W_skip = None
        if affine:
            self.W_skip = nn.ParameterList(
                nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) for _ in self.W_enc
            )

    def decode(
        self,
        acts: Sequence[SparseActs],
        x: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Reconstruction `[*batch, L, d_model]`; with `x [*batch, L, d_model]` the skip is added.

        Raises:
            ValueError: there is a skip connection and x is missing or of another shape.
        """
        skip = None
        if self.W_skip is not None:
            if x is None:
                raise ValueError("decode: this transcoder has an affine skip connection: pass x")
            check_stack("decode", "x", x, self)
            parts = zip(x.unbind(-2), self.W_skip, strict=True)
            skip = torch.stack([part.to(W.dtype) @ W for part, W in parts], -2)
        return multi_decode(acts, list(self.W_dec), self.b_dec, skip=skip, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[*batch, L, d_model]` in the dtype of x."""
        return self.decode(self.encode(x), x, dtype=x.dtype)
