"""`loss` of latent-sharded SAEs: terms, blocks and gradients against one process on gloo."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import sharded as problems
import torch
from ranks import Ranks
from sharded import JUMP, batch, close, parted, rows_of, same_gradients
from torch import Tensor

from gemmascope_fast import BatchTopK, TopK, batchtopk_encode, ops
from gemmascope_fast.distributed.peers import Peers
from gemmascope_fast.training import (
    L0,
    L1,
    AuxK,
    Frequency,
    LossTerm,
    Matryoshka,
    MultiTopK,
    PreAct,
    QuadraticL0,
    QuadraticMeanL0,
    Reconstruction,
    Tanh,
)
from gemmascope_fast.training.blocked import sae_loss
from gemmascope_fast.training.planning import Limits

TERMS = (
    Reconstruction(0.7, normalisation="variance"),
    L0(0.3),
    QuadraticL0(target=9, coefficient=0.05),
    QuadraticMeanL0(coefficient=0.02, target=9),
    Frequency(0.01),
    L1(0.1),
    Tanh(0.2, by_norm=False),
)
PATHS = {
    "dense": Limits(crossover=0.0),
    "dense tiles": Limits(span_rows=16, tile_bytes=1 << 10, crossover=0.0),
    "sparse": Limits(crossover=1.0),
    "sparse blocks": Limits(span_rows=16, entry_bytes=4000, crossover=1.0),
    "mixed": Limits(span_rows=8, entry_bytes=4000, crossover=0.4),  # ranks choose differently
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


def losses(
    dp: int,
    tp: int,
    activation: Any,
    limits: Limits,
    n: int = 39,
    kind: str = "sae",
    first: int | None = None,
    terms: tuple[LossTerm, ...] = TERMS,
    **options: Any,
) -> None:
    """Loss, metrics and gradients are those of one process on the whole batch."""
    dtype = options.get("dtype", torch.float32)
    whole = getattr(problems, kind)(37, activation, **options)
    sharded, mesh = parted(whole, dp, tp)
    everything = batch(n, dtype=dtype)
    goal = None if kind == "sae" else torch.randn(n, 7, generator=torch.Generator().manual_seed(4))
    rows = rows_of(mesh, n, first)
    goal = None if goal is None else goal.to(everything.device)
    x = everything[rows].clone().requires_grad_()
    everything.requires_grad_()
    expected, metrics = sae_loss(whole, everything, goal, terms, limits)
    expected.backward()
    peers, mine = Peers(sharded.layout), None if goal is None else goal[rows]
    found, seen = sharded._on_local(lambda v: sae_loss(v, x, mine, terms, limits, peers))
    found.backward()
    for name in metrics.keys() - {"blocks", "dense_blocks"}:
        close(seen[name], metrics[name], name, dtype)
    close(found, expected, "loss", dtype)
    close(x.grad, everything.grad[rows], "d_x", dtype)
    same_gradients(sharded, whole, dtype)


def every_path(dp: int, tp: int) -> None:
    for limits in PATHS.values():
        losses(dp, tp, JUMP, limits)
    losses(dp, tp, TopK(5), PATHS["sparse blocks"])
    losses(dp, tp, BatchTopK(4.5), PATHS["sparse"])
    losses(dp, tp, JUMP, PATHS["sparse"], kind="transcoder")
    losses(dp, tp, JUMP, PATHS["dense"], kind="transcoder")


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (1, 3), (2, 2)])
def test_the_loss_is_that_of_one_process(ranks: Ranks, dp: int, tp: int) -> None:
    ranks.run(dp * tp, every_path, dp, tp)


DEAD = torch.arange(37) % 3 == 1
WITH_WEIGHTS = (
    Reconstruction(),
    AuxK(DEAD, k_aux=6, normalisation="residual"),
    PreAct(DEAD, coefficient=0.2),
    MultiTopK((2, 9, 20), weights=(0.5, 0.3, 0.2)),
    Matryoshka((3, 13, 20, 37)),
)


def every_weight_term(dp: int, tp: int) -> None:
    for path in ("dense tiles", "sparse", "sparse blocks"):
        losses(dp, tp, JUMP, PATHS[path], terms=WITH_WEIGHTS)
    for kind in ("sae", "transcoder"):
        losses(dp, tp, TopK(5), PATHS["sparse blocks"], kind=kind, terms=WITH_WEIGHTS)
    few = torch.zeros(37, dtype=torch.bool)
    few[2] = True  # the other ranks have none
    options = {"scaled": True, "rectified": False, "normalisation": "target"}
    for terms in ((AuxK(few, 6, **options),), (AuxK(DEAD, 6, encoder_gradient=False, **options),)):
        losses(dp, tp, TopK(5), PATHS["sparse"], terms=(Reconstruction(), *terms))
    if dp > 1:
        losses(dp, tp, JUMP, PATHS["sparse"], terms=WITH_WEIGHTS, first=0)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (1, 4), (2, 2)])
def test_terms_with_activations_of_their_own_and_prefixes(ranks: Ranks, dp: int, tp: int) -> None:
    ranks.run(dp * tp, every_weight_term, dp, tp)


def odd() -> None:
    losses(1, 4, JUMP, PATHS["sparse"], dtype=torch.bfloat16)
    losses(1, 4, JUMP, PATHS["dense"], dtype=torch.float64)
    losses(1, 4, JUMP, PATHS["dense"], semantics="saelens_6")
    losses(1, 4, BatchTopK(5), PATHS["sparse"], semantics="dictionary_learning_0_1")


def test_it_holds_in_other_dtypes_and_semantics(ranks: Ranks) -> None:
    ranks.run(4, odd)


def one_row_without_tokens() -> None:
    """A rank of "dp" that has no tokens takes part in every sum."""
    for activation, limits in ((JUMP, "sparse"), (TopK(5), "sparse"), (BatchTopK(4.5), "sparse")):
        losses(2, 2, activation, PATHS[limits], n=9, first=0)
    losses(2, 2, JUMP, PATHS["dense tiles"], first=0)


def test_a_rank_without_tokens_contributes_nothing(ranks: Ranks) -> None:
    ranks.run(4, one_row_without_tokens)


def _overload(encoder: tuple[Tensor, ...], name: str) -> Any:
    return ops.overload(name, *encoder)


def local_threshold() -> None:
    """Where the op's is, with a view by latent and without: the next guess of the op here."""
    sharded, _ = parted(problems.sae(37, BatchTopK(4.0)), 1, 2)
    local, x = sharded.local, batch(11)
    encoder = (x, local.W_enc.detach(), local.b_enc.detach())
    share = (44 + 0.5) / 11
    op = partial(_overload, encoder)
    expected = batchtopk_encode(*encoder, share).threshold
    for by_feature in (False, True):
        found = Peers(sharded.layout).batchtopk(op, encoder, 4.0, by_feature, None, None)
        assert len(found) == 8 and torch.equal(found[5], expected)


def test_peers_tell_the_threshold_of_their_own_candidates(ranks: Ranks) -> None:
    ranks.run(2, local_threshold)
