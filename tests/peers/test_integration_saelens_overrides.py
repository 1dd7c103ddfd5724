"""What somebody replaced or watches in SAELens is called with the backend installed as without it.

Every method of every served class is replaced in turn by one that counts its calls and passes them
on; the calls must be the same with the backend and without, so that a method that SAELens comes to
call is noticed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peer import D, F, batch, close
from saelens_modules import INFERENCE, TRAINED, Largest, make, saes, step_input
from torch import Tensor, nn
from torch.autograd import forward_ad

from gemmascope_fast.integrations import saelens, saelens_stock
from gemmascope_fast.integrations.lazy_acts import LazyActs

ALL = INFERENCE | TRAINED
X = batch(0, 160)


def methods(cls: type) -> list[str]:
    """Those that SAELens wrote, private ones included."""
    functions = inspect.getmembers(cls, inspect.isfunction)
    return [n for n, _ in functions if not n.startswith("__") and not hasattr(nn.Module, n)] + [
        "forward"
    ]


def used(module: Any) -> dict[str, Any]:
    """What the calls that are served return."""
    acts = module.encode(X)
    found = {"encode": acts, "decode": module.decode(acts.detach()), "forward": module(X)}
    if isinstance(module, saes.TrainingSAE):
        for dead in (None, "few"):
            output = module.training_forward_pass(step_input(X, dead))
            found |= {f"{dead} {name}": value for name, value in output.losses.items()}
            found[f"{dead} acts"] = output.feature_acts
    return found


def counting(calls: list[str], name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return own(*args, **kwargs)

    return method


def subclassed(given: Any, name: str, calls: list[str]) -> Any:
    (cls, config), settings = given
    own = counting(calls, name, getattr(cls, name))
    return make(((type(f"My{cls.__name__}", (cls,), {name: own}), config), settings))


def set_on_it(given: Any, name: str, calls: list[str]) -> Any:
    module = make(given)
    setattr(module, name, counting(calls, name, getattr(module, name)))
    return module


def wrapped_on_it(given: Any, name: str, calls: list[str]) -> Any:
    """As a decorator does it, around what is there when the backend is installed already."""
    module = make(given)
    own = getattr(module, name)
    setattr(module, name, functools.wraps(own)(counting(calls, name, own)))
    return module


@pytest.mark.parametrize("override", [subclassed, set_on_it, wrapped_on_it])
@pytest.mark.parametrize("kind", ALL)
def test_every_override_is_called_as_without_us(kind: str, override: Any) -> None:
    for name in methods(ALL[kind][0][0]):
        calls: list[str] = []
        if override is not wrapped_on_it:
            module = override(ALL[kind], name, calls)
            calls.clear()
        else:
            module = set_on_it(ALL[kind], name, calls)
        expected, theirs = used(module), list(calls)
        calls.clear()
        with saelens.install():
            if override is wrapped_on_it:
                module = override(ALL[kind], name, calls)
            found = used(module)
        assert calls == theirs, name
        for key, value in expected.items():
            close(found[key].to_dense(), value.to_dense(), f"{name}: {key}")
        if name == "get_name" and kind in TRAINED:  # no part of a step
            assert isinstance(found["None acts"], LazyActs)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_another_loss_of_dead_latents_trains(kind: str) -> None:
    """By a method that only SAELens' own `calculate_aux_loss` calls."""
    module = make(TRAINED[kind])
    module.calculate_topk_aux_loss = lambda **given: module.b_enc.square().sum()
    with saelens.install():
        output = module.training_forward_pass(step_input(X, "many"))
        output.losses["auxiliary_reconstruction_loss"].backward()
    close(module.b_enc.grad, 2 * module.b_enc, "b_enc")


def test_a_class_that_was_changed_stays_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(TRAINED["topk"])
    monkeypatch.setattr(saes.TopKTrainingSAE, "calculate_topk_aux_loss", lambda self, **given: 5.0)
    with saelens.install():
        output = module.training_forward_pass(step_input(X, "few"))
    assert output.losses["auxiliary_reconstruction_loss"] == 5
    found = saelens_stock._called(saes.TopKTrainingSAE, "training_forward_pass")
    assert found.pop("calculate_topk_aux_loss") is None  # had it been changed before the import
    assert len(found) == 5 and all(found.values())


def seen(kept: list[Any]) -> Callable[..., None]:
    return lambda module, *given: kept.append((type(module).__name__, len(given)))


REGISTER = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("how", REGISTER)
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "transcoder", "batchtopk"])
def test_hooks_of_an_activation_function(kind: str, how: str) -> None:
    module, calls = make(ALL[kind]), list[Any]()
    getattr(module.activation_fn, how)(seen(calls))
    module(X).sum().backward()
    theirs = list(calls)
    assert theirs
    calls.clear()
    with saelens.install():
        module(X).sum().backward()
    assert calls == theirs


@pytest.mark.parametrize("how", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "step"])
def test_hooks_of_all_modules(kind: str, how: str) -> None:
    module, calls = make(ALL[kind]), list[Any]()
    handle = getattr(nn.modules.module, f"register_module_{how}")(seen(calls))
    try:
        module(X).sum().backward()
        theirs = list(calls)
        calls.clear()
        with saelens.install():
            module(X).sum().backward()
    finally:
        handle.remove()
    assert theirs and calls == theirs


def test_other_activation_functions_and_hook_points() -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x.relu()

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    for name, changed in (("activation_fn", Doubled()), ("hook_sae_acts_post", Shifted())):
        module = make(INFERENCE["jumprelu"])
        setattr(module, name, changed)
        module.hook_dict[name] = changed
        expected = module(X)
        with saelens.install():
            close(module(X), expected, name)
    module = make(INFERENCE["topk"])
    module.activation_fn.forward = lambda pre: pre.relu()
    expected = module(X)
    with saelens.install():
        close(module(X), expected, "forward")


def tangent(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[Any], Tensor]] = {
    "vmap": lambda f: torch.vmap(f)(X.view(4, 40, D)),
    "jacrev": lambda f: torch.func.jacrev(f)(X[0]),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X[0]),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).square().sum())(X[0]),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,))[1],
    "vjp": lambda f: torch.func.vjp(f, X)[1](torch.ones_like(f(X)))[0],
    "forward mode": lambda f: tangent(f, X),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "transcoder"])
def test_transforms_of_functions(kind: str, transform: str) -> None:
    module = make(INFERENCE[kind])
    for name in ("forward", "encode"):
        expected = TRANSFORMS[transform](getattr(module, name))
        with saelens.install():
            close(TRANSFORMS[transform](getattr(module, name)), expected, name)
    with saelens.install(), torch.no_grad(), Largest() as after:
        module(X)
    assert after.elements < 160 * F
