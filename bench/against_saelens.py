"""SAELens' own JumpReLU training step against this library's and plain dense PyTorch's.

    python bench/against_saelens.py [--n 1024 --d 1152 --d-sae 65536 --l0 64 --repeats 3]
        [--penalty step|tanh] [--centred] [--no-peak] [--json FILE]

Needs the package `sae-lens` (`make peers` installs it into `.venv-peers`). All contenders: float32,
the same weights and batches, `mean |recon - x|^2 + 1e-3 * penalty`, Adam with betas (0, 0.999).

    ours             SAE.loss under `Semantics.preset("saelens_6")`, then gsf.optim.Adam: fused;
                     with --centred or the tanh penalty, which fused does not serve, unfused
    saelens          SAETrainer.step as shipped: training_forward_pass, backward, firing counts,
                     clip_grad_norm_, torch.optim.Adam as the trainer makes it; no logging
    saelens fused    training_forward_pass, backward, torch.optim.Adam(fused=True); no counts or
                     clipping: what our step does too
    dense            plain autograd over dense tensors, torch.optim.Adam(fused=True)

The last three share one module and one set of moments, to halve the memory of the comparison. The
default is SAELens' step penalty and `apply_b_dec_to_input=False`, as Gemma Scope trains. Before
anything is timed, loss and all five gradients of one batch must agree; thresholds are first moved
off the pre-activations, so that no rounding decides a gate. Timing, floor and peak memory are those
of bench_step.py.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from against_dense import BANDWIDTH, Gate, keep_freed_memory, problem
from bench_step import (
    BETAS,
    LAMBDA,
    SIZES,
    L0Gate,
    Step,
    batches,
    floor_ms,
    interleaved,
    parser,
    peak_mebibytes,
    print_peak,
    summary,
    training_step,
)
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.training import L0, Reconstruction, Tanh

MARGIN = 2e-5
"""Distance from a gate or the edge of its window; float32 sums in two orders differ by 2e-6."""

TOLERANCE = 1e-4
"""Of a gradient, in the Frobenius norm; of the loss, a tenth of it."""

TANH_SCALE = 4.0
OURS, SHIPPED, FUSED, DENSE = "ours", "saelens", "saelens fused", "dense"
FIELDS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def ours(args: argparse.Namespace) -> tuple[Tensor, gsf.SAE]:
    """`problem` under SAELens' semantics, with thresholds clear of every pre-activation."""
    x, sae = problem(args)
    sae.semantics = gsf.Semantics.preset("saelens_6", center=args.centred)
    with torch.no_grad():
        sae.b_dec.copy_(0.01 * torch.randn(args.d))
        pre = torch.addmm(sae.b_enc, x - sae.b_dec if args.centred else x, sae.W_enc)
        columns = torch.arange(args.d_sae)
        while columns.numel():
            distance = (pre[:, columns] - sae.threshold[columns]).abs_()
            near = distance < MARGIN
            near |= distance.sub_(BANDWIDTH / 2).abs_() < MARGIN
            columns = columns[near.any(0)]
            sae.threshold[columns] += 3 * MARGIN
    return x, sae


def terms(args: argparse.Namespace) -> tuple[Any, ...]:
    if args.penalty == "tanh":
        return Reconstruction(), Tanh(LAMBDA, scale=TANH_SCALE)
    return Reconstruction(), L0(LAMBDA)


