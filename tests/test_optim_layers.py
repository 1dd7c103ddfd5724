"""gsf.optim.Adam of crosscoders and cross-layer transcoders: fused has the bits of unfused."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from oracle import assert_same
from test_multilayer import D, F, L, build
from test_optim_fused import RULES, assert_equal_runs
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.multilayer import MultiLayer
from gemmascope_fast.optim import deferred
from gemmascope_fast.training import L0, L1, QuadraticL0, Reconstruction, outcome
from gemmascope_fast.training.layered import layered_loss
from gemmascope_fast.training.planning import ENTRY_BYTES, Limits

TERMS = (Reconstruction(), QuadraticL0(target=9, coefficient=0.05))
SPARSE = gsf.JumpReLU(0.2, 1.5)
ACTIVATIONS = [SPARSE, gsf.TopK(3), gsf.BatchTopK(2.5)]

Run = tuple[MultiLayer, gsf.optim.Adam]


def module_of(kind: str = "affine clt", activation: Any = SPARSE) -> MultiLayer:
    module = build(kind, activation, generator=torch.Generator().manual_seed(1))
    if module.threshold is not None:
        with torch.no_grad():
            for threshold in module.threshold:
                threshold.add_(1.0)  # no layer is dense
    return module


def pair(kind: str = "affine clt", activation: Any = SPARSE, **rule: Any) -> list[Run]:
    """A fused and an unfused module with their optimizers."""
    modules = [module_of(kind, activation) for _ in range(2)]
    return [
        (m, gsf.optim.Adam(m, 1e-2, **rule, fused=f))
        for m, f in zip(modules, (True, False), strict=True)
    ]


def batch(step: int) -> Tensor:
    return torch.randn(4, 15, L, D, generator=torch.Generator().manual_seed(step))


def take(run: Run, step: int, terms: Any = TERMS, scale: float = 1.0) -> dict[str, Tensor]:
    module, optimizer = run
    optimizer.zero_grad()
    loss, metrics = module.loss(batch(step), batch(step).flip(0), terms)
    (loss * scale).backward()
    optimizer.step()
    return metrics


# ---- fused is unfused


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_same_bits_as_unfused(activation: Any, rule: dict[str, Any]) -> None:
    runs = pair(activation=activation, **rule)
    for run in runs:
        for step in range(6):
            metrics = take(run, step)
            assert (int(metrics["blocks"]), int(metrics["dense_blocks"])) == (L, 0)
    assert_equal_runs(*runs)
    assert not torch.equal(runs[0][0].W_dec[0], module_of(activation=activation).W_dec[0])


@pytest.mark.parametrize("kind", ["crosscoder", "clt"])
def test_kinds(kind: str) -> None:
    runs = pair(kind, remove_parallel=True, unit_norm=True)
    for run in runs:
        for step in range(4):
            take(run, step)
    assert_equal_runs(*runs)


def test_a_scaled_loss() -> None:
    runs = pair()
    for run in runs:
        take(run, 0, scale=0.5)
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_a_gpu_is_not_asked_for_the_scale(monkeypatch: Any) -> None:
    unknown = lambda scale, *, small: not small and bool(scale == 1)  # noqa: E731
    for user in (deferred, outcome):
        monkeypatch.setattr(user, "is_one", unknown)
    runs = pair()
    for run in runs:
        module, optimizer = run
        loss = module.loss(batch(0), batch(0), TERMS)[0]
        (loss / 3).backward()
        if run is runs[0]:  # one tensor has the gradients of all layers, until the step scales them
            kept = [part.pending.found["d_recon"] for part in module.deferred]
            assert len({t.untyped_storage().data_ptr() for t in kept}) == 1
        optimizer.step()
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_no_gradient_of_a_matrix_exists() -> None:
    module, optimizer = pair()[0]
    module.loss(batch(0), batch(0), TERMS)[0].backward()
    assert all(p.grad is None for p in (*module.W_enc, *module.W_dec, *module.b_enc))
    assert module.b_dec.grad is not None and module.W_skip[1].grad is not None
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in module.parameters())


def test_terms_with_gradients_of_the_decoder_are_dense() -> None:
    runs = pair()
    for run in runs:
        take(run, 0, (Reconstruction(), L1(1e-2)))
        assert all(p.grad is not None for p in run[0].parameters())
    assert_equal_runs(*runs)


def test_dense_layers_take_the_unfused_way() -> None:
    runs = pair()
    for run in runs:
        with torch.no_grad():
            run[0].threshold[1].fill_(-9.0)
        assert int(take(run, 0)["dense_blocks"]) > 0
    assert_equal_runs(*runs)


def test_several_blocks_take_the_unfused_way() -> None:
    runs = pair()
    limits = Limits(entry_bytes=50 * ENTRY_BYTES, crossover=1.0)
    for module, optimizer in runs:
        loss, metrics = layered_loss(module, batch(0), batch(1), TERMS, limits)
        loss.backward()
        assert int(metrics["blocks"]) > L and module.W_dec[0].grad is not None
        optimizer.step()
    assert_equal_runs(*runs)


def test_encode_and_decode_have_dense_gradients() -> None:
    runs = pair("crosscoder")
    for module, optimizer in runs:
        optimizer.zero_grad()
        (module(batch(0)) - batch(0)).square().sum().backward()
        assert all(W.grad is not None for W in module.W_dec)
        optimizer.step()
    assert_equal_runs(*runs)


# ---- decoder rows


@pytest.mark.parametrize("fused", [True, False])
def test_rows_over_all_outputs_have_unit_norm(fused: bool) -> None:
    module = module_of("affine clt")
    optimizer = gsf.optim.Adam(module, 1e-2, unit_norm=True, fused=fused)
    before = [W.detach().clone() for W in module.W_dec]
    take((module, optimizer), 0)
    for old, W in zip(before, module.W_dec, strict=True):
        moved = (old != W).any(1)
        norms = W.detach().norm(dim=1)
        assert bool(moved.any())
        torch.testing.assert_close(norms[moved], torch.ones(int(moved.sum())))
        assert bool(((norms[~moved] - 1).abs() > 1e-3).all())  # the others are left as they are
    skips = [float(W.detach().norm(dim=1).sub(1).abs().max()) for W in module.W_skip]
    assert min(skips) > 1e-2  # decoder options are not for other matrices


# ---- what is refused, what is kept


def test_a_second_backward_raises_and_changes_nothing() -> None:
    run, twin = pair()[0], pair()[0]
    for module, _ in (run, twin):
        module.loss(batch(0), batch(0), TERMS)[0].backward()
        for p in (module.b_dec, *module.W_skip):
            p.grad = None
    with pytest.raises(RuntimeError, match="a second backward"):
        run[0].loss(batch(1), batch(1), TERMS)[0].backward()
    for p in (run[0].b_dec, *run[0].W_skip):
        p.grad = None
    for _, optimizer in (run, twin):
        optimizer.step()
    assert_equal_runs(run, twin)


def test_a_layer_that_changed_stops_all_of_the_step() -> None:
    module, optimizer = pair()[0]
    module.loss(batch(0), batch(0), TERMS)[0].backward()
    with torch.no_grad():
        module.W_dec[2].mul_(2.0)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match=r"W_dec\[2\] was changed"):
        optimizer.step()
    for old, p in zip(before, module.parameters(), strict=True):
        assert_same(old, p.detach())


def test_clipping_is_refused() -> None:
    module, optimizer = pair()[0]
    module.loss(batch(0), batch(0), TERMS)[0].backward()
    with pytest.raises(ValueError, match="fused=False to clip"):
        gsf.optim.clip_grad_norm_(module.parameters(), 1.0)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="gradients were changed between"):
        optimizer.step()


def test_a_replaced_weight_and_another_optimizer() -> None:
    module, optimizer = pair()[0]
    with pytest.raises(ValueError, match="has a fused optimizer already"):
        gsf.optim.Adam(module, 1e-2, fused=True)
    module.W_enc[1] = torch.nn.Parameter(module.W_enc[1].detach().t().contiguous().t())
    with pytest.raises(RuntimeError, match=r"W_enc\[1\] was replaced"):
        optimizer.step()
    take((module, gsf.optim.Adam(module, 1e-2, fused=True)), 0)


def test_an_error_leaves_the_module_as_it_was() -> None:
    module = module_of()
    module.W_dec[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"W_dec\[2\] must require grad") as kept:
        gsf.optim.Adam(module, 1e-2, fused=True)
    module.W_dec[2].requires_grad_(True)
    take((module, gsf.optim.Adam(module, 1e-2, fused=True)), 0)
    assert kept.value is not None  # whose frames hold the optimizer that was not made


def test_without_its_optimizer_a_module_is_an_ordinary_one() -> None:
    module, optimizer = pair()[0]
    del optimizer
    gc.collect()
    assert not any(module.deferred)
    module.loss(batch(0), batch(0), TERMS)[0].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_copies_have_no_optimizer() -> None:
    module, optimizer = pair()[0]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        twin.loss(batch(0), batch(0), TERMS)[0].backward()
        assert all(p.grad is not None for p in twin.parameters())
        take((twin, gsf.optim.Adam(twin, 1e-2, fused=True)), 0)
    assert len(list(filter(None, module.deferred))) == L
    take((module, optimizer), 0)


def test_frozen_weights_stay() -> None:
    module, optimizer = pair()[0]
    module.W_dec[1].requires_grad_(False)
    kept = module.W_dec[1].detach().clone()
    take((module, optimizer), 0)
    assert_same(module.W_dec[1].detach(), kept)
    assert all(W.grad is not None for W in module.W_enc)


@pytest.mark.parametrize("name", ["b_enc.1", "threshold.2", "b_dec", "W_skip.0"])
def test_parameters_frozen_after_the_optimizer_was_made_stay(name: str) -> None:
    run = pair()[0]
    parameter = run[0].get_parameter(name).requires_grad_(False)
    before = parameter.detach().clone()
    take(run, 0)
    assert_same(parameter.detach(), before)


def test_state_is_saved_and_loaded() -> None:
    run, twin = pair(moments="8bit")[0], pair(moments="8bit")[0]
    for step in range(3):
        take(run, step)
    for step in range(2):
        take(twin, step)
    saved = copy.deepcopy(twin[1].state_dict())
    other = module_of()
    other.load_state_dict(twin[0].state_dict())
    optimizer = gsf.optim.Adam(other, 1e-2, moments="8bit", fused=True)
    optimizer.load_state_dict(saved)
    take((other, optimizer), 2)
    assert_equal_runs((other, optimizer), run)


def test_what_is_no_dictionary_is_refused() -> None:
    with pytest.raises(ValueError, match="fused=True needs an SAE, a Transcoder, a Crosscoder"):
        gsf.optim.Adam(torch.nn.Linear(3, 4), 1e-2, fused=True)


def test_an_input_with_gradients_takes_the_unfused_way() -> None:
    module, _ = pair("crosscoder")[0]
    x = batch(0).requires_grad_()
    module.loss(x, None, (Reconstruction(), L0(0.1)))[0].backward()
    assert x.grad is not None and all(W.grad is not None for W in module.W_dec)
    assert F > 0
