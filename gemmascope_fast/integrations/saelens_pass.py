"""One forward pass of a SAELens module over selected entries, and all its gradients at once.

`latents` selects the entries of a batch without autograd; `SparsePass` then makes the
reconstructions of them. Its backward is one `sae_backward`, where all weights are trained, or
`decode_backward` and `encode_backward`. Rescaling by the decoder's norms chooses entries only: what
is decoded is `pre * |W_dec[j]| / |W_dec[j]|`, whose gradient in the norms is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..functional import batchtopk_encode, jumprelu_encode, topk_encode
from ..functional import decode as sparse_decode
from ..operands import autocast, encoder_args, widen
from ..sparse import SparseActs


@dataclass(frozen=True)
class Encoder:
    """What a SAELens module encodes with.

    Attributes:
        kind: "jumprelu", "topk" or "batchtopk".
        threshold: `[d_sae]`, used where `pre` exceeds it; for a JumpReLU.
        bandwidth: of the threshold's straight-through window; 0 where it has none.
        to_input: whether the window's gradient reaches the pre-activations too.
        k: for TopK, BatchTopK.
        norms: `[d_sae]` by which pre-activations are multiplied, or None.
    """

    kind: str
    threshold: Tensor | None = None
    bandwidth: float = 0.0
    to_input: bool = False
    k: float = 0
    norms: Tensor | None = None


@torch.no_grad()
def select(encoder: Encoder, x: Tensor, W_enc: Tensor, b_enc: Tensor, window: bool) -> SparseActs:
    """Entries of x, without autograd and before rescaling; those in the window where asked."""
    x, W_enc, b_enc = x.detach(), W_enc.detach(), b_enc.detach()
    if encoder.threshold is not None:
        if not window:
            return jumprelu_encode(x, W_enc, b_enc, encoder.threshold.detach())
        with torch.enable_grad():  # a threshold that requires grad has its window stored
            leaf = encoder.threshold.detach().requires_grad_()
            return jumprelu_encode(x, W_enc, b_enc, leaf, bandwidth=encoder.bandwidth).detach()
    norms = encoder.norms
    if norms is not None:
        W_enc, b_enc = W_enc * norms.to(W_enc.dtype), b_enc * norms
    if encoder.kind == "batchtopk":
        acts = batchtopk_encode(x, W_enc, b_enc, encoder.k)
    else:
        acts = topk_encode(x, W_enc, b_enc, int(encoder.k))
    if norms is None:
        return acts
    return acts._replace(values=acts.values / norms[acts.latents()])


def sparse_pass(
    encoder: Encoder,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    decoder: tuple[Tensor, Tensor] | None = None,
    ends: Sequence[int] | None = None,
    centred: bool = False,
) -> tuple[Tensor, SparseActs]:
    """Reconstructions by the first `ends` latents, and the entries, differentiable.

    Args:
        encoder: what selects.
        x: `[*batch, d_in]`, as the encoder sees it.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        decoder: W_dec and b_dec; None for the entries alone.
        ends: widths of nested dictionaries, ascending, `d_sae` last; default `d_sae` alone.
        centred: whether x is a constant less b_dec; the gradient of that b_dec is `-W_enc @
            d_b_enc`, one product instead of one gathered row of W_enc per entry.

    Returns:
        `[G, *batch, d_out]` in the dtype of W_dec (G = 0 without a decoder), and entries before
        rescaling.
    """
    if torch.compiler.is_compiling():
        return _composed(encoder, x, W_enc, b_enc, decoder)
    theta = encoder.threshold
    grads = torch.is_grad_enabled()
    window = grads and theta is not None and encoder.bandwidth > 0
    window = window and any(t.requires_grad for t in (theta, x, W_enc, b_enc) if t is not None)
    acts = select(encoder, x, W_enc, b_enc, window)
    operands = (*encoder_args(x, W_enc, b_enc), None if theta is None else widen(theta))
    ends, dtype = tuple(ends or (acts.d_sae,)), x.dtype
    rows = bias = None
    if decoder is not None:
        dtype = decoder[0].dtype
        rows, bias = autocast(decoder[0])[0], widen(decoder[1])
    given = Given(ends, encoder, window, dtype, centred)
    if centred:
        operands = (operands[0].detach(), *operands[1:])
    recons, values, gate = SparsePass.apply(  # type: ignore[no-untyped-call]
        given, acts, *operands, rows, bias
    )
    recons = recons.reshape(recons.shape[0], *x.shape[:-1], recons.shape[-1])
    return recons, acts._replace(values=values, gate=gate)


def _composed(
    encoder: Encoder, x: Tensor, W_enc: Tensor, b_enc: Tensor, decoder: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, SparseActs]:
    """The same of the ops under autograd, which a compiler traces; one dictionary."""
    norms, n = encoder.norms, math.prod(x.shape[:-1])
    if norms is not None:
        W_enc, b_enc = W_enc * norms.to(W_enc.dtype), b_enc * norms
    if encoder.threshold is not None:
        acts = jumprelu_encode(x, W_enc, b_enc, encoder.threshold, bandwidth=encoder.bandwidth)
    elif encoder.kind == "topk":
        acts = topk_encode(x, W_enc, b_enc, int(encoder.k))
    else:
        acts = batchtopk_encode(x, W_enc, b_enc, encoder.k, max_nnz=int(encoder.k * n))
    if norms is not None:
        padded = torch.nn.functional.pad(norms, (0, 1), value=1.0)
        acts = acts._replace(values=acts.values / padded[acts.latents()])
    if decoder is None:
        return x.new_empty(0, *x.shape[:-1], 0), acts
    return sparse_decode(acts, *decoder)[None], acts


@dataclass(frozen=True)
class Given:
    """Constants of a pass: see `sparse_pass`; `window` says whether window entries are stored."""

    ends: tuple[int, ...]
    encoder: Encoder
    window: bool
    dtype: torch.dtype
    centred: bool


class SparsePass(torch.autograd.Function):
    """`(x, W_enc, b_enc, threshold, W_dec, b_dec) -> (recons, values, gate)` on given entries."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        given: Given,
        acts: SparseActs,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor | None,
        W_dec: Tensor | None,
        b_dec: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        view = acts.by_feature() if any(ctx.needs_input_grad) else (None, None)
        ctx.given, ctx.d_sae = given, acts.d_sae
        entries = (acts.offsets, acts.indices, acts.values, acts.gate)
        ctx.save_for_backward(x, W_enc, threshold, W_dec, *entries, *view)
        ctx.set_materialize_grads(False)
        values, gate = acts.values.clone(), acts.gate.clone()
        if not given.window:
            ctx.mark_non_differentiable(gate)
        if W_dec is None:
            return x.new_empty(0, x.shape[0], 0), values, gate
        return _prefixes(acts, W_dec, b_dec, given), values, gate

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, d_recons: Tensor | None, d_values: Tensor | None, d_gate: Tensor | None
    ) -> tuple[Any, ...]:
        x, W_enc, threshold, W_dec, *entries = ctx.saved_tensors
        given: Given = ctx.given
        needs = ctx.needs_input_grad[2:]
        trained = needs[1] and needs[4] and not (given.encoder.to_input and given.window)
        tensors = (x, W_enc, threshold, W_dec)
        if W_dec is not None and (trained or len(given.ends) > 1):
            if d_recons is None:
                none = entries[2].new_zeros(())
                d_recons = none.expand(len(given.ends), x.shape[0], W_dec.shape[1])
            found = _merged(given, tensors, (widen(d_recons), d_values, d_gate), entries, needs[0])
        else:
            d_recon = None if d_recons is None or W_dec is None else widen(d_recons[0])
            found = _apart(ctx, tensors, (d_recon, d_values, d_gate), entries, needs)
        if given.centred and needs[5]:
            moved = (W_enc @ found[2].to(W_enc.dtype)).to(found[2].dtype)
            found[5] = -moved if found[5] is None else found[5] - moved
        return (None, None, *(g if need else None for g, need in zip(found, needs, strict=True)))


