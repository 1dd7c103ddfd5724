"""The methods of `CrossLayerTranscoder`: each returns None where the host has to work.

Its `decode` stays the host's, which calls two of them: reconstructions of attribution and of
`forward` then have the same bits. They have as many positions as the last active one needs, like
the host's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sparse import SparseActs
from . import circuit_tracer_host as host
from . import circuit_tracer_ops as entries


def encode(self: Any, x: Tensor) -> Tensor | None:
    """Dense activations `[n_layers, n, d_sae]`, the encoder read layer by layer."""
    if not _all_layers(self, x):
        return None
    dense = x.new_zeros((*x.shape[:-1], self.d_transcoder), requires_grad=False)
    for layer in range(self.n_layers):
        acts, _ = _encoded(self, x[layer], layer)
        if acts is None:
            return None
        entries.fill(dense[layer], acts)
    return dense


def encode_layer(
    self: Any, x: Tensor, layer_id: int, apply_activation_function: bool = True
) -> Tensor | None:
    """Dense activations of one layer."""
    if not apply_activation_function or not host.own(self, "apply_activation_function"):
        return None
    acts, _ = _encoded(self, x, layer_id)
    return None if acts is None else entries.fill(acts.values.new_zeros(acts.shape), acts)


def encode_sparse(
    self: Any, x: Tensor, zero_positions: slice = slice(0, 1)
) -> tuple[Tensor, Tensor] | None:
    """Activations as COO, and the encoder row of each."""
    if not host.own(self, "apply_activation_function"):
        return None
    return _sparse(self, x, zero_positions, rows=True)


def select_decoder_vectors(self: Any, features: Tensor) -> tuple[Tensor, ...] | None:
    """Decoder rows times values, one per entry and layer that it writes to, and their places."""
    features = features if features.is_sparse else features.to_sparse()
    if not _decodes(self, features):
        return None
    layers, tokens, latents = features.indices()
    values = features.values()
    outputs = self.n_layers - layers
    source = torch.arange(len(layers), device=layers.device).repeat_interleave(outputs)
    first = outputs.cumsum(0) - outputs
    layer_ids = torch.arange(len(source), device=layers.device) + (layers - first)[source]
    differentiable = torch.is_grad_enabled() and (values.requires_grad or _trains(self))
    vectors = None if differentiable else values.new_empty((len(source), self.d_model))
    parts, end = [], 0
    for layer, at in _spans(layers):
        size = (at.stop - at.start, self.n_layers - layer, self.d_model)
        end, start = end + size[0] * size[1], end
        out = None if vectors is None else vectors[start:end].view(size)
        part = host.scaled(*host.decoder_rows(self, latents[at], layer), values[at], out)
        parts.append(part.view(-1, self.d_model))
    vectors = torch.cat(parts) if vectors is None else vectors
    return tokens[source], layer_ids, latents[source], vectors, source


def compute_reconstruction(
    self: Any,
    pos_ids: Tensor,
    layer_ids: Tensor,
    decoder_vectors: Tensor,
    input_acts: Tensor | None = None,
) -> Tensor | None:
    """Sums of decoder vectors by layer and position, biases and skip connections."""
    if pos_ids.numel() == 0 or host.lacks_input(self, input_acts):
        return None
    if not host.plain(decoder_vectors, self.dtype):
        return None
    n = int(pos_ids.max()) + 1
    sums = entries.sum_rows(decoder_vectors, layer_ids * n + pos_ids, n * self.n_layers)
    recon: Tensor = sums.view(self.n_layers, n, self.d_model) + self.b_dec[:, None]
    if self.W_skip is not None:
        recon = recon + input_acts @ self.W_skip
    return recon


def forward(self: Any, x: Tensor) -> Tensor | None:
    """Reconstruction, without dense activations."""
    if self.W_skip is not None or not host.own(self, "encode") or not _all_layers(self, x):
        return None
    found = _sparse(self, x, slice(0, 0), rows=False)
    return None if found is None else self.decode(found[0])


METHODS = (
    *(encode, encode_layer, encode_sparse, select_decoder_vectors, compute_reconstruction),
    forward,
)


def _all_layers(module: Any, x: Tensor) -> bool:
    """Whether x is of every layer, and `encode` gives no gradient to a threshold.

    It would by the host's JumpReLU, whose gradient has the shape of one layer.
    """
    threshold = getattr(module.activation_function, "threshold", None)
    if threshold is not None and torch.is_grad_enabled() and threshold.requires_grad:
        return False
    return x.dim() == 3 and x.shape[0] == module.n_layers


def _encoded(module: Any, x: Tensor, layer: int) -> tuple[SparseActs | None, Tensor | None]:
    """`(acts, W_enc)` of one layer."""
    gate = host.gate_of(module, layer, straight_through=False)
    if gate is None or not host.own(module, "_get_encoder_weights"):
        return None, None
    if x.dim() < 1 or x.shape[-1] != module.d_model or not host.plain(x, module.dtype):
        return None, None
    W_enc = module._get_encoder_weights(layer)
    if W_enc.dtype != module.dtype:
        return None, None
    return entries.encode(x, W_enc, module.b_enc[layer], gate, late_bias=True), W_enc


def _sparse(module: Any, x: Tensor, zeroed: slice, *, rows: bool) -> tuple[Tensor, Tensor] | None:
    """`(activations, encoder rows)` of all layers; no rows where none are wanted."""
    if x.dim() != 3 or x.shape[0] != module.n_layers or not isinstance(zeroed, slice):
        return None
    parts: list[tuple[Tensor, ...]] = []
    vectors = [x.new_empty(0, module.d_model)]
    for layer in range(module.n_layers):
        acts, W_enc = _encoded(module, x[layer], layer)
        if acts is None or W_enc is None:
            return None
        tokens, latents, values = entries.coo(acts, zeroed)
        parts.append((torch.full_like(tokens, layer), tokens, latents, values))
        vectors += [W_enc.index_select(0, latents)] if rows else []
    *indices, values = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = (*x.shape[:-1], module.d_transcoder)
    return host.coalesced(indices, values, shape), torch.cat(vectors)


def _decodes(module: Any, features: Tensor) -> bool:
    """Whether COO features are all of the module's, and there are some."""
    shape = (module.n_layers, module.d_transcoder)
    if features.dim() != 3 or (features.shape[0], features.shape[2]) != shape:
        return False
    values = features.values()
    return values.numel() > 0 and host.plain(values, module.dtype) and host.decodes(module)


def _trains(module: Any) -> bool:
    return not module.lazy_decoder and any(W.requires_grad for W in module.W_dec)


def _spans(layers: Tensor) -> list[tuple[int, slice]]:
    """`(layer, its entries)` of ascending layers, those without entries left out."""
    found, counts = layers.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(k, slice(a, b)) for k, a, b in zip(found.tolist(), starts, ends, strict=True)]