def saelens_trainer(args: argparse.Namespace, weights: gsf.SAE) -> Any:
    """SAELens' trainer over its own module, which takes a copy of the weights in its own layout."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = JumpReLUTrainingSAEConfig(
        d_in=args.d,
        d_sae=args.d_sae,
        apply_b_dec_to_input=args.centred,
        jumprelu_bandwidth=BANDWIDTH,
        jumprelu_sparsity_loss_mode=args.penalty,
        jumprelu_tanh_scale=TANH_SCALE,
        l0_coefficient=LAMBDA,
    )
    module = JumpReLUTrainingSAE(config)
    with torch.no_grad():
        for name in FIELDS:
            getattr(module, name).copy_(getattr(weights, name))
    run = SAETrainerConfig(
        total_training_samples=1000 * args.n,
        train_batch_size_samples=args.n,
        lr=args.lr,
        lr_end=args.lr,
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


def dense_loss(args: argparse.Namespace, module: Any) -> Callable[[Tensor], Tensor]:
    """The same loss in plain autograd, on any module with these parameters."""

    def evaluate(x: Tensor) -> Tensor:
        inner = x - module.b_dec if args.centred else x
        pre = torch.addmm(module.b_enc, inner, module.W_enc)
        acts = Gate.apply(pre, module.threshold)
        recon = torch.addmm(module.b_dec, acts, module.W_dec)
        if args.penalty == "tanh":
            penalty = (TANH_SCALE * acts * module.W_dec.norm(dim=1)).tanh().sum(-1)
        else:
            penalty = L0Gate.apply(pre, module.threshold).sum(-1)
        return (recon - x).square().sum(-1).mean() + LAMBDA * penalty.mean()

    return evaluate


def shipped_step(trainer: Any, x: Tensor) -> Step:
    following = batches(x)

    def step() -> float:
        loss = trainer.step(following()).loss
        trainer.n_training_steps += 1
        return float(loss.detach())

    return step


def fuses(args: argparse.Namespace) -> bool:
    """Whether the fused optimizer serves these settings."""
    return not args.centred and args.penalty == "step"


def our_step(args: argparse.Namespace, x: Tensor, sae: gsf.SAE) -> Step:
    options = {"moments": args.moments, "fused": fuses(args)}
    optimizer = gsf.optim.Adam(sae, args.lr, BETAS, **options)
    wanted = terms(args)
    return training_step(optimizer, lambda batch: sae.loss(batch, terms=wanted)[0], x)


def their_steps(args: argparse.Namespace, x: Tensor, trainer: Any) -> dict[str, Step]:
    """SAELens' two steps and the dense one, over the trainer's parameters and moments."""
    adam = torch.optim.Adam(trainer.sae.parameters(), args.lr, betas=BETAS, fused=True)
    adam.state = trainer.optimizer.state
    return {
        SHIPPED: shipped_step(trainer, x),
        FUSED: training_step(adam, saelens_loss(trainer), x),
        DENSE: training_step(adam, dense_loss(args, trainer.sae), x),
    }


def assert_equal(args: argparse.Namespace, x: Tensor, sae: gsf.SAE, trainer: Any) -> float:
    """Loss and gradients of x agree; returns the largest relative difference of a gradient."""
    loss, _ = sae.loss(x, terms=terms(args))
    loss.backward()
    expected = {name: getattr(sae, name).grad for name in FIELDS}
    sae.zero_grad()
    worst = 0.0
    for who, evaluate in (
        (SHIPPED, saelens_loss(trainer)),
        (DENSE, dense_loss(args, trainer.sae)),
    ):
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


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--penalty", choices=("step", "tanh"), default="step")
    options.add_argument("--centred", action="store_true", help="apply_b_dec_to_input=True")
    args = options.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if args.peak_of:
        x, sae = ours(args)
        steps = {OURS: our_step(args, x, sae)} if args.peak_of == OURS else {}
        print_peak(
            steps.get(args.peak_of)
            or their_steps(args, x, saelens_trainer(args, sae))[args.peak_of]
        )
        return
    keep_freed_memory()
    x, sae = ours(args)
    floor = floor_ms(args, x, sae)
    trainer = saelens_trainer(args, sae)
    worst = assert_equal(args, x, sae, trainer)
    print(f"same loss; gradients agree within {worst:.1g} (allowed {TOLERANCE:.0g})", flush=True)
    fused = fuses(args)
    print(f"our optimizer is {'fused' if fused else 'not fused: it serves neither of these'}")
    steps = {OURS: our_step(args, x, sae), **their_steps(args, x, trainer)}
    losses, times = interleaved(steps, args.repeats)
    assert abs(losses[OURS][0] / losses[SHIPPED][0] - 1) < TOLERANCE, losses
    del steps

    def peak(name: str) -> float:
        flags = ["--penalty", args.penalty, *(["--centred"] if args.centred else [])]
        return peak_mebibytes(__file__, name, args, SIZES, flags)

    facts = {"sae_lens": version("sae-lens"), "fused": fused, "gradients_agree_within": worst}
    summary(args, times, floor, peak, (SHIPPED, FUSED, DENSE), **facts)


if __name__ == "__main__":
    main()
