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
