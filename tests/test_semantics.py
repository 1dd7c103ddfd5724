"""`Semantics`: every variant against its formula in dense float64 autograd; conversion; errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same, batchtopk_support, topk_support
from test_loss import PATHS
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import Semantics
from gemmascope_fast.training import L0, QuadraticL0, Reconstruction
from gemmascope_fast.training.blocked import sae_loss

OPS = (
    *("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode", "pre_at"),
    *("encode_backward", "decode_backward", "sae_backward", "by_feature"),
)
BANDWIDTH = 0.4
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "rectangle": lambda u: (u.abs() < 0.5).double(),
    "closed_rectangle": lambda u: (u.abs() <= 0.5).double(),
    "triangular": lambda u: (1 - u.abs()).clamp_min(0),
    "epanechnikov": lambda u: 0.75 * (1 - u**2).clamp_min(0),
    "quartic": lambda u: 15 / 16 * (1 - u**2).clamp_min(0) ** 2,
    "cosine": lambda u: math.pi / 4 * torch.cos(math.pi * u.clamp(-1, 1) / 2),
}


class _Gate(torch.autograd.Function):
    """`(acts, gate)` of a JumpReLU with the pseudo-derivatives that the semantics name."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, s: Semantics) -> tuple[Tensor, Tensor]:
        gate = (pre >= theta if s.gate == "non_strict" else pre > theta).double()
        ctx.save_for_backward(pre, theta, gate)
        ctx.s = s
        return pre * gate, gate

    @staticmethod
    def backward(ctx: Any, d_acts: Tensor, d_gate: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, theta, gate = ctx.saved_tensors
        s = ctx.s
        weight = KERNELS[s.kernel]((pre - theta) / BANDWIDTH) / BANDWIDTH
        slope = pre if s.slope == "pre" else theta
        through = d_gate * gate if s.gate_window == "active" else d_gate
        d_step = weight * (slope * d_acts + through)
        d_pre = d_acts * gate + (d_step if s.gradient_to_x else 0)
        return d_pre, -d_step.sum(0), None


def module(activation: Any, semantics: Semantics, cls: type[gsf.SAE] = gsf.SAE) -> gsf.SAE:
    torch.manual_seed(0)
    made = cls(23, 37, activation, dtype=torch.float64, semantics=semantics)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name in ("b_enc", "b_dec"):
                p.copy_(torch.randn_like(p) * 0.2)
            if name == "threshold":
                p.copy_(0.1 + 0.3 * torch.rand_like(p))
                if semantics.threshold != "direct":
                    p.log_()
        made.W_dec.mul_(0.5 + torch.rand(37, 1, dtype=torch.float64))
    return made


def written_out(recon: Tensor, target: Tensor, l0: Tensor) -> Tensor:
    return ((recon - target).square().sum(-1) + 0.3 * l0 + 0.02 * (l0 - 9).square()).mean()


def truth(made: gsf.SAE, x: Tensor) -> Tensor:
    """The loss by dense autograd."""
    s, activation = made.semantics, made.activation
    inner = x - made.b_dec if s.center else x
    pre = inner @ made.W_enc + made.b_enc
    norms = made.W_dec.norm(dim=1)
    if isinstance(activation, gsf.JumpReLU):
        stored = made.threshold
        acts, gate = _Gate.apply(pre, stored if s.threshold == "direct" else stored.exp(), s)
    else:
        pre = pre * norms if s.rescale else pre
        if isinstance(activation, gsf.TopK):
            chosen = topk_support(pre.detach(), activation.k)[0].double()
        else:
            chosen = batchtopk_support(pre.detach(), activation.k)[0][0].double()
        acts = chosen * torch.relu(pre)
        if s.zero_gradient:
            acts = acts + chosen * (pre < 0) * (pre - pre.detach())
        gate = (acts > 0).double()
        acts = acts / norms if s.rescale else acts
    return written_out(acts @ made.W_dec + made.b_dec, x, gate.sum(-1))


def composed(made: gsf.SAE, x: Tensor) -> Tensor:
    acts = made.encode(x)
    return written_out(made.decode(acts), x, acts.l0())


def grads(loss: Tensor, made: gsf.SAE, x: Tensor) -> dict[str, Tensor]:
    inputs = {"x": x, **dict(made.named_parameters())}
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


JUMP = gsf.JumpReLU(BANDWIDTH)
VARIANTS: dict[str, tuple[Any, Semantics]] = {
    "default": (JUMP, Semantics()),
    "non_strict": (JUMP, Semantics(gate="non_strict")),
    "log": (JUMP, Semantics(threshold="log")),
    "exp": (JUMP, Semantics(threshold="exp", kernel="closed_rectangle")),
    "gradient_to_x": (JUMP, Semantics(gradient_to_x=True)),
    "slope pre": (JUMP, Semantics(slope="pre", gate="non_strict", kernel="closed_rectangle")),
    "active": (JUMP, Semantics(gate_window="active")),
    **{k: (JUMP, Semantics(kernel=k, gradient_to_x=True)) for k in KERNELS if "rect" not in k},
    "center": (JUMP, Semantics(center=True, slope="pre", gradient_to_x=True)),
    "topk": (gsf.TopK(30), Semantics(center=True, rescale=True)),
    "zero_gradient": (gsf.TopK(30), Semantics(zero_gradient=True)),
    "batchtopk": (gsf.BatchTopK(4.5), Semantics.preset("saelens_6")),
}


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(29, 23, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_formula(name: str) -> None:
    made, x = module(*VARIANTS[name]), batch()
    check(composed(made, x), made, x)


@pytest.mark.parametrize("path", ["dense tiles", "sparse blocks"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_formula_in_blocks(name: str, path: str) -> None:
    made, x = module(*VARIANTS[name]), batch()
    terms = (Reconstruction(), L0(0.3), QuadraticL0(9, 0.02 * 9 / 2))
    loss, metrics = sae_loss(made, x, None, terms, PATHS[path])
    if isinstance(made.activation, gsf.JumpReLU):
        assert int(metrics["dense_blocks"]) == (int(metrics["blocks"]) if "dense" in path else 0)
        assert int(metrics["blocks"]) > 3
    check(loss, made, x)


def test_frozen_weights_keep_the_others_gradients() -> None:
    for frozen in ("W_dec", "threshold", "W_enc"):
        for path in ("dense tiles", "sparse blocks"):
            made, x = module(*VARIANTS["gradient_to_x"]), batch()
            getattr(made, frozen).requires_grad_(False)
            loss, _ = sae_loss(made, x, None, (Reconstruction(), L0(0.3)), PATHS[path])
            loss.backward()
            mine = {n: p.grad for n, p in made.named_parameters()} | {"x": x.grad}
            assert mine.pop(frozen) is None
            made, x = module(*VARIANTS["gradient_to_x"]), batch()
            recon, l0 = made(x), made.encode(x).l0()
            ((recon - x).square().sum(-1) + 0.3 * l0).mean().backward()
            for name, found in mine.items():
                other = x.grad if name == "x" else made.get_parameter(name).grad
                torch.testing.assert_close(found, other, msg=f"{frozen} {path} {name}")


def check(loss: Tensor, made: gsf.SAE, x: Tensor) -> None:
    true = truth(made, x)
    torch.testing.assert_close(loss, true, rtol=1e-12, atol=1e-12)
    expected = grads(true, made, x)
    for field, found in grads(loss, made, x).items():
        torch.testing.assert_close(found, expected[field], rtol=1e-9, atol=1e-10, msg=field)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_differs_from_the_default(name: str) -> None:
    activation, semantics = VARIANTS[name]
    if semantics == Semantics() or name == "non_strict":  # which differs at equality only
        return
    made, x = module(activation, semantics), batch()
    found = grads(composed(made, x), made, x)
    made.semantics = Semantics()
    plain = grads(composed(made, x), made, x)
    assert any(not torch.allclose(found[f], plain[f], rtol=1e-4) for f in found)


def test_the_gate_at_equality(backend: Any) -> None:
    x = torch.tensor([[1.0], [0.0], [-0.0], [-1.0]])
    for theta, active in ((1.0, [1, 0, 0, 0]), (0.0, [1, 1, 1, 0]), (-1.0, [1, 1, 1, 1])):
        made = gsf.SAE(1, 1, JUMP, semantics=Semantics(gate="non_strict"))
        with torch.no_grad():
            made.W_enc.fill_(1.0)
            made.threshold.fill_(theta)
        assert made.encode(x).l0().tolist() == active
        made.semantics = Semantics()
        below = [int(v > theta) for v in (1.0, 0.0, -0.0, -1.0)]
        assert made.encode(x).l0().tolist() == below != active


@pytest.mark.parametrize("max_nnz", [None, 29 * 37])
def test_values_are_untouched_and_float32_agrees(backend: Any, max_nnz: int | None) -> None:
    for name in ("gradient_to_x", "quartic", "slope pre"):
        made = module(*VARIANTS[name]).float()
        x = batch().detach().float().requires_grad_()
        acts = made.encode(x, max_nnz=max_nnz)
        with torch.no_grad():
            plain = made.encode(x)
        assert_same(acts.to_dense().detach(), plain.to_dense())
        assert_same(acts.l0().detach(), plain.l0())
        exact = module(*VARIANTS[name])
        y = batch()
        wanted = grads(truth(exact, y), exact, y)
        loss = written_out(made.decode(acts), x, acts.l0())
        for field, found in grads(loss, made, x).items():
            torch.testing.assert_close(
                found.double(), wanted[field], rtol=2e-4, atol=2e-4, msg=f"{name} {field}"
            )


def test_parameters_start_where_the_library_starts_them() -> None:
    log = gsf.SAE(3, 5, gsf.JumpReLU(0.1, 0.25), semantics=Semantics(threshold="log"))
    torch.testing.assert_close(log.theta(), torch.full((5,), 0.25))
    exp = gsf.SAE(3, 5, gsf.JumpReLU(0.1, 0.25), semantics=Semantics(threshold="exp"))
    assert exp.threshold.tolist() == [-3.0] * 5
    torch.testing.assert_close(exp.theta(), torch.full((5,), math.exp(-3)))


# ---- BatchTopK's running threshold


@pytest.mark.parametrize("preset", ["saelens_6", "dictionary_learning_0_1"])
def test_running_threshold(backend: Any, preset: str) -> None:
    made = module(gsf.BatchTopK(4.5), Semantics.preset(preset)).float()
    assert made.ema_threshold.dtype == torch.float64
    running, decay = (0.0, 0.99) if preset == "saelens_6" else (None, 0.999)
    for step in range(4):
        x = torch.randn(29, 23) * (step + 1)
        acts = made.encode(x)
        smallest = float(acts.values[acts.gate > 0].min())
        running = smallest if running is None else decay * running + (1 - decay) * smallest
        assert float(made.ema_threshold) == pytest.approx(running, rel=1e-12)
    assert "ema_threshold" in made.state_dict()
    made.eval()
    x = torch.randn(29, 23)
    inner = x - made.b_dec
    pre = inner @ made.W_enc + made.b_enc
    pre = pre * made.W_dec.norm(dim=1) if preset == "saelens_6" else pre
    expected = torch.where(pre > running, pre, 0.0)
    torch.testing.assert_close(made.encode(x).to_dense(), expected, rtol=1e-4, atol=1e-5)
    assert float(made.ema_threshold) == pytest.approx(running, rel=1e-12)


def test_nothing_active_moves_nothing() -> None:
    made = module(gsf.BatchTopK(4.5), Semantics.preset("saelens_6"))
    made.ema_threshold.fill_(0.5)
    made.encode(torch.zeros(0, 23, dtype=torch.float64))
    made.encode(torch.full((2, 23), torch.nan, dtype=torch.float64))
    made.loss(torch.full((2, 23), torch.nan, dtype=torch.float64))
    assert float(made.ema_threshold) == 0.5


CONVERTED = ["center", "log", "non_strict", "saelens_6", "dictionary_learning_0_1"]


@pytest.mark.parametrize("name", CONVERTED)
def test_conversion_to_jumprelu(name: str, tmp_path: Any) -> None:
    if name in VARIANTS:
        made = module(*VARIANTS[name])
    else:
        made = module(gsf.BatchTopK(4.5), Semantics.preset(name))
        made.encode(batch() * 1.1)  # or its smallest activation would equal the threshold
    state = torch.get_rng_state()
    plain = made.to_jumprelu(bandwidth=0.07)
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.activation == gsf.JumpReLU(0.07) and plain.semantics == Semantics()
    made.eval()
    x = batch().detach()
    acts, other = made.encode(x), plain.encode(x)
    assert (acts.to_dense() > 0).any()
    torch.testing.assert_close(other.to_dense(), acts.to_dense())
    torch.testing.assert_close(plain(x), made(x))
    plain.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="save_pretrained: Gemma Scope 2's files"):
        made.save_pretrained(tmp_path / "b")


def test_a_transcoder_is_not_centred_and_rescales() -> None:
    made = module(gsf.TopK(5), Semantics.preset("saelens_6"), gsf.Transcoder)
    x = batch()
    acts = made.encode(x)
    pre = (x @ made.W_enc + made.b_enc) * made.W_dec.norm(dim=1)
    chosen = topk_support(pre.detach(), 5)[0]
    torch.testing.assert_close(acts.to_dense(), torch.where(chosen, pre.relu(), 0.0))
    recon = acts.to_dense() / made.W_dec.norm(dim=1) @ made.W_dec + made.b_dec
    torch.testing.assert_close(made.decode(acts), recon)


def test_dictionary_learning_centres_what_selects() -> None:
    semantics = Semantics.preset("dictionary_learning_0_1")
    for activation, centred in ((JUMP, False), (gsf.TopK(5), True), (gsf.BatchTopK(5), True)):
        assert semantics.centers(activation) is centred
        made, other = module(activation, semantics), module(activation, Semantics(center=centred))
        x = batch()
        assert_same(made.encode(x).to_dense().detach(), other.encode(x).to_dense().detach())
        loss = composed(made, x)
        torch.testing.assert_close(loss, composed(other, x))
        torch.testing.assert_close(made.loss(x)[0], other.loss(x)[0])
        for field, found in grads(loss, made, x).items() if centred else ():
            torch.testing.assert_close(found, grads(composed(other, x), other, x)[field])
    assert module(JUMP, semantics).to_jumprelu().b_enc.equal(module(JUMP, semantics).b_enc)
    assert semantics.plain_forward and not semantics.with_(center_jumprelu=True).plain_forward
    assert Semantics.preset("saelens_6").centers(JUMP)


def test_auxk_options_are_those_of_the_loss_and_of_the_term() -> None:
    dead = torch.arange(37) % 2 == 0
    for name in ("gemma_scope_2", "saelens_6", "sparsify_1_3", "dictionary_learning_0_1"):
        for strict in (False, True):
            options = Semantics.preset(name, strict_compat=strict).auxk_options()
            made, x = module(gsf.TopK(5), Semantics()), batch()
            weights = (made.W_enc, made.b_enc, made.W_dec)
            loss = gsf.losses.auxk(x, made(x), x, *weights, dead, 11, **options)
            term = gsf.training.AuxK(dead, 11, 1.0, **options)
            torch.testing.assert_close(made.loss(x, terms=(term,))[0], loss)
            assert loss.requires_grad
            encoder = torch.autograd.grad(loss, made.W_enc, allow_unused=True)[0]
            assert (encoder is None) == (strict and name == "sparsify_1_3")


def test_k_annealing() -> None:
    s = Semantics()
    ks = [s.annealed_k(step, 10, start=50, steps=4) for step in range(7)]
    assert ks == [50, 40, 30, 20, 10, 10, 10]
    assert s.annealed_k(0, 10, start=50, steps=0) == 10
    with pytest.raises(ValueError, match="annealed_k: start must be >= k=10.0, got 5.0"):
        s.annealed_k(0, 10, start=5, steps=4)


# ---- presets and errors


def test_presets() -> None:
    assert Semantics.preset("gemma_scope_2") == Semantics()
    assert gsf.SAE(3, 5, semantics="saelens_6").semantics == Semantics.preset("saelens_6")
    assert not Semantics.preset("sparsify_1_3").zero_gradient
    strict = Semantics.preset("sparsify_1_3", strict_compat=True)
    assert strict.zero_gradient and not strict.multi_topk_encoder_gradient
    assert not Semantics.preset("saelens_6").auxk_rectified
    assert Semantics.preset("dictionary_learning_0_1").l0_square == "batch"
    assert Semantics.preset("dictionary_learning_0_1", ema_decay=None).ema_decay is None
    assert Semantics.preset("dictionary_learning_0_1").with_(center=False).center is False


ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Semantics.preset("saelens"), "preset must be one of gemma_scope_2, .*, got 'saelens'"),
    (lambda: Semantics(gate=">"), "Semantics: gate must be one of strict, non_strict, got '>'"),
    (lambda: Semantics(kernel="gauss"), "Semantics: kernel must be one of rectangle, .*'gauss'"),
    (lambda: Semantics(center=1), "Semantics: center must be a bool, got 1"),
    (lambda: Semantics(ema_decay=1.0), r"Semantics: ema_decay must be in \[0, 1\), got 1.0"),
    (lambda: gsf.SAE(3, 5, semantics=3), "SAE: semantics must be a Semantics or a str, got int"),
    (lambda: gsf.SAE(3, 5, gsf.TopK(2)).theta(), "theta: TopK.k=2. has no thresholds"),
    (lambda: gsf.SAE(3, 5, gsf.TopK(2)).to_jumprelu(), "to_jumprelu: TopK.k=2. has no thresholds"),
    (
        lambda: gsf.SAE(3, 5, gsf.BatchTopK(2), semantics="dictionary_learning_0_1").to_jumprelu(),
        "to_jumprelu: the running threshold has not seen a batch yet",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
