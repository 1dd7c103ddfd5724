"""`steering_vector`: the direction that a set of activations adds to the reconstruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_vector
from ..entries import latent_ids
from .dictionary import Module, dictionary


def steering_vector(
    module: Module,
    latents: Any,
    strength: float | Tensor = 1.0,
    *,
    max_acts: Tensor | None = None,
    layer: int | None = None,
) -> Tensor:
    """What latents of given activations add to the reconstruction, without its bias.

    `v = sum over m of strength[m] * max_acts[latents[m]] * decoder_rows(latents)[m]`. Adding v at
    the place where the dictionary's output belongs steers by so much whatever the latents are
    there; to replace their activations, edit them (`acts.set`).

    Args:
        module: an `SAE` or a `Transcoder`; with `layer` a `Crosscoder` or a `CrossLayerTranscoder`.
        latents: one latent, m distinct ones, or a `[d_sae]` mask.
        strength: a number, or `[m]`: activations, or with `max_acts` multiples of the largest.
        max_acts: `[d_sae]` largest activations, as from `acts.max_over_tokens()`.
        layer: of the latents.

    Returns:
        `[d_out]` in the dtype of W_dec, summed in float32, differentiable in `strength` and W_dec;
        with `layer` `[L, d_model]`, 0 for the layers that the latents do not write to.

    Raises:
        TypeError: `module` is none of them, or `latents` are neither integers nor a mask.
        ValueError: a latent is out of range or named twice, a shape does not fit, or `layer` is
            missing, out of range, or given for a single-layer module.
    """
    op = "steering_vector"
    weights = dictionary(op, module, layer)
    ids = latent_ids(op, latents, weights.d_sae, weights.device)
    rows = weights.decoder_rows(ids)
    wide = torch.promote_types(rows.dtype, torch.float32)
    given = torch.as_tensor(strength, dtype=wide, device=rows.device)
    if given.shape not in ((), ids.shape):
        raise ValueError(
            f"{op}: strength must be a number or have shape [m={ids.shape[0]}], got "
            f"{tuple(given.shape)}"
        )
    scale = given.expand(ids.shape)
    if max_acts is not None:
        check_vector(op, "max_acts", max_acts, weights.d_sae, rows)
        scale = scale * max_acts[ids]
    flat = rows.reshape(rows.shape[0], -1).to(wide)
    vector = (scale.to(wide) @ flat).to(rows.dtype).reshape(weights.width)
    if layer is None:
        return vector
    before = len(weights.b_dec) - weights.width[0]
    return torch.nn.functional.pad(vector, (0, 0, before, 0))
