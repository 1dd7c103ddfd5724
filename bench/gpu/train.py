"""Part `train_1m`: a million latents of width 5376 on one device, 50 steps from a calibrated start.

A loop as users write it: encode, decode, `backward`, `gsf.optim.Adam(fused=True)` with 8-bit second
moments, which makes no gradient of the matrices. What a run from a dense start costs is timed
apart, through `SAE.loss`, whose dense path serves there.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf

from . import checks
from .context import Context, Shape
from .encoders import device_of
from .problem import Entries, problem
from .rows import OURS
from .steps import entries_of, module_of
from .targets import verdicts
from .timing import free, summarise, unavailable

START_L0 = 300
LR = 1e-4
SPARSITY = 1.0


def train_1m(ctx: Context) -> None:
    s = ctx.settings
    shape = Shape(s.n, s.d, s.latents[-1], 16 if s.quick else START_L0)
    estimate = 1 if s.quick else 60
    ctx.row(f"{s.steps} steps", lambda: _train(ctx, shape), estimate, shape=shape.json())
    free(device_of(ctx))
    for d_sae in sorted({s.latents[min(1, len(s.latents) - 1)], s.latents[-1]}):
        start = Shape(s.n if s.quick else 1024, s.d, d_sae, d_sae // 2)
        ctx.row(
            f"dense start F={d_sae}", lambda start=start: _dense_start(ctx, start), estimate,
            shape=start.json(),
        )  # fmt: skip
        free(device_of(ctx))


def _train(ctx: Context, shape: Shape) -> dict[str, Any]:
    """Steps on fresh random batches; times are those of whole steps, update included."""
    device = device_of(ctx)
    p = problem(shape, device)
    p.W_dec.copy_(p.W_enc.t())  # tied start
    sae = module_of(p)
    optimizer = gsf.optim.Adam(sae, LR, moments="8bit", fused=True)
    generator = torch.Generator(device).manual_seed(1)
    seconds, losses, l0s = [], [], []
    error = 0.0
    for at in range(ctx.settings.steps):
        if ctx.remaining() < 20 and not ctx.settings.quick:
            break
        p.x.copy_(torch.randn(p.x.shape, generator=generator, device=device))
        _synchronize(device)
        began = time.perf_counter()
        optimizer.zero_grad()
        acts = sae.encode(p.x)
        recon = sae.decode(acts)
        loss = _loss(recon, p.x)
        (loss + SPARSITY * acts.l0().mean()).backward()
        if not at:  # checked before anything moves
            e = _entries(acts.detach())
            error = max(checks.encoded(p, *e.csr, e.gate), checks.decoded(p, e, recon.detach()))
            del e
            if device.type == "cuda":  # the peak is that of the steps, not of the checks
                torch.cuda.reset_peak_memory_stats(device)
        optimizer.step()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
        l0s.append(float(acts.gate.detach().sum()) / shape.n)
        del acts, recon, loss
    assert sae.W_enc.grad is None and sae.W_dec.grad is None
    return _told(shape, device, seconds, losses, l0s, error)


def _told(
    shape: Shape,
    device: torch.device,
    seconds: list[float],
    losses: list[float],
    l0s: list[float],
    error: float,
) -> dict[str, Any]:
    assert all(math.isfinite(v) for v in losses), "the loss is not finite"
    cuda = device.type == "cuda"
    times = summarise(seconds[2:])  # the first two compile
    row: dict[str, Any] = {
        "shape": shape.json(),
        "times": {OURS: {**times, "peak_extra_bytes": None}},
        "steps": len(seconds),
        "tokens_per_s": shape.n / times["median_s"],
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
        "peak_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9 if cuda else None,
        "l0_first": l0s[0],
        "l0_last": l0s[-1],
        "losses": losses,
        "error": error,
        "update": "gsf.optim.Adam(fused=True), beta1 = 0, 8-bit second moments",
    }
    row["targets"] = verdicts("train_1m", row)
    peak = "" if row["peak_gb"] is None else f", peak {row['peak_gb']:.1f} GB"
    row["line"] = (
        f"{len(seconds)} steps of {1e3 * times['median_s']:.1f} ms, {row['tokens_per_s']:.0f} "
        f"tokens/s, L0 {l0s[0]:.0f} to {l0s[-1]:.0f}{peak}"
    )
    return row


def _entries(acts: gsf.SparseActs) -> Entries:
    """The entries of activations, for the checks."""
    held = (acts.offsets, acts.indices, acts.values, acts.gate)
    return entries_of([*held, acts.offsets[-1], *acts.by_feature()])


def _loss(recon: Tensor, x: Tensor) -> Tensor:
    return (recon.float() - x.float()).square().sum(-1).mean()


def _dense_start(ctx: Context, shape: Shape) -> dict[str, Any]:
    """`SAE.loss` and its gradients with threshold 0.001: half of all latents fire."""
    device = device_of(ctx)
    try:
        generator = torch.Generator(device).manual_seed(0)
        sae = gsf.SAE(
            *(shape.d, shape.d_sae, gsf.JumpReLU(bandwidth=0.001)),
            **{"device": device, "dtype": torch.bfloat16, "generator": generator},
        )
        x = torch.randn(shape.n, shape.d, generator=generator, device=device).bfloat16()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [_loss_seconds(sae, x) for _ in range(3)]
    except Exception as error:
        if (reason := unavailable(error)) != "does not fit":
            raise
        return {"status": "skipped", "reason": reason}
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    times = summarise(seconds[1:])
    told = f"{1e3 * times['median_s']:.0f} ms for {shape.n} tokens"
    found = {"times": {OURS: {**times, "peak_extra_bytes": None}}, "peak_gb": peak}
    return {**found, "tokens_per_s": shape.n / times["median_s"], "line": told}


def _loss_seconds(sae: gsf.SAE, x: Tensor) -> float:
    began = time.perf_counter()
    sae.zero_grad(set_to_none=True)
    loss, metrics = sae.loss(x)
    loss.backward()
    assert float(metrics["density"]) > 0.4, "the start is meant to be dense"
    _synchronize(x.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
