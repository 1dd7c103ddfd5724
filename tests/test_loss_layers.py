"""`loss` of crosscoders and cross-layer transcoders against dense autograd in float64."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from oracle import assert_close_to_truth, assert_same
from test_multilayer import D, F, L, build, dense, parameters
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import BatchTopK, CrossLayerTranscoder, JumpReLU, TopK
from gemmascope_fast.multilayer import MultiLayer
from gemmascope_fast.training import (
    L0,
    L1,
    AuxK,
    Frequency,
    Matryoshka,
    PreAct,
    QuadraticL0,
    QuadraticMeanL0,
    Reconstruction,
    Tanh,
    dense_paths,
)
from gemmascope_fast.training.layered import count_layered, layered_loss
from gemmascope_fast.training.planning import ENTRY_BYTES, Limits

KINDS = ["crosscoder", "clt", "affine clt"]
TERMS = (Reconstruction(0.7), L0(0.3), QuadraticL0(target=9, coefficient=0.05))
PATHS = {
    "dense": Limits(crossover=0.0),
    "dense tiles": Limits(span_rows=16, tile_bytes=1 << 10, crossover=0.0),
    "sparse": Limits(crossover=1.0),
    "sparse blocks": Limits(span_rows=16, entry_bytes=4000, crossover=1.0),
}


def batch(module: MultiLayer, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """`x [3, 13, L, D]` and a target, both leaves; no target for a crosscoder."""
    x = torch.randn(3, 13, module.n_layers, D).to(dtype).requires_grad_()
    if not isinstance(module, CrossLayerTranscoder):
        return x, None
    return x, torch.randn(3, 13, module.n_layers, D).to(dtype).requires_grad_()


def written_out(recon: Tensor, target: Tensor, l0: Tensor) -> Tensor:
    """`TERMS` by their formulas; recon and target `[n, L, D]`, l0 `[n, L]`."""
    error, total = (recon - target).square().sum((-2, -1)), l0.sum(-1)
    return (0.7 * error + 0.3 * total + 0.05 * 2 / 9 * (total - 9).square()).mean()


def truth(
    module: MultiLayer, x: Tensor, target: Tensor | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, its gradients (x, target, parameters), recon and l0 of dense autograd."""
    p = parameters(module, dtype)
    given = [t.detach().to(dtype).requires_grad_() for t in (x, target) if t is not None]
    flat = [t.view(-1, *t.shape[-2:]) for t in given]
    recon, l0 = dense(module, p, flat[0])
    loss = written_out(recon, flat[-1], l0)
    wanted = [*given, *(t for t in p.values() if t.requires_grad)]
    return loss, list(torch.autograd.grad(loss, wanted)), [recon.detach(), l0.detach()]


def assert_loss(module: MultiLayer, limits: Limits, dtype: torch.dtype = torch.float32) -> Any:
    """Loss and every gradient are those of dense autograd; returns the metrics."""
    x, target = batch(module, dtype)
    expected, theirs = truth(module, x, target), truth(module, x, target, torch.float32)
    loss, metrics = layered_loss(module, x, target, TERMS, limits)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = {"x": x, **({} if target is None else {"target": target}), **trained}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    size = 39 * L * 8
    assert_close_to_truth(loss, theirs[0], expected[0], loss.dtype, "loss", terms=size)
    for (name, leaf), own, other, true in zip(
        leaves.items(), grads, theirs[1], expected[1], strict=True
    ):
        assert own.dtype == leaf.dtype and own.shape == leaf.shape
        if name != "x" and name != "target":
            assert own.stride() == leaf.stride(), name
        assert_close_to_truth(own, other, true, own.dtype, name, terms=size)
    recon, l0 = expected[2]
    goal = (x if target is None else target).detach().double().view(-1, L, D)
    fvu = (recon - goal).square().sum() / (goal - goal.mean(0)).square().sum()
    torch.testing.assert_close(metrics["fvu"].double(), fvu, rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["l0"].double(), l0.sum(-1).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["density"], metrics["l0"] / (L * F))
    return metrics


