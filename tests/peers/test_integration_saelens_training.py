"""200 steps of SAELens' trainer with the backend installed, against 200 without.

The weights of a JumpReLU part by more than its gradients. SAELens starts with `W_dec = W_enc.T` of
unit rows w and no biases, so that the gradient of a latent alone on its token is 0 but for rounding
and a saturated penalty: `pre = x . w`, `(pre w - x) . w = 0`. Adam divides it by its own size plus
1e-8: at step 0 of "tanh to input" the threshold of latent 73, whose gradient of 1e-7 is clipped to
5e-9, parts by a tenth of lr. From there weights drift until a gate is decided otherwise, which
changes a loss by 1e-3: so it does between SAELens and itself in another order of the coordinates,
which changes nothing but the order of sums (4 of 24 orders for "tanh to input", 6 of 6 for
"quadratic"). The gradients of every step, and 200 steps with an eps above rounding, agree to
float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peer import D
from saelens_modules import JUMPRELU, TRAINED, make, saes
from torch import Tensor

from gemmascope_fast.integrations import saelens
from gemmascope_fast.integrations.lazy_acts import LazyActs

config = pytest.importorskip("sae_lens.config")
trainers = pytest.importorskip("sae_lens.training.sae_trainer")

STEPS, N = 200, 64
KINDS = ("step", "topk", "batchtopk", "matryoshka", "quadratic", "tanh to input")
GATED = tuple(kind for kind in KINDS if TRAINED[kind][0] is JUMPRELU)

ROUNDING = 1e-6
"""Relative error of a loss in float32, and of a gradient against its largest element."""

EPS = 1e-4
"""Of Adam: far above the rounding of gradients, whose norm is clipped to 1."""


@dataclass
class Run:
    """Losses `[STEPS]` of SAELens' trainer, who fired `[STEPS, n, d_sae]`, its last output."""

    losses: Tensor
    fired: Tensor
    output: Any
    trainer: Any


def trained(
    kind: str,
    eps: float | None = None,
    watch: Callable[[Any, Tensor], None] | None = None,
) -> Run:
    """A run; `watch` sees each step before it."""
    cls, settings = TRAINED[kind]
    module = make((cls, {**settings, "decoder_init_norm": 1.0}))
    generator = torch.Generator().manual_seed(3)
    atoms = torch.randn(48, D, generator=generator)
    with torch.no_grad():
        module.initialize_weights()

    def data() -> Any:
        while True:
            weights = torch.rand(N, 48, generator=generator).pow(12) * 3
            yield weights @ atoms / D**0.5

    run = config.SAETrainerConfig(
        total_training_samples=STEPS * N, train_batch_size_samples=N, lr=1e-3, lr_end=1e-3,
        dead_feature_window=20, lr_warm_up_steps=0,
    )  # fmt: skip
    trainer = trainers.SAETrainer(run, module, data_provider=data())
    trainer.optimizer.param_groups[0]["eps"] = eps or trainer.optimizer.defaults["eps"]
    losses, fired = [], []
    for _ in range(STEPS):
        x = next(trainer.data_provider)
        if watch is not None:
            watch(trainer, x)
        output = trainer.step(x)
        trainer.n_training_steps += 1
        losses.append(output.loss.detach().double())
        fired.append(output.feature_acts.detach().to_dense() != 0)
    return Run(torch.stack(losses), torch.stack(fired), output, trainer)


@pytest.mark.parametrize("kind", GATED)
def test_gradients_of_every_step(kind: str) -> None:
    """Of the weights and dead latents of SAELens' run: who fires, every loss, every gradient.

    The truth is SAELens in float64; ours may be twice as far from it as SAELens in float32.
    """

    def watch(trainer: Any, x: Tensor) -> None:
        plain, ours, exact = (copy.deepcopy(trainer.sae) for _ in range(3))
        for p in exact.double().parameters():
            p.data = p.data.double()  # SAELens keeps a threshold in float32
        given = (trainer.get_coefficients(), trainer.dead_neurons)
        with saelens.accelerate(ours):
            losses, fired, grads = computed(ours, x, *given)
        theirs, truth = computed(plain, x, *given), computed(exact, x.double(), *given)
        at = f"step {trainer.n_training_steps}"
        assert torch.equal(fired, truth[1]), at
        assert losses == pytest.approx(truth[0], rel=ROUNDING), at
        for name, grad in truth[2].items():
            off, allowed = ((g[name].double() - grad).abs().max() for g in (grads, theirs[2]))
            assert off <= 2 * allowed + ROUNDING * grad.abs().max(), f"{at}: {name}"

    trained(kind, watch=watch)


def computed(
    module: Any, x: Tensor, coefficients: Any, dead: Tensor
) -> tuple[dict[str, float], Tensor, dict[str, Tensor]]:
    """Losses of a step, who fired, gradients."""
    output = module.training_forward_pass(
        saes.sae.TrainStepInput(x, coefficients, dead, 0, is_logging_step=False)
    )
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(output.loss, list(named.values()))
    losses = {name: float(value.detach()) for name, value in output.losses.items()}
    fired = output.feature_acts.detach().to_dense() != 0
    return losses, fired, dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_of_saelens_trainer(kind: str) -> None:
    """From one seed: every loss, who fires, weights and logs, to rounding.

    A JumpReLU's Adam has an eps that keeps rounding out of its weights; TopK needs none.
    """
    eps = EPS if kind in GATED else None
    theirs = trained(kind, eps=eps)
    with saelens.install():
        ours = trained(kind, eps=eps)
        log = ours.trainer.build_train_step_log_dict(ours.output, N)
    assert isinstance(ours.output.feature_acts, LazyActs)
    assert (ours.losses / theirs.losses - 1).abs().max() <= ROUNDING
    assert abs(theirs.losses[-1] / theirs.losses[0] - 1) > 2e-3
    assert torch.equal(ours.fired, theirs.fired)
    assert torch.equal(ours.trainer.act_freq_scores, theirs.trainer.act_freq_scores)
    assert torch.equal(ours.trainer.dead_neurons, theirs.trainer.dead_neurons)
    for name, p in theirs.trainer.sae.named_parameters():
        found = ours.trainer.sae.get_parameter(name)
        torch.testing.assert_close(found, p, rtol=0, atol=10 * ROUNDING, msg=name)
    for name, value in theirs.trainer.build_train_step_log_dict(theirs.output, N).items():
        assert log[name] == pytest.approx(value, rel=10 * ROUNDING, abs=ROUNDING), name


@pytest.mark.parametrize("kind", GATED)
def test_200_steps_by_adams_own_eps(kind: str) -> None:
    """As a user trains: L0 and loss at the end within 1 %, and hardly a gate decided otherwise.

    SAELens in another order of the coordinates flips up to 21 of 7210 entries.
    """
    theirs = trained(kind)
    with saelens.install():
        ours = trained(kind)
    assert ours.losses[-20:].mean() == pytest.approx(float(theirs.losses[-20:].mean()), rel=1e-2)
    assert (ours.fired[-20:].sum() / theirs.fired[-20:].sum() - 1).abs() < 1e-2
    assert (ours.fired != theirs.fired).sum() < 1e-2 * theirs.fired.sum()
