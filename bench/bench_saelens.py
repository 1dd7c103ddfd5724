"""SAELens' own JumpReLU training step against this library's and plain dense PyTorch's.

    make bench-peers

Needs the package `sae-lens`, which `make peers` installs into `.venv-peers`. All in float32, the
same weights and batches, `mean |recon - x|^2` and a penalty, Adam with betas (0, 0.999):

    ours                SAE.loss under `Semantics.preset("saelens_6")`, then gsf.optim.Adam: fused;
                        centred, or with the tanh penalty, which fused does not serve, unfused
    saelens             SAETrainer.step as shipped: training_forward_pass, backward, firing counts,
                        clip_grad_norm_, torch.optim.Adam as the trainer makes it; no logging
    saelens, fused Adam training_forward_pass, backward, torch.optim.Adam(fused=True); no counts or
                        clipping: what our step does too
    dense fp32          plain autograd over dense tensors, torch.optim.Adam(fused=True)

The last three share one module and one set of moments. The default is SAELens' step penalty and
`apply_b_dec_to_input=False`, as Gemma Scope trains. Before anything is timed, loss and all five
gradients of one batch agree. Floor and memory are those of bench_step.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest
import torch
from bench_step import BETAS, LR, SIZES, batches, floor_of, step
from dense import LAMBDA, Gate, L0Gate
from interleaving import Call, Case, Measured, Spec, Target, replay
from problems import BANDWIDTH, Size, autoencoder, clear
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.report import OURS
from gemmascope_fast.training import L0, Reconstruction, Tanh

pytest.importorskip("sae_lens", reason="needs sae-lens: make bench-peers")

SHIPPED, FUSED, DENSE = "saelens", "saelens, fused Adam", "dense fp32"
FIELDS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
TOLERANCE = 1e-4
"""Of a gradient, in the Frobenius norm; of the loss, a tenth of it."""
TANH_SCALE = 4.0


@dataclass(frozen=True)
class Variant:
    """Which penalty, and whether the decoder's bias is taken from the input."""

    penalty: str = "step"
    centred: bool = False

    @property
    def fuses(self) -> bool:
        """Whether our fused optimizer serves it."""
        return not self.centred and self.penalty == "step"

    def __str__(self) -> str:
        return f"{self.penalty} penalty{', centred' if self.centred else ''}"


def specs(shapes: str) -> list[Spec]:
    variants = [Variant(), Variant("tanh"), Variant(centred=True)]
    return [
        Spec(
            f"saelens-{size}-{str(variant).replace(', ', '-').replace(' ', '-')}",
            (OURS, SHIPPED, FUSED, DENSE),
            functools.partial(case_of, size, variant, shapes == "named"),
        )
        for size in SIZES[shapes]
        for variant in variants
    ]


def test_saelens(benchmark: Any, rounds: tuple[Measured, str]) -> None:
    replay(benchmark, *rounds)


def case_of(size: Size, variant: Variant, judged: bool) -> Case:
    x, sae = ours(size, variant)
    latents = int(sae.encode(x).detach().fired().sum())
    trainer = trainer_of(size, variant, sae)
    worst = assert_equal(variant, x, sae, trainer)
    calls = {OURS: our_step(variant, x, sae), **their_steps(variant, x, trainer)}
    return Case(
        op="step, saelens_6",
        shape=size.shape(f"fp32, {variant}, {latents:,} latents touched"),
        calls=calls,
        **floor_of(size, latents, sae.W_dec.detach()),
        facts={
            **{"touched": latents, "gradients_agree_within": worst, "fused": variant.fuses},
            "sae_lens": version("sae-lens"),
        },
        targets=(
            Target("x SAELens' own step", 12.0, lambda m: m.ratio(SHIPPED)),
            Target("x dense fp32 with Adam(fused=True)", 12.0, lambda m: m.ratio(DENSE)),
        )
        if judged and variant.fuses
        else (),
    )


# ---- contenders


def ours(size: Size, variant: Variant) -> tuple[Tensor, gsf.SAE]:
    """`autoencoder` under SAELens' semantics, with thresholds clear of every pre-activation."""
    x, sae = autoencoder(size)
    sae.semantics = gsf.Semantics.preset("saelens_6", center=variant.centred)
    with torch.no_grad():
        assert sae.threshold is not None
        sae.b_dec.copy_(0.01 * torch.randn(size.d, generator=torch.Generator().manual_seed(6)))
        inner = x - sae.b_dec if variant.centred else x
        clear(sae.threshold, torch.addmm(sae.b_enc, inner, sae.W_enc))
    return x, sae


