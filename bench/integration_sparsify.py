"""sparsify's rows of bench_integrations.py: steps of its trainer on one coder (k = `--l0`).

signum is its default optimizer, step has fused Adam, gradients ends before the optimizer.
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


def install() -> None:
    backend.install()


def optimizer_of(feature: str, coder: Any) -> Any:
    if feature == "gradients":
        return None
    if feature != "signum":
        return torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    wrapped = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=1e-4), momentum=0.95)
    wrapped.train()
    return wrapped


def stepping(args: argparse.Namespace) -> Call:
    """What the trainer does with a batch: normalise, forward, backward, project, update."""
    feature, x = args.feature, torch.randn(args.n, args.d)
    options = {"num_latents": args.d_sae, "k": args.l0, "multi_topk": feature == "multi_topk"}
    coder = sparsify.SparseCoder(args.d, sparsify.SparseCoderConfig(**options))
    dead = torch.arange(args.d_sae) % 4 == 0 if feature == "auxk" else None
    optimizer = optimizer_of(feature, coder)

    def passes() -> dict[str, float]:
        out = coder(x, dead_mask=dead)
        loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
        loss.backward()
        return {"loss": float(loss.detach())}

    def call() -> dict[str, float]:
        if optimizer is not None:
            coder.set_decoder_norm_to_unit_norm()
        numbers = passes()
        if optimizer is not None:
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
        coder.zero_grad()
        return numbers

    def measured() -> dict[str, float]:
        numbers = passes()
        coder.zero_grad()
        return numbers

    measured.gradients = sum(p.nbytes for p in coder.parameters())  # type: ignore[attr-defined]
    return measured if args.peak else call


FEATURES = dict.fromkeys(("step", "signum", "gradients", "auxk", "multi_topk"), stepping)
