"""Modules of several layers made of others: of single layers, and the JumpReLU of a BatchTopK."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..activations import BatchTopK, JumpReLU
from ..arguments import check_number
from ..hook_points import collapse

HOOKS = ("hf_hook_point_in", "hf_hook_point_out")


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


@torch.no_grad()
def assembled(kind: Any, dictionaries: Any) -> Any:
    """`kind.from_layers(dictionaries)`."""
    parts = _checked(f"{kind.__name__}.from_layers", kind, dictionaries)
    first, L = parts[0], len(parts)
    # as training folds the scales of its layers: one bandwidth, their geometric mean
    bandwidth = math.prod(part.activation.bandwidth ** (1 / L) for part in parts)
    affine = getattr(first, "W_skip", None) is not None
    sizes = L, first.d_in, first.d_sae, JumpReLU(bandwidth)
    made = empty(kind, *sizes, affine=affine, like=first.W_enc)
    for at, part in enumerate(parts):
        for name in ("W_enc", "b_enc", "threshold", "b_dec", *(("W_skip",) if affine else ())):
            getattr(made, name)[at].copy_(getattr(part, name))
        made.W_dec[at].zero_()
        made.decoder(at)[:, at - made.outputs(at).start].copy_(part.W_dec)
    made.metadata = _metadata([part.metadata for part in parts])
    return made


def _checked(op: str, kind: Any, dictionaries: Any) -> list[Any]:
    """`dictionaries`, if they are layers of one module of the kind."""
    if not isinstance(dictionaries, Sequence):
        raise TypeError(f"{op}: dictionaries must be a sequence, got {type(dictionaries).__name__}")
    if not dictionaries:
        raise ValueError(f"{op}: dictionaries must not be empty")
    wanted: dict[str, Any] = {}
    for at, part in enumerate(dictionaries):
        named = f"{op}: dictionaries[{at}]"
        if type(part) is not kind.single:
            found = type(part).__name__
            raise TypeError(f"{named} must be of class {kind.single.__name__}, got {found}")
        if not (isinstance(part.activation, JumpReLU) and part.semantics.plain_forward):
            raise ValueError(
                f"{named} must be a JumpReLU of Gemma Scope's semantics, got {part.activation} "
                f"with {part.semantics}: pass its to_jumprelu()"
            )
        sizes = {name: getattr(part, name) for name in ("d_in", "d_out", "d_sae")}
        sizes |= {"dtype": part.W_enc.dtype, "device": part.W_enc.device}
        sizes["affine"] = getattr(part, "W_skip", None) is not None
        wanted = wanted or sizes | {"d_out": part.d_in}
        for name, value in sizes.items():
            if value != wanted[name]:
                raise ValueError(f"{named} must have {name}={wanted[name]}, got {value}")
    return list(dictionaries)


def _metadata(of_layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the whole: the sum of the l0, the model that all name, hook points in braces."""

    def of(name: str) -> list[Any]:
        return [metadata.get(name) for metadata in of_layers]

    found: dict[str, Any] = {}
    if all(isinstance(l0, (int, float)) for l0 in of("l0")):
        found["l0"] = sum(of("l0"))
    model = of("model_name")
    found["model_name"] = model[0] if model == model[:1] * len(model) else None
    for name in HOOKS:
        if all(isinstance(point, str) for point in of(name)):
            found[name] = collapse(of(name))
    return {name: value for name, value in found.items() if value is not None}


def empty(kind: Any, *sizes: Any, affine: bool, like: torch.Tensor, **options: Any) -> Any:
    """A module without values yet, on the device and in the dtype of `like`: nothing is drawn."""
    if affine:
        options["affine"] = True
    return kind(*sizes, device="meta", dtype=like.dtype, **options).to_empty(device=like.device)
