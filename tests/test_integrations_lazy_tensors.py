"""Lazy tensors answer every form of a call as the dense tensor does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.integrations.lazy_acts import LazyActs
from gemmascope_fast.integrations.sparsify_ops import top
from gemmascope_fast.integrations.sparsify_pre_acts import PreActs

N, D, F = 6, 5, 16
Use = Callable[[Any], Any]

USES: dict[str, Use] = {
    "sum by keyword": lambda t: torch.sum(input=t),
    "sum into": lambda t: torch.sum(t, 0, out=torch.empty(F)),
    "greater into": lambda t: torch.gt(t, 0.0, out=torch.empty(N, F, dtype=torch.bool)),
    "greater than a tensor": lambda t: torch.gt(t, torch.full((F,), 0.5)),
    "a tensor greater than it": lambda t: torch.gt(torch.full((N, F), 0.5), t),
    "not equal": lambda t: t != 0,
    "bool of a format": lambda t: t.bool(memory_format=torch.preserve_format),
    "where by keyword": lambda t: torch.where(mask(), input=t, other=torch.zeros(())),
    "where a matrix": lambda t: torch.where(mask(), t, torch.ones(N, F)),
    "where a number": lambda t: torch.where(mask(), t, 2.0),
    "topk by keyword": lambda t: torch.topk(input=t, k=3).values,
    "topk": lambda t: t.topk(k=3).values,
    "topk into": lambda t: torch.topk(
        t, 2, out=(torch.empty(N, 2), torch.empty(N, 2, dtype=torch.int64))
    )[0],
    "smallest": lambda t: t.topk(2, largest=False).values,
    "arithmetic": lambda t: (2 * t + 1).square().mean(),
    "indexing": lambda t: t[1:3, ::2],
}


def mask() -> Tensor:
    return torch.arange(F) % 3 == 0


def lazy_acts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    dense = torch.randn(N, F).relu()
    return LazyActs(gsf.SparseActs.from_dense(dense), torch.float32), dense


def pre_acts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(N, D), torch.randn(F, D), torch.randn(F)
    return PreActs(x, weight, bias, False, top), (x @ weight.t() + bias).relu()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", [lazy_acts, pre_acts])
def test_every_form_of_a_call(make: Callable[[], tuple[Tensor, Tensor]], use: Use) -> None:
    lazy, dense = make()
    found, expected = use(lazy), use(dense)
    found = found.dense() if isinstance(found, LazyActs) else found
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


WRITES: dict[str, Use] = {
    "mul_": lambda t: t.mul_(2),
    "a column": lambda t: t.__setitem__((slice(None), 3), 9.0),
    "zero_": lambda t: t.zero_(),
    "clamp_": lambda t: t.clamp_(max=0.5),
    "masked": lambda t: t.__setitem__(t < 0.5, 7.0),
    "mask of itself": lambda t: t.masked_fill_(t > 0, 3.0),
    "augmented": lambda t: t.__iadd__(1),
    "out": lambda t: torch.add(t, 1, out=t),
    "out of another": lambda t: torch.mul(torch.ones(N, F), 2, out=t),
    "copy_": lambda t: t.copy_(torch.ones(N, F)),
    "scatter_": lambda t: t.scatter_(1, torch.zeros(N, 1, dtype=torch.int64), 4.0),
    "in place": lambda t: torch.nn.functional.relu(t.sub_(1), inplace=True),
    "foreach": lambda t: torch._foreach_mul_([t, torch.ones(2)], 3.0),
    "init": lambda t: torch.nn.init.constant_(t, 2.0),
    "a view": lambda t: t[:, 2:5].zero_(),
    "a view of a view": lambda t: t.t()[3].fill_(5.0),
    "a flat view": lambda t: t.view(-1)[::7].neg_(),
    "detached": lambda t: t.detach().mul_(2),
    "detached twice": lambda t: t.detach().detach().fill_(2.0),
    "data": lambda t: t.data.mul_(2),
    "an array": lambda t: t.detach().numpy().__setitem__(0, 6.0),
    "its shape": lambda t: t.unsqueeze_(0),
    "another": lambda t: setattr(t, "data", torch.ones(2, 3)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("make", [lazy_acts, pre_acts])
def test_writes_stay(
    make: Callable[[], tuple[Tensor, Tensor]], read_before: bool, write: Use
) -> None:
    lazy, dense = make()
    detached = lazy.detach()
    if read_before:
        assert torch.equal(lazy.abs(), dense)
    write(lazy), write(dense)
    torch.testing.assert_close(lazy * 1, dense)
    torch.testing.assert_close(lazy.sum(0), dense.sum(0))
    assert torch.equal((lazy > 0).sum(0), (dense > 0).sum(0))
    assert lazy.shape == dense.shape
    if lazy.shape == detached.shape:
        torch.testing.assert_close(detached * 1, dense)


def test_a_detached_tensor_shares_its_elements_both_ways() -> None:
    lazy, dense = lazy_acts()
    detached = lazy.detach()
    lazy.mul_(2)
    assert torch.equal(detached.sum(0), 2 * dense.sum(0))
    detached[0] = 3.0
    assert torch.equal(lazy[0], torch.full((F,), 3.0)) and lazy.float() is lazy
    assert "3.0" in repr(detached) and "LazyActs" not in repr(detached)
    copied = lazy.bool()
    lazy.zero_()
    assert copied.any() and not lazy.any()


def trained_acts() -> tuple[Tensor, Tensor, Tensor]:
    """Activations, the same as a dense tensor, and the weights they are made of."""
    dense = lazy_acts()[1]
    scale = torch.ones(N, F).requires_grad_()
    values = gsf.SparseActs.from_dense(dense * scale)
    return LazyActs(values, torch.float32), dense * scale, scale


def test_gradients_after_a_write_and_a_first_use_without_them() -> None:
    lazy, dense, scale = trained_acts()
    with torch.no_grad():
        assert torch.equal(lazy.abs(), dense) and lazy.requires_grad
    with torch.inference_mode():
        assert torch.equal(lazy.neg(), -dense)
    for t in (lazy, dense):
        t[:, 3] = 9.0
        t.mul_(2)
    found, expected = (torch.autograd.grad(t.square().sum(), scale)[0] for t in (lazy, dense))
    torch.testing.assert_close(found, expected)
    assert found.any() and not found[:, 3].any()
    leaf = trained_acts()[0].detach().requires_grad_()
    leaf.register_hook(lambda grad: 2 * grad)
    (3 * leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((N, F), 6.0))
    with torch.inference_mode():
        assert torch.equal(lazy_acts()[0].mul_(2), 2 * lazy_acts()[1])


def test_gradients_of_the_dense_tensor_are_refused() -> None:
    lazy, _, scale = trained_acts()
    for ask in (
        lambda: lazy.register_hook(print),
        lambda: lazy.retain_grad(),
        lambda: torch.autograd.grad(lazy.sum(), lazy),
        lambda: torch.autograd.grad(lazy.sum(), [scale, lazy], allow_unused=True),
        lambda: torch.autograd.grad(outputs=lazy.sum(), inputs=lazy),
    ):
        with pytest.raises(RuntimeError, match="the host's loss is computed without these dense"):
            ask()
    assert torch.autograd.grad(lazy, scale, torch.ones(N, F))[0].any()
