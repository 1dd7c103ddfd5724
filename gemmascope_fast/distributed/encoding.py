"""Encode and decode of one rank: the module's own kernels on its latents, then what they exchange.

`view` is the local module computing with the ranks' parts of the parameters. Encoding by JumpReLU
communicates nothing; a selection does what `selection.py` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..activations import Activation, BatchTopK, TopK
from ..arguments import check_count, check_number
from ..effective import deferred_of, effective, encoded, pass_zeros, unscaled
from ..functional import batchtopk_encode, topk_encode
from ..multilayer import MultiLayer, multi_decode
from ..operands import widen
from ..sparse import SparseActs
from .layout import Layout
from .selection import batch_count, batch_share, keep_batchtopk, keep_topk


def selects(module: Any) -> bool:
    """Whether the module compares latents with each other, or gates each by itself."""
    if isinstance(module.activation, BatchTopK):
        return module.training or getattr(module, "ema_threshold", None) is None
    return isinstance(module.activation, TopK)


def check_capacity(module: Any, max_nnz: int | None) -> None:
    """A fixed capacity is for entries that no other rank can push out."""
    if max_nnz is not None and selects(module):
        raise ValueError(
            f"encode: max_nnz is for a JumpReLU; {module.activation} over several ranks sizes its "
            "entries exactly: drop max_nnz"
        )


def encode(view: Any, x: Tensor, layout: Layout, max_nnz: int | None = None) -> SparseActs:
    """This rank's entries of an SAE's or a transcoder's activations."""
    if not selects(view):
        return encoded(view, x, max_nnz)
    given = effective(view, x)
    weights = given.W_enc if view.packed is None else view.packed
    (acts,), smallest = _select([(given.x, weights, given.b_enc)], given.activation, layout)
    if isinstance(given.activation, BatchTopK) and view.training:
        view.observe(smallest[0])
    if view.semantics.zero_gradient and view.packed is None:
        acts = pass_zeros(acts, (given.x, given.W_enc, given.b_enc))
    deferred = deferred_of(view)
    return acts if deferred is None else deferred.encode(x, acts)


def encode_layers(
    view: MultiLayer, x: Tensor, layout: Layout, max_nnz: int | None = None
) -> list[SparseActs]:
    """This rank's entries of every source layer; layers share the exchanges of a selection."""
    if not selects(view):
        return view.encode(x, max_nnz=max_nnz)
    encoders = [(part, view._encoder(i), view.b_enc[i]) for i, part in enumerate(x.unbind(-2))]
    found, smallest = _select(encoders, view.activation, layout)
    if view.training:
        for layer, value in enumerate(smallest):
            view.observe(layer, value)
    return found


def _select(
    encoders: list[tuple[Tensor, Any, Tensor]], kind: Activation, layout: Layout
) -> tuple[list[SparseActs], list[Tensor | None]]:
    """What the whole keeps of each source, and the smallest kept values of a BatchTopK."""
    x, _, b_enc = encoders[0]
    n, size = math.prod(x.shape[:-1]), b_enc.shape[0]
    if isinstance(kind, TopK):
        check_count("encode", "k", kind.k, layout.d_sae, "d_sae")
        candidates = [topk_encode(*encoder, min(kind.k, size)) for encoder in encoders]
        return keep_topk(candidates, kind.k, min(kind.k, max(layout.sizes())), layout), []
    assert isinstance(kind, BatchTopK)
    count = batch_count(check_number("encode", "k", kind.k), n, layout, x.device)
    share = batch_share(count, n, size)
    candidates = [batchtopk_encode(*encoder, share) for encoder in encoders]
    return keep_batchtopk(candidates, count, layout)


def decode(view: Any, acts: SparseActs, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Summand of this rank, and what is added to the sum once: bias and affine skip.

    Returns:
        `[n, d_out]` each, in the dtype of the sums.
    """
    W_dec, b_dec = view.W_dec, widen(view.b_dec)
    acc = torch.promote_types(torch.promote_types(W_dec.dtype, acts.dtype), b_dec.dtype)
    deferred = deferred_of(view)
    if deferred is not None:
        partial = deferred.decode(acts, torch.zeros_like(b_dec), acc)
    else:
        partial = functional.decode(unscaled(view, acts), W_dec, None, dtype=acc)
    whole, size = b_dec.to(acc), (acts.n, b_dec.numel())
    W_skip = getattr(view, "W_skip", None)
    if W_skip is not None:
        assert x is not None
        whole = whole + (x.to(W_skip.dtype) @ W_skip).to(acc).reshape(size)
    return partial.reshape(size), whole.expand(size)


def decode_layers(
    view: MultiLayer, acts: list[SparseActs], x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for several layers: `[n, L * d_model]` each."""
    W_dec, b_dec = list(view.W_dec), widen(view.b_dec)
    acc = torch.promote_types(torch.promote_types(W_dec[0].dtype, acts[0].dtype), b_dec.dtype)
    partial = multi_decode(acts, W_dec, torch.zeros_like(b_dec), dtype=acc)
    whole = b_dec.to(acc)
    W_skip = getattr(view, "W_skip", None)
    if W_skip is not None:
        assert x is not None
        parts = zip(x.unbind(-2), W_skip, strict=True)
        skip = torch.stack([part.to(W.dtype) @ W for part, W in parts], -2)
        whole = whole + skip.to(acc).reshape(acts[0].n, *b_dec.shape)
    size = acts[0].n, b_dec.numel()
    return partial.reshape(size), whole.expand(size[0], *b_dec.shape).reshape(size)
