"""`Semantics.preset("saelens_6")` against SAELens' own modules and their training losses.

Not reproduced, on purpose: SAELens' inference rectifies before its gate, so that a negative
threshold passes nothing below 0 (ours passes it; SAELens clamps thresholds at 0 while it trains),
and a decoder row of norm 0 makes its TopK NaN (ours divides by at least 1e-8).
"""

from __future__ import annotations

from typing import Any

import peer
import pytest
import torch
from peer import BANDWIDTH, DEAD, SEEDS, D, F, batch, check_forward, check_loss, close, module
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import Semantics
from gemmascope_fast import training as t

saes = pytest.importorskip("sae_lens.saes", reason="sae-lens is not installed: see `make peers`")
CLASSES = {
    "jumprelu": (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig),
    "topk": (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig),
    "batchtopk": (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig),
    "matryoshka": (saes.MatryoshkaBatchTopKTrainingSAE, saes.MatryoshkaBatchTopKTrainingSAEConfig),
    "inference": (saes.JumpReLUSAE, saes.JumpReLUSAEConfig),
}


def theirs(kind: str, ours: gsf.SAE, **options: Any) -> Any:
    """SAELens' module with the weights of ours."""
    cls, config = CLASSES[kind]
    made = cls(config(d_in=D, d_sae=F, **options))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            getattr(made, name).copy_(p)
    return made


def parameters(other: Any) -> peer.Parameters:
    return {name: (p, lambda grad: grad) for name, p in other.named_parameters()}


def training_loss(other: Any, x: Tensor, l0: float = 0.0, dead: Tensor | None = None) -> Tensor:
    given = saes.sae.TrainStepInput(x, {"l0": l0}, dead, 0, False)
    loss: Tensor = other.training_forward_pass(given).loss
    return loss


def jumprelu(seed: int, mode: str = "step", **options: Any) -> tuple[gsf.SAE, Any]:
    to_input, centred = options.get("jumprelu_ste_to_input"), options.get("apply_b_dec_to_input")
    changes = {"gradient_to_x": True} if to_input else {}
    changes |= {} if centred is None else {"center": centred}
    semantics = Semantics.preset("saelens_6", **changes)
    ours = module(gsf.JumpReLU(BANDWIDTH), semantics, seed)
    made = {"jumprelu_bandwidth": BANDWIDTH, "jumprelu_sparsity_loss_mode": mode, **options}
    return ours, theirs("jumprelu", ours, **made)


