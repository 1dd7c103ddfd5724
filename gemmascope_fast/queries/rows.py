"""Rows of the weights: gathered, compared with directions, scaled for steering."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count
from ..checks import check_device, check_float
from ..entries import latent_ids
from .dictionary import Dictionary, Module, dictionary

BLOCK = 2**23
"""Elements of a block of rows that is worked on at once."""


def decoder_rows(module: Module, latents: Any, *, layer: int | None = None) -> Tensor:
    """What one unit of each latent's activation adds to the reconstruction.

    `W_dec[latents]`, over the decoder norms where the module's semantics rescale activations.

    Args:
        module: an `SAE` or a `Transcoder`; with `layer` a `Crosscoder` or a `CrossLayerTranscoder`.
        latents: m latents, repetitions allowed, or a `[d_sae]` mask.
        layer: of the latents.

    Returns:
        `[m, d_out]` in the dtype of W_dec, differentiable; with `layer` `[m, outputs, d_model]`,
        for the layers `module.outputs(layer)`.

    Raises:
        TypeError: `module` is none of them, or `latents` are neither integers nor a mask.
        ValueError: a latent is out of range, or `layer` is missing, out of range, or given for a
            single-layer module.
    """
    weights = dictionary("decoder_rows", module, layer)
    return weights.decoder_rows(_ids("decoder_rows", latents, weights))


def encoder_rows(module: Module, latents: Any, *, layer: int | None = None) -> Tensor:
    """Gradient of each latent's pre-activation with respect to x.

    `W_enc[:, latents].t()`, times the decoder norms where the module's semantics rescale.

    Args:
        module: an `SAE` or a `Transcoder`; with `layer` a `Crosscoder` or a `CrossLayerTranscoder`.
        latents: m latents, repetitions allowed, or a `[d_sae]` mask.
        layer: of the latents.

    Returns:
        `[m, d_in]` in the dtype of W_enc, differentiable.

    Raises:
        TypeError: `module` is none of them, or `latents` are neither integers nor a mask.
        ValueError: a latent is out of range, or `layer` is missing, out of range, or given for a
            single-layer module.
    """
    weights = dictionary("encoder_rows", module, layer)
    return weights.encoder_rows(_ids("encoder_rows", latents, weights))


@torch.no_grad()
def cosine_topk(rows: Tensor, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of largest cosine with each direction, in blocks of rows.

    `cos[i, j] = <directions[i], rows[j]> / (|directions[i]| |rows[j]|)`, 0 where a norm is 0. NaN
    ranks largest; ties go to the smaller row. Nothing of the size of `rows` is allocated.

    Args:
        rows: `[d_sae, d]`: `module.W_dec`, or `module.W_enc.t()` for the encoder's.
        directions: `[*batch, d]`.
        k: rows wanted, in `[0, d_sae]`.

    Returns:
        `cosines [*batch, k]` float32 (float64 if an argument is), largest first, without
        gradients, and `indices [*batch, k]` int64.

    Raises:
        TypeError: a tensor is not floating point, or k not an int.
        ValueError: shapes or devices disagree, or k is out of range.
    """
    op = "cosine_topk"
    check_float(op, "rows", rows)
    check_float(op, "directions", directions)
    if rows.dim() != 2:
        raise ValueError(f"{op}: rows must have shape [d_sae, d], got {tuple(rows.shape)}")
    if directions.dim() == 0 or directions.shape[-1] != rows.shape[1]:
        raise ValueError(
            f"{op}: directions must have shape [*batch, d={rows.shape[1]}], got "
            f"{tuple(directions.shape)}"
        )
    check_device(op, "directions", directions, rows)
    k = check_count(op, "k", k, rows.shape[0], "d_sae")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, directions.dtype), torch.float32)
    flat = directions.reshape(-1, rows.shape[1]).to(dtype)
    units = flat / _norms(flat)[:, None]
    best, indices = units.new_empty(units.shape[0], 0), units.new_empty(units.shape[0], 0).long()
    for block in row_blocks(rows, units.shape[0]):
        part = rows[block].to(dtype)
        cosines = units @ part.t() / _norms(part)
        ids = torch.arange(block.start, block.stop, device=rows.device)
        if 0 < k == best.shape[1]:  # rows below every direction's k-th best need no sorting
            near = (~(cosines < best[:, -1:])).any(0)
            cosines, ids = cosines[:, near], ids[near]
        cosines = torch.cat([best, cosines], 1)
        places = torch.cat([indices, ids.expand(units.shape[0], -1)], 1)
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        best, indices = cosines[:, :k], places.gather(1, order[:, :k])
    shape = (*directions.shape[:-1], k)
    return best.reshape(shape), indices.reshape(shape)


def row_blocks(rows: Tensor, beside: int = 0) -> Iterator[slice]:
    """Slices of `rows [r, d]` that hold at most `BLOCK` elements with `beside` more per row."""
    size = max(BLOCK // max(rows.shape[1] + beside, 1), 1)
    for start in range(0, rows.shape[0], size):
        yield slice(start, min(start + size, rows.shape[0]))


def _norms(rows: Tensor) -> Tensor:
    """Norms of the rows, 1 where it is 0."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.masked_fill(norms == 0, 1.0)


def _ids(op: str, latents: Any, weights: Dictionary) -> Tensor:
    return latent_ids(op, latents, weights.d_sae, weights.device, distinct=False)
