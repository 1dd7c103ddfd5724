"""gsf.optim.Adam(fused=True): the bits of the unfused one, and what backward and step promise."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from oracle import assert_same
from test_optim import F, batch, loss_of, sae, train

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.optim import deferred
from gemmascope_fast.training import blocked, entry_paths, outcome, planning

ACTIVATIONS = [gsf.JumpReLU(0.2, 0.4), gsf.TopK(5), gsf.BatchTopK(4.5)]
RULES = [
    {},
    {"betas": (0.9, 0.99)},
    {"betas": (0.9, 0.99), "rows": "live"},
    {"moments": "8bit"},
    {"remove_parallel": True, "unit_norm": True},
]


def pair(activation=None, dtype=torch.float32, **rule):
    """A fused and an unfused module with their optimizers."""
    modules = [sae(activation, dtype) for _ in range(2)]
    return [
        (m, gsf.optim.Adam(m, 1e-2, **rule, fused=f)) for m, f in zip(modules, (1, 0), strict=True)
    ]


def assert_equal_runs(first, second) -> None:
    for (name, p), q in zip(first[0].named_parameters(), second[0].parameters(), strict=True):
        assert_same(p.detach(), q.detach(), name)
        mine, other = first[1].state[p], second[1].state[q]
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert_same(value, other[key], f"{name}.{key}")
            else:
                assert value == other[key]


@pytest.mark.triton
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_same_bits_as_unfused(activation, rule):
    interpreted = ops.BACKEND == "triton"
    at = RULES.index(rule)
    if interpreted and (at < 2 or ACTIVATIONS.index(activation) != at % 3):
        pytest.skip("interpreted: every activation, with a rule of its own")
    runs = pair(activation, **rule)
    for module, optimizer in runs:
        train(module, optimizer, 2 if interpreted else 12)
    assert_equal_runs(*runs)
    assert not torch.equal(runs[0][0].W_dec, sae(activation).W_dec)


def test_float64_runs_on_the_reference():
    fused, unfused = pair(dtype=torch.float64)
    for module, optimizer in (fused, unfused):
        train(module, optimizer, 12, dtype=torch.float64)
    for p, q in zip(fused[0].parameters(), unfused[0].parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_float64_activations_beside_float32_weights(activation):
    fused, unfused = pair(activation)
    for module, optimizer in (fused, unfused):
        for step in range(3):
            optimizer.zero_grad()
            module.loss(batch(step).double())[0].backward()
            optimizer.step()
    for p, q in zip(fused[0].parameters(), unfused[0].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_transcoder_with_skip():
    runs = []
    for fused in (True, False):
        g = torch.Generator().manual_seed(1)
        module = gsf.Transcoder(12, 40, gsf.JumpReLU(0.2, 0.4), d_out=7, affine=True, generator=g)
        optimizer = gsf.optim.Adam(module, 1e-2, fused=fused)
        for step in range(6):
            optimizer.zero_grad()
            x = batch(step)
            (module(x) - x[:, :7]).square().sum().backward()
            optimizer.step()
        runs.append((module, optimizer))
    assert_equal_runs(*runs)
    assert runs[0][0].W_skip.any()


def test_no_gradient_of_the_matrices_exists():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    loss_of(module, batch(0)).backward()
    assert module.W_enc.grad is None and module.W_dec.grad is None
    assert module.b_dec.grad is not None
    optimizer.step()
    assert module.W_enc.grad is None and optimizer.state[module.W_enc]["step"] == 1


def test_a_second_backward_raises_and_changes_nothing():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    value = loss_of(module, batch(0))
    value.backward(retain_graph=True)
    text = "a second backward\\(\\) before step\\(\\)"
    with pytest.raises(RuntimeError, match=text):
        value.backward()
    with pytest.raises(RuntimeError, match=text):
        loss_of(module, batch(1)).backward()
    with pytest.raises(RuntimeError, match=text):
        module.encode(batch(1)).l0().sum().backward()
    module.b_dec.grad = None  # of the refused passes
    other, twin = sae(), None
    twin = gsf.optim.Adam(other, 1e-2, fused=True)
    loss_of(other, batch(0)).backward()
    other.b_dec.grad = None
    optimizer.step()
    twin.step()
    assert_equal_runs((module, optimizer), (other, twin))


def test_zero_grad_clears_and_step_consumes():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    before = module.W_dec.detach().clone()
    loss_of(module, batch(0)).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert_same(module.W_dec.detach(), before)
    loss_of(module, batch(0)).backward()
    optimizer.step()
    once = module.W_dec.detach().clone()
    assert not torch.equal(once, before)
    optimizer.step()
    assert_same(module.W_dec.detach(), once)


def test_penalties_alone_reach_the_threshold():
    runs = pair()
    for module, optimizer in runs:
        module.encode(batch(0)).l0().mean().backward()
        if module.W_dec.grad is None and not optimizer._deferred:
            module.W_dec.grad = torch.zeros_like(module.W_dec)
        optimizer.step()
    assert_same(runs[0][0].threshold.detach(), runs[1][0].threshold.detach())
    assert not torch.equal(runs[0][0].threshold, sae().threshold)


def test_gradients_of_biases_from_elsewhere_are_added():
    runs = pair()
    for module, optimizer in runs:
        (loss_of(module, batch(0)) + module.b_enc.sin().sum() + module.b_dec.sum()).backward()
        optimizer.step()
    torch.testing.assert_close(runs[0][0].b_enc, runs[1][0].b_enc)


def terms_of(activation):
    return [gsf.training.Reconstruction(), gsf.training.QuadraticL0(target=4.0, coefficient=0.01)]


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("activation", [gsf.JumpReLU(0.2, 1.2), *ACTIVATIONS[1:]], ids=str)
def test_loss_in_one_sparse_block(activation, scale):
    runs = pair(activation)
    for module, optimizer in runs:
        for step in range(6):
            optimizer.zero_grad()
            value, metrics = module.loss(batch(step), terms=terms_of(activation))
            (scale * value).backward()
            assert (int(metrics["blocks"]), int(metrics["dense_blocks"])) == (1, 0)
            assert (module.W_dec.grad is None) == (module is runs[0][0])
            optimizer.step()
    if scale == 1:
        assert_equal_runs(*runs)
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_a_gpu_is_not_asked_for_the_scale(scale, monkeypatch):
    unknown = lambda scale, *, small: not small and bool(scale == 1)  # noqa: E731
    for user in (deferred, outcome):
        monkeypatch.setattr(user, "is_one", unknown)
    monkeypatch.setattr(entry_paths, "NARROW", ("cpu",))
    module = sae(gsf.JumpReLU(0.2, 1.2), torch.bfloat16)
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    x = batch(0).bfloat16()
    value, _ = module.loss(x, terms=terms_of(module.activation))
    (scale * value).backward()
    held, factor = module.deferred.pending, torch.tensor(scale)
    for name, kept in held.found.items():
        assert kept.dtype == (torch.bfloat16 if name == "d_recon" else torch.float32)
        assert_same(held._scaled(name), (kept.float() * factor).to(kept.dtype), name)
    assert set(held.found) == {"d_recon", "d_gate"}
    before = module.W_dec.detach().clone()
    optimizer.step()
    assert not torch.equal(module.W_dec, before)


def test_loss_in_several_blocks_takes_the_unfused_way():
    runs = pair()
    limits = planning.Limits(entry_bytes=F * planning.ENTRY_BYTES, crossover=1.0)
    for module, optimizer in runs:
        for step in range(3):
            optimizer.zero_grad()
            terms = terms_of(module.activation)
            value, metrics = blocked.sae_loss(module, batch(step), batch(step), terms, limits)
            value.backward()
            assert int(metrics["blocks"]) > 1 and module.W_dec.grad is not None
            optimizer.step()
    assert_equal_runs(*runs)


TERMS = {
    "prefixes and activations": (
        True,
        [gsf.training.Tanh(1e-3, False), gsf.training.Matryoshka((10, F))],
    ),
    "decoder norms": (False, [gsf.training.Reconstruction(), gsf.training.L1(1e-3)]),
    "dead latents": (False, [gsf.training.Reconstruction(), gsf.training.MultiTopK((2,))]),
}
"""Whether the step can be fused: terms with gradients of W_dec of their own are not."""


@pytest.mark.parametrize("kind", TERMS)
def test_loss_with_other_terms(kind):
    fuses, terms = TERMS[kind]
    runs = pair(ACTIVATIONS[1])
    for module, optimizer in runs:
        for step in range(4):
            optimizer.zero_grad()
            module.loss(batch(step), terms=terms)[0].backward()
            assert (module.W_dec.grad is None) == (fuses and module is runs[0][0])
            optimizer.step()
    assert_equal_runs(*runs)


def test_other_semantics_are_refused():
    for semantics in (
        "saelens_6",
        gsf.Semantics(threshold="log"),
        gsf.Semantics(gate="non_strict"),
    ):
        module = gsf.SAE(12, F, gsf.JumpReLU(0.2, 0.4), semantics=semantics)
        with pytest.raises(ValueError, match="only the default semantics are served"):
            gsf.optim.Adam(module, 1e-2, fused=True)
        with pytest.raises(ValueError, match="only the default semantics are served"):
            gsf.optim.set_grad_format(module, "coo")


def test_choices_of_other_activations_are_not_refused():
    """SAELens rescales TopK and BatchTopK only, and only those select zeros."""
    runs = []
    for semantics in (
        "gemma_scope_2",
        gsf.Semantics.preset("saelens_6", center=False),
        gsf.Semantics(zero_gradient=True),
    ):
        module = sae(ACTIVATIONS[0])
        module.semantics = gsf.semantics.as_semantics("test", semantics)
        runs.append((module, gsf.optim.Adam(module, 1e-2, fused=True)))
        for step in range(3):
            runs[-1][1].zero_grad()
            module.loss(batch(step))[0].backward()
            runs[-1][1].step()
    for module, _ in runs[1:]:
        for name, p in module.named_parameters():
            assert torch.equal(p, runs[0][0].get_parameter(name)), name
    for semantics in (gsf.Semantics(rescale=True), gsf.Semantics(zero_gradient=True)):
        module = gsf.SAE(12, F, gsf.TopK(3), semantics=semantics)
        with pytest.raises(ValueError, match="only the default semantics are served"):
            gsf.optim.Adam(module, 1e-2, fused=True)


def test_a_second_backward_of_the_loss_raises():
    module = sae(ACTIVATIONS[1])
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    module.loss(batch(0))[0].backward()
    with pytest.raises(RuntimeError, match="a second backward"):
        module.loss(batch(1))[0].backward()
    optimizer.zero_grad()
    module.loss(batch(1))[0].backward()
    optimizer.step()


def test_dense_gradients_alone_are_applied_as_unfused():
    """What `module.loss` leaves when it needs several blocks."""
    runs = pair()
    for module, optimizer in runs:
        optimizer.zero_grad()
        module.W_dec.square().sum().backward()
        optimizer.step()
    assert_same(runs[0][0].W_dec.detach(), runs[1][0].W_dec.detach())
    assert not torch.equal(runs[0][0].W_dec, sae().W_dec)


def test_a_dense_gradient_beside_the_fused_one_is_refused():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    before = [p.detach().clone() for p in module.parameters()]
    (loss_of(module, batch(0)) + module.W_dec.square().sum()).backward()
    with pytest.raises(RuntimeError, match="W_dec has a dense gradient beside the fused one"):
        optimizer.step()
    for p, q in zip(module.parameters(), before, strict=True):
        assert_same(p.detach(), q)
    assert not optimizer.state


def test_weights_changed_since_the_forward_pass_are_refused():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    loss_of(module, batch(0)).backward()
    with torch.no_grad():
        module.W_enc.mul_(2)
    with pytest.raises(RuntimeError, match="W_enc was changed between encode and step"):
        optimizer.step()


@pytest.mark.parametrize("loss", [loss_of, lambda module, x: module.loss(x)[0]])
@pytest.mark.parametrize("what", ["module", "W_enc", "W_dec", "b_enc", "threshold"])
def test_what_is_frozen_meanwhile_does_not_move(what, loss):
    """As under any optimizer: a weight that requires no gradient has none."""
    runs = pair(gsf.JumpReLU(0.2, 1.2))
    for module, optimizer in runs:
        train(module, optimizer, 1)
        optimizer.zero_grad()
        if what == "module":
            module.freeze()
            assert not loss(module, batch(3)).requires_grad
            optimizer.step()
            module.unfreeze()
        else:
            module.get_parameter(what).requires_grad_(False)
            before = module.get_parameter(what).clone()
            loss(module, batch(3)).backward()
            optimizer.step()
            assert_same(module.get_parameter(what), before)
            module.get_parameter(what).requires_grad_(True)
        train(module, optimizer, 1, 4)
    assert_equal_runs(*runs)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 20), (6, 1), (1, 1)])
def test_one_input_and_one_latent(sizes, rule):
    """A matrix of one row or column has both strides 1, and one row of state per latent."""
    g = torch.Generator().manual_seed(0)
    weights = gsf.SAE(*sizes, gsf.JumpReLU(0.2, 0.1), generator=g).state_dict()
    runs = []
    for fused in (True, False):
        module = gsf.SAE(*sizes, gsf.JumpReLU(0.2, 0.1))
        module.load_state_dict(weights)
        optimizer = gsf.optim.Adam(module, 1e-2, **rule, fused=fused)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(module, batch(step)[:, : sizes[0]]).backward()
            optimizer.step()
        assert len(optimizer.state[module.W_enc]["touched_at"]) == sizes[1]
        assert not torch.equal(module.W_enc, weights["W_enc"])
        runs.append((module, optimizer))
    assert_equal_runs(*runs)


def test_a_module_whose_optimizer_is_gone_has_gradients_again():
    """Else those of W_enc and W_dec would be kept for a step that nobody takes."""
    module, twin = sae(), sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    train(module, optimizer, 1)
    twin.load_state_dict(module.state_dict())
    del optimizer
    assert module.deferred is None
    for each in (module, twin):
        each.zero_grad()
        loss_of(each, batch(5)).backward()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert_same(p.grad, q.grad)


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("loss", [loss_of, lambda module, x: module.loss(x)[0]])
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_weights_replaced_by_others_are_refused(name, loss, when):
    module = sae(gsf.JumpReLU(0.2, 1.2))
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    if when == "between":
        loss(module, batch(0)).backward()
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().clone()))
    before = copy.deepcopy(module.state_dict())
    if when == "before":
        loss(module, batch(0)).backward()
    with pytest.raises(RuntimeError, match=f"{name} was replaced after the optimizer was made"):
        optimizer.step()
    assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())
    module.zero_grad()
    again = gsf.optim.Adam(module, 1e-2, fused=True)
    train(module, again, 2)
    assert not torch.equal(module.W_enc, before["W_enc"])


@pytest.mark.parametrize("how", ["clipped", "unscaled", "replaced"])
@pytest.mark.parametrize("loss", [loss_of, lambda module, x: module.loss(x)[0]])
def test_gradients_changed_before_the_step_are_refused(how, loss):
    module = sae(gsf.JumpReLU(0.2, 1.2))
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    before = copy.deepcopy(module.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=how == "unscaled")
    scaler.scale(loss(module, batch(0))).backward()
    if how == "clipped":
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1e6)
    elif how == "replaced":
        module.b_dec.grad = module.b_dec.grad * 0.5
    text = "GradScaler" if how == "unscaled" else "changed between backward\\(\\) and step"
    with pytest.raises(RuntimeError, match=text):
        scaler.step(optimizer)
    for name, value in module.state_dict().items():
        assert_same(value, before[name], name)
    optimizer.zero_grad()
    loss(module, batch(1)).backward()
    optimizer.step()
    assert not torch.equal(module.W_dec, before["W_dec"])


def test_gradients_of_steps_before_may_be_changed():
    """Of a step without a fused gradient too: b_dec alone, then a loss that does not reach it."""
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    module.b_dec.sum().backward()
    optimizer.step()
    module.zero_grad(set_to_none=False)
    before = module.W_enc.detach().clone()
    module.encode(batch(0)).values.sum().backward()
    optimizer.step()
    assert not torch.equal(module.W_enc, before)


def test_edited_activations_are_refused_with_gradients_and_served_without():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    acts = module.encode(batch(0))
    with pytest.raises(ValueError, match="decode needs the activations that .* unedited"):
        module.decode(acts.scale([1], 2.0))
    with torch.no_grad():
        assert_same(module.decode(acts.detach()), sae().decode(acts.detach()).detach())
    with pytest.raises(ValueError, match="x must not require grad"):
        module.encode(batch(0).requires_grad_())
    optimizer.step()  # nothing is pending
    assert not optimizer.state


def test_construction_is_checked():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    with pytest.raises(ValueError, match="has a fused optimizer already: delete that first"):
        gsf.optim.Adam(module, 1e-2, fused=True)
    del optimizer
    gsf.optim.Adam(module, 1e-2, fused=True)
    frozen = sae()
    frozen.W_dec.requires_grad_(False)
    with pytest.raises(ValueError, match="W_dec must require grad"):
        gsf.optim.Adam(frozen, 1e-2, fused=True)
    turned = sae()
    turned.W_enc.data = turned.W_enc.data.contiguous()
    with pytest.raises(ValueError, match="W_enc must have one contiguous row of memory"):
        gsf.optim.Adam(turned, 1e-2, fused=True)


def test_copies_and_files_of_the_module_have_no_optimizer():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    twin = copy.deepcopy(module)
    assert twin.deferred is None and module.deferred is optimizer._deferred[0]
    loss_of(twin, batch(0)).backward()
    assert twin.W_dec.grad is not None
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).deferred is None


def test_activations_are_freed_with_the_step():
    module = sae()
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    acts = module.encode(batch(0))
    kept = weakref.ref(acts.indices.untyped_storage())
    storage = weakref.ref(acts.values)
    module.decode(acts).square().sum().backward()
    optimizer.step()
    gc.disable()
    try:
        del acts
        assert storage() is None and kept() is None, "a reference cycle holds a batch"
    finally:
        gc.enable()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    before = torch.get_num_threads()
    runs = []
    try:
        for used in (2, threads):
            torch.set_num_threads(used)
            module = sae(dtype=torch.bfloat16, d_sae=300)
            rule = {"moments": "8bit", "unit_norm": True, "seed": 5}
            optimizer = gsf.optim.Adam(module, 1e-2, (0.5, 0.9), fused=True, **rule)
            train(module, optimizer, 4)
            runs.append((module, optimizer))
    finally:
        torch.set_num_threads(before)
    assert_equal_runs(*runs)