def terms(variant: Variant) -> tuple[Any, ...]:
    if variant.penalty == "tanh":
        return Reconstruction(), Tanh(LAMBDA, scale=TANH_SCALE)
    return Reconstruction(), L0(LAMBDA)


def our_step(variant: Variant, x: Tensor, sae: gsf.SAE) -> Call:
    optimizer = gsf.optim.Adam(sae, LR, BETAS, fused=variant.fuses)
    wanted = terms(variant)
    return step(optimizer, lambda batch: sae.loss(batch, terms=wanted)[0], batches(x))


def trainer_of(size: Size, variant: Variant, weights: gsf.SAE) -> Any:
    """SAELens' trainer over its own module, which takes a copy of the weights in its own layout."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = JumpReLUTrainingSAEConfig(
        d_in=size.d,
        d_sae=size.d_sae,
        apply_b_dec_to_input=variant.centred,
        jumprelu_bandwidth=BANDWIDTH,
        jumprelu_sparsity_loss_mode=variant.penalty,
        jumprelu_tanh_scale=TANH_SCALE,
        l0_coefficient=LAMBDA,
    )
    module = JumpReLUTrainingSAE(config)
    with torch.no_grad():
        for name in FIELDS:
            getattr(module, name).copy_(getattr(weights, name))
    run = SAETrainerConfig(
        total_training_samples=1000 * size.n,
        train_batch_size_samples=size.n,
        lr=LR,
        lr_end=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
    )
    return SAETrainer(run, module, data_provider=iter(()))


def saelens_loss(trainer: Any) -> Callable[[Tensor], Tensor]:
    """The trainer's loss of a batch, without its bookkeeping."""
    from sae_lens.saes.sae import TrainStepInput

    def evaluate(x: Tensor) -> Tensor:
        given = TrainStepInput(x, trainer.get_coefficients(), trainer.dead_neurons, 0, False)
        loss: Tensor = trainer.sae.training_forward_pass(given).loss
        return loss

    return evaluate


def dense_loss(variant: Variant, module: Any) -> Callable[[Tensor], Tensor]:
    """The same loss in plain autograd, on any module with these parameters."""

    def evaluate(x: Tensor) -> Tensor:
        inner = x - module.b_dec if variant.centred else x
        pre = torch.addmm(module.b_enc, inner, module.W_enc)
        acts = Gate.apply(pre, module.threshold)
        recon = torch.addmm(module.b_dec, acts, module.W_dec)
        if variant.penalty == "tanh":
            penalty = (TANH_SCALE * acts * module.W_dec.norm(dim=1)).tanh().sum(-1)
        else:
            penalty = L0Gate.apply(pre, module.threshold).sum(-1)
        return (recon - x).square().sum(-1).mean() + LAMBDA * penalty.mean()

    return evaluate


def their_steps(variant: Variant, x: Tensor, trainer: Any) -> dict[str, Call]:
    """SAELens' two steps and the dense one, over the trainer's parameters and moments."""
    adam = torch.optim.Adam(trainer.sae.parameters(), LR, betas=BETAS, fused=True)
    adam.state = trainer.optimizer.state
    return {
        SHIPPED: shipped_step(trainer, x),
        FUSED: step(adam, saelens_loss(trainer), batches(x)),
        DENSE: step(adam, dense_loss(variant, trainer.sae), batches(x)),
    }


def shipped_step(trainer: Any, x: Tensor) -> Call:
    arranged = batches(x)

    def run(turn: int) -> Tensor:
        loss: Tensor = trainer.step(arranged[turn % len(arranged)]).loss
        trainer.n_training_steps += 1
        return loss.detach()

    return run


def assert_equal(variant: Variant, x: Tensor, sae: gsf.SAE, trainer: Any) -> float:
    """Loss and gradients of x agree; returns the largest relative difference of a gradient."""
    loss, _ = sae.loss(x, terms=terms(variant))
    loss.backward()
    expected = {name: getattr(sae, name).grad for name in FIELDS}
    sae.zero_grad()
    worst = 0.0
    losses = {SHIPPED: saelens_loss(trainer), DENSE: dense_loss(variant, trainer.sae)}
    for who, evaluate in losses.items():
        other = evaluate(x)
        other.backward()
        torch.testing.assert_close(other, loss, rtol=TOLERANCE / 10, atol=0, msg=f"loss of {who}")
        for name in FIELDS:
            found = getattr(trainer.sae, name).grad
            off = float((found - expected[name]).norm() / expected[name].norm())
            assert off <= TOLERANCE, f"gradient of {name}: {who} differs by {off:.2g}"
            worst = max(worst, off)
        trainer.sae.zero_grad()
    return worst
