"""dictionary_learning's rows of bench_integrations.py: updates of its trainers (k = `--l0`)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from dictionary_learning import trainers

from gemmascope_fast.integrations import dictionary_learning as backend

TRAINERS = {"topk": trainers.TopKTrainer, "batchtopk": trainers.BatchTopKTrainer}
Call = Callable[[], dict[str, float]]


def install() -> None:
    backend.install()


def updating(args: argparse.Namespace) -> Call:
    x, count = torch.randn(args.n, args.d), 0
    run = {"steps": 10**6, "warmup_steps": 10, "layer": 0, "lm_name": "none", "device": "cpu"}
    sizes = {"activation_dim": args.d, "dict_size": args.d_sae, "k": args.l0}
    trainer = TRAINERS[args.feature](**sizes, lr=1e-4, **run)

    def call() -> dict[str, float]:
        nonlocal count
        count += 1
        return {"loss": float(trainer.update(count, x))}

    def passes() -> dict[str, float]:
        loss = trainer.loss(x, step=1)
        loss.backward()
        trainer.ae.zero_grad()
        return {"loss": float(loss.detach())}

    passes.gradients = sum(p.nbytes for p in trainer.ae.parameters())  # type: ignore[attr-defined]
    return passes if args.peak else call


FEATURES = dict.fromkeys(TRAINERS, updating)
