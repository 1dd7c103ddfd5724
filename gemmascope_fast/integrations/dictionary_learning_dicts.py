"""dictionary_learning's dictionaries as subclasses that encode and decode by stored entries.

    acts = select((x - b_dec) @ W_enc + b_enc)        recon = acts @ W_dec + b_dec

Weights are views of the library's own parameters: `encoder.weight [d_sae, d_in]` and
`decoder.weight [d_in, d_sae]`, or `W_enc [d_in, d_sae]` and `W_dec [d_sae, d_in]`.
Imports `dictionary_learning`.
"""

from __future__ import annotations

import importlib
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..functional import batchtopk_encode, decode, jumprelu_encode, topk_encode
from ..sparse import SparseActs

host: Any = importlib.import_module("dictionary_learning.dictionary")
top_k: Any = importlib.import_module("dictionary_learning.trainers.top_k")
batch_top_k: Any = importlib.import_module("dictionary_learning.trainers.batch_top_k")
nested: Any = importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
jumprelu: Any = importlib.import_module("dictionary_learning.trainers.jumprelu")

STOCK_ENCODE = {
    cls.__name__: cls.encode
    for cls in (
        *(top_k.AutoEncoderTopK, batch_top_k.BatchTopKSAE),
        *(nested.MatryoshkaBatchTopKSAE, host.JumpReluAutoEncoder),
    )
}
"""The library's own methods, before anything replaces them."""


