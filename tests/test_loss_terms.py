"""The terms of `SAE.loss` beyond the first: on both paths against dense float64 autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import assert_same, dense_jumprelu, dense_selected, topk_support
from test_loss import BANDWIDTH, PATHS, batch, gradients, leaves, sae, transcoder
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import training as t
from gemmascope_fast.training.blocked import count_latents, sae_loss
from gemmascope_fast.training.planning import Limits

OPS = (
    *("jumprelu_encode", "topk_encode", "decode", "encode_backward", "decode_backward"),
    *("sae_backward", "by_feature", "pre_at"),
)
DEAD = torch.arange(37) % 4 == 2
TERMS: dict[str, t.LossTerm] = {
    "width": t.Reconstruction(0.7, "width"),
    "token": t.Reconstruction(0.7, "token"),
    "variance": t.Reconstruction(0.7, "variance"),
    "matryoshka": t.Matryoshka((5, 21, 37), (0.5, 1, 2), 0.7),
    "matryoshka part": t.Matryoshka((5, 21), "mean"),
    "quadratic_l0": t.QuadraticL0(9, 0.3, "1/target^2"),
    "quadratic_mean_l0": t.QuadraticMeanL0(0.3, target=9),
    "frequency": t.Frequency(0.3, w0=0.2),
    "frequency_l0": t.FrequencyL0(0.3, w0=0.2),
    "l1": t.L1(0.3),
    "tanh": t.Tanh(0.3, scale=0.4),
    "tanh unit": t.Tanh(0.3, by_norm=False, scale=0.4),
    "auxk": t.AuxK(DEAD, 4, 0.5),
    "auxk residual": t.AuxK(DEAD, 14, 0.5, "residual"),
    "auxk target": t.AuxK(DEAD.nonzero()[:, 0], 14, 0.5, "target", False, False),
    "auxk unrectified": t.AuxK(DEAD, 7, 0.5, rectified=False),
    "auxk unrectified decoder": t.AuxK(DEAD, 7, 0.5, encoder_gradient=False, rectified=False),
    "pre_act": t.PreAct(DEAD, 0.5),
    "pre_act zero": t.PreAct(DEAD, 0.5, to_threshold=False, by_norm=False),
    "multi_topk": t.MultiTopK((3, 12), (1, 1 / 8), 0.7),
    "multi_topk decoder": t.MultiTopK((3, 12), (1, 1 / 8), 0.7, encoder_gradient=False),
}


class Dense:
    """One evaluation by dense autograd, in the dtype of its inputs."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.p = inputs
        self.x = inputs["x"].reshape(-1, 23)
        self.pre = self.x @ inputs["W_enc"] + inputs["b_enc"]
        self.acts, self.gate = dense_jumprelu(self.pre, inputs["threshold"], BANDWIDTH)
        self.goal = inputs.get("target", inputs["x"]).reshape(-1, inputs["W_dec"].shape[1])
        self.norms = inputs["W_dec"].norm(dim=1)

    def recon(self, acts: Tensor) -> Tensor:
        made = acts @ self.p["W_dec"] + self.p["b_dec"]
        return made + self.x @ self.p["W_skip"] if "W_skip" in self.p else made

    def error(self, acts: Tensor) -> Tensor:
        return (self.recon(acts) - self.goal).square().sum(-1)

    def reconstruction(self, term: t.Reconstruction) -> Tensor:
        error = self.error(self.acts)
        flat = self.goal.detach()
        divisor = {
            "none": 1.0,
            "width": self.goal.shape[1],
            "token": self.goal.square().sum(-1),
            "variance": (flat - flat.mean(0)).square().sum(-1).mean(),
        }[term.normalisation]
        return (error / divisor).mean()

    def matryoshka(self, term: t.Matryoshka) -> Tensor:
        n = len(term.ends)
        weights = (1 / n,) * n if term.weights == "mean" else term.weights
        cut = [torch.where(torch.arange(37) < end, self.acts, 0.0) for end in term.ends]
        return sum(w * self.error(acts).mean() for w, acts in zip(weights, cut, strict=True))

    def quadratic_l0(self, term: t.QuadraticL0) -> Tensor:
        return (self.gate.sum(-1) / term.target - 1).square().mean()

    def quadratic_mean_l0(self, term: t.QuadraticMeanL0) -> Tensor:
        return 2 / term.target * (self.gate.sum(-1).mean() - term.target) ** 2

    def frequency(self, term: t.Frequency) -> Tensor:
        return (self.gate.mean(0) ** 2).sum() / term.w0

    def frequency_l0(self, term: t.FrequencyL0) -> Tensor:
        return self.frequency(term) + self.gate.mean(0).sum()

    def l1(self, term: t.L1) -> Tensor:
        return (self.acts * self.norms).sum(-1).mean()

    def tanh(self, term: t.Tanh) -> Tensor:
        scaled = self.acts * self.norms if term.by_norm else self.acts
        return torch.tanh(term.scale * scaled).sum(-1).mean()

    def auxk(self, term: t.AuxK) -> Tensor:
        residual = (self.goal - self.recon(self.acts)).detach()
        k = min(term.k_aux, int(DEAD.sum()))
        shown = torch.where(DEAD, self.pre, self.pre.new_full((), -1e9))
        acts = dense_selected(shown, lambda pre: topk_support(pre, k)[0])
        if not term.rectified:
            top = shown.topk(k)
            acts = torch.zeros_like(shown).scatter(1, top.indices, top.values)
        made = (acts if term.encoder_gradient else acts.detach()) @ self.p["W_dec"]
        loss = (made - residual).square().sum(-1).mean()
        base = {"residual": residual, "target": self.goal.detach()}.get(term.normalisation)
        if base is not None:
            loss = loss / (base - base.mean(0)).square().sum(-1).mean()
        return loss * min(int(DEAD.sum()) / term.k_aux, 1) if term.scaled else loss

    def pre_act(self, term: t.PreAct) -> Tensor:
        limit = self.p["threshold"] if term.to_threshold else 0.0
        weight = DEAD * self.norms if term.by_norm else DEAD
        return ((limit - self.pre).relu() * weight).sum(-1).mean()

    def multi_topk(self, term: t.MultiTopK) -> Tensor:
        total = self.pre.new_zeros(())
        for k, weight in zip(term.ks, term.weights, strict=True):
            acts = dense_selected(self.pre, lambda pre, k=k: topk_support(pre, k)[0])
            acts = acts if term.encoder_gradient else acts.detach()
            total = total + weight * self.error(acts).mean()
        return total

    def loss(self, terms: tuple[t.LossTerm, ...]) -> Tensor:
        return sum(term.coefficient * getattr(self, term.name)(term) for term in terms)


