"""One view of dictionaries over one layer and over several: encode a layer, write a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..functional import decode
from ..modules import SAE, Transcoder
from ..multilayer import CrossLayerTranscoder, MultiLayer
from ..sparse import SparseActs

Dictionary = SAE | MultiLayer


def is_dictionary(module: Any) -> bool:
    """Whether `module` encodes and decodes activations."""
    return isinstance(module, (SAE, MultiLayer))


def maps(module: Dictionary) -> bool:
    """Whether it reads one place and writes another."""
    return isinstance(module, (Transcoder, CrossLayerTranscoder))


def layers_of(module: Dictionary) -> int:
    """Number of layers that it reads and writes."""
    return module.n_layers if isinstance(module, MultiLayer) else 1


def widths(module: Dictionary) -> tuple[int, int]:
    """`(d_in, d_out)` of each layer."""
    if isinstance(module, MultiLayer):
        return module.d_model, module.d_model
    return module.d_in, module.d_out


def encode_layer(module: Dictionary, layer: int, x: Tensor) -> SparseActs:
    """Activations of the latents of `layer`, from its `x [*batch, d_in]`."""
    if isinstance(module, MultiLayer):
        return module.encode_layer(layer, x)
    return module.encode(x)


def decode_layer(
    module: Dictionary, layer: int, acts: Mapping[int, SparseActs], x: Tensor, dtype: Any
) -> Tensor:
    """Reconstruction `[*batch, d_out]` of `layer`, from all latents that write to it.

    Args:
        module: the dictionary.
        layer: whose output.
        acts: of this layer and those before it.
        x: of this layer, for a skip connection.
        dtype: of the result.
    """
    if isinstance(module, Transcoder):
        return module.decode(acts[layer], x, dtype=dtype)
    if isinstance(module, SAE):
        return module.decode(acts[layer], dtype=dtype)
    recon = module.b_dec[layer].to(dtype)
    for source in range(layer + 1):
        W_dec = module.decoder(source)[:, layer - module.outputs(source).start]
        recon = recon + decode(acts[source], W_dec, dtype=dtype)
    if isinstance(module, CrossLayerTranscoder) and module.W_skip is not None:
        W_skip: Tensor = module.W_skip[layer]
        recon = recon + (x.to(W_skip.dtype) @ W_skip).to(dtype)
    return recon


def check_causal(op: str, module: Dictionary) -> None:
    """No latent writes to a layer before its own.

    Raises:
        ValueError: one does: its activation is not known yet when that layer runs.
    """
    if not isinstance(module, MultiLayer):
        return
    for layer in range(module.n_layers):
        if module.outputs(layer).start < layer:
            raise ValueError(
                f"{op}: saes must be causal: the latents of layer {layer} of this "
                f"{type(module).__name__} write to layer {module.outputs(layer).start}, which has "
                "run before"
            )
