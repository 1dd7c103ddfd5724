"""Sparse COO gradients of W_enc and W_dec, for optimizers that take them.

Backward runs on the touched latents alone, renumbered 0 to U - 1: the ops then write `[U, d]`
gradients, which become the values of a sparse tensor. That of W_dec has one index per row; W_enc
has its latents in the second dimension, so each element carries an index pair (20 bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import check_decoder
from ..modules import SAE, JumpReLU
from ..operands import autocast, widen
from ..sparse import SparseActs
from .deferred import check_semantics

OP = "set_grad_format"


def set_grad_format(module: SAE, grad_format: str) -> None:
    """Choose the layout of the gradients of `module.W_enc` and `module.W_dec`.

    "coo" serves `torch.optim.SparseAdam` and `SGD`, and `gsf.clip_grad_norm_`; gradients of the
    vectors stay dense, so SparseAdam gets the two matrices only. `module.loss` stays dense.

    With "coo", W_enc moves to row-major memory, where encoding is slower: torch's in-place sparse
    addition refuses a transposed parameter when it uses several threads. "dense" moves it back.

    Args:
        module: an `SAE` or `Transcoder`; a copy of it is dense again.
        grad_format: "dense", the default of every module, or "coo".

    Raises:
        TypeError: `module` is not an `SAE`.
        ValueError: `grad_format` is unknown, the module has a fused optimizer, or its semantics
            are not the default ones.
    """
    if not isinstance(module, SAE):
        raise TypeError(f"{OP}: module must be an SAE, got {type(module).__name__}")
    if grad_format not in ("dense", "coo"):
        raise ValueError(f'{OP}: grad_format must be "dense" or "coo", got {grad_format!r}')
    if module.deferred is not None and not isinstance(module.deferred, CooGradients):
        raise ValueError(f"{OP}: the module has a fused optimizer, which forms no gradients")
    if grad_format == "coo":
        check_semantics(OP, module)
    if module.deferred is not None:
        module.deferred.remove()
    W_enc = module.W_enc.data
    if grad_format == "coo":
        module.W_enc.data = W_enc.contiguous()
    elif module.deferred is not None:
        module.W_enc.data = W_enc.t().contiguous().t()
    module.deferred = CooGradients(module) if grad_format == "coo" else None


class CooGradients:
    """What makes the gradients of a module sparse, and keeps them coalesced.

    Autograd drops the mark of a coalesced gradient; without it every reader would sort again.
    """

    keep = None

    def __init__(self, module: SAE) -> None:
        self.module = module
        self.sizes: dict[str, int] = {}
        self._hooks = [
            getattr(module, name).register_post_accumulate_grad_hook(self._marker(name))
            for name in ("W_enc", "W_dec")
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module is dense again: the hooks are on these parameters."""
        return type(None), ()

    @property
    def serves(self) -> bool:
        """Whether gradients are asked for."""
        return torch.is_grad_enabled()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _marker(self, name: str) -> Callable[[Tensor], None]:
        def mark(p: Tensor) -> None:
            if p.grad is None or not p.grad.is_sparse or p.grad.is_coalesced():
                return
            if p.grad._nnz() == self.sizes.get(name):  # one backward pass, sorted as it came
                p.grad._coalesced_(True)
            else:
                p.grad = p.grad.coalesce()

        return mark

    def encode(self, x: Tensor, acts: SparseActs) -> SparseActs:
        """`acts`, just encoded from x, with a backward of sparse gradients."""
        module, activation = self.module, self.module.activation
        window = isinstance(activation, JumpReLU) and acts.gate.requires_grad
        bandwidth = activation.bandwidth if isinstance(activation, JumpReLU) and window else 0.0
        (x,) = autocast(x.reshape(-1, module.d_in))
        threshold = module.threshold if window else None
        values, gate = _Encode.apply(  # type: ignore[no-untyped-call]
            x, module.W_enc, module.b_enc, threshold, bandwidth, acts.detach(), self.sizes
        )
        return acts._replace(values=values, gate=gate if window else acts.gate.detach())

    def decode(self, acts: SparseActs, b_dec: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Reconstruction with a sparse gradient of W_dec."""
        check_decoder("decode", acts, self.module.W_dec, dtype)
        dtype = dtype or self.module.W_dec.dtype
        recon = _Decode.apply(  # type: ignore[no-untyped-call]
            acts.values, self.module.W_dec, b_dec, acts.detach(), dtype, self.sizes
        )
        return recon.reshape(*acts.shape[:-1], self.module.d_out)  # type: ignore[no-any-return]


def _touched(acts: SparseActs) -> tuple[Tensor, list[Tensor]]:
    """Latents with entries `[U]`; indices and feature offsets that count these alone."""
    feature_offsets, permutation = acts.by_feature()
    fired = feature_offsets.diff() > 0
    latents = fired.nonzero()[:, 0]
    rank = (fired.cumsum(0) - 1).to(torch.int32)
    indices = rank[acts.indices.long()] if rank.numel() else acts.indices
    starts = torch.cat([feature_offsets[:1], feature_offsets[1:][latents]])
    return latents, [indices, starts, permutation]


class _Encode(torch.autograd.Function):
    """Values and gates as they are; their backward makes a sparse gradient of W_enc."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor | None,
        bandwidth: float,
        acts: SparseActs,
        sizes: dict[str, int],
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, threshold)
        ctx.acts, ctx.bandwidth, ctx.sizes = acts, bandwidth, sizes
        return acts.values.clone(), acts.gate.clone()

    @staticmethod
    def backward(ctx: Any, d_values: Tensor | None, d_gate: Tensor | None) -> tuple[Any, ...]:
        (x, W_enc, threshold), acts = ctx.saved_tensors, ctx.acts
        if d_values is None and d_gate is None:
            return (None,) * 7
        latents, (indices, starts, permutation) = _touched(acts)
        rows = W_enc.t()[latents]
        theta = None if threshold is None else widen(threshold)[latents]
        needs = (*ctx.needs_input_grad[:3], threshold is not None and ctx.needs_input_grad[3])
        d_x, d_W, d_b, d_theta = ops.overload("encode_backward", x, W_enc, acts.values)(
            *(d_values, d_gate, x, rows.t(), theta, ctx.bandwidth, acts.offsets, indices),
            *(widen(acts.values), widen(acts.gate), starts, permutation, *needs),
        )

        def spread(part: Tensor) -> Tensor:
            return part.new_zeros(W_enc.shape[1]).index_copy_(0, latents, part)

        found = [
            d_x,
            None,
            spread(d_b) if needs[2] else None,
            spread(d_theta) if needs[3] else None,
        ]
        if needs[1]:
            d_in, touched = d_W.shape
            first = torch.arange(d_in, device=x.device).repeat_interleave(touched)
            where = torch.stack([first, latents.repeat(d_in)])
            found[1] = _sparse(where, d_W.reshape(-1), W_enc)
            ctx.sizes["W_enc"] = where.shape[1]
        return (found[0] if needs[0] else None, *found[1:], None, None, None)


