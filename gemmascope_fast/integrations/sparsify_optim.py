"""The update of sparsify's default optimizer, in fewer passes over memory.

`ScheduleFreeWrapper(SignSGD)` with momentum m keeps y (the parameter) and z, and averages into x:

    x = y + (1 - 1/m) (z - y)       z <- z - lr sign(g)
    x <- x + c (z - x)              y <- x + (1 - m) (z - x)

Its own step goes over each parameter eleven times, x and z changing places through memory twice.
Here a block of it stays in the cache meanwhile: the same operations on every element in the same
order, hence the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as base_optimizer

BLOCK = 1 << 19
"""Elements at a time: those of y, z, g and sign(g) take 8 MiB."""


def replacement(own: Callable[..., Any], sign_sgd: Any) -> Callable[..., Any]:
    """Stands for `ScheduleFreeWrapper.step`, which is `own`."""

    @functools.wraps(own)
    @torch.no_grad()
    def step(wrapper: Any, closure: Any = None) -> Any:
        if closure is not None or not _serves(wrapper, sign_sgd):
            return own(wrapper, closure)
        for group in wrapper.param_groups:
            share = _average(wrapper, group)
            for p in _trained(group):
                _update(p, wrapper.state[p]["z"], group["lr"], wrapper.momentum, share)
        return None

    return step


def _serves(wrapper: Any, sign_sgd: Any) -> bool:
    """Whether a step is the one above and nobody listens to the inner optimizer's."""
    base = wrapper.base
    if type(base) is not sign_sgd or wrapper.weight_decay_at_y != 0 or not wrapper.train_mode:
        return False
    hooks = (base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks)
    everywhere = (
        base_optimizer._global_optimizer_pre_hooks,
        base_optimizer._global_optimizer_post_hooks,
    )
    if any(hooks) or any(everywhere) or "step" in vars(base):
        return False
    for group in wrapper.param_groups:
        for p in _trained(group):
            state = wrapper.state[p]
            if "z" not in state:
                state["z"] = torch.clone(p)
            if not all(t.is_contiguous() for t in (p, state["z"], p.grad)):
                return False
    return True


def _trained(group: dict[str, Any]) -> Iterator[Any]:
    return (p for p in group["params"] if p.grad is not None)


def _average(wrapper: Any, group: dict[str, Any]) -> float:
    """The share of z in x after this step; counts the step."""
    count, lr = group.get("k", 0), group["lr"] * group.get("d", 1.0)
    largest = group["lr_max"] = max(lr, group.get("lr_max", 0))
    weight = (count + 1) ** wrapper.r * largest**wrapper.weight_lr_power
    group["weight_sum"] = group.get("weight_sum", 0.0) + weight
    group["k"] = count + 1
    return float(weight / group["weight_sum"])


def _update(p: Tensor, z: Tensor, lr: float, momentum: float, share: float) -> None:
    """One parameter, in place."""
    flat = p.view(-1), z.view(-1), p.grad.view(-1)  # type: ignore[union-attr]
    sign = torch.empty_like(flat[2][:BLOCK])
    for y_part, z_part, g_part in zip(*(t.split(BLOCK) for t in flat), strict=True):
        direction = torch.sign(g_part, out=sign[: g_part.shape[0]])
        y_part.lerp_(z_part, 1 - 1 / momentum)
        z_part.add_(direction, alpha=-lr)
        y_part.lerp_(z_part, share)
        y_part.lerp_(z_part, 1 - momentum)
