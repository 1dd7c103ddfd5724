"""What the tests against the installed libraries share: a problem, and the comparison.

Ours, under a preset, and the library's module hold the same float32 weights. Encoding (the support
exactly), decoding, the loss and the gradient of every parameter must agree within `TOLERANCE` of
the largest element; the loss both as `SAE.loss` of terms and composed of `gsf.losses`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gemmascope_fast as gsf
from gemmascope_fast import losses
from gemmascope_fast import training as t

# Read when the libraries are imported, which is after this module.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its CPU path
os.environ.setdefault("WANDB_MODE", "disabled")

N, D, F = 40, 24, 96
SEEDS = (0, 1, 2)
TOLERANCE = 1e-5
BANDWIDTH = 0.25
DEAD = {"many": torch.arange(F) % 2 == 0, "few": torch.arange(F) % 19 == 3}
"""48 and 5 dead latents; k_aux is D / 2 = 12 in every library."""


def batch(seed: int, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(n, D, generator=generator) + 0.3


def module(
    activation: Any,
    semantics: gsf.Semantics,
    seed: int,
    cls: type[gsf.SAE] = gsf.SAE,
    shift: float = 0.0,
    **options: Any,
) -> gsf.SAE:
    """Random weights: decoder norms 0.5 to 2, no bias 0; `shift` moves every pre-activation."""
    torch.manual_seed(seed)
    made = cls(D, F, activation, semantics=semantics, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        made.W_dec.mul_((0.5 + 1.5 * torch.rand(F, 1)) / made.W_dec.norm(dim=1, keepdim=True))
        made.b_enc.add_(shift)
        if made.threshold is not None:
            made.threshold.copy_(0.5 + torch.rand(F))
    return made


def on_the_edges(made: gsf.SAE) -> Tensor:
    """Make every pre-activation exact, many of them on a threshold or an edge of its window."""
    generator = torch.Generator().manual_seed(7)

    def whole(*shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    with torch.no_grad():
        made.W_enc.copy_(whole(D, F) * BANDWIDTH / 4)
        made.b_enc.copy_(whole(F) * BANDWIDTH / 2)
        made.b_dec.copy_(whole(D))
        if made.threshold is not None:
            made.threshold.copy_(whole(F, low=0, high=5) * BANDWIDTH / 2)
    x = whole(N, D)
    inner = x - made.b_dec if made.semantics.centers(made.activation) and made.centred else x
    if made.threshold is not None:
        u = (inner @ made.W_enc + made.b_enc - made.threshold).detach() / BANDWIDTH
        assert all((u == at).sum() > 50 for at in (-0.5, 0, 0.5))
    return x


def close(found: Tensor, expected: Tensor, name: str) -> None:
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        *(found.detach(), expected.detach()), rtol=0, atol=TOLERANCE * largest, msg=name
    )


def differs(found: Tensor, expected: Tensor) -> bool:
    off = float((found.detach() - expected.detach()).abs().max())
    return off > 100 * TOLERANCE * float(expected.detach().abs().max())


def check_forward(ours: gsf.SAE, x: Tensor, acts: Tensor, recon: Tensor) -> None:
    """Activations and reconstruction are the library's."""
    found = ours.encode(x)
    mine = found.to_dense()
    assert torch.equal(mine != 0, acts != 0), "another support"
    assert (acts != 0).any()
    close(mine, acts, "acts")
    close(ours(x), recon, "recon")


Parameters = Mapping[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]
"""The library's parameter by our name, and its gradient in our layout."""


def gradients(loss: Tensor, parameters: Parameters) -> dict[str, Tensor]:
    inputs = [p for p, _ in parameters.values()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: turn(grad) for (name, (_, turn)), grad in pairs}


def our_gradients(ours: gsf.SAE, loss: Tensor) -> dict[str, Tensor]:
    named = dict(ours.named_parameters())
    found = torch.autograd.grad(
        loss, list(named.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def check_loss(
    ours: gsf.SAE,
    x: Tensor,
    terms: Sequence[t.LossTerm],
    theirs: Tensor,
    parameters: Parameters,
    target: Tensor | None = None,
    but: Sequence[str] = (),
) -> None:
    """Loss and gradients are the library's, those named in `but` are not."""
    expected = gradients(theirs, parameters)
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for loss in (ours.loss(x, target, terms)[0], composed(ours, x, terms, target)):
        close(loss, theirs, "loss")
        for name, found in our_gradients(ours, loss).items():
            if name in but:
                assert differs(found, expected[name]), f"{name}: the known difference is gone"
            else:
                close(found, expected[name], name)


def composed(
    ours: gsf.SAE, x: Tensor, terms: Sequence[t.LossTerm], target: Tensor | None = None
) -> Tensor:
    """The terms by the functions of `gsf.losses`, under plain autograd."""
    goal = x if target is None else target
    acts = ours.encode(x)
    recon = ours.decode(acts, x) if isinstance(ours, gsf.Transcoder) else ours.decode(acts)
    inner, W_enc, b_enc, W_dec = seen(ours, x)
    total = recon.new_zeros(())
    for term in terms:
        c = getattr(term, "coefficient", 1.0)
        if isinstance(term, t.Reconstruction):
            kinds = {"none": losses.squared_error, "variance": losses.fvu}
            value = kinds[term.normalisation](recon, goal)
        elif isinstance(term, t.L0):
            value = losses.l0(acts)
        elif isinstance(term, t.QuadraticL0):
            value = losses.quadratic_l0(acts, term.target, term.normalisation)
        elif isinstance(term, t.QuadraticMeanL0):
            value = losses.quadratic_mean_l0(acts, term.target, term.normalisation)
        elif isinstance(term, t.Tanh):
            value = losses.tanh(acts, ours.W_dec, term.scale)
        elif isinstance(term, t.PreAct):
            value = losses.pre_act(inner, W_enc, b_enc, term.dead, ours.threshold, ours.W_dec)
        elif isinstance(term, t.AuxK):
            options = ours.semantics.auxk_options()
            dead = (W_enc, b_enc, W_dec, term.dead, term.k_aux)
            value = losses.auxk(inner, recon, goal, *dead, **options)
        elif isinstance(term, t.Matryoshka):
            rows = (unscaled_acts(ours, acts), ours.W_dec, ours.b_dec)
            value = losses.matryoshka(*rows, goal, term.ends, term.weights)
        else:
            assert isinstance(term, t.MultiTopK)
            weights = (W_enc, b_enc, W_dec, ours.b_dec, term.ks, term.weights)
            encoder = ours.semantics.multi_topk_encoder_gradient
            value = losses.multi_topk(inner, goal, *weights, encoder_gradient=encoder)
        total = total + c * value
    return total


def seen(ours: gsf.SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the encoder sees and the decoder uses, once centred and rescaled."""
    s = ours.semantics
    inner = x - ours.b_dec if s.centers(ours.activation) and ours.centred else x
    if not s.rescale or isinstance(ours.activation, gsf.JumpReLU):
        return inner, ours.W_enc, ours.b_enc, ours.W_dec
    norms = ours.W_dec.norm(dim=1)
    return inner, ours.W_enc * norms, ours.b_enc * norms, ours.W_dec / norms[:, None]


def unscaled_acts(ours: gsf.SAE, acts: gsf.SparseActs) -> gsf.SparseActs:
    if not ours.semantics.rescale:
        return acts
    return acts._replace(values=acts.values / ours.W_dec.norm(dim=1)[acts.latents()])