class _Decode(torch.autograd.Function):
    """Decoder whose gradient of W_dec has one sparse index per touched row."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        acts: SparseActs,
        dtype: torch.dtype,
        sizes: dict[str, int],
    ) -> Tensor:
        (weights,), bias = autocast(W_dec), widen(b_dec)
        ctx.save_for_backward(values, W_dec)
        ctx.acts, ctx.sizes = acts, sizes
        op = ops.overload("decode", values, weights, bias)
        entries = (acts.offsets, acts.indices, widen(values), weights, bias)
        recon: Tensor = op(*entries, *acts.by_feature(), dtype)
        return recon

    @staticmethod
    def backward(ctx: Any, d_recon: Tensor) -> tuple[Any, ...]:
        (values, W_dec), acts = ctx.saved_tensors, ctx.acts
        latents, (indices, starts, permutation) = _touched(acts)
        needs = ctx.needs_input_grad[:3]
        d_values, d_W, d_b = ops.overload("decode_backward", d_recon, values, W_dec)(
            *(d_recon, acts.offsets, indices, widen(values), W_dec[latents], starts, permutation),
            *needs,
        )
        d_W_dec = _sparse(latents[None], d_W, W_dec) if needs[1] else None
        ctx.sizes["W_dec"] = latents.shape[0]
        d_b_dec = d_b if needs[2] else None
        return d_values if needs[0] else None, d_W_dec, d_b_dec, None, None, None


def _sparse(where: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """Coalesced COO tensor in the shape and dtype of `like`."""
    return torch.sparse_coo_tensor(
        where, values.to(like.dtype), like.shape, is_coalesced=True, check_invariants=False
    )
