"""`gsf.losses`: values and gradients against dense autograd in float64; parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_close_to_truth, dense_jumprelu, dense_selected, topk_support
from samples import Problem, problem
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.losses import dead as dead_losses

OPS = (
    *("jumprelu_encode", "topk_encode", "decode", "encode_backward", "decode_backward"),
    "by_feature",
)
BANDWIDTH = 0.4
DEAD = torch.arange(37) % 3 == 1
N = 13


def sparse(p: Problem) -> gsf.SparseActs:
    return gsf.jumprelu_encode(*p.encoder, p.threshold, bandwidth=BANDWIDTH)


def dense(p: Problem) -> tuple[Tensor, Tensor]:
    """`(acts, gate)`."""
    return dense_jumprelu(p.x @ p.W_enc + p.b_enc, p.threshold, BANDWIDTH)


def norms(p: Problem) -> Tensor:
    return p.W_dec.norm(dim=1)


def error(recon: Tensor, target: Tensor) -> Tensor:
    return (recon - target).square().sum(-1).mean()


def recon(p: Problem, acts: Tensor) -> Tensor:
    return acts @ p.W_dec + p.b_dec


def target(p: Problem) -> Tensor:
    return p.x.detach()[:, :19] + 0.5


def dense_prefixes(p: Problem, ends: tuple[int, ...], weights: tuple[float, ...]) -> Tensor:
    acts, _ = dense(p)
    parts = [error(acts[:, :e] @ p.W_dec[:e] + p.b_dec, target(p)) for e in ends]
    return sum(w * part for w, part in zip(weights, parts, strict=True))


def dense_topk(p: Problem, k: int) -> Tensor:
    return dense_selected(p.x @ p.W_enc + p.b_enc, lambda pre: topk_support(pre, k)[0])


def dense_auxk(p: Problem, k: int, kind: str, scaled: bool, encoder: bool = True) -> Tensor:
    acts, _ = dense(p)
    residual = (target(p) - recon(p, acts)).detach()
    pre = torch.where(DEAD, p.x @ p.W_enc + p.b_enc, -torch.inf)
    mine = dense_selected(pre, lambda pre: topk_support(pre, min(k, int(DEAD.sum())))[0] & DEAD)
    mine = torch.where(mine.isfinite(), mine, 0.0)
    loss = error((mine if encoder else mine.detach()) @ p.W_dec, residual)
    base = {"residual": residual, "target": target(p)}.get(kind)
    if base is not None:
        loss = loss / (base - base.mean(0)).square().sum(-1).mean()
    return loss * min(int(DEAD.sum()) / k, 1.0) if scaled else loss


def sparse_auxk(p: Problem, k: int, kind: str, scaled: bool, encoder: bool = True) -> Tensor:
    decoded = gsf.decode(sparse(p), p.W_dec, p.b_dec)
    args = (p.x, decoded, target(p), p.W_enc, p.b_enc, p.W_dec, DEAD, k)
    return gsf.losses.auxk(*args, normalisation=kind, scaled=scaled, encoder_gradient=encoder)


def dense_unrectified(p: Problem, k: int) -> Tensor:
    pre = torch.where(DEAD, p.x @ p.W_enc + p.b_enc, -torch.inf)
    top = pre.topk(min(k, int(DEAD.sum())))
    mine = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    residual = (target(p) - decoded(p)).detach()
    return error(mine @ p.W_dec, residual) * min(int(DEAD.sum()) / k, 1.0)


def sparse_unrectified(p: Problem, k: int) -> Tensor:
    args = (p.x, decoded(p), target(p), p.W_enc, p.b_enc, p.W_dec, DEAD, k)
    return losses.auxk(*args, rectified=False)


def decoded(p: Problem) -> Tensor:
    return gsf.decode(sparse(p), p.W_dec, p.b_dec)


def frequencies(p: Problem) -> Tensor:
    return dense(p)[1].mean(0)


Case = tuple[Callable[[Problem], Tensor], Callable[[Problem], Tensor]]
losses = gsf.losses
CASES: dict[str, Case] = {
    "squared_error": (
        lambda p: losses.squared_error(decoded(p), target(p)),
        lambda p: error(recon(p, dense(p)[0]), target(p)),
    ),
    "mse": (
        lambda p: losses.mse(decoded(p), target(p)),
        lambda p: torch.nn.functional.mse_loss(recon(p, dense(p)[0]), target(p)),
    ),
    "normalised_mse": (
        lambda p: losses.normalised_mse(decoded(p), p.x[:, :19]),
        lambda p: (
            (recon(p, dense(p)[0]) - p.x[:, :19]).norm(dim=1) ** 2 / p.x[:, :19].norm(dim=1) ** 2
        ).mean(),
    ),
    "fvu": (
        lambda p: losses.fvu(decoded(p), p.x[:, :19]),
        lambda p: (
            error(recon(p, dense(p)[0]), p.x[:, :19]) / p.x[:, :19].var(dim=0, unbiased=False).sum()
        ),
    ),
    "l0": (lambda p: losses.l0(sparse(p)), lambda p: dense(p)[1].sum(1).mean()),
    "quadratic_l0": (
        lambda p: losses.quadratic_l0(sparse(p), 9),
        lambda p: (2 / 9 * (dense(p)[1].sum(1) - 9) ** 2).mean(),
    ),
    "quadratic_l0 relative": (
        lambda p: losses.quadratic_l0(sparse(p), 9, "1/target^2"),
        lambda p: ((dense(p)[1].sum(1) / 9 - 1) ** 2).mean(),
    ),
    "quadratic_mean_l0": (
        lambda p: losses.quadratic_mean_l0(sparse(p), 9),
        lambda p: 2 / 9 * (dense(p)[1].sum(1).mean() - 9) ** 2,
    ),
    "quadratic_mean_l0 relative": (
        lambda p: losses.quadratic_mean_l0(sparse(p), 9, "1/target^2"),
        lambda p: (dense(p)[1].sum(1).mean() / 9 - 1) ** 2,
    ),
    "frequency": (
        lambda p: losses.frequency(sparse(p), 0.1),
        lambda p: (frequencies(p) ** 2 / 0.1).sum(),
    ),
    "frequency_l0": (
        lambda p: losses.frequency_l0(sparse(p), 0.1),
        lambda p: (frequencies(p) * (1 + frequencies(p) / 0.1)).sum(),
    ),
    "l1": (
        lambda p: losses.l1(sparse(p), p.W_dec),
        lambda p: (dense(p)[0] * norms(p)).sum(1).mean(),
    ),
    "l1 unit": (lambda p: losses.l1(sparse(p)), lambda p: dense(p)[0].sum(1).mean()),
    "tanh": (
        lambda p: losses.tanh(sparse(p), p.W_dec, 0.3),
        lambda p: torch.tanh(0.3 * dense(p)[0] * norms(p)).sum(1).mean(),
    ),
    "pre_act": (
        lambda p: losses.pre_act(*p.encoder, DEAD, p.threshold, p.W_dec),
        lambda p: ((p.threshold - p.x @ p.W_enc - p.b_enc).relu() * DEAD * norms(p)).sum(1).mean(),
    ),
    "pre_act plain": (
        lambda p: losses.pre_act(*p.encoder, DEAD.nonzero()[:, 0]),
        lambda p: ((-p.x @ p.W_enc - p.b_enc).relu() * DEAD).sum(1).mean(),
    ),
    "auxk": (
        lambda p: sparse_auxk(p, 5, "none", True),
        lambda p: dense_auxk(p, 5, "none", True),
    ),
    "auxk few dead": (
        lambda p: sparse_auxk(p, 24, "residual", True),
        lambda p: dense_auxk(p, 24, "residual", True),
    ),
    "auxk unscaled": (
        lambda p: sparse_auxk(p, 24, "target", False),
        lambda p: dense_auxk(p, 24, "target", False),
    ),
    "auxk decoder only": (
        lambda p: sparse_auxk(p, 5, "none", True, False),
        lambda p: dense_auxk(p, 5, "none", True, False),
    ),
    "auxk unrectified": (lambda p: sparse_unrectified(p, 10), lambda p: dense_unrectified(p, 10)),
    "auxk unrectified, few dead": (
        lambda p: sparse_unrectified(p, 24),
        lambda p: dense_unrectified(p, 24),
    ),
    "matryoshka": (
        lambda p: losses.matryoshka(sparse(p), p.W_dec, p.b_dec, target(p), (3, 17, 37)),
        lambda p: dense_prefixes(p, (3, 17, 37), (1, 1, 1)),
    ),
    "matryoshka mean": (
        lambda p: losses.matryoshka(sparse(p), p.W_dec, p.b_dec, target(p), (3, 17), "mean"),
        lambda p: dense_prefixes(p, (3, 17), (0.5, 0.5)),
    ),
    "matryoshka weighted": (
        lambda p: losses.matryoshka(sparse(p), p.W_dec, p.b_dec, target(p), [3, 37], (0.2, 3)),
        lambda p: dense_prefixes(p, (3, 37), (0.2, 3)),
    ),
    "multi_topk": (
        lambda p: losses.multi_topk(
            p.x, target(p), p.W_enc, p.b_enc, p.W_dec, p.b_dec, (4, 16), (1, 1 / 8)
        ),
        lambda p: sum(
            w * error(recon(p, dense_topk(p, k)), target(p)) for k, w in ((4, 1), (16, 1 / 8))
        ),
    ),
    "multi_topk decoder only": (
        lambda p: losses.multi_topk(
            *(p.x, target(p), p.W_enc, p.b_enc, p.W_dec, p.b_dec, (4, 16)), encoder_gradient=False
        ),
        lambda p: sum(error(recon(p, dense_topk(p, k).detach()), target(p)) for k in (4, 16)),
    ),
}
FIELDS = ("x", "W_enc", "b_enc", "threshold", "W_dec", "b_dec")


def grads(loss: Tensor, p: Problem) -> dict[str, Tensor]:
    tensors = [getattr(p, name) for name in FIELDS]
    found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    pairs = zip(FIELDS, tensors, found, strict=True)
    return {name: torch.zeros_like(t) if g is None else g for name, t, g in pairs}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(backend: Any, name: str) -> None:
    ours, theirs = CASES[name]
    single, double = problem().leaves(), problem().double().leaves()
    mine, other, true = ours(single), theirs(single), theirs(double)
    assert mine.shape == () and mine.dtype == torch.float32
    assert_close_to_truth(mine, other, true, torch.float32, name, 500)
    found, plain, truth = grads(mine, single), grads(other, single), grads(true, double)
    assert any(g.any() for g in truth.values())
    for field in FIELDS:
        assert_close_to_truth(
            found[field], plain[field], truth[field], torch.float32, f"{name}: d_{field}", 500
        )


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    ours, theirs = CASES[name]
    p = problem(seed=3).double().leaves()
    mine, true = ours(p), theirs(p)
    torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    truth = grads(true, p)
    for field, found in grads(mine, p).items():
        torch.testing.assert_close(found, truth[field], rtol=1e-10, atol=1e-11, msg=field)


def test_pre_act_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_losses, "TILE_BYTES", 5 * N * 8)
    test_float64("pre_act")
    test_float64("pre_act plain")


# ---- parts of a batch


def parts(p: Problem) -> list[Problem]:
    return [p.with_(x=x) for x in (p.x[:4], p.x[4:9], p.x[9:])]


NONLINEAR: dict[str, Callable[..., Tensor]] = {
    "quadratic_mean_l0": lambda acts, **whole: losses.quadratic_mean_l0(acts, 9, **whole),
    "frequency": lambda acts, **whole: losses.frequency(acts, 0.1, **whole),
    "frequency_l0": lambda acts, **whole: losses.frequency_l0(acts, 0.1, **whole),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_totals_make_parts_equal_the_whole(name: str) -> None:
    loss, p = NONLINEAR[name], problem().double().leaves()
    whole = loss(sparse(p))
    encoded = [sparse(part) for part in parts(p)]
    counts = sum(acts.counts().detach() for acts in encoded)
    values = [loss(acts, counts=counts, tokens=N) for acts in encoded]
    for value in values:
        torch.testing.assert_close(value, whole)
    mean = sum(v * acts.n / N for v, acts in zip(values, encoded, strict=True))
    truth = grads(whole, p)["threshold"]
    assert truth.any()
    torch.testing.assert_close(grads(mean, p)["threshold"], truth)
    apart = sum(loss(acts) * acts.n / N for acts in encoded)
    assert not torch.allclose(grads(apart, p)["threshold"], truth, rtol=1e-3)


# ---- edges


def test_empty_batch_and_no_dead_latents() -> None:
    p = problem(n=0).leaves()
    for name, (ours, _) in CASES.items():
        if name in ("fvu", "quadratic_mean_l0", "quadratic_mean_l0 relative"):
            continue
        loss = ours(p)
        assert loss == 0, name
        if loss.requires_grad:
            assert not any(g.any() for g in grads(loss, p).values()), name
    p = problem().leaves()
    none = torch.zeros(37, dtype=torch.bool)
    assert losses.pre_act(*p.encoder, none) == 0
    recon, goal = decoded(p), target(p)
    assert losses.auxk(p.x, recon, goal, p.W_enc, p.b_enc, p.W_dec, none, 5) == 0
    assert (
        losses.auxk(p.x, goal, goal, p.W_enc, p.b_enc, p.W_dec, DEAD, 5, normalisation="residual")
        == 0
    )


def test_unrectified_auxk_beside_a_huge_token() -> None:
    """Each token's pre-activations are raised by a bound of their own: no other's are rounded."""
    p = problem()
    pre = p.x @ p.W_enc + p.b_enc
    for x in (p.x, torch.cat((p.x, 1e7 * p.x[:1]))):
        chosen = dead_losses._largest(x, p.W_enc, p.b_enc, 30)
        latents, values = chosen.latents().view(-1, 30)[:N], chosen.values.view(-1, 30)[:N]
        assert torch.equal(latents, pre.topk(30).indices.sort().values)
        torch.testing.assert_close(values, pre.gather(1, latents))
        assert (values < 0).any()


def test_blank_targets_count_nothing() -> None:
    recon = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    loss = losses.normalised_mse(recon, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    loss.backward()
    assert loss == 1.25 and recon.grad is not None
    assert recon.grad.tolist() == [[0.0, 0.0], [1.0, -0.5]]


def test_leading_dimensions_and_16_bit_weights() -> None:
    p = problem(n=12, w_dtype=torch.bfloat16)
    flat = sparse(p)
    deep = gsf.jumprelu_encode(p.x.view(3, 4, -1), p.W_enc, p.b_enc, p.threshold)
    goal = torch.randn(12, 19)
    for weights in (p.W_dec, p.W_dec.float()):
        one = losses.matryoshka(flat, weights, p.b_dec, goal, (5, 37))
        two = losses.matryoshka(deep, weights, p.b_dec, goal.view(3, 4, 19), (5, 37))
        torch.testing.assert_close(one, two)
        assert one.dtype == torch.float32
    shape = (p.x.view(3, 4, -1), p.W_enc, p.b_enc)
    torch.testing.assert_close(losses.pre_act(*shape, DEAD), losses.pre_act(*p.encoder, DEAD))


def test_skip_is_added_to_every_reconstruction() -> None:
    p, goal, skip = problem(), torch.randn(N, 19), torch.randn(N, 19)
    acts = sparse(p)
    with_skip = losses.matryoshka(acts, p.W_dec, p.b_dec, goal, (5, 37), skip=skip)
    moved = losses.matryoshka(acts, p.W_dec, p.b_dec, goal - skip, (5, 37))
    torch.testing.assert_close(with_skip, moved)
    args = (p.W_enc, p.b_enc, p.W_dec, p.b_dec, (4, 8))
    torch.testing.assert_close(
        losses.multi_topk(p.x, goal, *args, skip=skip), losses.multi_topk(p.x, goal - skip, *args)
    )


def _p() -> Problem:
    return problem()


ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: losses.mse(torch.ones(3, 2), torch.ones(3, 1)), "mse: recon and target must have"),
    (lambda: losses.fvu(torch.ones(3), torch.ones(3).int()), "fvu: target must be float32"),
    (lambda: losses.l0(torch.ones(3)), "l0: acts must be a SparseActs, got Tensor"),
    (lambda: losses.quadratic_l0(sparse(_p()), 0), "quadratic_l0: target must be finite and > 0"),
    (
        lambda: losses.quadratic_mean_l0(sparse(_p()), 3, "target"),
        "quadratic_mean_l0: normalisation must be one of 2/target, 1/target.2, got 'target'",
    ),
    (
        lambda: losses.frequency(sparse(_p()), 0.1, tokens=4),
        "frequency: counts and tokens go together, counts is missing",
    ),
    (
        lambda: losses.frequency(sparse(_p()), 0.1, counts=torch.ones(3), tokens=4),
        r"frequency: counts must have shape \[d_sae=37\], got \(3,\)",
    ),
    (
        lambda: losses.frequency_l0(
            sparse(_p()), 0.1, counts=torch.ones(37).requires_grad_(), tokens=4
        ),
        "frequency_l0: counts are constants, and these require grad: detach them",
    ),
    (lambda: losses.tanh(sparse(_p()), scale=-1.0), "tanh: scale must be finite and >= 0"),
    (
        lambda: losses.l1(sparse(_p()), torch.ones(3, 4)),
        r"l1: W_dec must have shape \[d_sae=37, d_out\], got \(3, 4\)",
    ),
    (
        lambda: losses.pre_act(*_p().encoder, torch.tensor([40])),
        r"pre_act: latent 40 is out of range \[0, d_sae=37\)",
    ),
    (
        lambda: losses.pre_act(*_p().encoder, DEAD, W_dec=torch.ones(36, 4)),
        r"pre_act: W_dec must have shape \[d_sae=37, d_out=4\], got \(36, 4\)",
    ),
    (lambda: sparse_auxk(_p(), 0, "none", True), "auxk: k_aux must be >= 1, got 0"),
    (lambda: sparse_auxk(_p(), 3, "x", True), "auxk: normalisation must be one of none, residual"),
    (
        lambda: losses.matryoshka(sparse(_p()), _p().W_dec, None, target(_p()), (5, 5)),
        r"matryoshka: prefixes must ascend from 1 or more, got \[5, 5\]",
    ),
    (
        lambda: losses.matryoshka(sparse(_p()), _p().W_dec, None, target(_p()), (5, 38)),
        r"matryoshka: prefixes\[1\] must be in \[0, d_sae=37\], got 38",
    ),
    (
        lambda: losses.matryoshka(sparse(_p()), _p().W_dec, None, target(_p()), (5,), (1, 2)),
        "matryoshka: 1 weights are needed, got 2",
    ),
    (
        lambda: losses.matryoshka(sparse(_p()), _p().W_dec, None, target(_p()), (5,), "max"),
        "matryoshka: weights must be 'sum', 'mean' or numbers, got 'max'",
    ),
    (
        lambda: losses.multi_topk(
            _p().x, target(_p()), _p().W_enc, _p().b_enc, _p().W_dec, None, 3
        ),
        "multi_topk: ks must be a sequence of ints, got int",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
