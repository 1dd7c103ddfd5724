"""Losses that revive dead latents; they read the dead latents' weights only.

The dead columns of W_enc and rows of W_dec are gathered into a dictionary of their own; autograd
scatters the gradients back. AuxK encodes with it by TopK. The pre-activation loss needs every
pre-activation of a dead latent, which it computes in tiles and again in the backward pass.

Unrectified AuxK takes the largest pre-activations, negative ones too. Adding
`|x| max_j |W_enc[:, j]| + max_j |b_enc[j]|` to those of a token makes all of them positive and
keeps their order: TopK then selects, and `pre_at` computes what was selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count
from ..checks import check_device, check_encoder, check_float, check_vector
from ..entries import latent_ids
from ..functional import decode, pre_at, topk_encode
from ..operands import encoder_args
from ..sparse import SparseActs
from .reconstruction import check_pair

TILE_BYTES = 64 << 20
"""Size of one `[n, latents]` tile of pre-activations, of which two or three live at a time."""

AUX_NORMALISATIONS = ("none", "residual", "target")


def pre_act(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    dead: Tensor,
    threshold: Tensor | None = None,
    W_dec: Tensor | None = None,
) -> Tensor:
    """Pull dead latents towards firing, by how far below their threshold they are.

    `mean_i sum_{j dead} relu(threshold[j] - pre[i, j]) |W_dec[j]|`, `pre = x @ W_enc + b_enc`;
    differentiable in every tensor but `dead`.

    Args:
        x: `[*batch, d_in]` floating point.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        dead: `[d_sae]` bool, or integer latents, all different.
        threshold: `[d_sae]`; None for 0.
        W_dec: `[d_sae, d_out]`; None for norms of 1.

    Returns:
        A scalar; 0 without dead latents or tokens.

    Raises:
        TypeError: a tensor has the wrong kind of dtype.
        ValueError: shapes or devices disagree, or `dead` is out of range or names a latent twice.

    Source: Conerly et al., Transformer Circuits updates, January 2025; without a threshold, the
    dead-latent loss of cross-layer transcoders.
    """
    from torch.utils.checkpoint import checkpoint  # imports sympy: not with this package

    op = "pre_act"
    check_encoder(op, x, W_enc, b_enc)
    if threshold is not None:
        check_vector(op, "threshold", threshold, W_enc.shape[1], W_enc)
    _check_rows(op, W_dec, W_enc)
    ids = latent_ids(op, dead, W_enc.shape[1], W_enc.device)
    x, W_enc, b_enc = encoder_args(x, W_enc, b_enc)
    wide = torch.promote_types(torch.promote_types(x.dtype, b_enc.dtype), W_enc.dtype)
    width = max(TILE_BYTES // (max(x.shape[0], 1) * wide.itemsize), 1)
    total = b_enc.new_zeros((), dtype=wide)
    with torch.autocast(x.device.type, enabled=False):
        for tile in torch.split(ids, width):
            theta = None if threshold is None else threshold[tile].to(wide)
            rows = None if W_dec is None else W_dec[tile].to(wide)
            part = (x.to(wide), W_enc.t()[tile].t().to(wide), b_enc[tile].to(wide), theta, rows)
            total = total + checkpoint(shortfall, *part, use_reentrant=False)
    return total / max(x.shape[0], 1)


def auxk(
    x: Tensor,
    recon: Tensor,
    target: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    k_aux: int,
    *,
    normalisation: str = "none",
    scaled: bool = True,
    rectified: bool = True,
    encoder_gradient: bool = True,
) -> Tensor:
    """Error of the dead latents' own reconstruction of the residual.

    `s * mean_i |sum_{j in top(i)} relu(pre[i, j]) W_dec[j] - r[i]|^2 / v`, with the residual
    `r = target - recon` a constant, `top(i)` the `min(k_aux, D)` largest of the D dead latents, and
    `s = min(D / k_aux, 1)` where `scaled`; without the relu where not `rectified`.

    Args:
        x: `[*batch, d_in]` floating point.
        recon: `[*batch, d_out]` reconstruction by the living latents.
        target: `[*batch, d_out]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_out]`.
        dead: `[d_sae]` bool, or integer latents, all different.
        k_aux: latents per token, >= 1; d_in / 2 is customary.
        normalisation: v: "none" (1; SAELens), "residual" (mean squared deviation of r from its
            batch mean; dictionary_learning) or "target" (that of the target; sparsify).
        scaled: whether s is used; dictionary_learning has s = 1.
        rectified: whether negative pre-activations count 0; SAELens' count as they are, and pass
            gradients.
        encoder_gradient: whether W_enc, b_enc and x receive gradients; sparsify's do not.

    Returns:
        A scalar; 0 without dead latents or tokens, or where v is 0.

    Raises:
        TypeError: a tensor has the wrong kind of dtype, or k_aux is not an int.
        ValueError: shapes or devices disagree, k_aux < 1, the normalisation is unknown, or `dead`
            is out of range or names a latent twice.

    Source: Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """
    op = "auxk"
    check_encoder(op, x, W_enc, b_enc)
    check_pair(op, recon, target)
    _check_rows(op, W_dec, W_enc, target)
    check_auxk(op, k_aux, normalisation)
    if x.shape[:-1] != target.shape[:-1]:
        raise ValueError(
            f"{op}: x and target must agree in their leading dimensions, got {tuple(x.shape)} and "
            f"{tuple(target.shape)}"
        )
    ids = latent_ids(op, dead, W_enc.shape[1], W_enc.device)
    wide = torch.promote_types(torch.promote_types(recon.dtype, target.dtype), torch.float32)
    residual = (target.to(wide) - recon.to(wide)).detach()
    n = max(residual.numel() // max(residual.shape[-1], 1), 1)
    if ids.shape[0] == 0 or residual.numel() == 0:
        return residual.new_zeros(())
    dictionary = (x, W_enc.t()[ids].t(), b_enc[ids], W_dec[ids])
    error = aux_error(residual, [dictionary], k_aux, rectified, encoder_gradient) / n
    error = error / aux_denominator(normalisation, residual, target.detach().to(wide))
    return error * aux_scale(ids.shape[0], k_aux, scaled)


def aux_error(
    residual: Tensor,
    dictionaries: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    k_aux: int,
    rectified: bool = True,
    encoder_gradient: bool = True,
    keep: Callable[[SparseActs], SparseActs] = lambda acts: acts,
    join: Callable[[Tensor], Tensor] = lambda partial: partial,
) -> Tensor:
    """Summed squared error of the reconstruction of `residual` by dictionaries of dead latents.

    They are x, W_enc, b_enc and W_dec of each layer, and write to the last columns, the first to
    all. Where other processes have dead latents too, `keep` returns the entries that stand among
    theirs, and `join` sums the reconstructions.
    """
    largest = topk_encode if rectified else _largest
    recon: Tensor | None = None
    for x, W_enc, b_enc, W_dec in dictionaries:
        acts = keep(largest(x, W_enc, b_enc, min(k_aux, W_enc.shape[1])))
        if not encoder_gradient:
            acts = acts.detach()
        part = decode(acts, W_dec, dtype=residual.dtype)
        before = residual.shape[-1] - part.shape[-1]
        recon = part if recon is None else recon + torch.nn.functional.pad(part, (before, 0))
    assert recon is not None
    return (join(recon) - residual).square().sum()


def _largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> SparseActs:
    """The k largest pre-activations of each token, of either sign."""
    x, W_enc, b_enc = encoder_args(x, W_enc, b_enc)
    wide = torch.promote_types(torch.promote_types(x.dtype, b_enc.dtype), W_enc.dtype)
    x, W_enc, b_enc = x.to(wide), W_enc.to(wide), b_enc.to(wide)
    if W_enc.shape[1] == 0:
        return topk_encode(x, W_enc, b_enc, 0)
    with torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            longest = torch.linalg.vector_norm(W_enc, dim=0).amax()
            lift = torch.linalg.vector_norm(x, dim=1) * longest + b_enc.abs().amax()
            rows = torch.cat((W_enc.t(), W_enc.new_ones(W_enc.shape[1], 1)), 1)
            chosen = topk_encode(torch.cat((x, lift[:, None]), 1), rows.t(), b_enc, k)
        values = pre_at(x, W_enc, b_enc, chosen.tokens(), chosen.latents())
    return chosen._replace(values=values, gate=torch.ones_like(values))


def mean_deviation(flat: Tensor) -> Tensor:
    """Mean squared deviation of the rows of `flat [n, d]` from their mean."""
    return (flat - flat.mean(0)).square().sum() / max(flat.shape[0], 1)


def aux_denominator(
    normalisation: str,
    residual: Tensor,
    target: Tensor,
    deviation_of: Callable[[Tensor], Tensor] = mean_deviation,
) -> Tensor:
    """Mean squared deviation from the batch mean, or 1; infinite where it is 0."""
    if normalisation == "none":
        return residual.new_ones(())
    chosen = residual if normalisation == "residual" else target
    deviation = deviation_of(chosen.reshape(-1, chosen.shape[-1]).to(residual.dtype))
    return deviation.masked_fill(~(deviation > 0) & ~deviation.isnan(), torch.inf)


def aux_scale(dead: float, k_aux: int, scaled: bool) -> float:
    """`min(D / k_aux, 1)`: few dead latents weigh less."""
    return min(dead / k_aux, 1.0) if scaled else 1.0


def check_auxk(op: str, k_aux: Any, normalisation: Any) -> None:
    """k_aux is an int >= 1, the normalisation a known one."""
    check_count(op, "k_aux", k_aux)
    if k_aux < 1:
        raise ValueError(f"{op}: k_aux must be >= 1, got {k_aux}")
    if normalisation not in AUX_NORMALISATIONS:
        raise ValueError(
            f"{op}: normalisation must be one of {', '.join(AUX_NORMALISATIONS)}, got "
            f"{normalisation!r}"
        )


def shortfall(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, W_dec: Tensor | None
) -> Tensor:
    """`sum relu(threshold - pre) |W_dec|` over one tile of latents."""
    pre = torch.addmm(b_enc, x, W_enc)
    short = (-pre if threshold is None else threshold - pre).relu()
    if W_dec is None:
        return short.sum()
    return torch.dot(short.sum(0), torch.linalg.vector_norm(W_dec, dim=1))


def _check_rows(op: str, W_dec: Any, W_enc: Tensor, target: Tensor | None = None) -> None:
    """W_dec is None or `[d_sae, d_out]` beside W_enc."""
    if W_dec is None:
        return
    check_float(op, "W_dec", W_dec)
    d_out = W_dec.shape[-1] if target is None else target.shape[-1]
    if W_dec.dim() != 2 or tuple(W_dec.shape) != (W_enc.shape[1], d_out):
        raise ValueError(
            f"{op}: W_dec must have shape [d_sae={W_enc.shape[1]}, d_out={d_out}], got "
            f"{tuple(W_dec.shape)}"
        )
    check_device(op, "W_dec", W_dec, W_enc)
