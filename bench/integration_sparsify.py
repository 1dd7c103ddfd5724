"""sparsify's rows of bench_integrations.py: steps of its trainer on one coder (k = `--l0`).

Its default optimizer, `ScheduleFreeWrapper(SignSGD)`, except in "step, Adam": `torch.optim.Adam`
as its trainer makes it, which the backend's `install` makes fused.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its CPU path
os.environ.setdefault("WANDB_MODE", "disabled")

import sparsify
import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.sign_sgd import SignSGD

from gemmascope_fast.integrations import sparsify as backend

Call = Callable[[], dict[str, float]]
AUXK_ALPHA = 1 / 32


def install() -> None:
    backend.install()


def optimizer_of(args: argparse.Namespace, coder: Any) -> Any:
    """As the trainer makes it."""
    if "Adam" in args.feature:
        return torch.optim.Adam(coder.parameters(), lr=1e-4, fused=args.contender == "backend")
    wrapped = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=1e-4), momentum=0.95)
    wrapped.train()
    return wrapped


def coder_of(args: argparse.Namespace) -> Any:
    multi, skip = "Multi" in args.feature, "skip" in args.feature
    options = {"num_latents": args.d_sae, "k": args.l0, "multi_topk": multi, "transcode": skip}
    return sparsify.SparseCoder(args.d, sparsify.SparseCoderConfig(**options, skip_connection=skip))


def stepping(args: argparse.Namespace) -> Call:
    """What the trainer does with a batch: normalise, forward, backward, project, update, count."""
    x = torch.randn(args.n, args.d)
    coder = coder_of(args)
    y = torch.randn(args.n, args.d) if coder.cfg.transcode else x
    dead = torch.arange(args.d_sae) % 4 == 0 if "AuxK" in args.feature else None
    idle, fired = torch.zeros(args.d_sae, dtype=torch.long), torch.zeros(args.d_sae).bool()
    optimizer = optimizer_of(args, coder)

    def backward() -> dict[str, float]:
        variance = (y - y.mean(0)).pow(2).sum()
        out = coder(x=x, y=y, dead_mask=dead, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        loss = out.fvu + AUXK_ALPHA * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        return {"loss": float(loss.detach())}

    def call() -> None:
        if not coder.cfg.transcode:
            coder.set_decoder_norm_to_unit_norm()
        backward()
        if not coder.cfg.transcode:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        idle.add_(args.n)
        idle[fired] = 0
        fired.zero_()

    def passes() -> dict[str, float]:
        numbers = backward()
        encoder = dead is None and not coder.cfg.multi_topk  # else sparsify's gets no gradient
        for name, p in coder.named_parameters():
            if encoder or name == "W_dec":
                numbers[f"gradient of {name}"] = float(p.grad.norm())
        coder.zero_grad()
        return numbers

    call.passes = passes  # type: ignore[attr-defined]
    call.gradients = sum(p.nbytes for p in coder.parameters())  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


FEATURES = dict.fromkeys(
    ("step", "step, Adam", "step, AuxK", "step, Multi-TopK", "step, skip transcoder"), stepping
)