PENALTIES: dict[str, tuple[dict[str, Any], t.LossTerm]] = {
    "step": ({}, t.L0(0.3)),
    "tanh": ({"jumprelu_tanh_scale": 3.0}, t.Tanh(0.3, scale=3.0)),
    "quadratic": ({"target_l0": 15.0}, t.QuadraticL0(15.0, 0.3)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("changed", [{}, {"jumprelu_ste_to_input": True}], ids=str)
@pytest.mark.parametrize("mode", PENALTIES)
def test_jumprelu(mode: str, changed: dict[str, Any], seed: int) -> None:
    options, term = PENALTIES[mode]
    ours, other = jumprelu(seed, mode, **options, **changed)
    for x in (batch(seed), batch(seed).view(8, 5, D)):
        check_forward(ours, x, other.encode(x), other(x))
    check_loss(
        *(ours, batch(seed), (t.Reconstruction(), term)),
        *(training_loss(other, batch(seed), 0.3), parameters(other)),
    )


@pytest.mark.parametrize("changed", [{}, {"jumprelu_ste_to_input": True}], ids=str)
@pytest.mark.parametrize("mode", PENALTIES)
@pytest.mark.parametrize("centred", [True, False])
def test_jumprelu_on_thresholds_and_edges(
    mode: str, changed: dict[str, Any], centred: bool
) -> None:
    options, term = PENALTIES[mode]
    ours, other = jumprelu(0, mode, apply_b_dec_to_input=centred, **options, **changed)
    x = peer.on_the_edges(ours)
    other.load_state_dict(ours.state_dict())
    check_forward(ours, x, other.encode(x), other(x))
    loss = training_loss(other, x, 0.3)
    check_loss(ours, x, (t.Reconstruction(), term), loss, parameters(other))


@pytest.mark.parametrize("dead", DEAD)
def test_jumprelu_pre_act_loss(dead: str) -> None:
    ours, other = jumprelu(0, "tanh", pre_act_loss_coefficient=0.2)
    terms = (t.Reconstruction(), t.Tanh(0.3), t.PreAct(DEAD[dead], 0.2))
    loss = training_loss(other, batch(0), 0.3, DEAD[dead])
    check_loss(ours, batch(0), terms, loss, parameters(other))


def test_jumprelu_inference() -> None:
    ours, _ = jumprelu(0)
    x = batch(0)
    other = theirs("inference", ours)
    check_forward(ours, x, other.encode(x), other(x))
    with torch.no_grad():
        for made in (ours, other):
            made.threshold.fill_(-0.5)
    negative = ours.encode(x).to_dense() < 0
    assert negative.any()
    assert not other.encode(x)[negative].any()


RESCALE: dict[bool, tuple[dict[str, Any], dict[str, Any]]] = {
    True: ({}, {}),  # the defaults of both
    False: ({"rescale": False}, {"rescale_acts_by_decoder_norm": False}),
}
SELECTED: dict[str, tuple[float, float]] = {
    "few": (5, 0.0),
    "more than are positive": (60, -0.8),
    "all": (F, 0.0),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dead", [None, *DEAD])
@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_selecting(kind: str, selected: str, dead: str | None, rescale: bool, seed: int) -> None:
    k, shift = SELECTED[selected]
    k = k - 0.55 if kind == "batchtopk" else k
    activation = gsf.TopK(int(k)) if kind == "topk" else gsf.BatchTopK(k)
    mine, changes = RESCALE[rescale]
    semantics = Semantics.preset("saelens_6", **mine)
    ours, x = module(activation, semantics, seed, shift=shift), batch(seed)
    other = theirs(kind, ours, k=k, aux_loss_coefficient=0.5, **changes)
    check_forward(ours, x, other.encode(x), other(x))
    terms: list[t.LossTerm] = [t.Reconstruction()]
    if dead is not None:
        terms.append(t.AuxK(DEAD[dead], D // 2, 0.5, **semantics.auxk_options()))
    loss = training_loss(other, x, dead=None if dead is None else DEAD[dead])
    check_loss(ours, x, terms, loss, parameters(other))


def test_matryoshka() -> None:
    ends = (10, 33, F)
    semantics = Semantics.preset("saelens_6")
    ours, x = module(gsf.BatchTopK(6.5), semantics, 0), batch(0)
    other = theirs("matryoshka", ours, k=6.5, matryoshka_widths=list(ends))
    aux = t.AuxK(DEAD["many"], D // 2, 1.0, **semantics.auxk_options())
    loss = training_loss(other, x, dead=DEAD["many"])
    check_loss(ours, x, (t.Matryoshka(ends), aux), loss, parameters(other))


@pytest.mark.parametrize("rescale", [True, False])
def test_batchtopk_threshold_and_its_jumprelu(rescale: bool) -> None:
    mine, changes = RESCALE[rescale]
    ours = module(gsf.BatchTopK(4.5), Semantics.preset("saelens_6", **mine), 0)
    other = theirs("batchtopk", ours, k=4.5, **changes)
    for step in range(5):
        x = batch(step) * (step + 1)
        training_loss(other, x)
        ours.encode(x)
        close(ours.ema_threshold, other.topk_threshold, "running threshold")
    state = other.state_dict()
    other.process_state_dict_for_saving_inference(state)
    saved = CLASSES["inference"][0](CLASSES["inference"][1](d_in=D, d_sae=F))
    saved.load_state_dict(state)
    plain, x = ours.to_jumprelu(), batch(9)
    check_forward(plain, x, saved.encode(x), saved(x))
    recon = saved(x)
    check_forward(ours.eval(), x, saved.encode(x), recon)


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("how", ["constant_norm_rescale", "layer_norm"])
def test_normalised_inputs(kind: str, how: str) -> None:
    """SAELens normalises each token and undoes it afterwards; ours is given what it would see."""
    activation = {"jumprelu": gsf.JumpReLU(BANDWIDTH), "topk": gsf.TopK(7)}
    ours = module(activation.get(kind, gsf.BatchTopK(7)), Semantics.preset("saelens_6"), 0)
    options = {"jumprelu_bandwidth": BANDWIDTH} if kind == "jumprelu" else {"k": 7}
    other = theirs(kind, ours, normalize_activations=how, **options)
    x = batch(0) * 5
    mean = x.mean(-1, keepdim=True) if how == "layer_norm" else torch.zeros(len(x), 1)
    spread = (x - mean).std(-1, keepdim=True)
    norm = x.norm(dim=-1, keepdim=True) / D**0.5
    inner = (x - mean) / (spread + 1e-5) if how == "layer_norm" else x / norm
    acts = ours.encode(inner)
    close(acts.to_dense(), other.encode(x), "acts")
    recon = ours.decode(acts) * (spread if how == "layer_norm" else norm) + mean
    close(recon, other(x), "recon")
    loss = gsf.losses.squared_error(recon, x)
    expected = peer.gradients(training_loss(other, x), parameters(other))
    for name, found in peer.our_gradients(ours, loss).items():
        close(found, expected[name], name)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_folded_scale(kind: str) -> None:
    """`normalize_activations="expected_average_only_in"`: trained on scaled inputs, then folded."""
    activation = gsf.JumpReLU(BANDWIDTH) if kind == "jumprelu" else gsf.TopK(7)
    ours = module(activation, Semantics.preset("saelens_6"), 0)
    other = theirs(kind, ours, **({"k": 7} if kind == "topk" else {}))
    scale, x = 2.5, batch(0)
    other.fold_activation_norm_scaling_factor(scale)
    rescaled = 1 / scale if kind == "topk" else 1.0  # by the norms, which shrank
    close(ours.encode(scale * x).to_dense() * rescaled, other.encode(x), "acts")
    close(ours(scale * x) / scale, other(x), "recon")


def test_decoder_rows_of_norm_0() -> None:
    ours, x = module(gsf.TopK(7), Semantics.preset("saelens_6"), 0), batch(0)
    with torch.no_grad():
        ours.W_dec[3] = 0
    other = theirs("topk", ours, k=7)
    assert other(x).isnan().any()
    assert ours(x).isfinite().all()
