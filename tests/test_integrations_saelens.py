"""The SAELens integration where SAELens is not installed: its activations, and its refusal."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from gemmascope_fast import SparseActs
from gemmascope_fast.integrations import saelens
from gemmascope_fast.integrations.lazy_acts import LazyActs


class Dense:
    """Counts how often activations become dense."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        made = SparseActs.to_dense

        def to_dense(acts: SparseActs) -> Tensor:
            self.times += 1
            return made(acts)

        monkeypatch.setattr(SparseActs, "to_dense", to_dense)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Dense:
    return Dense(monkeypatch)


def lazy(rank: int = 2) -> tuple[LazyActs, Tensor]:
    """Activations with an explicit 0 among their entries, and the same as a dense tensor."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(6, 10, generator=generator).clamp(min=0.3) - 0.3
    given = given if rank == 2 else given.reshape(2, 3, 10)
    acts = SparseActs.from_dense(given)
    acts = acts.union(SparseActs.from_dense(torch.ones_like(given)[:1].expand_as(given)))
    assert acts.nnz > (given != 0).sum()
    return LazyActs(acts, torch.float32), given


def test_what_a_trainer_asks_is_answered_from_the_entries(dense: Dense) -> None:
    acts, given = lazy()
    assert isinstance(acts, Tensor)
    assert (acts.shape, acts.dtype, acts.device, acts.dim(), len(acts), acts.is_sparse) == (
        *(given.shape, given.dtype, given.device, 2, 6, False),
    )
    fired, expected = acts.bool().float(), given.bool().float()
    for dim in (0, -2, 1, -1):
        assert torch.equal(fired.sum(dim), expected.sum(dim))
        assert torch.equal((acts > 0).sum(dim), (given > 0).sum(dim))
        torch.testing.assert_close(torch.sum(acts, dim), given.sum(dim))
    assert torch.equal(fired.sum(), expected.sum())
    assert torch.equal((acts != 0).sum(), (given != 0).sum())
    assert acts.detach().shape == given.shape
    three, cube = lazy(3)
    torch.testing.assert_close(three.bool().float().sum(-1), cube.bool().float().sum(-1))
    assert dense.times == 0


def test_everything_else_is_the_dense_tensor(dense: Dense) -> None:
    acts, given = lazy()
    uses: list[tuple[Any, Any]] = [
        (acts + 1, given + 1),
        (acts @ torch.ones(10, 3), given @ torch.ones(10, 3)),
        (acts[2], given[2]),
        (acts < 1, given < 1),
        (acts >= 0, given >= 0),
        (acts != 0.5, given != 0.5),
        (acts > -1, given > -1),
        (acts.max(), given.max()),
        (torch.cat([acts, given]), torch.cat([given, given])),
        (acts.sum(-1, keepdim=True), given.sum(-1, keepdim=True)),
        (acts.sum((0, 1)), given.sum((0, 1))),
        (acts.to(torch.float64), given.double()),
        (acts.numpy(), given.numpy()),
    ]
    assert dense.times == 1
    for found, expected in uses:
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected)
    three, cube = lazy(3)
    torch.testing.assert_close(three.sum(0), cube.sum(0))
    torch.testing.assert_close(acts, given, check_layout=False)


def test_gradients_reach_the_entries() -> None:
    acts, given = lazy()
    values = acts.acts.values.clone().requires_grad_()
    made = LazyActs(acts.acts._replace(values=values), torch.float32)
    assert made.requires_grad
    weights = torch.randn(6, 10)
    (made * weights).sum().backward()
    at = (acts.acts.tokens(), acts.acts.latents())
    torch.testing.assert_close(values.grad, weights[at])
    values.grad = None
    made = LazyActs(acts.acts._replace(values=values), torch.float32)
    made.sum(0).dot(weights[0]).backward()
    torch.testing.assert_close(values.grad, weights[0][at[1]])
    assert not made.detach().requires_grad


def test_another_dtype() -> None:
    acts, given = lazy()
    half = LazyActs(acts.acts, torch.bfloat16)
    assert half.dtype == torch.bfloat16 == (half * 1).dtype
    torch.testing.assert_close(half.sum(0), given.bfloat16().sum(0))
    assert torch.equal(half.bool().float().sum(0), given.bool().float().sum(0))


@pytest.mark.parametrize("call", [saelens.install, saelens.register, lambda: saelens.accelerate(1)])
def test_other_versions_of_saelens_are_refused(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens.uninstall()
    for found in ("6.53.9", "6.55.0", "7.0"):
        monkeypatch.setattr(metadata, "version", lambda _, found=found: found)
        with pytest.raises(ImportError, match=f"sae-lens must be >= 6.54 and < 6.55, .*; {found}"):
            call()
