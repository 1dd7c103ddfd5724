"""Losses over nested dictionaries: prefixes of the latents (Matryoshka), several k (Multi-TopK).

One encode serves all of them. The reconstruction of a prefix is that of the prefix before plus a
decode of the entries between the two, so all together cost one decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count, check_number
from ..checks import check_decoder, check_device, check_encoder, check_float, check_vector
from ..functional import decode, topk_encode
from ..sparse import SparseActs
from .reconstruction import squared_error

Weights = str | Sequence[float]


def matryoshka(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    prefixes: Sequence[int],
    weights: Weights = "sum",
    *,
    skip: Tensor | None = None,
) -> Tensor:
    """Squared error of every prefix: `sum_g w_g mean_i |recon_g[i] - target[i]|^2`.

    `recon_g = acts[:, :prefixes[g]] @ W_dec[:prefixes[g]] + b_dec (+ skip)`.

    Args:
        acts: activations of one encode over all latents.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`, or None.
        target: `[*batch, d_out]`.
        prefixes: numbers of leading latents, ascending, in `[1, d_sae]`.
        weights: w: "sum" (1 each; SAELens), "mean" (1 / number of prefixes) or one number >= 0 per
            prefix.
        skip: `[*batch, d_out]` added to every reconstruction: a transcoder's affine skip.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes or devices disagree, prefixes do not ascend or weights do not fit.

    Source: Bussmann et al. 2025, arXiv 2503.17547, section 3.
    """
    op = "matryoshka"
    check_decoder(op, acts, W_dec)
    ends = check_prefixes(op, prefixes, acts.d_sae)
    factors = group_weights(op, weights, len(ends))
    if b_dec is not None:
        check_vector(op, "b_dec", b_dec, W_dec.shape[1], W_dec)
    for name, t in (("target", target), ("skip", skip)):
        if t is not None:
            check_float(op, name, t)
            check_device(op, name, t, W_dec)
    recon: Tensor | None = skip
    total = acts.values.new_zeros(())
    start = 0
    sizes = [end - low for low, end in zip((0, *ends), ends, strict=False)]
    rows = torch.split(W_dec[: ends[-1]], sizes)
    for end, part, factor in zip(ends, rows, factors, strict=True):
        bias = b_dec if start == 0 else None
        added = decode(acts.latent_range(start, end), part, bias, dtype=_wide(W_dec, target))
        recon = added if recon is None else recon + added
        total = total + factor * squared_error(recon, target)
        start = end
    return total


def multi_topk(
    x: Tensor,
    target: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    ks: Sequence[int],
    weights: Weights = "sum",
    *,
    skip: Tensor | None = None,
    encoder_gradient: bool = True,
) -> Tensor:
    """Squared error of the reconstructions by several k.

    `sum_g w_g mean_i |recon_g[i] - target[i]|^2`,
    `recon_g = topk_{ks[g]}(relu(x @ W_enc + b_enc)) @ W_dec + b_dec (+ skip)`; one encode with the
    largest k, of which the others are subsets.

    Args:
        x: `[*batch, d_in]` floating point.
        target: `[*batch, d_out]`.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`, or None.
        ks: latents per token, each in `[1, d_sae]`, ascending.
        weights: w: "sum" (1 each), "mean" or one number >= 0 per k; `(1, 1 / 8)` with `(k, 4 k)` is
            customary.
        skip: `[*batch, d_out]` added to every reconstruction: a transcoder's affine skip.
        encoder_gradient: whether W_enc, b_enc and x receive gradients; sparsify's do not.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes or devices disagree, ks do not ascend or weights do not fit.

    Source: Gao et al. 2024, arXiv 2406.04093, section 5.3.
    """
    op = "multi_topk"
    check_encoder(op, x, W_enc, b_enc)
    ends = check_prefixes(op, ks, W_enc.shape[1], "ks")
    factors = group_weights(op, weights, len(ends))
    widest = topk_encode(x, W_enc, b_enc, ends[-1])
    widest = widest if encoder_gradient else widest.detach()
    total = widest.values.new_zeros(())
    for k, factor in zip(ends, factors, strict=True):
        acts = widest if k == ends[-1] else widest.topk(k)
        recon = decode(acts, W_dec, b_dec, dtype=_wide(W_dec, target))
        total = total + factor * squared_error(recon if skip is None else recon + skip, target)
    return total


def check_prefixes(
    op: str, ends: Any, d_sae: int | None, name: str = "prefixes"
) -> tuple[int, ...]:
    """Ascending ints in `[1, d_sae]`, at least one."""
    if not isinstance(ends, Sequence) or isinstance(ends, str):
        raise TypeError(f"{op}: {name} must be a sequence of ints, got {type(ends).__name__}")
    if not ends:
        raise ValueError(f"{op}: {name} must not be empty")
    for at, end in enumerate(ends):
        check_count(op, f"{name}[{at}]", end, d_sae, "d_sae")
        if end < 1 or (at and end <= ends[at - 1]):
            raise ValueError(f"{op}: {name} must ascend from 1 or more, got {list(ends)}")
    return tuple(ends)


def group_weights(op: str, weights: Any, groups: int) -> tuple[float, ...]:
    """One weight per group."""
    if isinstance(weights, str):
        if weights not in ("sum", "mean"):
            raise ValueError(f"{op}: weights must be 'sum', 'mean' or numbers, got {weights!r}")
        return (1.0 if weights == "sum" else 1 / groups,) * groups
    if not isinstance(weights, Sequence):
        raise TypeError(f"{op}: weights must be a str or a sequence, got {type(weights).__name__}")
    if len(weights) != groups:
        raise ValueError(f"{op}: {groups} weights are needed, got {len(weights)}")
    return tuple(check_number(op, f"weights[{at}]", w) for at, w in enumerate(weights))


def _wide(W_dec: Tensor, target: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(W_dec.dtype, target.dtype), torch.float32)
