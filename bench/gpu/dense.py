"""The contenders: the same maths as dense PyTorch writes it, with the `[n, d_sae]` matrices."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Settings, Shape
from .problem import BANDWIDTH, Entries, Problem


def encode(p: Problem) -> Tensor:
    """Dense JumpReLU: `[n, F]`."""
    pre = torch.addmm(p.b_enc.to(p.x.dtype), p.x, p.W_enc)
    return torch.where(pre > p.threshold.to(pre.dtype), pre, 0)


def topk(p: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Values and latents `[n, k]`."""
    values, latents = torch.addmm(p.b_enc.to(p.x.dtype), p.x, p.W_enc).relu().topk(k, sorted=False)
    return values, latents


def decode(p: Problem, acts: Tensor) -> Tensor:
    return torch.addmm(p.b_dec.to(acts.dtype), acts, p.W_dec)


def bag(p: Problem, e: Entries) -> Callable[[], Tensor]:
    """`embedding_bag` over the entries; its int64 copies are made outside of the timing."""
    indices, values, bias = e.indices.long(), e.values.to(p.W_dec.dtype), p.b_dec.to(p.W_dec.dtype)
    return lambda: (
        bias
        + F.embedding_bag(
            *(indices, p.W_dec, e.offsets),
            **{"mode": "sum", "per_sample_weights": values, "include_last_offset": True},
        )
    )


def csr(p: Problem, e: Entries, shape: Shape) -> Callable[[], Tensor]:
    """`torch.sparse` CSR times dense: cuSPARSE on a GPU."""
    values, bias = e.values.to(p.W_dec.dtype), p.b_dec.to(p.W_dec.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CSR is called beta
        acts = torch.sparse_csr_tensor(
            e.offsets, e.indices.long(), values, (shape.n, shape.d_sae), check_invariants=False
        )
    return lambda: bias + acts @ p.W_dec


def backward(
    p: Problem, pre: Tensor, d_recon: Tensor, bandwidth: float = BANDWIDTH
) -> tuple[Tensor, ...]:
    """d_W_enc, d_b_enc, d_threshold, d_W_dec, d_b_dec: three products, as autograd would do them.

    d_x is not asked for: activations of a frozen model are data.
    """
    theta = p.threshold.to(pre.dtype)
    active = pre > theta
    d_acts = d_recon @ p.W_dec.t()
    d_W_dec = torch.where(active, pre, 0).t() @ d_recon
    window = (pre - theta).abs() < bandwidth / 2
    d_threshold = torch.where(window, d_acts, 0).sum(0, dtype=torch.float32)
    d_pre = torch.where(active, d_acts, 0)
    del d_acts, active, window
    d_W_enc = (d_pre.t() @ p.x).t()
    return (
        *(d_W_enc, d_pre.sum(0, dtype=torch.float32)),
        *(d_threshold * p.threshold / -bandwidth, d_W_dec, d_recon.sum(0, dtype=torch.float32)),
    )


def step(p: Problem) -> tuple[Tensor, ...]:
    """Forward and backward of the mean squared error."""
    pre = torch.addmm(p.b_enc.to(p.x.dtype), p.x, p.W_enc)
    recon = decode(p, torch.where(pre > p.threshold.to(pre.dtype), pre, 0))
    return backward(p, pre, (recon - p.x) * (2 / p.x.shape[0]))


def adam_step(p: Problem, beta1: float = 0.0) -> Callable[[], object]:
    """The same with PyTorch's fused Adam on the five parameters; lr = 0 leaves them as they are."""
    names = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
    parameters = [torch.nn.Parameter(getattr(p, name)) for name in names]
    adam = torch.optim.Adam(parameters, lr=0.0, betas=(beta1, 0.999), fused=True)

    def call() -> None:
        for parameter, gradient in zip(parameters, step(p), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        adam.step()
        adam.zero_grad()

    return call


def compiled(settings: Settings, function: Callable[..., object]) -> Callable[..., object]:
    """`torch.compile` for static shapes; quick runs stop behind the graph capture."""
    backend = "eager" if settings.quick else "inductor"
    return torch.compile(function, dynamic=False, backend=backend)


def compiles(settings: Settings, reason: str) -> str:
    """Why `torch.compile` is left out: `reason`, or the settings."""
    return reason or ("left out by --brief" if settings.brief else "")


def fits(shape: Shape, device: torch.device, matrices: int, weights: int) -> str:
    """Why so many `[n, d_sae]` and `[d_sae, d]` 16-bit matrices cannot fit; empty when they may."""
    need = 2 * shape.d_sae * (matrices * shape.n + weights * shape.d)
    if device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    return f"does not fit: needs {need / 2**30:.0f} GiB" if need > total else ""
