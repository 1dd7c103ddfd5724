"""`Semantics.preset("dictionary_learning_0_1")` against that library's dictionaries and trainers.

A known bug, reproduced under `strict_compat` only: its JumpReLU trainer counts L0 on the gated
activations, so that an inactive latent near its threshold passes no gradient. The same count passes
one for *every* inactive latent whose threshold is below half the bandwidth; that is not reproduced.
Nor are these: its inference rectifies after the gate (which matters for negative thresholds), a
batch without active latents moves its running threshold towards 0 (ours does not move), and its
TopK has a running threshold too.
"""

from __future__ import annotations

import importlib
from typing import Any

import peer
import pytest
import torch
from peer import BANDWIDTH, DEAD, SEEDS, D, F, batch, check_forward, check_loss, close, module
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import Semantics
from gemmascope_fast import training as t

REASON = "dictionary-learning is not installed: see `make peers`"
trainers = pytest.importorskip("dictionary_learning.trainers", reason=REASON)
nested = importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
PRESET = "dictionary_learning_0_1"
SHIFTS = {5: 0.0, 40: -0.8, F: 0.0}
"""Moves of the pre-activations by k: few, more than are positive, all."""
TARGET_L0 = 12.0


def trainer(cls: Any, ours: gsf.SAE, **options: Any) -> Any:
    """The library's trainer, whose dictionary has the weights of ours."""
    run = {"steps": 100, "warmup_steps": 10, "layer": 0, "lm_name": "none", "device": "cpu"}
    made = cls(activation_dim=D, dict_size=F, **run, **options)
    with torch.no_grad():
        for name, (p, turn) in parameters(made.ae).items():
            p.copy_(turn(ours.get_parameter(name)))
    return made


def parameters(ae: Any) -> peer.Parameters:
    if hasattr(ae, "W_enc"):
        return {name: (p, torch.clone) for name, p in ae.named_parameters()}
    return {
        "W_enc": (ae.encoder.weight, torch.t),
        "b_enc": (ae.encoder.bias, torch.clone),
        "W_dec": (ae.decoder.weight, torch.t),
        "b_dec": (ae.b_dec, torch.clone),
    }


