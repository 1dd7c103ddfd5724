"""Queries of given activations against sorts of dense tensors in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import assert_same
from test_sparse_acts import FILLED, SHAPES, assert_equal, make
from torch import Tensor

from gemmascope_fast import SparseActs, queries


@pytest.fixture(params=[0, 9], ids=["exact", "padded"])
def padding(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def ranking(value: float) -> tuple[bool, float]:
    """Sort key: NaN before everything, then the largest."""
    return (not math.isnan(value), 0.0 if math.isnan(value) else -value)


def tied(n: int = 12, d_sae: int = 9, seed: int = 0) -> SparseActs:
    """Activations -1, 1, 2 or NaN, so that ties and NaN abound; latent 0 is never active."""
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.0, 0.0, -1.0, 1.0, 2.0, torch.nan])
    dense = levels[torch.randint(0, 6, (n, d_sae), generator=g)]
    dense[:, 0] = 0
    return SparseActs.from_dense(dense)


def best_latents(dense: Tensor, active: Tensor, n: int) -> list[tuple[int, int]]:
    """`(latent, token)` of the n best latents, by comparing all entries."""
    entries = sorted(
        (ranking(dense[i, j].item()), int(j), int(i)) for i, j in active.nonzero().tolist()
    )
    found: list[tuple[int, int]] = []
    for _, latent, token in entries:
        if latent not in [j for j, _ in found]:
            found.append((latent, token))
    return found[:n]


# ---- top_latents


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [0, 1, 3, 1000])
def test_top_latents(shape: tuple[int, ...], n: int, padding: int) -> None:
    case = make(shape, padding)
    flat, active = (t.reshape(case.acts.n, case.acts.d_sae) for t in (case.dense, case.gate > 0))
    expected = best_latents(flat.detach(), active, n)
    found = queries.top_latents(case.acts, n)
    assert list(zip(found.latents.tolist(), found.tokens.tolist(), strict=True)) == expected
    where = torch.tensor(expected, dtype=torch.int64).reshape(-1, 2)
    assert_equal(found.values, flat[where[:, 1], where[:, 0]], case.leaves)


@pytest.mark.parametrize("seed", range(4))
def test_top_latents_of_ties_and_nan(seed: int) -> None:
    acts = tied(seed=seed)
    dense = acts.to_dense()
    expected = best_latents(dense, dense != 0, 5)
    found = queries.top_latents(acts, 5)
    assert list(zip(found.latents.tolist(), found.tokens.tolist(), strict=True)) == expected
    assert_same(found.values, dense[found.tokens, found.latents])


def test_a_latent_whose_activations_are_negative_beats_one_that_is_off() -> None:
    acts = SparseActs.from_dense(torch.tensor([[0.0, -2.0, 0.0], [0.0, -1.0, 0.0]]))
    found = queries.top_latents(acts, 3)
    assert [t.tolist() for t in found] == [[-1.0], [1], [1]]


# ---- top_per_token


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0, 1, 3, 20])
def test_top_per_token(shape: tuple[int, ...], k: int, padding: int) -> None:
    case = make(shape, padding)
    values, indices = queries.top_per_token(case.acts, k)
    assert values.shape == indices.shape == (*shape[:-1], k)
    flat, active = (t.reshape(case.acts.n, case.acts.d_sae) for t in (case.dense, case.gate > 0))
    rows = []
    for i in range(case.acts.n):
        on = active[i].nonzero()[:, 0].tolist()
        on.sort(key=lambda j: (ranking(flat[i, j].item()), j))
        rows.append((on + [-1] * k)[:k])
    expected = torch.tensor(rows, dtype=torch.int64).reshape(*shape[:-1], k)
    assert_same(indices, expected)
    if case.acts.d_sae:
        wide = expected.reshape(case.acts.n, k)
        dense = flat.gather(1, wide.clamp_min(0)).where(wide >= 0, 0.0)
        assert_equal(values, dense.reshape(values.shape), case.leaves)


@pytest.mark.parametrize("seed", range(4))
def test_top_per_token_of_ties_and_nan(seed: int) -> None:
    acts = tied(seed=seed)
    dense = acts.to_dense()
    values, indices = queries.top_per_token(acts, 4)
    for i, row in enumerate(dense.tolist()):
        on = sorted((j for j, v in enumerate(row) if v != 0), key=lambda j: (ranking(row[j]), j))
        assert indices[i].tolist() == (on + [-1] * 4)[:4]
        assert_same(values[i, : len(on)], dense[i, on[:4]])


def test_slots_go_back_into_sparse_acts(padding: int) -> None:
    case = make((5, 7), padding, window=False)
    values, indices = queries.top_per_token(case.acts, 7)
    again = SparseActs.from_topk(values, indices.clamp_min(0), 7)
    assert_same(again.to_dense(), case.dense)
    assert_same(again.l0(), case.gate.sum(-1))


# ---- activations_of, to_sparse_coo


@pytest.mark.parametrize("shape", FILLED)
def test_activations_of(shape: tuple[int, ...], padding: int) -> None:
    case = make(shape, padding)
    mask = torch.arange(shape[-1]) % 2 == 0
    selections: list[Any] = [list(range(shape[-1]))[::-1], torch.tensor([0]), 0, [], mask]
    for latents in selections:
        columns = torch.as_tensor(latents).reshape(-1)
        columns = columns if columns.dtype == torch.bool else columns.long()
        found = queries.activations_of(case.acts, latents)
        assert_equal(found, case.dense[..., columns], case.leaves)


def test_a_latent_that_is_off_gets_the_gradient_of_its_stored_zero() -> None:
    acts = SparseActs.from_dense(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    both = acts.union(SparseActs.from_dense(torch.ones(2, 2))).detach().requires_grad_()
    queries.activations_of(both, [1])[0].sum().backward()
    assert both.values.grad is not None
    assert both.values.grad.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_to_sparse_coo(shape: tuple[int, ...], padding: int) -> None:
    case = make(shape, padding)
    coo = queries.to_sparse_coo(case.acts)
    assert coo.shape == shape and coo.is_coalesced()
    assert coo.values().shape[0] == int(case.gate.sum())
    assert_same(coo.indices(), (case.gate > 0).nonzero().t())
    assert_equal(coo.to_dense(), case.dense * (case.gate > 0), case.leaves)
    again = torch.sparse_coo_tensor(
        coo.indices(), coo.values(), shape, check_invariants=True
    ).coalesce()
    assert_same(again.indices(), coo.indices())


# ---- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: queries.top_latents(a, -1), ValueError, "top_latents: n must be >= 0"),
        (lambda a: queries.top_latents(a, 1.5), TypeError, "top_latents: n must be an int"),
        (lambda a: queries.top_latents(torch.ones(2), 1), TypeError, "top_latents: acts must be"),
        (lambda a: queries.top_per_token(a, -1), ValueError, "top_per_token: k must be >= 0"),
        (lambda a: queries.top_per_token([], 1), TypeError, "top_per_token: acts must be"),
        (lambda a: queries.activations_of(a, [7]), ValueError, "latent 7 is out of range"),
        (lambda a: queries.activations_of(a, [1, 1]), ValueError, "latents must be distinct"),
        (lambda a: queries.activations_of(a, [0.5]), TypeError, "latents must be integers"),
        (lambda a: queries.activations_of(None, [0]), TypeError, "activations_of: acts must be"),
        (lambda a: queries.to_sparse_coo(None), TypeError, "to_sparse_coo: acts must be"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make((5, 7)).acts)
