"""One rank's part of a module: a module of the same kind over some of the latents."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .layout import LATENTS


@torch.no_grad()
def cut(module: Any, latents: slice) -> Any:
    """A module that holds copies of the latents `latents` of `module`, and of what has none.

    Raises:
        ValueError: the module is frozen or has no memory.
    """
    if module.packed is not None:
        raise ValueError("module must not be frozen: call unfreeze()")
    if getattr(module, "screened", None) is not None:
        raise ValueError("module must not be screened: call unscreen()")
    if any(p.is_meta for p in module.parameters()):
        raise ValueError("module is on the meta device: pass load=, which makes the parts")
    part = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for name, p in module.named_parameters():
        dim = LATENTS.get(name.split(".")[0])
        mine = p if dim is None else p[latents] if dim == 0 else p[:, latents]
        _replace(part, name, nn.Parameter(_compact(name, mine), requires_grad=p.requires_grad))
    return part


@torch.no_grad()
def placed(part: Any, device: torch.device) -> Any:
    """`part`, its parameters on `device` and feature-major."""
    if device.type != "cpu" and part.b_dec.device != device:
        part = part.to(device)
    for name, p in part.named_parameters():
        if p.device != device:
            raise ValueError(f"{name} is on {p.device}, this rank of the mesh on {device}")
        rows = p.t() if name.split(".")[0] == "W_enc" else p
        if not rows.is_contiguous():
            _replace(part, name, nn.Parameter(_compact(name, p), requires_grad=p.requires_grad))
    return part


def decoders(part: Any) -> list[Tensor]:
    """`W_dec` of every source layer; none for a module of a single one."""
    return list(part.W_dec) if isinstance(part.W_dec, nn.ParameterList) else []


@torch.no_grad()
def widen(part: Any, columns: list[int]) -> None:
    """Give `W_dec[i]` `columns[i]` columns: the outputs before its own, which are 0."""
    for i, (p, wanted) in enumerate(zip(decoders(part), columns, strict=True)):
        if p.shape[1] < wanted:
            whole = torch.nn.functional.pad(p.detach(), (wanted - p.shape[1], 0))
            part.W_dec[i] = nn.Parameter(whole, requires_grad=p.requires_grad)


def _compact(name: str, t: Tensor) -> Tensor:
    """A copy with one contiguous row of memory per latent."""
    if name.split(".")[0] != "W_enc":
        return t.detach().clone(memory_format=torch.contiguous_format)
    return t.detach().t().clone(memory_format=torch.contiguous_format).t()


def _replace(module: nn.Module, name: str, p: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path).register_parameter(last, p)
