"""TopActivations against one sort of everything, for any batches in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same
from test_queries_activations import ranking
from torch import Tensor

from gemmascope_fast import SparseActs
from gemmascope_fast.queries import TopActivations

TOKENS, LATENTS = 60, 7


def stream(seed: int = 0) -> Tensor:
    """Small whole numbers, NaN in latent 3, latent 5 never active: ties abound."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.randint(-3, 6, (TOKENS, LATENTS), generator=g).clamp_min(-1).float()
    dense[torch.rand(TOKENS, LATENTS, generator=g) < 0.5] = 0
    dense[[41, 7], 3] = torch.nan
    dense[:, 5] = 0
    return dense


def sorted_entries(dense: Tensor, n: int, latents: list[int]) -> tuple[Tensor, Tensor]:
    values, tokens = torch.zeros(len(latents), n), torch.full((len(latents), n), -1)
    for row, j in enumerate(latents):
        column = dense[:, j].tolist()
        best = sorted((i for i, v in enumerate(column) if v != 0), key=lambda i: ranking(column[i]))
        for slot, i in enumerate(best[:n]):
            values[row, slot], tokens[row, slot] = column[i], i
    return values, tokens


def assert_state(top: TopActivations, dense: Tensor, latents: list[int]) -> None:
    values, tokens = sorted_entries(dense, top.n, latents)
    assert_same(top.tokens, tokens)
    assert_same(top.values, values)


@pytest.mark.parametrize("n", [0, 1, 4, 100])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_batches_in_order(n: int, size: int) -> None:
    dense, top = stream(), TopActivations(LATENTS, n)
    for batch in dense.split(size):
        top.update(SparseActs.from_dense(batch))
    assert top.seen == TOKENS
    assert_state(top, dense, list(range(LATENTS)))


@pytest.mark.parametrize("seed", range(3))
def test_batches_in_any_order_and_in_shards(seed: int) -> None:
    dense = stream(seed)
    shards = [TopActivations(LATENTS, 5) for _ in range(3)]
    starts = torch.randperm(10, generator=torch.Generator().manual_seed(seed)) * 6
    for turn, first in enumerate(starts.tolist()):
        acts = SparseActs.from_dense(dense[first : first + 6].reshape(2, 3, LATENTS))
        shards[turn % 3].update(acts, first_token=first)
    for shard in shards[1:]:
        shards[0].merge(shard)
    assert shards[0].seen == TOKENS
    assert_state(shards[0], dense, list(range(LATENTS)))


@pytest.mark.parametrize("latents", [[6, 3, 0], [5], []])
def test_chosen_latents_in_the_order_given(latents: list[int]) -> None:
    dense, top = stream(), TopActivations(LATENTS, 4, latents)
    for batch in dense.split(9):
        top.update(SparseActs.from_dense(batch))
    assert top.latents.tolist() == latents
    assert_state(top, dense, latents)
    mask = torch.tensor([j in latents for j in range(LATENTS)])
    assert TopActivations(LATENTS, 4, mask).latents.tolist() == sorted(latents)


def test_window_entries_and_padding_do_not_count_and_nothing_keeps_a_graph() -> None:
    offsets = torch.tensor([0, 2, 3])
    latents = torch.tensor([0, 1, 0, -99], dtype=torch.int32)
    values = torch.tensor([2.0, 0.0, 3.0, torch.nan], requires_grad=True)
    gate = torch.tensor([1.0, 0.0, 1.0, torch.nan])
    top = TopActivations(2, 2)
    top.update(SparseActs(offsets, latents, values, gate, (2, 2), padded=True), first_token=10)
    assert top.values.tolist() == [[3.0, 2.0], [0.0, 0.0]] and not top.values.requires_grad
    assert top.tokens.tolist() == [[11, 10], [-1, -1]]
    assert top.seen == 12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: TopActivations(-1, 2), ValueError, "TopActivations: d_sae must be >= 0"),
        (lambda t: TopActivations(4, 2.0), TypeError, "TopActivations: n must be an int"),
        (lambda t: TopActivations(4, 2, [4]), ValueError, "latent 4 is out of range"),
        (lambda t: t.update(torch.ones(2)), TypeError, "update: acts must be a SparseActs"),
        (
            lambda t: t.update(SparseActs.from_dense(torch.ones(2, 3))),
            ValueError,
            "update: acts must have d_sae=4 latents, got 3",
        ),
        (
            lambda t: t.update(SparseActs.from_dense(torch.ones(2, 4)), first_token=-1),
            ValueError,
            "update: first_token must be >= 0",
        ),
        (lambda t: t.merge(None), TypeError, "merge: other must be a TopActivations"),
        (lambda t: t.merge(TopActivations(4, 3)), ValueError, "merge: other must have the same"),
        (lambda t: t.merge(TopActivations(4, 2, [1])), ValueError, "other must have the same"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(TopActivations(4, 2))
