"""Modules of several layers made of others: the JumpReLU that a BatchTopK evaluates as."""

from __future__ import annotations

from typing import Any

import torch

from ..activations import BatchTopK, JumpReLU
from ..arguments import check_number


@torch.no_grad()
def folded(module: Any, bandwidth: float) -> Any:
    """A JumpReLU with the weights that evaluation mode amounts to."""
    op = "to_jumprelu"
    bandwidth = check_number(op, "bandwidth", bandwidth)
    running = module.ema_threshold if isinstance(module.activation, BatchTopK) else None
    if running is None and not isinstance(module.activation, JumpReLU):
        raise ValueError(
            f"{op}: {module.activation} has no thresholds: only a JumpReLU, or a BatchTopK with an "
            "ema_decay, becomes a JumpReLU"
        )
    if running is not None and bool((running < 0).any()):
        raise ValueError(f"{op}: a running threshold has not seen a batch yet: train first")
    plain = empty(
        type(module),
        *(module.n_layers, module.d_model, module.d_sae, JumpReLU(bandwidth)),
        packed=[module.outputs(at).start == at for at in range(module.n_layers)],
        affine=getattr(module, "W_skip", None) is not None,
        like=module.W_enc[0],
    )
    for name, p in module.named_parameters():
        plain.get_parameter(name).copy_(p)
    if running is not None:
        for threshold, limit in zip(plain.threshold, running, strict=True):
            threshold.fill_(limit)
    plain.metadata = dict(module.metadata)
    return plain.train(module.training)


def empty(kind: Any, *sizes: Any, affine: bool, like: torch.Tensor, **options: Any) -> Any:
    """A module without values yet, on the device and in the dtype of `like`: nothing is drawn."""
    if affine:
        options["affine"] = True
    return kind(*sizes, device="meta", dtype=like.dtype, **options).to_empty(device=like.device)