def with_auxk(made: Any, ours: gsf.SAE, x: Tensor, idle: str) -> tuple[Tensor, t.AuxK]:
    """The trainer's loss when these latents have not fired for long; our term."""
    made.dead_feature_threshold = 10**6
    made.num_tokens_since_fired = 10**7 * DEAD[idle].long()
    loss = made.loss(x, step=0)
    dead = made.num_tokens_since_fired >= made.dead_feature_threshold
    assert int(dead.sum()) > (D // 2 if idle == "many" else 0)  # some fired on this batch
    return loss, t.AuxK(dead, D // 2, made.auxk_alpha, **ours.semantics.auxk_options())


def quiet(ours: gsf.SAE, idle: str) -> gsf.SAE:
    with torch.no_grad():
        ours.b_enc[DEAD[idle]] -= 1.5
    return ours


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", SHIFTS)
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_selecting(kind: str, k: int, seed: int) -> None:
    activation = gsf.TopK(k) if kind == "topk" else gsf.BatchTopK(k)
    ours = module(activation, Semantics.preset(PRESET), seed, shift=SHIFTS[k])
    x = batch(seed)
    made = trainer(trainers.TopKTrainer if kind == "topk" else trainers.BatchTopKTrainer, ours, k=k)
    acts = made.ae.encode(x, use_threshold=False)
    check_forward(ours, x, acts, made.ae.decode(acts))
    loss = made.loss(x, step=0)
    check_loss(ours, x, (t.Reconstruction(),), loss, parameters(made.ae))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("idle", DEAD)
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_auxk(kind: str, idle: str, seed: int) -> None:
    activation = gsf.TopK(5) if kind == "topk" else gsf.BatchTopK(5)
    ours, x = quiet(module(activation, Semantics.preset(PRESET), seed), idle), batch(seed)
    cls = trainers.TopKTrainer if kind == "topk" else trainers.BatchTopKTrainer
    made = trainer(cls, ours, k=5, auxk_alpha=0.5)
    loss, aux = with_auxk(made, ours, x, idle)
    check_loss(ours, x, (t.Reconstruction(), aux), loss, parameters(made.ae))


def test_matryoshka() -> None:
    """The mean over groups of errors that `group_weights` (default 1 / groups) weigh already."""
    ours, x = quiet(module(gsf.BatchTopK(6), Semantics.preset(PRESET), 0), "many"), batch(0)
    options = {"k": 6, "group_fractions": [0.25, 0.25, 0.5], "auxk_alpha": 0.5}
    for weights, mine in ((None, (1 / 9,) * 3), ([1.0, 2.0, 3.0], (1 / 3, 2 / 3, 1))):
        made = trainer(nested.MatryoshkaBatchTopKTrainer, ours, group_weights=weights, **options)
        loss, aux = with_auxk(made, ours, x, "many")
        terms = (t.Matryoshka((24, 48, F), mine), aux)
        check_loss(ours, x, terms, loss, parameters(made.ae))


def test_batchtopk_threshold() -> None:
    ours = module(gsf.BatchTopK(4), Semantics.preset(PRESET), 0)
    made = trainer(trainers.BatchTopKTrainer, ours, k=4, threshold_start_step=-1)
    x = batch(9)
    before = made.ae.encode(x)  # at first its threshold is negative: all that is positive
    check_forward(ours.eval(), x, before, made.ae.decode(before))
    ours.train()
    for step in range(5):
        made.loss(batch(step) * (step + 1), step=step)
        ours.encode(batch(step) * (step + 1))
        close(ours.ema_threshold.float(), made.ae.threshold, "running threshold")
    after = made.ae.encode(x)
    check_forward(ours.eval(), x, after, made.ae.decode(after))
    check_forward(ours.to_jumprelu(), x, after, made.ae.decode(after))


def jumprelu(strict: bool, seed: int) -> tuple[gsf.SAE, Any]:
    semantics = Semantics.preset(PRESET, strict_compat=strict)
    ours = module(gsf.JumpReLU(BANDWIDTH), semantics, seed)
    options = {"bandwidth": BANDWIDTH, "sparsity_penalty": 3.0, "target_l0": TARGET_L0}
    return ours, trainer(trainers.JumpReluTrainer, ours, sparsity_warmup_steps=None, **options)


def jumprelu_terms(ours: gsf.SAE) -> tuple[t.LossTerm, ...]:
    s = ours.semantics
    assert s.l0_square == "batch"
    return t.Reconstruction(), t.QuadraticMeanL0(
        3.0, target=TARGET_L0, normalisation=s.l0_normalisation
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strict", [False, True])
def test_jumprelu(strict: bool, seed: int) -> None:
    (ours, made), x = jumprelu(strict, seed), batch(seed)
    acts = made.ae.encode(x)
    check_forward(ours, x, acts, made.ae.decode(acts))
    loss = made.loss(x, step=0)
    but = () if strict else ("threshold",)
    check_loss(ours, x, jumprelu_terms(ours), loss, parameters(made.ae), but=but)


def test_jumprelu_on_thresholds_and_edges() -> None:
    ours, made = jumprelu(True, 0)
    x = peer.on_the_edges(ours)
    with torch.no_grad():
        ours.threshold.clamp_(min=BANDWIDTH / 2)
    made.ae.load_state_dict(ours.state_dict())
    acts = made.ae.encode(x)
    check_forward(ours, x, acts, made.ae.decode(acts))
    loss = made.loss(x, step=0)
    check_loss(ours, x, jumprelu_terms(ours), loss, parameters(made.ae))


def test_jumprelu_below_half_the_bandwidth() -> None:
    """There the library's L0 sees every inactive latent; ours does under no setting."""
    (ours, made), x = jumprelu(True, 0), batch(0)
    with torch.no_grad():
        ours.threshold[:8] = BANDWIDTH / 4
    made.ae.load_state_dict(ours.state_dict())
    expected = peer.gradients(made.loss(x, step=0), parameters(made.ae))["threshold"]
    loss = ours.loss(x, terms=jumprelu_terms(ours))[0]
    found = peer.our_gradients(ours, loss)["threshold"]
    close(found[8:], expected[8:], "the others")
    l0 = ours.encode(x).l0().mean().item()
    weight = 3.0 * 2 * (l0 / TARGET_L0 - 1) / TARGET_L0 / BANDWIDTH
    inactive = (ours.encode(x).to_dense() == 0).float().mean(0)[:8]
    close(found[:8] - weight * inactive, expected[:8], "inactive latents")


def test_negative_thresholds() -> None:
    (ours, made), x = jumprelu(True, 0), batch(0)
    with torch.no_grad():
        for p in (ours.threshold, made.ae.threshold):
            p.fill_(-0.5)
    negative = ours.encode(x).to_dense() < 0
    assert negative.any() and not made.ae.encode(x)[negative].any()