def _merged(
    given: Given,
    tensors: tuple[Any, ...],
    incoming: tuple[Tensor, Tensor | None, Tensor | None],
    entries: Sequence[Tensor],
    need_x: bool,
) -> list[Any]:
    """All gradients in one pass over the entries, latent by latent."""
    x, W_enc, threshold, W_dec = tensors
    window = (threshold, given.encoder.bandwidth) if given.window else (None, 0.0)
    d_recons, d_values, d_gate = incoming
    serve = ops.overload("sae_backward", x, W_enc, W_dec)
    d_x, d_W_enc, d_b_enc, d_threshold, d_W_dec, _ = serve(
        *(x, W_enc, *window, W_dec, d_recons, list(given.ends)),
        *(*entries[:4], d_values, d_gate, *entries[4:], need_x),
    )
    return [d_x, d_W_enc, d_b_enc, d_threshold, d_W_dec, d_recons.sum((0, 1))]


def _apart(
    ctx: Any,
    tensors: tuple[Any, ...],
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    entries: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Any]:
    """Decoder's gradients, then the encoder's, the window's share of `d_pre` between the two."""
    x, W_enc, threshold, W_dec = tensors
    given: Given = ctx.given
    d_recon, d_values, d_gate = incoming
    offsets, indices, values, gate, *view = entries
    d_W_dec = d_b_dec = d_threshold = None
    if d_recon is not None and W_dec is not None:
        dot, d_W_dec, d_b_dec = ops.overload("decode_backward", W_dec, d_recon)(
            *(d_recon, offsets, indices, values, W_dec, *view, True, needs[4], needs[5])
        )
        d_values = dot if d_values is None else dot + d_values
    d_values = torch.zeros_like(values) if d_values is None else d_values
    d_pre = d_values * gate
    if given.window and threshold is not None:
        latents = indices.long()
        limits = threshold[latents]
        near = (gate == 0) | (values < limits + given.encoder.bandwidth / 2)
        step = limits * d_values if d_gate is None else limits * d_values + d_gate
        step = torch.where(near, step / given.encoder.bandwidth, 0.0)
        d_threshold = threshold.new_zeros(ctx.d_sae).index_add(0, latents, -step)
        d_pre = d_pre + step if given.encoder.to_input else d_pre
    d_x, d_W_enc, d_b_enc, _ = ops.overload("encode_backward", x, W_enc)(
        *(d_pre, None, x, W_enc, None, 0.0, offsets, indices, values, torch.ones_like(gate)),
        *(*view, *needs[:2], needs[2] or given.centred, False),
    )
    return [d_x, d_W_enc, d_b_enc, d_threshold, d_W_dec, d_b_dec]


def _parts(acts: SparseActs, ends: Sequence[int]) -> list[tuple[int, int, SparseActs]]:
    """The entries of each stretch of latents between two ends."""
    if len(ends) == 1:
        return [(0, ends[0], acts)]
    return [(a, b, acts.latent_range(a, b)) for a, b in zip((0, *ends[:-1]), ends, strict=True)]


def _prefixes(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None, given: Given) -> Tensor:
    """`[G, n, d_out]`: each reconstruction adds its stretch of latents to the one before."""
    found: list[Tensor] = []
    flat = SparseActs(*(acts.offsets, acts.indices, acts.values, acts.gate), (acts.n, acts.d_sae))
    dtype, nested = given.dtype, len(given.ends) > 1
    wide = torch.promote_types(dtype, torch.float32) if nested else dtype
    with torch.autocast(W_dec.device.type, enabled=False):
        for start, end, part in _parts(flat, given.ends):
            bias = None if found else b_dec
            recon = sparse_decode(part, W_dec[start:end], bias, dtype=wide)
            found.append(recon if not found else found[-1] + recon)
    return torch.stack(found).to(dtype) if nested else found[0][None]
