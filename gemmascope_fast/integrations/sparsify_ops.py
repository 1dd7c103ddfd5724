"""What sparsify's encoder and decoder compute, from and to its own layouts.

    values, latents [n, k] = the k largest of relu(x weight^T + bias)     weight [d_sae, d_in]
    recon = sum_e values[i, e] W_dec[latents[i, e]]                       W_dec [d_sae, d_out]

The gradients are those of the weights as they are, in their dtype, also where autocast rounds them
for the products: that is how sparsify's own backward pass has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional, ops
from ..arguments import check_count
from ..checks import check_encoder
from ..operands import autocast
from ..sparse import SparseActs
from .sparsify_pre_acts import PreActs

STORED = "_gemmascope_fast_entries"
"""Attribute of a tensor of latents: `(its version, its entries)`, which decoding uses again."""

BLOCK = 512
"""Latents projected at a time: two blocks of rows stay in the cache."""


def encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(values [*batch, k], latents [*batch, k] int64, pre [*batch, d_sae])`, pre when it is used.

    Args:
        x: `[*batch, d_in]` floating point.
        weight: `[d_sae, d_in]`.
        bias: `[d_sae]`, or None.
        k: latents per token, in `[0, d_sae]`.
        strict: selected zeros pass a gradient to the encoder, `pre` passes none.

    Raises:
        TypeError: a tensor is not floating point, or k is not an int.
        ValueError: shapes or devices disagree, or k is out of range.
    """
    op = "fused_encoder"
    b_enc = weight.new_zeros(weight.shape[0]) if bias is None else bias
    check_encoder(op, x, weight.t(), b_enc)
    check_count(op, "k", k, weight.shape[0], "d_sae")
    values, latents = top(x, weight, b_enc, k, strict=strict)
    if torch.compiler.is_compiling():  # dead code there, unless it is used
        pre = torch.nn.functional.linear(x, weight, b_enc).relu()
        return values, latents, pre.detach() if strict else pre
    return values, latents, PreActs(x, weight, b_enc, strict, top)


def decode(latents: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """`[*batch, d_out]` in the dtype of W_dec, whatever autocast says, as `embedding_bag` has it.

    Args:
        latents: `[*batch, k]` integers in `[0, d_sae)`.
        values: `[*batch, k]` floating point.
        W_dec: `[d_sae, d_out]`.

    Raises:
        ValueError: the shapes differ.
        RuntimeError: a latent is out of range (CPU).
    """
    if latents.shape != values.shape or latents.dim() == 0:
        raise ValueError(
            "decoder_impl: top_indices and top_acts must have the same shape [*batch, k], got "
            f"{tuple(latents.shape)} and {tuple(values.shape)}"
        )
    entries = _stored(latents, W_dec.shape[0])
    if torch.is_grad_enabled() and W_dec.requires_grad:
        entries.by_feature()  # kept for the encoder's backward pass
    acts = entries._replace(values=values.reshape(-1))
    with torch.autocast(W_dec.device.type, enabled=False):
        return functional.decode(acts, W_dec).reshape(*latents.shape[:-1], W_dec.shape[1])


@torch.no_grad()
def remove_parallel_(gradient: Tensor, W_dec: Tensor) -> None:
    """`gradient[j] -= (gradient[j] . W_dec[j]) W_dec[j]` in place, block by block."""
    for begin in range(0, gradient.shape[0], BLOCK):
        part, rows = gradient[begin : begin + BLOCK], W_dec[begin : begin + BLOCK]
        part.addcmul_(torch.linalg.vecdot(part, rows)[:, None], rows, value=-1)


def top(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, *, strict: bool, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest activations, of the latents `among [m]` or of all, in the host's order."""
    values, latents, entries = _Top.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, k, strict, among
    )
    shape = (*x.shape[:-1], k)
    values, latents = values.reshape(shape), latents.reshape(shape)
    if not torch.compiler.is_compiling():
        setattr(latents, STORED, (latents._version, entries))
    return values, latents


class _Top(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        k: int,
        strict: bool,
        among: Tensor | None,
    ) -> tuple[Tensor, Tensor, SparseActs]:
        rows, b_enc = (weight, bias) if among is None else (weight[among], bias[among])
        acts = functional.topk_encode(x.detach(), rows.detach().t(), b_enc.detach(), k)
        values, latents = acts.values.view(acts.n, k), acts.indices.view(acts.n, k).long()
        order = _order(values)
        values, latents = values.gather(1, order), latents.gather(1, order)
        latents = latents if among is None else among[latents]
        entries = _entries(latents, weight.shape[0])
        gate = torch.ones_like(values) if strict else (values > 0).to(values.dtype)
        ctx.entries = entries._replace(values=values.reshape(-1), gate=gate.reshape(-1))
        ctx.shared = entries
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        ctx.mark_non_differentiable(latents)
        return values.to(autocast(weight[:0])[0].dtype), latents, entries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_values: Tensor, *others: Any) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        acts, needs = ctx.entries, ctx.needs_input_grad[:3]
        by_feature = _by_feature(ctx.shared) if needs[1] or needs[2] else (None, None)
        flat = x.reshape(-1, x.shape[-1])
        entries = (acts.offsets, acts.indices, acts.values, acts.gate, *by_feature)
        given = d_values.reshape(-1).to(acts.values.dtype)
        serve = ops.overload("encode_backward", given, flat, weight, acts.values)
        d_x, d_W, d_b, _ = serve(given, None, flat, weight.t(), None, 0.0, *entries, *needs, False)
        found = (d_x.reshape(x.shape) if needs[0] else None, d_W.t(), d_b.to(ctx.bias_dtype))
        return (*(t if need else None for t, need in zip(found, needs, strict=True)), *[None] * 3)


def _by_feature(entries: SparseActs) -> tuple[Tensor, Tensor]:
    """`entries.by_feature()`; a compiler's trace of a backward pass changes no objects."""
    if not torch.compiler.is_compiling():
        return entries.by_feature()
    op = ops.overload("by_feature")
    return op(entries.offsets, entries.indices, entries.d_sae)  # type: ignore[no-any-return]


def _order(values: Tensor) -> Tensor:
    """Positions `[n, k]` in which `torch.topk(sorted=False)` returns a row given by latent."""
    if values.device.type == "cpu":
        return values.argsort(dim=1, descending=True, stable=True)
    smallest = values == values.amin(1, keepdim=True) if values.shape[1] else values > 0
    return smallest.to(torch.uint8).argsort(dim=1, stable=True)


def _stored(latents: Tensor, d_sae: int) -> SparseActs:
    """The entries at `latents`: those of the encoder that chose them, or new ones."""
    version, entries = getattr(latents, STORED, (None, None))
    if entries is not None and (version, entries.d_sae) == (latents._version, d_sae):
        return entries  # type: ignore[no-any-return]
    return _entries(latents, d_sae)


def _entries(latents: Tensor, d_sae: int) -> SparseActs:
    """Entries of value 1 at `latents [*batch, k]`, row by row in that order."""
    k, flat = latents.shape[-1], latents.reshape(-1)
    n = latents.shape[:-1].numel()
    offsets = torch.arange(n + 1, device=latents.device) * k
    ones = torch.ones(flat.shape[0], device=latents.device)
    return SparseActs(offsets, flat.to(torch.int32), ones, ones, (*latents.shape[:-1], d_sae))
