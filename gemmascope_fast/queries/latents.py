"""Activations of a few latents from x, without encoding the others where the gate allows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_encoder
from ..entries import latent_ids
from .activations import activations_of
from .dictionary import Module, dictionary


def encode_latents(module: Module, x: Tensor, latents: Any, *, layer: int | None = None) -> Tensor:
    """`module.encode(x)` at m latents, as a dense matrix.

    A JumpReLU, or a BatchTopK that evaluates with its running threshold, decides about each latent
    by itself: only the m columns of W_enc are read, and on a CPU every number has the bits of the
    full encode. (On a GPU sums may be rounded in another order. Of a token whose pre-activations
    are NaN an encoder stores the first NaN: here the first of the m.) TopK and BatchTopK compare
    latents with each other: everything is encoded, sparsely. The running threshold does not move.

    Args:
        module: an `SAE` or a `Transcoder`; with `layer` a `Crosscoder` or a `CrossLayerTranscoder`.
        x: `[*batch, d_in]`.
        latents: m distinct latents in the wanted order, or a `[d_sae]` mask.
        layer: whose x this is.

    Returns:
        `[*batch, m]` float32 (float64 if x or a weight is), differentiable as `encode` is.

    Raises:
        TypeError: `module` is none of them, or `latents` are neither integers nor a mask.
        ValueError: x has the wrong width, a latent is out of range or named twice, or `layer` is
            missing, out of range, or given for a single-layer module.
    """
    op = "encode_latents"
    weights = dictionary(op, module, layer)
    check_encoder(op, x, weights.W_enc, weights.b_enc)
    chosen = latent_ids(op, latents, weights.d_sae, weights.device)
    if not weights.independent:
        return activations_of(weights.encode(x), chosen)
    return weights.part(chosen).encode(x).to_dense()
