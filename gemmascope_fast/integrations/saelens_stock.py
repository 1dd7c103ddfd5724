"""Whether a call may be served in SAELens' place: its methods are its own, and nobody watches.

A served call stands for one of SAELens' methods and for all that this one calls. `CALLED` lists
them for each class, from the names in the compiled code, so that what a new release of SAELens
calls is looked at too: one of them replaced, in a subclass, on the instance or on SAELens' class,
and SAELens' code runs. So it does where a submodule that would be passed over has a hook, and under
transforms that differentiate or batch the code that they see. Imports `sae_lens`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from sae_lens.saes import batchtopk_sae, jumprelu_sae, matryoshka_batchtopk_sae, sae, topk_sae
from sae_lens.saes import transcoder as transcoders
from torch import Tensor, nn
from torch.autograd import forward_ad

STOCK = "__sae_lens__"
"""Attribute of our methods: the method itself, and the one of SAELens that it replaces."""

SERVED = (
    *(jumprelu_sae.JumpReLUSAE, topk_sae.TopKSAE, transcoders.Transcoder),
    *(transcoders.SkipTranscoder, transcoders.JumpReLUTranscoder),
    *(transcoders.JumpReLUSkipTranscoder, jumprelu_sae.JumpReLUTrainingSAE),
    *(topk_sae.TopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAE),
    matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
)
METHODS = ("encode", "decode", "forward", "training_forward_pass")


def original(method: Any) -> Any:
    """SAELens' function behind one of our methods, compiled or not; another as a function.

    Our mark names our method, since `functools.wraps` copies it to whatever wraps that.
    """
    method = getattr(method, "_torchdynamo_orig_callable", method)
    function = getattr(method, "__func__", method)
    ours, own = getattr(function, STOCK, (None, None))
    return own if ours is function else function


def stock(module: Any, name: str) -> Any:
    """The function behind the method `name` of a module: SAELens' own where we replaced it."""
    found = vars(module).get(name, None)
    return original(getattr(type(module), name) if found is None else found)


def intact(module: Any, name: str) -> bool:
    """Whether SAELens' `name`, and every method that it calls, is as SAELens wrote it."""
    for cls in type(module).__mro__:
        if cls in CALLED:
            called = CALLED[cls].get(name, {})
            return bool(called) and all(stock(module, n) is f for n, f in called.items())
    return False


def watched(module: Any) -> bool:
    """Whether a submodule that a served call passes over has a hook, or is not SAELens'."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(nn.modules.module, f"_global{table}") for table in tables):
        return True
    points = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post")
    inner = [getattr(module, name) for name in points]
    if any(type(point) not in POINTS for point in inner):
        return True
    if isinstance(module.activation_fn, nn.Module):
        inner.append(module.activation_fn)
    return any("forward" in vars(m) or any(getattr(m, t) for t in tables) for m in inner)


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


POINTS = (sae.HookPoint, topk_sae.SparseHookPoint, nn.Identity)
"""Classes of hook points; SAELens itself puts an identity in their place for its error term."""


def _called(cls: type, name: str) -> dict[str, Any]:
    """`name` and the methods of `cls` that it calls, that these call, and so on."""
    found: dict[str, Any] = {}
    todo = [name]
    while todo:
        name = todo.pop()
        if name not in found and hasattr(cls, name):
            found[name] = getattr(cls, name) if _written(getattr(cls, name)) else None
            todo += [n for n in _names(cls, name) if _is_method(cls, n)]
    return found


def _names(cls: type, name: str) -> Iterator[str]:
    """Names in the code of a method and of those of the same name that it extends."""
    functions = (inspect.unwrap(vars(base)[name]) for base in cls.__mro__ if name in vars(base))
    codes = [f.__code__ for f in functions if isinstance(f, FunctionType)]
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]


def _is_method(cls: type, name: str) -> bool:
    """Whether the class has a method of that name, which no tensor and no other module has."""
    known = hasattr(Tensor, name) or hasattr(nn.Module, name)
    return not known and isinstance(inspect.getattr_static(cls, name, None), FunctionType)


def _written(function: Any) -> bool:
    """Whether SAELens wrote this function, under decorators of torch at most."""
    while getattr(function, "__globals__", {}).get("__name__") == "torch.utils._contextlib":
        function = function.__wrapped__
    home = getattr(function, "__globals__", {}).get("__name__", "")
    return str(home).startswith("sae_lens.")


CALLED = {cls: {name: _called(cls, name) for name in METHODS} for cls in SERVED}
"""By class and served method: SAELens' functions by name; None for one replaced before."""
