"""gsf.optim.Adam without fusion: dense Adam's numbers, a torch optimizer's manners."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from oracle import assert_all_same, assert_same
from torch import nn

import gemmascope_fast as gsf

D, F = 12, 40


def sae(activation=None, dtype=torch.float32, **sizes) -> gsf.SAE:
    g = torch.Generator().manual_seed(1)
    activation = activation or gsf.JumpReLU(bandwidth=0.2, init_threshold=0.4)
    return gsf.SAE(D, sizes.get("d_sae", F), activation, dtype=dtype, generator=g)


def batch(step: int, n: int = 9, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(50 + step)).to(dtype)


def loss_of(module: gsf.SAE, x: torch.Tensor) -> torch.Tensor:
    acts = module.encode(x)
    error = (module.decode(acts) - x).square().sum(-1).mean()
    return error + 1e-2 * acts.l0().mean() + 1e-3 * acts.values.sum()


def train(module: gsf.SAE, optimizer, steps: int, first: int = 0, dtype=torch.float32) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(module, batch(step, dtype=dtype)).backward()
        optimizer.step()


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.99)])
def test_equals_torch_adam_in_float64_over_hundreds_of_steps(betas):
    """The same gradients go to both; latents are off for long stretches."""
    ours, dense = sae(dtype=torch.float64), sae(dtype=torch.float64)
    mine = gsf.optim.Adam(ours, 3e-3, betas)
    theirs = torch.optim.Adam(dense.parameters(), lr=3e-3, betas=betas)
    idle = 0
    for step in range(300):
        dense.load_state_dict(ours.state_dict()) if step == 0 else None
        theirs.zero_grad()
        loss_of(dense, batch(step, 1, torch.float64)).backward()
        for p, q in zip(ours.parameters(), dense.parameters(), strict=True):
            p.grad = q.grad.clone()
        idle += int((dense.W_dec.grad == 0).all(1).sum())
        theirs.step()
        mine.step()
    assert idle > 300 * F / 4
    for (name, p), q in zip(ours.named_parameters(), dense.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12, name
    assert (ours.W_dec - sae(dtype=torch.float64).W_dec).abs().max() > 0.1


@pytest.mark.parametrize("rows", ["exact", "live"])
def test_momentum_in_float32(rows):
    ours, dense = sae(), sae()
    train(ours, gsf.optim.Adam(ours, 3e-3, (0.9, 0.999), rows=rows), 40)
    train(dense, torch.optim.Adam(dense.parameters(), lr=3e-3, betas=(0.9, 0.999)), 40)
    for (name, p), q in zip(ours.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: name + m)


def test_live_rows_stop_when_their_momentum_is_below_rounding():
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = gsf.optim.Adam([p], 0.1, (0.5, 0.9), rows="live")
    p.grad = torch.tensor([[1.0], [0.0]]).expand(2, 3).clone()
    for step in range(40):
        before = p.detach().clone()
        optimizer.step()
        p.grad = torch.zeros(2, 3)
        assert (p[1] == 1).all()
        if step > 24:  # 0.5^24 = 2^-24
            assert_same(p.detach(), before)
    moved = optimizer.state[p]["exp_avg"][0, 0]
    assert moved == 0.5**25


def test_learning_rate_schedules_groups_and_closures():
    module, dense = sae(), sae()
    mine = gsf.optim.Adam(module, 1e-2)
    assert [len(g["params"]) for g in mine.param_groups] == [4, 1]
    mine.param_groups[1]["lr"] = 5e-3
    others = [p for p in dense.parameters() if p is not dense.W_dec]
    theirs = torch.optim.Adam(
        [{"params": others}, {"params": [dense.W_dec], "lr": 5e-3}], lr=1e-2, betas=(0.0, 0.999)
    )
    schedules = [torch.optim.lr_scheduler.StepLR(o, 3, 0.1) for o in (mine, theirs)]
    for step in range(8):
        for m, optimizer in ((module, mine), (dense, theirs)):

            def closure(m=m, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                value = loss_of(m, batch(step))
                value.backward()
                return value

            assert optimizer.step(closure).isfinite()
        for schedule in schedules:
            schedule.step()
    assert mine.param_groups[0]["lr"] == pytest.approx(1e-4)
    for p, q in zip(module.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_accumulation_and_clipping_work_as_with_any_optimizer():
    module, dense = sae(), sae()
    mine = gsf.optim.Adam(module, 1e-2)
    theirs = torch.optim.Adam(dense.parameters(), lr=1e-2, betas=(0.0, 0.999))
    for step in range(5):
        for m, optimizer in ((module, mine), (dense, theirs)):
            optimizer.zero_grad()
            for part in range(3):
                (loss_of(m, batch(3 * step + part)) / 3).backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
    for p, q in zip(module.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_same_bits(tmp_path, dtype, fused, moments):
    def made() -> tuple[gsf.SAE, gsf.optim.Adam]:
        module = sae(dtype=dtype)
        options = {"fused": fused, "moments": moments, "seed": 3}
        return module, gsf.optim.Adam(module, 1e-2, (0.5, 0.9), rows="live", **options)

    whole, optimizer = made()
    train(whole, optimizer, 4)
    saved = tmp_path / "checkpoint.pt"
    torch.save({"module": whole.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(whole, optimizer, 4, first=4)
    resumed, other = made()
    loaded = torch.load(saved, weights_only=True)
    resumed.load_state_dict(loaded["module"])
    other.load_state_dict(loaded["optimizer"])
    train(resumed, other, 4, first=4)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert_same(p.detach(), q.detach(), name)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[p]["exp_avg_sq"].stride() == other.state[q]["exp_avg_sq"].stride()
        assert optimizer.state[p]["exp_avg_sq"].dtype == other.state[q]["exp_avg_sq"].dtype


def test_options_of_the_decoder_apply_to_it_alone():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, remove_parallel=True, unit_norm=True)
    before = module.W_enc.detach().clone()
    train(module, optimizer, 5)
    torch.testing.assert_close(module.W_dec.norm(dim=1), torch.ones(F), rtol=3e-7, atol=0)
    norms = module.W_enc.norm(dim=0)
    assert ((norms - before.norm(dim=0)).abs() > 1e-3).any()


def test_dense_oracle_of_projection_and_norm():
    module, dense = sae(dtype=torch.float64), sae(dtype=torch.float64)
    mine = gsf.optim.Adam(module, 1e-2, remove_parallel=True, unit_norm=True)
    theirs = torch.optim.Adam(dense.parameters(), lr=1e-2, betas=(0.0, 0.999))
    train(module, mine, 30, dtype=torch.float64)
    for step in range(30):
        theirs.zero_grad()
        loss_of(dense, batch(step, dtype=torch.float64)).backward()
        with torch.no_grad():
            W, g = dense.W_dec, dense.W_dec.grad
            g -= (g * W).sum(1, keepdim=True) * W
        theirs.step()
        with torch.no_grad():
            W /= W.norm(dim=1, keepdim=True)
    for p, q in zip(module.parameters(), dense.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-10


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2), (2, 0), (1, 7), (7, 1)])
def test_parameters_of_any_shape(shape):
    p, q = (nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).reshape(shape)) for _ in range(2))
    mine = gsf.optim.Adam([p], 0.1, moments="8bit" if len(shape) != 2 else "fp32")
    theirs = torch.optim.Adam([q], 0.1, betas=(0.0, 0.999))
    for step in range(3):
        p.grad = torch.full(shape, 0.5 + step)
        q.grad = p.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q)


def test_strided_parameters_are_updated_in_place():
    whole = torch.ones(6, 8)
    p = nn.Parameter(whole[::2, ::2])
    optimizer = gsf.optim.Adam([p], 0.1)
    p.grad = torch.ones(3, 4)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3, 4), 0.9))
    assert (whole[1::2] == 1).all() and (whole[:, 1::2] == 1).all()


def test_the_update_is_noticed_by_autograd():
    p = nn.Parameter(torch.ones(3, 4))
    y = (p * p).sum()
    p.grad = torch.ones(3, 4)
    gsf.optim.Adam([p], 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_eight_bit_moments_take_a_byte_per_weight():
    module = sae(d_sae=512)
    optimizer = gsf.optim.Adam(module, 1e-2, moments="8bit")
    train(module, optimizer, 1)
    state = optimizer.state[module.W_dec]
    size = sum(t.nbytes for name, t in state.items() if name in ("exp_avg_sq", "exponents"))
    assert size <= module.W_dec.numel() * (1 + 1 / D)
    assert optimizer.state[module.b_enc]["exp_avg_sq"].dtype == torch.float32


def test_a_copy_of_the_optimizer_goes_on():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2)
    train(module, optimizer, 2)
    twin_module, twin = copy.deepcopy((module, optimizer))
    train(module, optimizer, 2, first=2)
    train(twin_module, twin, 2, first=2)
    assert_all_same(
        [p.detach() for p in module.parameters()], [p.detach() for p in twin_module.parameters()]
    )


# ---- bad input

OPTIONS = [
    ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, got -1.0"),
    ({"lr": math.nan}, ValueError, "lr must be finite"),
    ({"lr": "1e-3"}, TypeError, "lr must be a number, got str"),
    ({"lr": None}, TypeError, "lr must be a number, got NoneType"),
    ({"betas": (0.0, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
    ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] must be finite and >= 0"),
    ({"betas": 0.9}, ValueError, "betas must be two numbers, got 0.9"),
    ({"eps": -1e-8}, ValueError, "eps must be finite and >= 0"),
    ({"rows": "lazy"}, ValueError, "rows must be one of .*, got 'lazy'"),
    ({"rows": "touched", "betas": (0.9, 0.9)}, ValueError, 'rows="touched" is Adam only'),
    ({"moments": "4bit"}, ValueError, "moments must be one of .*, got '4bit'"),
    ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
]


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS, ids=str)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=f"^Adam: {message}"):
        gsf.optim.Adam(sae(), **({"lr": 1e-3} | options))


def test_names_and_learning_rates_as_other_optimizers_take_them():
    x, runs = batch(0), []
    for parameters, lr in (
        (lambda m: m.parameters(), 1e-2),
        (lambda m: m.named_parameters(), torch.tensor(1e-2, dtype=torch.float64)),
        (lambda m: [{"params": m.named_parameters()}], np.float64(1e-2)),
    ):
        module = sae()
        optimizer = gsf.optim.Adam(parameters(module), lr)
        loss_of(module, x).backward()
        optimizer.step()
        runs.append(module.state_dict())
    assert set(optimizer.param_groups[0]["param_names"]) == set(runs[0])
    for state in runs[1:]:
        assert all(torch.equal(t, runs[0][name]) for name, t in state.items())


@pytest.mark.parametrize("fused", [False, True])
def test_computed_weights_are_no_parameters(fused):
    module = sae()
    torch.nn.utils.parametrizations.weight_norm(module, "W_dec", dim=0)
    with pytest.raises(ValueError, match="^Adam: W_dec of the module is computed from other"):
        gsf.optim.Adam(module, 1e-3, fused=fused)
    optimizer, before = gsf.optim.Adam(module.parameters(), 1e-2), module.W_dec.detach()
    loss_of(module, batch(0)).backward()
    optimizer.step()
    assert not torch.equal(module.W_dec, before)


def test_bad_parameters_and_gradients_change_nothing():
    half = nn.Parameter(torch.ones(3, 4, dtype=torch.float16))
    with pytest.raises(TypeError, match="^Adam: parameters must be float32, bfloat16 or float64"):
        gsf.optim.Adam([half], 1e-3)
    wide = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match='^Adam: moments="8bit" is for float32 and bfloat16'):
        gsf.optim.Adam([wide], 1e-3, moments="8bit")
    with pytest.raises(ValueError, match="^Adam: fused=True needs an SAE"):
        gsf.optim.Adam([nn.Parameter(torch.ones(2))], 1e-3, fused=True)
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 4))
    optimizer = gsf.optim.Adam([first, second], 1e-3)
    first.grad, second.grad = torch.ones(3), torch.eye(3, 4).to_sparse()
    with pytest.raises(TypeError, match="^Adam: gradients must be dense, got layout torch.sparse"):
        optimizer.step()
    assert (first == 1).all() and not optimizer.state