def truth(
    module: gsf.SAE, x: Tensor, target: Tensor | None, terms: tuple[t.LossTerm, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {k: v.detach().double().requires_grad_() for k, v in leaves(module, x, target).items()}
    loss = Dense(inputs).loss(terms)
    return loss, gradients(loss, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("path", ["dense", "dense tiles", "sparse", "sparse blocks"])
@pytest.mark.parametrize("name", TERMS)
def test_each_term(name: str, path: str) -> None:
    module = (transcoder if len(path) > 6 else sae)(dtype=torch.float64)
    x, target = batch(module, torch.float64)
    terms = (TERMS[name],)
    loss, metrics = sae_loss(module, x, target, terms, PATHS[path])
    true, expected = truth(module, x, target, terms)
    torch.testing.assert_close(loss, true, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(metrics[terms[0].name], loss.detach())
    assert any(g.any() for g in expected.values())
    for field, found in gradients(loss, leaves(module, x, target)).items():
        if field == "target" and name == "variance":  # of which the denominator is a constant
            continue
        torch.testing.assert_close(found, expected[field], rtol=1e-9, atol=1e-11, msg=field)


MIX = tuple(TERMS[n] for n in ("width", "matryoshka", "frequency", "tanh", "auxk", "pre_act"))
MIX = (*MIX, TERMS["multi_topk"], TERMS["quadratic_mean_l0"], t.L0(0.1))


@pytest.mark.parametrize("path", ["dense tiles", "sparse", "sparse blocks"])
def test_all_together(backend: Any, path: str) -> None:
    module = transcoder()
    x, target = batch(module)
    loss, _ = sae_loss(module, x, target, MIX, PATHS[path])
    mixed = tuple(term for term in MIX if term.name != "l0_penalty")
    true, expected = truth(module, x, target, mixed)
    inputs = leaves(module, x, target)
    acts = module.encode(x)
    penalty = 0.1 * acts.l0().mean()
    torch.testing.assert_close(loss.double(), true + penalty.double(), rtol=1e-5, atol=1e-5)
    extra = gradients(penalty, inputs, allow_unused=True, materialize_grads=True)
    for field, found in gradients(loss, inputs).items():
        wanted = expected[field] + extra[field].double()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=2e-4, msg=field)


@pytest.mark.parametrize("path", ["dense tiles", "sparse"])
@pytest.mark.parametrize("frozen", ["W_enc", "W_dec", "x", "b_dec"])
def test_frozen_tensors(path: str, frozen: str) -> None:
    module = transcoder(torch.float64)
    x, target = batch(module, torch.float64)
    inputs = leaves(module, x, target)
    everything = gradients(sae_loss(module, x, target, MIX, PATHS[path])[0], inputs)
    inputs.pop(frozen).requires_grad_(False)
    found = gradients(sae_loss(module, x, target, MIX, PATHS[path])[0], inputs)
    for field, part in found.items():
        torch.testing.assert_close(part, everything[field], msg=field)


def test_without_gradients_and_in_blocks_of_rows() -> None:
    module = sae(dtype=torch.float64)
    x, _ = batch(module, torch.float64)
    loss = sae_loss(module, x, None, MIX, PATHS["sparse"])[0]
    with torch.no_grad():
        for path in PATHS.values():
            torch.testing.assert_close(sae_loss(module, x, None, MIX, path)[0], loss.detach())


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_topk_takes_terms_over_entries_and_prefixes(name: str) -> None:
    module = sae(gsf.TopK(5) if name == "topk" else gsf.BatchTopK(4.5), torch.float64)
    x, _ = batch(module, torch.float64)
    terms = (TERMS["matryoshka"], TERMS["tanh"], TERMS["frequency"], TERMS["auxk"])
    loss = sae_loss(module, x, None, terms, Limits(entry_bytes=40 * 5 * 10))[0]
    acts = module.encode(x)
    prefix = t.Matryoshka((5, 21, 37), (0.5, 1, 2), 0.7)
    args = (module.W_enc, module.b_enc, module.W_dec, DEAD, 4)
    expected = (
        0.7
        * gsf.losses.matryoshka(acts, module.W_dec, module.b_dec, x, prefix.ends, prefix.weights)
        + 0.3 * gsf.losses.tanh(acts, module.W_dec, 0.4)
        + 0.3 * gsf.losses.frequency(acts, 0.2)
        + 0.5 * gsf.losses.auxk(x, module.decode(acts), x, *args)
    )
    torch.testing.assert_close(loss, expected)
    inputs = leaves(module, x, None)
    wanted = gradients(expected, inputs)
    for field, found in gradients(loss, inputs).items():
        torch.testing.assert_close(found, wanted[field], msg=field)


@pytest.mark.parametrize("path", ["dense tiles", "sparse", "sparse blocks"])
@pytest.mark.parametrize("name", ["quadratic_mean_l0", "frequency", "frequency_l0"])
def test_parts_of_a_batch(name: str, path: str) -> None:
    module = sae(dtype=torch.float64)
    x = torch.randn(40, 23, dtype=torch.float64)
    whole, _ = sae_loss(module, x, None, (TERMS[name],), PATHS[path])
    counts, tokens = module.count_latents(x)
    assert_same(counts, (module.encode(x).to_dense() != 0).sum(0))
    parts = [count_latents(module, part, PATHS[path]) for part in x.split(20)]
    assert_same(sum(c for c, _ in parts), counts)
    assert tokens == 40 == sum(n for _, n in parts)
    term = replace(TERMS[name], counts=counts, tokens=tokens)
    losses = [sae_loss(module, part, None, (term,), PATHS[path])[0] for part in x.split(20)]
    for loss in losses:
        torch.testing.assert_close(loss, whole)
    mean = torch.autograd.grad(sum(losses) / 2, module.threshold)[0]
    expected = torch.autograd.grad(whole, module.threshold)[0]
    assert expected.any()
    torch.testing.assert_close(mean, expected)


def test_same_bits_twice_and_in_either_mode(backend: Any) -> None:
    module = sae()
    x, _ = batch(module)
    runs = []
    for _ in range(2):
        loss, _ = sae_loss(module, x, None, MIX, PATHS["sparse blocks"])
        runs.append((loss.detach(), *gradients(loss, leaves(module, x, None)).values()))
    for first, second in zip(*runs, strict=True):
        assert_same(first, second)


def test_an_empty_batch_and_no_dead_latents() -> None:
    module = sae()
    x = torch.zeros(0, 23, requires_grad=True)
    loss, _ = module.loss(x, terms=MIX)
    assert loss == 0
    loss.backward()
    assert not any(p.grad.any() for p in module.parameters())
    none = torch.zeros(37, dtype=torch.bool)
    loss, _ = module.loss(batch(module)[0], terms=(t.AuxK(none, 4), t.PreAct(none, 1.0)))
    assert loss == 0


def test_batchtopk_moves_its_running_threshold_once_per_loss() -> None:
    semantics = gsf.Semantics.preset("dictionary_learning_0_1")
    module = gsf.SAE(23, 37, gsf.BatchTopK(4.5), semantics=semantics)
    x = torch.randn(39, 23)
    module.loss(x)
    moved = float(module.ema_threshold)
    acts = module.encode(x)
    assert moved == float(acts.values[acts.gate > 0].min()) == float(module.ema_threshold)
    module.eval()
    loss, metrics = module.loss(2 * x)
    assert float(module.ema_threshold) == moved
    acts = module.encode(2 * x)
    torch.testing.assert_close(metrics["l0"], acts.l0().mean())
    assert metrics["l0"] > 4.5
    expected = (module.decode(acts) - 2 * x).square().sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()


ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: t.Reconstruction(normalisation="x"), "Reconstruction: normalisation must be one of"),
    (lambda: t.Matryoshka((3, 3)), "Matryoshka: ends must ascend from 1"),
    (lambda: t.Matryoshka((3,), (1, 2)), "Matryoshka: 1 weights are needed, got 2"),
    (lambda: t.Frequency(-1.0), "Frequency: coefficient must be finite and >= 0"),
    (lambda: t.Frequency(1.0, tokens=3), "Frequency: counts and tokens go together"),
    (lambda: t.FrequencyL0(1.0, w0=0), "FrequencyL0: w0 must be finite and > 0"),
    (lambda: t.QuadraticMeanL0(1.0), "QuadraticMeanL0: target must be finite and > 0"),
    (lambda: t.Tanh(1.0, scale=-1), "Tanh: scale must be finite and >= 0"),
    (lambda: t.L1(1.0, by_norm=2), "L1: by_norm must be a bool, got 2"),
    (lambda: t.AuxK(DEAD, 0), "AuxK: k_aux must be >= 1, got 0"),
    (lambda: t.MultiTopK(()), "MultiTopK: ks must not be empty"),
    (
        lambda: sae().loss(torch.ones(2, 23), terms=[t.Matryoshka((3, 40))]),
        "loss: matryoshka has a prefix of 40 latents, and d_sae=37",
    ),
    (
        lambda: sae().loss(torch.ones(2, 23), terms=[t.MultiTopK((3, 40))]),
        r"loss: multi_topk: ks\[1\] must be in \[0, d_sae=37\], got 40",
    ),
    (
        lambda: sae().loss(torch.ones(2, 23), terms=[t.PreAct(DEAD[:5], 1.0)]),
        r"loss: pre_act: mask must have shape \[d_sae=37\], got \(5,\)",
    ),
    (
        lambda: sae().loss(
            torch.ones(2, 23), terms=[t.Frequency(1.0, counts=torch.ones(5), tokens=4)]
        ),
        r"loss: frequency: counts must have shape \[d_sae=37\], got \(5,\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