def encoder(ae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(x as the encoder sees it, W_enc, b_enc)`, the weights as views of the parameters."""
    centred = getattr(ae, "apply_b_dec_to_input", True)
    x = x - ae.b_dec if centred else x
    if isinstance(getattr(ae, "encoder", None), nn.Linear):
        return x, ae.encoder.weight.t(), ae.encoder.bias
    return x, ae.W_enc, ae.b_enc


def decoder(ae: Any) -> Tensor:
    """`[d_sae, d_in]`, a view of the parameter."""
    linear = getattr(ae, "decoder", None)
    return linear.weight.t() if isinstance(linear, nn.Linear) else ae.W_dec


@torch.no_grad()
def feature_major_(obj: Any) -> bool:
    """Lay a dictionary's `decoder.weight` out latent by latent; False where it is already so."""
    linear = getattr(getattr(obj, "ae", obj), "decoder", None)
    if not isinstance(linear, nn.Linear) or linear.weight.t().is_contiguous():
        return False
    linear.weight.data = linear.weight.data.t().contiguous().t()
    return True


@torch.no_grad()
def row_major_(obj: Any) -> None:
    """Lay `decoder.weight` out as the library does."""
    weight = getattr(obj, "ae", obj).decoder.weight
    weight.data = weight.data.contiguous()


def above_threshold(ae: Any, x: Tensor) -> SparseActs:
    """Entries above the dictionary's running threshold (a scalar), or its thresholds.

    The library rectifies as well: a negative threshold is 0.
    """
    x, W_enc, b_enc = encoder(ae, x)
    limit = ae.threshold.detach().float().clamp_min(0).expand(W_enc.shape[1])
    return jumprelu_encode(x, W_enc, b_enc, limit)


def active_groups(ae: Any, acts: SparseActs) -> SparseActs:
    """Without the latents of groups that are switched off."""
    if not hasattr(ae, "group_indices") or ae.active_groups == len(ae.group_indices) - 1:
        return acts
    return acts._keep(acts.latents() < int(ae.group_indices[ae.active_groups]))


def batch_entries(ae: Any, x: Tensor) -> SparseActs:
    """The `k * n` largest positive entries of a batch `[n, d_in]`."""
    return active_groups(ae, batchtopk_encode(*encoder(ae, x), int(ae.k)))


def dense(acts: SparseActs, like: Tensor) -> Tensor:
    """`[*batch, d_sae]` in the dtype of the weights."""
    return acts.to_dense().to(like.dtype)


def _forward(self: Any, x: Tensor, output_features: bool = False) -> Any:
    """Reconstruction, and the dense activations where they are asked for.

    `encode` is dense, as the library's callers expect it; this is not.
    """
    acts = ENTRIES[_kind(self)](self, x)
    recon = decode(acts, decoder(self), self.b_dec)
    return (recon, dense(acts, self.b_dec)) if output_features else recon


class AutoEncoderTopK(top_k.AutoEncoderTopK):  # type: ignore[misc]
    """`AutoEncoderTopK` by entries."""

    strict_compat = False
    forward = _forward

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        feature_major_(self)

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """Dense activations; with `return_topk` the library's own method."""
        if return_topk:
            return STOCK_ENCODE["AutoEncoderTopK"](self, x, return_topk, use_threshold)
        chosen = above_threshold if use_threshold else _topk
        return dense(chosen(self, x), self.b_dec)

    @classmethod
    def from_pretrained(cls, path: Any, k: int | None = None, device: Any = None) -> Self:
        """Load a dictionary that the library saved."""
        made = top_k.AutoEncoderTopK.from_pretrained(path, k, device)
        made.__class__ = cls
        feature_major_(made)
        return made  # type: ignore[no-any-return]


class BatchTopKSAE(batch_top_k.BatchTopKSAE):  # type: ignore[misc]
    """`BatchTopKSAE` by entries."""

    strict_compat = False
    forward = _forward

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        feature_major_(self)

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """Dense activations; with `return_active` the library's own method."""
        if return_active:
            return STOCK_ENCODE["BatchTopKSAE"](self, x, return_active, use_threshold)
        return dense((above_threshold if use_threshold else batch_entries)(self, x), self.b_dec)


class MatryoshkaBatchTopKSAE(nested.MatryoshkaBatchTopKSAE):  # type: ignore[misc]
    """`MatryoshkaBatchTopKSAE` by entries."""

    strict_compat = False
    forward = _forward

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """Dense activations; with `return_active` the library's own method."""
        if return_active:
            return STOCK_ENCODE["MatryoshkaBatchTopKSAE"](self, x, return_active, use_threshold)
        return dense((_nested if use_threshold else batch_entries)(self, x), self.b_dec)


class JumpReluAutoEncoder(host.JumpReluAutoEncoder):  # type: ignore[misc]
    """`JumpReluAutoEncoder` by entries; its thresholds get gradients from a trainer only."""

    strict_compat = False
    forward = _forward

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        """Dense activations; with `output_pre_jump` the library's own method."""
        if output_pre_jump:
            return STOCK_ENCODE["JumpReluAutoEncoder"](self, x, output_pre_jump)
        return dense(above_threshold(self, x), self.b_dec)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Load a dictionary that the library saved, or one of SAELens."""
        made = host.JumpReluAutoEncoder.from_pretrained(*args, **kwargs)
        made.__class__ = cls
        return made  # type: ignore[no-any-return]


def _topk(ae: Any, x: Tensor) -> SparseActs:
    return topk_encode(*encoder(ae, x), int(ae.k))


def _nested(ae: Any, x: Tensor) -> SparseActs:
    return active_groups(ae, above_threshold(ae, x))


def _kind(ae: Any) -> str:
    """Name of the library's class that `ae` is an instance of."""
    return next(cls.__name__ for cls in type(ae).__mro__ if cls.__name__ in ENTRIES)


ENTRIES = {
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": above_threshold,
    "MatryoshkaBatchTopKSAE": _nested,
    "JumpReluAutoEncoder": above_threshold,
}
"""What `forward` decodes."""

DICTIONARIES = (
    (top_k.AutoEncoderTopK, AutoEncoderTopK),
    (batch_top_k.BatchTopKSAE, BatchTopKSAE),
    (nested.MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKSAE),
    (host.JumpReluAutoEncoder, JumpReluAutoEncoder),
)
