"""SAELens' rows of bench_integrations.py: its trainer's steps, and inference."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from sae_lens import saes
from sae_lens.config import SAETrainerConfig
from sae_lens.saes import transcoder
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from gemmascope_fast.integrations import saelens

BANDWIDTH = 0.02
Call = Callable[[], dict[str, float]]


def install() -> None:
    saelens.install()


def gate(module: Any, x: torch.Tensor, l0: int) -> None:
    """Thresholds (biases, where there are none) that leave `l0` latents per token."""
    with torch.no_grad():
        sample = x[:32] @ module.W_enc
        limit = float(sample.flatten().topk(32 * l0).values[-1])
        if hasattr(module, "threshold"):
            module.threshold.fill_(limit)
        else:
            module.b_enc.fill_(-limit)


def module_of(args: argparse.Namespace, cls: Any, config: Any, **options: Any) -> tuple[Any, Any]:
    x = torch.randn(args.n, args.d)
    if "k" in options:
        options["k"] = args.l0
    module = cls(config(d_in=args.d, d_sae=args.d_sae, **options))
    with torch.no_grad():
        module.W_dec.div_(module.W_dec.norm(dim=1, keepdim=True))
        module.W_enc.copy_(module.W_dec.t())
    if "k" not in options:
        gate(module, x, args.l0)
    return x, module


def training(args: argparse.Namespace, cls: Any, config: Any, **options: Any) -> Call:
    """A step of SAELens' trainer as it comes: statistics, clipping, Adam."""
    x, module = module_of(args, cls, config, **options)
    run = SAETrainerConfig(
        total_training_samples=1000 * args.n,
        train_batch_size_samples=args.n,
        lr=1e-5,
        lr_end=1e-5,
    )
    trainer = SAETrainer(run, module, data_provider=iter(()))

    def call() -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def passes() -> dict[str, float]:
        coefficients, dead = trainer.get_coefficients(), trainer.dead_neurons
        output = module.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
        output.loss.backward()
        numbers = {"loss": float(output.loss.detach())}
        for name, p in module.named_parameters():
            numbers[f"gradient of {name}"] = float(p.grad.norm())
        module.zero_grad()
        return numbers

    call.passes = passes  # type: ignore[attr-defined]
    call.gradients = sum(p.nbytes for p in module.parameters())  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def inference(args: argparse.Namespace, cls: Any, config: Any, **options: Any) -> Call:
    x, module = module_of(args, cls, config, **options)

    @torch.no_grad()
    def call() -> dict[str, float]:
        return {"norm": float(module(x).norm())}

    return call


def encoding(args: argparse.Namespace, cls: Any, config: Any, **options: Any) -> Call:
    """Dense activations, as `encode` returns them."""
    x, module = module_of(args, cls, config, **options)

    @torch.no_grad()
    def call() -> dict[str, float]:
        return {"active": float(torch.count_nonzero(module.encode(x)))}

    return call


JUMPRELU = (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig)
JUMPRELU_OPTIONS = {"jumprelu_bandwidth": BANDWIDTH, "l0_coefficient": 1e-3}
TRANSCODER = (transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig)


def _rows() -> dict[str, Callable[[argparse.Namespace], Call]]:
    step, tanh = JUMPRELU_OPTIONS, {"jumprelu_sparsity_loss_mode": "tanh"}
    k = {"k": 0}  # `--l0` takes its place
    topk = (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig)
    batch = (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig)
    infer = (saes.JumpReLUSAE, saes.JumpReLUSAEConfig)

    def trained(pair: tuple[Any, Any], **options: Any) -> Callable[[argparse.Namespace], Call]:
        return lambda args: training(args, *pair, **options)

    def matryoshka(args: argparse.Namespace) -> Call:
        widths = [args.d_sae // 16, args.d_sae // 4, args.d_sae]
        cls, config = saes.MatryoshkaBatchTopKTrainingSAE, saes.MatryoshkaBatchTopKTrainingSAEConfig
        return training(args, cls, config, matryoshka_widths=widths, **k)

    plain = {"apply_b_dec_to_input": False}
    return {
        "train jumprelu": trained(JUMPRELU, **step),
        "train jumprelu tanh": trained(JUMPRELU, **step, **tanh),
        "train topk": trained(topk, **k),
        "train batchtopk": trained(batch, **k),
        "train matryoshka": matryoshka,
        "forward jumprelu": lambda args: inference(args, *infer),
        "encode jumprelu": lambda args: encoding(args, *infer),
        "forward topk": lambda args: inference(args, saes.TopKSAE, saes.TopKSAEConfig, **k),
        "forward jumprelu transcoder": lambda args: inference(
            args, *TRANSCODER, d_out=args.d, **plain
        ),
    }


FEATURES = _rows()