# ---- values and gradients


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_jumprelu(kind: str, path: str) -> None:
    metrics = assert_loss(build(kind), PATHS[path])
    blocks, tiles = int(metrics["blocks"]), int(metrics["dense_blocks"])
    cut = {"dense": 1, "sparse": 1, "dense tiles": 8}  # of 6 rows in spans of 16
    assert blocks == L * cut[path] if path in cut else blocks > 8 * L
    assert tiles == (blocks if path.startswith("dense") else 0)


@pytest.mark.parametrize("packed", [False, [True, False, True]], ids=str)
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_decoder_that_writes_backwards(packed: Any, path: str) -> None:
    assert_loss(build("affine clt", packed=packed), PATHS[path])


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(2.5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_selecting_activations(kind: str, activation: Any) -> None:
    metrics = assert_loss(build(kind, activation), Limits(entry_bytes=4000))
    assert int(metrics["dense_blocks"]) == 0
    rows = 39 if isinstance(activation, BatchTopK) else 4000 // ENTRY_BYTES // (3 * L)
    assert int(metrics["blocks"]) == L * -(-39 // rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_dtypes(dtype: torch.dtype, path: str) -> None:
    module = build("affine clt", dtype=dtype)
    if dtype == torch.float64:
        assert_loss(module, PATHS[path], dtype)
        return
    x, target = batch(module, dtype)
    wide = build("affine clt").double()
    with torch.no_grad():
        for p, q in zip(wide.parameters(), module.parameters(), strict=True):
            p.copy_(q)
    loss, _ = layered_loss(module, x, target, TERMS, PATHS[path])
    expected, _, _ = truth(wide, x, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_layers_decide_by_themselves() -> None:
    """One layer is dense, the others are not: the same result as by one path."""
    module = build("affine clt")
    with torch.no_grad():
        module.threshold[1].fill_(-5.0)  # all of its latents are active
    metrics = assert_loss(module, Limits(crossover=0.9))
    assert (int(metrics["blocks"]), int(metrics["dense_blocks"])) == (L, 1)
    metrics = assert_loss(module, Limits(crossover=0.9, tile_bytes=10 * F * 4))
    assert (int(metrics["blocks"]), int(metrics["dense_blocks"])) == (4 * L, 4)


def test_one_tile_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = dense_paths.dense_tile

    def counted(*args: Any) -> Any:
        assert not any(tile() is not None for tile in made)
        tile = make(*args)
        made.append(weakref.ref(tile))
        return tile

    monkeypatch.setattr(dense_paths, "dense_tile", counted)
    x, target = batch(module := build("affine clt"))
    layered_loss(module, x, target, TERMS, PATHS["dense"])
    assert len(made) == 2 * L - 1


def test_the_paths_agree_on_a_batch_with_nan() -> None:
    module = build("crosscoder")
    x, _ = batch(module)
    with torch.no_grad():
        x[1, 2, 1, 3] = torch.nan
    for path in ("dense", "sparse"):
        loss, metrics = layered_loss(module, x, None, TERMS, PATHS[path])
        assert bool(loss.isnan()) and bool(metrics["fvu"].isnan())


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(path: str) -> None:
    module = build("affine clt")
    x = torch.zeros(0, L, D)
    loss, _ = layered_loss(module, x, x, TERMS, PATHS[path])
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_what_needs_no_gradient_has_none() -> None:
    module = build("affine clt")
    x, target = batch(module)
    frozen = ["W_enc.1", "W_dec.0", "threshold.2", "b_dec", "W_skip.2"]
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)
    expected = truth(module, x, target)[1][2:]
    for path in ("dense", "sparse"):
        module.zero_grad()
        loss, _ = layered_loss(module, x.detach(), target.detach(), TERMS, PATHS[path])
        loss.backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        for p, true in zip(trained, expected, strict=True):
            torch.testing.assert_close(p.grad.double(), true, rtol=1e-3, atol=1e-4)
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    with torch.no_grad():
        loss, _ = module.loss(x, target, TERMS)
    assert not loss.requires_grad


# ---- other terms


def whole(module: MultiLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, gates `[n, L * F]` and the norms of the decoder rows `[L * F]`, dense."""
    acts, gates, norms = [], [], []
    for i, part in enumerate(x.view(-1, L, D).unbind(1)):
        pre = part @ module.W_enc[i] + module.b_enc[i]
        theta, width = module.threshold[i], module.activation.bandwidth
        step = ((pre - theta).abs() < width / 2) * (theta.detach() - theta) / width
        on = (pre > theta).to(pre.dtype)
        acts.append(pre * on + theta.detach() * step)
        gates.append(on + step)
        norms.append(module.W_dec[i].norm(dim=1))
    return torch.cat(acts, 1), torch.cat(gates, 1), torch.cat(norms)


EXTRA: dict[str, tuple[Any, Any]] = {
    "l1": (L1(0.2, by_norm=False), lambda a, g, w: 0.2 * a.sum(1).mean()),
    "l1 by norm": (L1(0.2, by_norm=True), lambda a, g, w: 0.2 * (a * w).sum(1).mean()),
    "tanh by norm": (
        Tanh(0.2, scale=0.5, by_norm=True),
        lambda a, g, w: 0.2 * torch.tanh(0.5 * a * w).sum(1).mean(),
    ),
    "frequency": (
        Frequency(0.3, w0=0.2),
        lambda a, g, w: 0.3 * g.mean(0).square().sum() / 0.2,
    ),
    "mean l0": (
        QuadraticMeanL0(0.1, target=4.0),
        lambda a, g, w: 0.1 * 2 / 4 * (g.sum(1).mean() - 4).square(),
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", EXTRA)
def test_terms_of_activations_and_firing_rates(name: str, path: str) -> None:
    term, formula = EXTRA[name]
    module = build("crosscoder", dtype=torch.float64)
    x, _ = batch(module, torch.float64)
    loss, metrics = layered_loss(module, x, None, (Reconstruction(), term), PATHS[path])
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad(loss, wanted)
    expected = formula(*whole(module, x))
    torch.testing.assert_close(metrics[term.name], expected.detach())
    recon, _ = dense(module, dict(module.named_parameters()), x.view(-1, L, D))
    expected = expected + (recon - x.view(-1, L, D)).square().sum((1, 2)).mean()
    torch.testing.assert_close(loss, expected)
    for ours, true in zip(found, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, true)


def dead_of(module: MultiLayer) -> Tensor:
    """Some latents of the first and the last layer, none of the one between."""
    dead = torch.zeros(L, F, dtype=torch.bool)
    dead[0, ::3] = dead[2, 5:9] = True
    return dead.flatten()


def revived(module: MultiLayer, term: AuxK, x: Tensor, target: Tensor) -> Tensor:
    """The term by its formula, dense; x and target `[n, L, D]`."""
    p, dead = dict(module.named_parameters()), dead_of(module).view(L, F)
    residual = (target - dense(module, p, x)[0]).detach()
    found = torch.zeros_like(residual)
    for i in range(L):
        weights = [p[f"W_enc.{i}"][:, dead[i]], p[f"b_enc.{i}"][dead[i]]]
        pre = x[:, i] @ (weights[0] if term.encoder_gradient else weights[0].detach())
        pre = pre + (weights[1] if term.encoder_gradient else weights[1].detach())
        pre = pre if term.encoder_gradient else pre.detach()
        k = min(term.k_aux, int(dead[i].sum()))
        values, at = pre.topk(k)
        acts = torch.zeros_like(pre).scatter(1, at, values.relu() if term.rectified else values)
        W_dec = p[f"W_dec.{i}"].view(F, -1, D)[dead[i]]
        written = torch.einsum("nf,fjd->njd", acts, W_dec)
        found = found + torch.nn.functional.pad(written, (0, 0, L - W_dec.shape[1], 0))
    share = min(int(dead.sum()) / L / term.k_aux, 1.0) if term.scaled else 1.0
    v = torch.ones(())
    if term.normalisation != "none":
        flat = (residual if term.normalisation == "residual" else target.detach()).flatten(1)
        v = (flat - flat.mean(0)).square().sum(1).mean()
    return term.coefficient * share * (found - residual).square().sum((1, 2)).mean() / v


AUXK: dict[str, dict[str, Any]] = {
    "plain": {},
    "few": {"k_aux": 20},
    "unscaled, by the residual": {"scaled": False, "normalisation": "residual", "k_aux": 20},
    "by the target": {"normalisation": "target"},
    "negative too": {"rectified": False},
    "decoder only": {"encoder_gradient": False},
}


@pytest.mark.parametrize("name", AUXK)
@pytest.mark.parametrize("kind", KINDS)
def test_dead_latents_reconstruct_the_residual_of_all_layers(kind: str, name: str) -> None:
    module = build(kind, TopK(3), dtype=torch.float64, packed=[True, False, True])
    term = AuxK(**({"dead": dead_of(module), "k_aux": 3, "coefficient": 0.3} | AUXK[name]))
    x, target = batch(module, torch.float64)
    wanted = [*((x,) if target is None else (x, target)), *module.parameters()]
    for limits in (Limits(), Limits(entry_bytes=4000)):
        active: list[Tensor] = []
        loss, metrics = layered_loss(
            module, x, target, (Reconstruction(), term), limits, active=active
        )
        found = torch.autograd.grad(loss, wanted)
        flat = [t.view(-1, L, D) for t in (x, x if target is None else target)]
        expected = revived(module, term, *flat)
        torch.testing.assert_close(metrics["auxk"], expected.detach())
        recon, _ = dense(module, dict(module.named_parameters()), flat[0])
        expected = expected + (recon - flat[1]).square().sum((1, 2)).mean()
        torch.testing.assert_close(loss, expected)
        for ours, true in zip(found, torch.autograd.grad(expected, wanted), strict=True):
            torch.testing.assert_close(ours, true)
        with torch.no_grad():
            fired = torch.cat([acts.fired() for acts in module.encode(x)])
        assert_same(torch.cat(active), fired)


@pytest.mark.parametrize("path", PATHS)
def test_dead_latents_of_a_jumprelu_on_every_path(path: str) -> None:
    module = build("affine clt")
    term = AuxK(dead_of(module), 3, 0.3)
    x, target = batch(module)
    assert target is not None
    alone, _ = layered_loss(module, x, target, (Reconstruction(),), PATHS[path])
    both, metrics = layered_loss(module, x, target, (Reconstruction(), term), PATHS[path])
    flat = x.view(-1, L, D), target.view(-1, L, D)
    expected = revived(module, term, *flat)
    torch.testing.assert_close(metrics["auxk"], expected.detach())
    parameters = list(module.parameters())
    first, second, only = (
        torch.autograd.grad(value, parameters, allow_unused=True)
        for value in (alone, both, expected)
    )
    for a, b, c in zip(first, second, only, strict=True):
        torch.testing.assert_close(
            b - a, torch.zeros_like(a) if c is None else c, atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("path", PATHS)
def test_counts_of_latents(path: str) -> None:
    module = build("affine clt")
    x, _ = batch(module)
    counts, tokens = count_layered(module, x, PATHS[path])
    assert tokens == 39
    assert_same(counts, torch.cat([acts.counts().long() for acts in module.encode(x)]))
    assert_same(counts, module.count_latents(x)[0])


def test_counts_of_a_larger_batch() -> None:
    """Halves of a batch, each told the counts of both, have its gradients on average."""
    module = build("crosscoder", dtype=torch.float64)
    x = torch.randn(20, L, D, dtype=torch.float64)
    whole_batch, _ = module.loss(x, None, (Reconstruction(), Frequency(0.3, w0=0.2)))
    expected = torch.autograd.grad(whole_batch, list(module.parameters()))
    counts, tokens = module.count_latents(x)
    term = Frequency(0.3, w0=0.2, counts=counts, tokens=tokens)
    halves = [module.loss(part, None, (Reconstruction(), term))[0] for part in x.chunk(2)]
    found = torch.autograd.grad(sum(halves) / 2, list(module.parameters()))
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, true)


# ---- frozen encoders, autocast


def test_frozen_weights_leave_the_loss_as_it_is() -> None:
    """Also where they are rounded, or were changed since: their codes would be of other weights."""
    module = gsf.Crosscoder(L, 128, 300, gsf.JumpReLU(0.5, 1.8))
    x = torch.randn(40, L, 128)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = module.loss(x, x, TERMS)
    module.freeze()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(module.loss(x, x, TERMS)[0], rounded.detach())
    with torch.no_grad():
        module.W_enc[1].neg_()
    found, _ = module.loss(x, x, TERMS)
    module.unfreeze()
    assert_same(found, module.loss(x, x, TERMS)[0].detach())


def test_a_bias_of_any_strides() -> None:
    module, x = build("crosscoder"), torch.randn(4, L, D)
    expected = torch.autograd.grad(module.loss(x)[0], module.b_dec)[0]
    module.b_dec = torch.nn.Parameter(module.b_dec.detach().t().contiguous().t())
    assert_same(torch.autograd.grad(module.loss(x)[0], module.b_dec)[0], expected)


def test_autocast_rounds_the_matrices() -> None:
    module, other = build("affine clt"), build("affine clt", dtype=torch.bfloat16)
    x, target = batch(module)
    with torch.no_grad():
        for p, q in zip(other.parameters(), module.parameters(), strict=True):
            p.copy_(q)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = layered_loss(module, x, target, TERMS, PATHS["sparse"])
    expected, _ = layered_loss(other, x.bfloat16(), target, TERMS, PATHS["sparse"])
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


# ---- errors


WRONG: dict[str, tuple[Any, str]] = {
    "no layers": (lambda m, x: m.loss(x[..., 0, :]), "loss: x must have shape .*n_layers=3"),
    "fewer": (lambda m, x: m.loss(x[..., :2, :]), "loss: x must have shape .*n_layers=3"),
    "integers": (lambda m, x: m.loss(x.long()), "loss: x must be"),
    "no target": (lambda m, x: m.loss(x), "loss: target is needed"),
    "short target": (lambda m, x: m.loss(x, x[:1]), "loss: target must have shape"),
    "meta": (lambda m, x: m.loss(x.to("meta"), x), "loss: x must have values"),
    "no terms": (lambda m, x: m.loss(x, x, []), "terms must not be empty"),
    "matryoshka": (lambda m, x: m.loss(x, x, [Matryoshka((2, F))]), "matryoshka .*one layer"),
    "auxk": (lambda m, x: m.loss(x, x, [AuxK(torch.ones(F, dtype=torch.bool), 2)]), "loss: auxk"),
    "pre_act": (
        lambda m, x: m.loss(x, x, [PreAct(torch.ones(L * F, dtype=torch.bool), 2.0)]),
        "pre_act is for dictionaries of one layer",
    ),
    "counts": (
        lambda m, x: m.loss(x, x, [Frequency(0.1, counts=torch.ones(F), tokens=3)]),
        "frequency: counts must",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call(build("clt"), torch.randn(3, 13, L, D))


def test_a_bandwidth_of_zero() -> None:
    module = build("crosscoder", JumpReLU(0.0, 0.2))
    with pytest.raises(ValueError, match="bandwidth is 0"):
        module.loss(torch.randn(4, L, D))
    module.threshold.requires_grad_(False)
    module.loss(torch.randn(4, L, D))[0].backward()


def test_second_derivatives_are_refused() -> None:
    module = build("crosscoder")
    loss, _ = module.loss(torch.randn(4, L, D))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, list(module.parameters()), create_graph=True)


def test_a_scaled_loss_scales_the_gradients() -> None:
    module, x = build("crosscoder"), torch.randn(4, L, D)
    plain = torch.autograd.grad(module.loss(x)[0], list(module.parameters()))
    scaled = torch.autograd.grad(module.loss(x)[0] * 0.5, list(module.parameters()))
    for one, other in zip(plain, scaled, strict=True):
        assert_same(one * 0.5, other)


def test_the_same_bits_every_run() -> None:
    module, x = build("affine clt"), torch.randn(50, L, D)
    first, second = (
        torch.autograd.grad(module.loss(x, x, TERMS)[0], list(module.parameters()))
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert_same(one, other)
