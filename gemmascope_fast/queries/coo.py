"""`encode_coo`: activations as COO with the weights of the active latents, for attribution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_encoder
from ..sparse import SparseActs
from .activations import active_entries, check_acts
from .dictionary import Module, dictionary


class Coo(NamedTuple):
    """Active entries and the weights of their latents.

    Attributes:
        acts: `[*batch, d_sae]` coalesced `torch.sparse_coo`, nnz entries, differentiable.
        encoder_rows: `[r, d_in]`, see `encoder_rows`.
        decoder_rows: `[r, d_out]` (with `layer` `[r, outputs, d_model]`), see `decoder_rows`.
        row: `[nnz]` int64, the row of each entry: r = nnz and 0, 1, 2, ..., or with `unique` one
            row for each latent that is active anywhere.
    """

    acts: Tensor
    encoder_rows: Tensor
    decoder_rows: Tensor
    row: Tensor


def encode_coo(
    module: Module,
    x: Tensor,
    *,
    zero_positions: Any = None,
    unique: bool = False,
    layer: int | None = None,
) -> Coo:
    """Encode x, as COO with encoder and decoder rows of the active latents.

    `recon = b_dec + index_add of values[e] * decoder_rows[row[e]] over the tokens of entries e`.

    Args:
        module: an `SAE` or a `Transcoder`; with `layer` a `Crosscoder` or a `CrossLayerTranscoder`.
        x: `[*batch, d_in]`.
        zero_positions: index of the leading dimensions; what it selects has no entries, such as
            `slice(0, 1)` for BOS. None: nothing.
        unique: one row per distinct latent instead of one per entry, which is less memory.
        layer: whose x this is.

    Raises:
        TypeError: `module` is none of them, or x not floating point.
        ValueError: x has the wrong width, or `layer` is missing, out of range, or given for a
            single-layer module.
    """
    weights = dictionary("encode_coo", module, layer)
    check_encoder("encode_coo", x, weights.W_enc, weights.b_enc)
    acts = weights.encode(x)
    if zero_positions is not None:
        dropped = torch.zeros(acts.shape[:-1], dtype=torch.bool, device=acts.device)
        dropped[zero_positions] = True
        dropped = torch.nn.functional.pad(dropped.reshape(-1), (0, 1), value=True)
        acts = acts._keep(~dropped[acts.tokens()])
    found = to_sparse_coo(acts)
    latents = found.indices()[-1]
    row = torch.arange(latents.shape[0], device=latents.device)
    if unique:
        latents, row = latents.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return Coo(found, weights.encoder_rows(latents), weights.decoder_rows(latents), row)


def to_sparse_coo(acts: SparseActs) -> Tensor:
    """The active entries as a coalesced `torch.sparse_coo` tensor `[*batch, d_sae]`.

    Raises:
        TypeError: `acts` is not a `SparseActs`.
    """
    check_acts("to_sparse_coo", acts)
    tokens, latents, values = active_entries(acts)
    where = []
    for size in reversed(acts.shape[:-1]):
        where.append(tokens % max(size, 1))
        tokens = tokens // max(size, 1)
    indices = torch.stack([*reversed(where), latents])
    return torch.sparse_coo_tensor(
        indices, values, acts.shape, is_coalesced=True, check_invariants=False
    )
