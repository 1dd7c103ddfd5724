"""Gemma 3 27B's shapes on a CUDA device: a training step, sparse beside dense, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import JumpReLU, ops
from ..modules import SAE
from .dense import DenseSAE

COLUMNS = ("ms/step", "tokens/s", "peak memory")
BANDWIDTH = 0.02


@dataclass(frozen=True)
class Shape:
    """Tokens, width, latents and mean active latents of one training step."""

    n: int = 4096
    d: int = 5376
    d_sae: int = 65536
    l0: float = 64.0


def rows(
    device: torch.device, shape: Shape = Shape(), dtype: torch.dtype = torch.bfloat16
) -> list[list[str]]:
    """Table rows: contender, ms per step, tokens/s, peak memory over the weights and gradients.

    Both contenders evaluate `mean_i |recon_i - x_i|^2` and all five gradients, in `dtype`, from the
    same weights, with thresholds that give the wanted mean L0 on random x of unit variance.
    """
    sae, x = _problem(device, shape, dtype)
    shared = {name: p.detach().clone() for name, p in sae.named_parameters()}
    shared |= {name: shared[name].to(dtype) for name in ("b_enc", "b_dec")}
    dense = DenseSAE(shared, BANDWIDTH)
    contenders = {
        f"gemmascope-fast ({ops.implementation('jumprelu_encode', device.type)})": (
            lambda: _step(sae, sae(x), x)
        ),
        "dense PyTorch": lambda: _step(dense, dense(x)[0], x),
    }
    found = []
    for name, step in contenders.items():
        seconds, peak = _measure(step, device)
        memory = "-" if peak is None else f"{peak / 2**20:,.0f} MiB"
        found.append([name, f"{1e3 * seconds:,.1f}", f"{shape.n / seconds:,.0f}", memory])
    return found


def _problem(device: torch.device, shape: Shape, dtype: torch.dtype) -> tuple[SAE, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.n, shape.d, device=device, generator=generator).to(dtype)
    sae = SAE(
        shape.d, shape.d_sae, JumpReLU(BANDWIDTH), device=device, dtype=dtype, generator=generator
    )
    with torch.no_grad():
        sample = (x[:32] @ sae.W_enc).float().flatten()
        kept = max(1, round(shape.l0 * sample.numel() / shape.d_sae))
        assert sae.threshold is not None
        sae.threshold.fill_(float(sample.topk(kept).values[-1]))
    return sae, x


def _step(module: torch.nn.Module, recon: Tensor, x: Tensor) -> None:
    module.zero_grad(set_to_none=False)
    (recon.float() - x.float()).square().sum(-1).mean().backward()  # type: ignore[no-untyped-call]


def _measure(step: Callable[[], None], device: torch.device) -> tuple[float, int | None]:
    """Median seconds of five steps after one warm-up, and peak bytes over the start of a step."""
    cuda = device.type == "cuda"
    step()
    start = 0
    if cuda:
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) - start if cuda else None
    return statistics.median(seconds), peak
