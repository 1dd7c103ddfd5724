"""What this backend reads of a circuit-tracer transcoder, and when it leaves the work to the host.

A transcoder is served when its weights, biases and threshold are of one dtype, float32 or bfloat16,
its activation function is a ReLU or the host's own JumpReLU or TopK without hooks, and every method
that takes part in the call is the host's, looked up on the instance and then on its class. Weights
are read through the host: the encoder as often as it reads it, of a lazy decoder the rows of active
latents, each once. Imports `circuit_tracer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from circuit_tracer.transcoder import activation_functions
from circuit_tracer.transcoder import cross_layer_transcoder as cross
from circuit_tracer.transcoder import single_layer_transcoder as single
from torch import Tensor, nn

from .. import ops
from ..training.planning import CROSSOVER
from .circuit_tracer_ops import Gate, compact

Single, Set = single.SingleLayerTranscoder, single.TranscoderSet
Cross = cross.CrossLayerTranscoder

NEEDED = ("jumprelu_encode", "topk_encode", "decode")
STOCK = "__circuit_tracer__"
"""Attribute of our methods: the method of circuit-tracer that one replaces."""
ORIGINAL = {
    (kind, name): getattr(found, STOCK, found)
    for kind in (Single, Cross)
    for name, found in vars(kind).items()
    if callable(found)
}


def replaced(stock: Callable[..., Any], serve: Callable[..., Any]) -> Callable[..., Any]:
    """The method `serve`, which passes a call on to `stock` by returning None."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = serve(self, *args, **kwargs)
        return stock(self, *args, **kwargs) if found is None else found

    setattr(method, STOCK, getattr(stock, STOCK, stock))
    return method


def own(module: Any, *names: str) -> bool:
    """Whether these methods of a module are circuit-tracer's, or ours in their place."""
    kind = Single if isinstance(module, Single) else Cross
    for name in names:
        found = getattr(module, name)
        found = getattr(found, "__func__", found)
        if getattr(found, STOCK, found) is not ORIGINAL[kind, name]:
            return False
    return True


def plain(x: Any, dtype: torch.dtype) -> bool:
    """Whether the ops have kernels for a tensor of this dtype, and nothing casts it on the way."""
    if not isinstance(x, Tensor) or x.dtype != dtype or x.device.type not in CROSSOVER:
        return False
    if dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled(x.device.type):
        return False
    serving = (ops.implementation(name, x.device.type) for name in NEEDED)
    return all(name in ("native", "triton") for name in serving)


def gate_of(module: Any, layer: int | None = None, *, straight_through: bool = True) -> Gate | None:
    """The activation function, of `layer` where there are several; None for an unknown one.

    Args:
        module: a transcoder.
        layer: of a cross-layer transcoder.
        straight_through: whether the host gives the threshold a gradient.
    """
    chosen: Any = module.activation_function
    d_sae: int = module.d_transcoder
    if chosen in (F.relu, torch.relu):
        return Gate(torch.zeros(d_sae, dtype=module.dtype, device=module.device))
    if not _unhooked_module(chosen):
        return None
    if type(chosen) is getattr(activation_functions, "TopK", None):  # there since 0.5
        return Gate(module.b_enc, k=chosen.k) if 0 < chosen.k <= d_sae else None
    if type(chosen) is not activation_functions.JumpReLU or chosen.threshold.dtype != module.dtype:
        return None
    theta = chosen.threshold if layer is None else chosen.threshold[layer, 0]
    if not (straight_through and torch.is_grad_enabled() and theta.requires_grad):
        return Gate(theta.detach().expand(d_sae))
    return Gate(theta, chosen.bandwidth) if theta.dim() == 1 and chosen.bandwidth > 0 else None


def _unhooked_module(chosen: Any) -> bool:
    if not isinstance(chosen, nn.Module):
        return False
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(chosen, table) for table in tables)


def decodes(module: Any) -> bool:
    """Whether decoder rows are as the module stores them."""
    if not own(module, "_get_decoder_vectors") or not plain(module.b_dec, module.dtype):
        return False
    if module.lazy_decoder:
        return True
    first = module.W_dec if isinstance(module, Single) else module.W_dec[0]
    return bool(first.dtype == module.dtype)


def decoder_rows(module: Any, latents: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
    """`(rows, place)`: decoder rows, and where that of each latent is among them.

    All rows of a decoder in memory, of a lazy one those of the latents: [r, d_model], of a
    cross-layer transcoder [r, outputs, d_model].
    """
    if not module.lazy_decoder:
        return module.W_dec if layer is None else module.W_dec[layer], latents
    distinct, place = compact(latents)
    which = (distinct.cpu(),) if layer is None else (layer, distinct.cpu())
    return module._get_decoder_vectors(*which), place


def scaled(rows: Tensor, place: Tensor, values: Tensor, out: Tensor | None = None) -> Tensor:
    """`values[e] * rows[place[e]]`, without a second copy where nothing is differentiated."""
    scale = values.view(-1, *[1] * (rows.dim() - 1))
    if torch.is_grad_enabled() and (rows.requires_grad or values.requires_grad):
        return rows.index_select(0, place) * scale
    return torch.index_select(rows.detach(), 0, place, out=out).mul_(scale.detach())


def coalesced(indices: list[Tensor], values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The entries, in order, as the host's sparse tensor."""
    return torch.sparse_coo_tensor(
        torch.stack(indices), values, shape, is_coalesced=True, check_invariants=False
    )


def lacks_input(module: Any, input_acts: Tensor | None) -> bool:
    """Whether a skip connection has nothing to read: the host says so."""
    return module.W_skip is not None and input_acts is None
