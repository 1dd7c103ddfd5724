"""Arguments of a loss: checked, flattened, with the module's semantics applied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import check_count
from ..checks import check_device, check_encoder, check_float, check_vector
from ..effective import effective, weights_of
from ..losses.sparsity import check_totals
from ..modules import SAE, Activation, JumpReLU, TopK, Transcoder
from ..operands import autocast, widen
from ..packing import unpacked
from .evaluation import Inputs
from .losses import LossTerm, Term
from .losses_batch import BatchTerm
from .losses_weights import WeightTerm
from .whole import WHOLE, Whole


def check_call(op: str, module: SAE, x: Tensor, target: Tensor | None, d_sae: int) -> Tensor:
    """Raise on arguments that do not fit; return the target."""
    check_encoder(op, x, module.W_enc, module.b_enc)
    if x.is_meta:
        raise ValueError(f"{op}: x must have values, and is on the meta device")
    _check_activation(op, module, d_sae)
    if target is None:
        if isinstance(module, Transcoder) or module.d_in != module.d_out:
            raise ValueError(
                f"{op}: target is needed, the activation that this {type(module).__name__} maps x "
                f"to: pass a tensor of shape {(*x.shape[:-1], module.d_out)}"
            )
        return x
    check_float(op, "target", target)
    expected = (*x.shape[:-1], module.d_out)
    if tuple(target.shape) != expected:
        raise ValueError(f"{op}: target must have shape {expected}, got {tuple(target.shape)}")
    check_device(op, "target", target, module.W_enc)
    return target


def _check_activation(op: str, module: SAE, d_sae: int) -> None:
    activation = module.activation
    if isinstance(activation, TopK):
        check_count(op, "k", activation.k, d_sae, "d_sae")
    if not isinstance(activation, JumpReLU) or module.threshold is None:
        return
    check_vector(op, "threshold", module.threshold, module.d_sae, module.W_enc)
    if activation.bandwidth == 0 and torch.is_grad_enabled() and module.threshold.requires_grad:
        raise ValueError(
            f"{op}: threshold requires grad but the activation's bandwidth is 0: use "
            "JumpReLU(bandwidth=...) > 0, or threshold.requires_grad_(False)"
        )


def check_fit(op: str, module: SAE, terms: Sequence[LossTerm], d_sae: int) -> None:
    """Prefixes, counts and latents that the terms name exist among the `d_sae` of the whole."""
    for term in terms:
        if isinstance(term, Term) and any(end > d_sae for end in term.prefixes):
            raise ValueError(
                f"{op}: {term.name} has a prefix of {max(term.prefixes)} latents, and d_sae={d_sae}"
            )
        if isinstance(term, BatchTerm):
            check_totals(f"{op}: {term.name}", term.counts, term.tokens, d_sae)
        if isinstance(term, WeightTerm):
            term.latents(op, d_sae, module.W_enc.device)


def tensors_of(module: SAE, x: Tensor, target: Tensor) -> tuple[dict[str, Tensor], Activation]:
    """Everything the loss depends on, the module's semantics applied, and what selects.

    x and target are flat, weights as autocast wants them.
    """
    n = math.prod(x.shape[:-1])
    given = effective(module, x)
    W_dec: Tensor = module.W_dec
    if given.norms is not None:
        W_dec = W_dec / given.norms[:, None]
    flat, W_enc, W_dec = autocast(given.x.reshape(n, module.d_in), given.W_enc, W_dec)
    tensors = {"x": flat, "target": target.reshape(n, module.d_out), "W_enc": W_enc, "W_dec": W_dec}
    tensors |= {"b_enc": widen(given.b_enc), "b_dec": widen(module.b_dec)}
    if given.threshold is not None:
        tensors["threshold"] = widen(given.threshold)
    skip = getattr(module, "W_skip", None)
    if skip is not None:
        tensors["W_skip"] = skip
    return tensors, given.activation


def inputs_of(
    module: SAE,
    tensors: dict[str, Tensor],
    activation: Activation,
    needs: frozenset[str],
    whole: Whole = WHOLE,
) -> Inputs:
    """Inputs of an evaluation; sums are float64 where x or a weight is."""
    acc = torch.float32
    if any(t.dtype == torch.float64 for name, t in tensors.items() if name != "target"):
        acc = torch.float64
    detached = {name: t.detach() for name, t in tensors.items()}
    tokens = whole.n(tensors["x"].shape[0])
    codes = unpacked(weights_of(module, tensors["W_enc"]))[1]
    held = (codes, None if codes is None else module.screened)
    return Inputs(detached, activation, needs, acc, module.semantics, whole, tokens, *held)
