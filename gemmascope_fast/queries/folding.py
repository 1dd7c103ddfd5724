"""`fold_decoder_norm`: decoder rows of unit norm, their norms moved into the encoder."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..activations import JumpReLU
from ..effective import TINY, decoder_norms
from ..modules import SAE
from ..multilayer.base import MultiLayer
from .dictionary import Dictionary, dictionary
from .rows import row_blocks

Folded = TypeVar("Folded", bound=SAE | MultiLayer)


@torch.no_grad()
def fold_decoder_norm(module: Folded) -> Folded:
    """Give every decoder row unit norm, in place, so that the reconstruction stays the same.

        r_j = |W_dec[j]|:   W_dec[j] /= r_j,   W_enc[:, j], b_enc[j], theta[j] *= r_j

    Activations become `r_j` times what they were: their size is then their share of the
    reconstruction, as tools that compare latents expect. In a module of several layers r_j is the
    norm over all outputs. The same up to the rounding of the weights' dtype. Rows of a norm below
    1e-8 stay as they are, with their encoder. What is not the same is training: the
    straight-through bandwidth keeps its number and is now in units of the new activations (set
    `module.activation` to change it), and an optimizer's moments are those of the old weights. A
    frozen module is unfrozen.

    Args:
        module: any of the four kinds; `copy.deepcopy` it first to keep it.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is none of them.
        ValueError: the activation is a TopK or a BatchTopK whose semantics do not rescale, which
            would select other latents afterwards; or the norm of a row is not finite. Nothing has
            changed then.
    """
    op = "fold_decoder_norm"
    layers = list(range(module.n_layers)) if isinstance(module, MultiLayer) else [None]
    found = [dictionary(op, module, layer) for layer in layers]
    norms = [_factors(op, weights) for weights in found]
    module.unfreeze()
    for weights, r in zip(found, norms, strict=True):
        _fold(weights, r)
    return module


def _factors(op: str, weights: Dictionary) -> Tensor:
    """`[d_sae]` numbers that the decoder's rows are divided by."""
    if not isinstance(weights.activation, JumpReLU) and not weights.rescaled:
        raise ValueError(
            f"{op}: {weights.activation} selects by size, so that folding changes what it selects; "
            "needed: a JumpReLU (a BatchTopK with a running threshold has to_jumprelu) or "
            "semantics with rescale=True"
        )
    blocks = row_blocks(weights.W_dec)
    norms = torch.cat([decoder_norms(weights.W_dec[block]) for block in blocks])
    bad = (~norms.isfinite()).nonzero()
    if bad.numel():
        raise ValueError(f"{op}: the norm of decoder row {int(bad[0])} is not finite")
    return norms.masked_fill(norms <= TINY, 1.0)


def _fold(weights: Dictionary, norms: Tensor) -> None:
    rows = weights.W_enc.t()
    for block in row_blocks(weights.W_dec):
        weights.W_dec[block].div_(norms[block, None])
        rows[block].mul_(norms[block, None])
    weights.b_enc.mul_(norms)
    if weights.threshold is not None:
        if weights.semantics.threshold == "direct":
            weights.threshold.mul_(norms)
        else:
            weights.threshold.add_(norms.log())
