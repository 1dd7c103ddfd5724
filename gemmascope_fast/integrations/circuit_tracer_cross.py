"""The methods of `CrossLayerTranscoder`: each returns None where the host has to work.

Its reconstructions have as many positions as the last active one needs, like the host's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import decode_
from ..multilayer import multi_decode
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
        rows, place = host.decoder_rows(self, latents[at], layer)
        part = host.scaled(rows, place, values.detach()[at] if out is not None else values[at], out)
        parts += [part.view(-1, self.d_model)] if out is None else []
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
    return _with_bias(self, sums.view(self.n_layers, n, self.d_model), input_acts)


def decode(self: Any, features: Tensor, input_acts: Tensor | None = None) -> Tensor | None:
    """Reconstruction of activations, without a decoder vector of each entry."""
    if not host.own(self, "select_decoder_vectors", "compute_reconstruction"):
        return None
    features = features if features.is_sparse else features.to_sparse()
    if not _decodes(self, features) or host.lacks_input(self, input_acts):
        return None
    if torch.is_grad_enabled() and (features.values().requires_grad or _trains(self)):
        return _with_bias(self, _differentiable(self, features), input_acts)
    layers, tokens, latents = features.indices()
    n, width = int(tokens.max()) + 1, self.n_layers * self.d_model
    recon = torch.zeros(n, width, device=tokens.device)
    for layer, at in _spans(layers):
        rows, place = host.decoder_rows(self, latents[at], layer)
        acts = entries.csr(tokens[at], place, features.values()[at], (n, rows.shape[0]))
        decode_(recon[:, layer * self.d_model :], acts, rows.flatten(1))
    sums = recon.view(n, self.n_layers, self.d_model).transpose(0, 1)
    return _with_bias(self, sums.to(self.dtype).contiguous(), input_acts)


def forward(self: Any, x: Tensor) -> Tensor | None:
    """Reconstruction, without dense activations."""
    if self.W_skip is not None or not host.own(self, "encode") or not _all_layers(self, x):
        return None
    found = _sparse(self, x, slice(0, 0), rows=False)
    return None if found is None else self.decode(found[0])


METHODS = (
    *(encode, encode_layer, encode_sparse, select_decoder_vectors, compute_reconstruction),
    *(decode, forward),
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


def _differentiable(module: Any, features: Tensor) -> Tensor:
    """Reconstruction `[n_layers, n, d_model]` without biases, in the same bits."""
    layers, tokens, latents = features.indices()
    spans = dict(_spans(layers))
    n = int(tokens.max()) + 1
    acts, W_dec = [], []
    for layer in range(module.n_layers):
        at = spans.get(layer)
        if at is None:
            rows = features.values().new_empty(0, module.n_layers - layer, module.d_model)
            at, place = slice(0, 0), latents[:0]
        else:
            rows, place = host.decoder_rows(module, latents[at], layer)
        acts.append(entries.csr(tokens[at], place, features.values()[at], (n, rows.shape[0])))
        W_dec.append(rows.flatten(1))
    sums = multi_decode(acts, W_dec, torch.zeros_like(module.b_dec, requires_grad=False))
    return sums.transpose(0, 1).contiguous()


def _with_bias(module: Any, recon: Tensor, input_acts: Tensor | None) -> Tensor:
    recon = recon + module.b_dec[:, None]
    if module.W_skip is None:
        return recon
    return recon + input_acts @ module.W_skip  # type: ignore[no-any-return]
