"""dictionary_learning's rows of bench_integrations.py: updates of its trainers (k = `--l0`)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from dictionary_learning import trainers
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

from gemmascope_fast.integrations import dictionary_learning as backend

TRAINERS = {
    "update, TopK": trainers.TopKTrainer,
    "update, BatchTopK": trainers.BatchTopKTrainer,
    "update, Matryoshka BatchTopK": MatryoshkaBatchTopKTrainer,
    "update, JumpReLU": trainers.JumpReluTrainer,
}
RUN = {"steps": 10**6, "warmup_steps": 10, "layer": 0, "lm_name": "none", "device": "cpu"}
BANDWIDTH = 0.02
Call = Callable[[], dict[str, float]]


def install() -> None:
    backend.install()


def trainer_of(args: argparse.Namespace, x: torch.Tensor) -> Any:
    """A trainer; a JumpReLU with decoder rows as encoder and `l0` active latents per token."""
    options: dict[str, Any] = {"activation_dim": args.d, "dict_size": args.d_sae, "lr": 1e-5}
    if "Matryoshka" in args.feature:
        options["group_fractions"] = [1 / 16, 3 / 16, 3 / 4]
    if "JumpReLU" not in args.feature:
        return TRAINERS[args.feature](**options, **RUN, k=args.l0)
    options |= {"bandwidth": BANDWIDTH, "target_l0": float(args.l0 // 2)}
    trainer = trainers.JumpReluTrainer(**options, **RUN, sparsity_warmup_steps=0)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(trainer.ae.W_dec)
        trainer.ae.W_dec.copy_(rows)
        trainer.ae.W_enc.copy_(rows.t())
        pre = x[:32] @ trainer.ae.W_enc
        trainer.ae.threshold.fill_(float(pre.flatten().topk(32 * args.l0).values[-1]))
    return trainer


def updating(args: argparse.Namespace) -> Call:
    x, count = torch.randn(args.n, args.d), 0
    trainer = trainer_of(args, x)

    def call() -> None:
        nonlocal count
        count += 1
        trainer.update(count, x)

    def passes() -> dict[str, float]:
        loss = trainer.loss(x, step=1)
        loss.backward()
        numbers = {"loss": float(loss.detach())}
        for name, p in trainer.ae.named_parameters():
            if name != "threshold":  # there ours reaches both sides of it: see strict_compat
                numbers[f"gradient of {name}"] = float(p.grad.norm())
        trainer.ae.zero_grad()
        return numbers

    call.passes = passes  # type: ignore[attr-defined]
    call.gradients = sum(p.nbytes for p in trainer.ae.parameters())  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


FEATURES = dict.fromkeys(TRAINERS, updating)
