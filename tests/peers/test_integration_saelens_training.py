"""200 steps of SAELens' trainer with the backend installed, against 200 without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer import D
from saelens_modules import TRAINED, make
from torch import Tensor

from gemmascope_fast.integrations import saelens
from gemmascope_fast.integrations.lazy_acts import LazyActs

config = pytest.importorskip("sae_lens.config")
trainers = pytest.importorskip("sae_lens.training.sae_trainer")

KINDS = ("step", "topk", "batchtopk", "matryoshka", "quadratic", "tanh to input")

NOISE = 4
"""Times two samples of SAELens' own noise."""

LOOSE = {"tanh to input": (1e-5, 1e-2)}
"""Bounds where ours leaves SAELens' losses by more than nudged inputs do: 4e-3 against 3e-5."""


def trained(
    kind: str, steps: int, nudge: int | None = None, **options: Any
) -> tuple[list[float], Any, Any]:
    """Losses of a run by SAELens' trainer, its last output and the trainer.

    `nudge` seeds which way every input moves by one unit in the last place.
    """
    n, (cls, settings) = 64, TRAINED[kind]
    module = make((cls, {**settings, "decoder_init_norm": 1.0}))
    with torch.no_grad():
        module.initialize_weights()
    generator, noise = (torch.Generator().manual_seed(seed) for seed in (3, nudge or 0))
    atoms = torch.randn(48, D, generator=generator)

    def data() -> Any:
        while True:
            weights = torch.rand(n, 48, generator=generator).pow(12) * 3
            x = weights @ atoms / D**0.5
            if nudge is not None:
                towards = torch.randint(0, 2, x.shape, generator=noise) * 2.0 - 1
                x = x.nextafter(torch.copysign(torch.tensor(torch.inf), towards))
            yield x

    run = config.SAETrainerConfig(
        total_training_samples=steps * n, train_batch_size_samples=n, lr=1e-3, lr_end=1e-3,
        dead_feature_window=20, lr_warm_up_steps=0, **options,
    )  # fmt: skip
    trainer = trainers.SAETrainer(run, module, data_provider=data())
    losses = []
    for batch_of in (next(trainer.data_provider) for _ in range(steps)):
        output = trainer.step(batch_of)
        trainer.n_training_steps += 1
        losses.append(float(output.loss.detach()))
    return losses, output, trainer


@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_of_saelens_trainer(kind: str) -> None:
    """From one seed: every loss within float32 noise; L0, MSE, dead latents at the end.

    Noise is what SAELens' own losses do when its inputs move by one unit in the last place:
    rounding then decides a gate on a few steps, as it does between two orders of summation.
    """
    expected, theirs, trainer = trained(kind, 200)
    noise = torch.stack([apart(trained(kind, 200, nudge)[0], expected) for nudge in (1, 2)])
    with saelens.install():
        losses, output, ours = trained(kind, 200)
        log = ours.build_train_step_log_dict(output, 64)
    assert isinstance(output.feature_acts, LazyActs)
    off = apart(losses, expected)
    median, largest = LOOSE.get(kind, (NOISE * noise.median(), NOISE * noise.max()))
    assert off.median() <= median and off.max() <= largest
    assert abs(expected[-1] / expected[0] - 1) > 2e-3
    for name, value in trainer.build_train_step_log_dict(theirs, 64).items():
        assert log[name] == pytest.approx(value, rel=1e-2, abs=1e-6), name
    counts = trainer.act_freq_scores
    assert (ours.act_freq_scores - counts).abs().sum() < 1e-3 * counts.sum()


def apart(losses: list[float], expected: list[float]) -> Tensor:
    """Relative differences, step by step."""
    return (torch.tensor(losses).double() / torch.tensor(expected).double() - 1).abs()
