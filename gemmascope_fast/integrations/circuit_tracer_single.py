"""The methods of `SingleLayerTranscoder`: each returns None where the host has to work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import decode as sparse_decode
from ..sparse import SparseActs
from ..training.planning import CROSSOVER
from . import circuit_tracer_host as host
from . import circuit_tracer_ops as entries


def encode(self: Any, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor | None:
    """Dense activations, from sparse ones: one `[n, d_sae]` tensor, the result."""
    if not apply_activation_function:
        return None
    acts, _ = _encoded(self, input_acts)
    return None if acts is None else entries.fill(acts.values.new_zeros(acts.shape), acts)


def encode_sparse(
    self: Any, input_acts: Tensor, zero_positions: slice = slice(0, 1)
) -> tuple[Tensor, Tensor] | None:
    """Activations as COO, and the encoder row of each."""
    if input_acts.dim() != 2 or not isinstance(zero_positions, slice):
        return None
    acts, W_enc = _encoded(self, input_acts)
    if acts is None or W_enc is None:
        return None
    tokens, latents, values = entries.coo(acts, zero_positions)
    return host.coalesced([tokens, latents], values, acts.shape), W_enc.index_select(0, latents)


def decode(self: Any, acts: Tensor, input_acts: Tensor | None = None) -> Tensor | None:
    """Reconstruction of dense activations, from those that are not 0."""
    if not host.decodes(self) or not host.plain(acts, self.dtype):
        return None
    if acts.dim() < 1 or acts.shape[-1] != self.d_transcoder or host.lacks_input(self, input_acts):
        return None
    if torch.is_grad_enabled() and acts.requires_grad:
        return None  # its gradient is that of latents that are off, too
    if int(acts.count_nonzero()) > CROSSOVER[acts.device.type] * acts.numel():
        return None
    flat = acts.reshape(-1, self.d_transcoder)
    tokens, latents = flat.nonzero(as_tuple=True)
    found = entries.csr(tokens, latents, flat[tokens, latents], tuple(acts.shape))
    return _recon(self, found, input_acts)


def decode_sparse(
    self: Any, sparse_acts: Tensor, input_acts: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Reconstruction of COO activations, and the decoder row of each times its value."""
    if not host.decodes(self) or host.lacks_input(self, input_acts):
        return None
    values = sparse_acts.values()
    if sparse_acts.dim() != 2 or values.numel() == 0 or not host.plain(values, self.dtype):
        return None
    tokens, latents = sparse_acts.indices()
    vectors = host.scaled(*host.decoder_rows(self, latents), values)
    recon = entries.sum_rows(vectors, tokens, sparse_acts.shape[0])
    if self.W_skip is not None:
        recon = recon + self.compute_skip(input_acts)
    return recon + self.b_dec, vectors


def forward(self: Any, input_acts: Tensor) -> Tensor | None:
    """Reconstruction, without dense activations."""
    if not host.own(self, "encode", "decode") or not host.decodes(self):
        return None
    acts, _ = _encoded(self, input_acts)
    return None if acts is None else _recon(self, acts, input_acts)


METHODS = (encode, encode_sparse, decode, decode_sparse, forward)


def _encoded(module: Any, x: Tensor) -> tuple[SparseActs | None, Tensor | None]:
    """`(acts, W_enc)`; a lazy encoder is read once, and not at all where it cannot be served."""
    gate = host.gate_of(module)
    if gate is None or not host.plain(module.b_enc, module.dtype):
        return None, None
    W_enc = module.W_enc
    x = x.to(W_enc.dtype)
    if not host.plain(x, module.dtype) or x.dim() < 1 or x.shape[-1] != W_enc.shape[1]:
        return None, None
    return entries.encode(x, W_enc, module.b_enc, gate), W_enc


def _recon(module: Any, acts: SparseActs, input_acts: Tensor | None) -> Tensor:
    """`acts @ W_dec + b_dec`, and the skip connection."""
    rows, place = host.decoder_rows(module, acts.latents())
    shape = (*acts.shape[:-1], rows.shape[0])
    found = SparseActs(acts.offsets, place.to(torch.int32), acts.values, acts.gate, shape)
    recon = sparse_decode(found, rows, module.b_dec)
    if module.W_skip is None:
        return recon
    return recon + module.compute_skip(input_acts)  # type: ignore[no-any-return]
