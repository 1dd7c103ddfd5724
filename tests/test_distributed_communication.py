"""What latent-sharded dictionaries send, to the last collective, and selections with ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sharded as problems
import torch
from ranks import Ranks
from sharded import JUMP, D, batch, close, counted, parted, rows_of, same_acts, same_gradients
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import BatchTopK, TopK
from gemmascope_fast.training import (
    L1,
    AuxK,
    Frequency,
    LossTerm,
    QuadraticL0,
    Reconstruction,
)
from gemmascope_fast.training.losses_weights import WeightTerm

N = 11


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


# ---- exact collectives

REDUCE, GATHER, SCATTER = "all_reduce", "all_gather", "reduce_scatter"
Sent = list[tuple[str, tuple[int, ...]]]


def sent_by(dp: int, tp: int, activation: Any, semantics: str, x_grad: bool) -> dict[str, Sent]:
    sharded, mesh = parted(problems.sae(37, activation, semantics=semantics), dp, tp)
    x = batch(N * dp)[rows_of(mesh, N * dp)].requires_grad_(x_grad)
    found: dict[str, Sent] = {}
    with counted() as found["encode"]:
        acts = sharded.encode(x)
    with counted() as found["decode"]:
        recon = sharded.decode(acts)
    with counted() as found["backward"]:
        recon.square().sum().backward()
    with counted() as found["gathered"]:
        acts.gathered()
    with counted() as found["l0"]:
        acts.l0()
    return found


def test_jumprelu_encodes_without_a_collective(ranks: Ranks) -> None:
    for found in ranks.run(2, sent_by, 1, 2, JUMP, "gemma_scope_2", False):
        longest = found["gathered"][1][1][0]
        assert found == {
            "encode": [],
            "decode": [(REDUCE, (N, D))],
            "backward": [],
            "gathered": [(GATHER, (N,)), (GATHER, (longest,))],
            "l0": [(REDUCE, (N,))],
        }


def test_d_x_costs_one_all_reduce_where_it_is_wanted(ranks: Ranks) -> None:
    for found in ranks.run(2, sent_by, 1, 2, JUMP, "gemma_scope_2", True):
        assert found["backward"] == [(REDUCE, (N, D))]


def test_centring_by_b_dec_costs_one_small_all_reduce(ranks: Ranks) -> None:
    for found in ranks.run(2, sent_by, 1, 2, TopK(5), "dictionary_learning_0_1", False):
        assert found["backward"] == [(REDUCE, (D,))]


def test_topk_sends_its_candidates_values_once(ranks: Ranks) -> None:
    for k, width in ((5, 5), (20, 13)):  # a shard of 37 latents over 3 ranks has 13
        for found in ranks.run(3, sent_by, 1, 3, TopK(k), "gemma_scope_2", False):
            assert found["encode"] == [(GATHER, (N * width,))]
            assert found["backward"] == []


def test_batchtopk_counts_digit_by_digit(ranks: Ranks) -> None:
    for found in ranks.run(2, sent_by, 1, 2, BatchTopK(5), "gemma_scope_2", False):
        assert found["encode"] == [(REDUCE, (1, 257))] * 4
    for found in ranks.run(4, sent_by, 2, 2, BatchTopK(5), "gemma_scope_2", False):
        assert found["encode"] == [(REDUCE, ())] + [(REDUCE, (1, 257))] * 8
        assert found["backward"] == []


def sent_by_layers(activation: Any) -> tuple[Sent, Sent, Sent]:
    sharded, _ = parted(problems.clt(23, activation), 1, 2)
    x = batch(N, 3).requires_grad_()
    with counted() as encode:
        acts = sharded.encode(x)
    with counted() as decode:
        recon = sharded.decode(acts, x)
    with counted() as backward:
        recon.square().sum().backward()
    return encode, decode, backward


def test_layers_share_their_collectives(ranks: Ranks) -> None:
    for activation, encode in (
        (JUMP, []),
        (TopK(4), [(GATHER, (3 * N * 4,))]),
        (BatchTopK(4), [(REDUCE, (3, 257))] * 4),
    ):
        for found in ranks.run(2, sent_by_layers, activation):
            assert found == (encode, [(REDUCE, (N, 3 * D))], [(REDUCE, (N, 3, D))])


def sent_by_scattering() -> tuple[Sent, Sent]:
    sharded, _ = parted(problems.sae(), 1, 3)
    acts = sharded.encode(batch(N))
    with counted() as decode:
        recon = sharded.decode(acts, scatter_tokens=True)
    with counted() as backward:
        recon.sum().backward()
    return decode, backward


def test_scattered_tokens_cost_a_reduce_scatter_and_a_gather(ranks: Ranks) -> None:
    for found in ranks.run(3, sent_by_scattering):
        assert found == ([(SCATTER, (12, D))], [(GATHER, (4 * D,))])


def sent_by_loss(
    dp: int, tp: int, activation: Any, terms: tuple[LossTerm, ...]
) -> tuple[Sent, Sent]:
    sharded, mesh = parted(problems.sae(37, activation), dp, tp)
    x = batch(N * dp)[:N] if dp == 1 else batch(N * dp)[rows_of(mesh, N * dp)]
    with counted() as forward:
        loss, _ = sharded.loss(x, terms=terms)
    with counted() as backward:
        loss.backward()
    return forward, backward


def test_the_loss_sends_what_its_docstring_says(ranks: Ranks) -> None:
    terms = (Reconstruction(), QuadraticL0(target=9, coefficient=0.1), L1(0.1), Frequency(0.1))
    block = [(REDUCE, (1, N, D)), (REDUCE, (N,))]
    one = [(REDUCE, (1,)), *block, (GATHER, (19,)), (REDUCE, (1,))]
    for found in ranks.run(2, sent_by_loss, 1, 2, JUMP, terms):
        assert found == (one, [])
    for found in ranks.run(2, sent_by_loss, 1, 2, TopK(5), (Reconstruction(),)):
        assert found == ([(GATHER, (N * 5,)), *block], [])
    for rank, found in enumerate(ranks.run(4, sent_by_loss, 2, 2, JUMP, (Reconstruction(),))):
        n = N - 1 if rank < 2 else N + 1
        block = [(REDUCE, (1, n, D)), (REDUCE, (n,))]
        over_dp = [(REDUCE, ()), (REDUCE, (D + 1,)), (REDUCE, ())]
        assert found == ([*over_dp, (REDUCE, (1,)), *block, (REDUCE, (3,))], [])


class Unknown(WeightTerm):
    """A user's own, which has not thought of latents elsewhere."""

    name = "unknown"

    def latents(self, op: str, d_sae: int, device: torch.device) -> None:
        return None

    def entries_per_token(self, latents: int) -> int:
        return latents

    def total(self, dictionary: Any) -> Tensor:
        raise AssertionError("evaluated")


def refusing_a_term() -> None:
    sharded, _ = parted(problems.sae(), 1, 2)
    with pytest.raises(ValueError, match="loss: unknown is not served over several ranks"):
        sharded.loss(batch(), terms=(Reconstruction(), Unknown()))
    with pytest.raises(ValueError, match=r"auxk: .*d_sae=37"):
        sharded.loss(batch(), terms=(Reconstruction(), AuxK(torch.zeros(19, dtype=torch.bool), 3)))


def test_a_term_that_knows_no_peers_is_named(ranks: Ranks) -> None:
    ranks.run(2, refusing_a_term)


# ---- values: layers, scattered tokens


def layers(dp: int, tp: int) -> None:
    for make in (problems.crosscoder, problems.clt):
        for activation in (JUMP, TopK(4), BatchTopK(3.5)):
            whole = make(23, activation)
            sharded, mesh = parted(whole, dp, tp)
            everything = batch(N, 2, 3)
            rows = rows_of(mesh, N)
            x = everything[rows].clone().requires_grad_()
            everything.requires_grad_()
            expected = whole.encode(everything)
            target = whole(everything)
            (target.square().sum() + 0.1 * whole.l0(expected).square().sum()).backward()
            acts = sharded.encode(x)
            for mine, theirs in zip(acts, expected, strict=True):
                same_acts(mine.gathered(), theirs[rows])
            recon = sharded.decode(acts, *((x,) if make is problems.clt else ()))
            close(recon, target[rows], "recon")
            close(sharded(x), target[rows], "forward")
            (recon.square().sum() + 0.1 * sharded.l0(acts).square().sum()).backward()
            close(x.grad, everything.grad[rows], "d_x")
            same_gradients(sharded, whole)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (1, 3), (2, 2)])
def test_dictionaries_of_several_layers(ranks: Ranks, dp: int, tp: int) -> None:
    ranks.run(dp * tp, layers, dp, tp)


def scattered() -> None:
    for whole, inner in ((problems.transcoder(), ()), (problems.clt(), (3,))):
        sharded, _ = parted(whole, 1, 3)
        for n in (11, 1, 0):  # the last ranks have fewer rows, or none
            whole.zero_grad()
            sharded.zero_grad()
            x = batch(n, *inner)
            rows = sharded.rows(n)
            expected = whole.decode(whole.encode(x), x)
            recon = sharded.decode(sharded.encode(x), x, scatter_tokens=True)
            close(recon, expected[rows], "recon")
            recon.square().sum().backward()
            expected.square().sum().backward()
            same_gradients(sharded, whole)


def test_scattered_tokens_have_the_gradients_of_the_whole(ranks: Ranks) -> None:
    ranks.run(3, scattered)


# ---- selections: ties, NaN


def with_ties(dp: int, tp: int) -> None:
    """Small integers: most values appear several times, on several ranks and tokens."""
    for kind in (TopK(4), TopK(11), BatchTopK(2.5), BatchTopK(6)):
        whole = problems.randomised(gsf.SAE(D, 23, kind), integer=True)
        sharded, mesh = parted(whole, dp, tp)
        everything = torch.randint(-1, 2, (N, D)).to(batch(0))
        rows = rows_of(mesh, N)
        expected = whole.encode(everything)
        found = sharded.encode(everything[rows])
        same_acts(found.gathered(), expected[rows], str(kind))
        if isinstance(kind, BatchTopK):
            assert torch.equal(found.local.threshold, expected.threshold)
    layered = problems.randomised(gsf.Crosscoder(3, D, 23, BatchTopK(2.5)), integer=True)
    sharded, mesh = parted(layered, dp, tp)
    stacks = torch.randint(-1, 2, (N, 3, D)).to(batch(0))
    rows = rows_of(mesh, N)
    for mine, theirs in zip(sharded.encode(stacks[rows]), layered.encode(stacks), strict=True):
        same_acts(mine.gathered(), theirs[rows])


@pytest.mark.parametrize(("dp", "tp"), [(1, 3), (1, 4), (2, 2)])
def test_ties_go_to_the_smaller_token_and_latent(ranks: Ranks, dp: int, tp: int) -> None:
    ranks.run(dp * tp, with_ties, dp, tp)


def with_nan() -> None:
    x = batch()
    x[3, 1] = torch.nan
    x[5] = torch.inf
    for kind in (JUMP, TopK(4), BatchTopK(4)):
        whole = problems.sae(23, kind, semantics="gemma_scope_2")
        with torch.no_grad():
            whole.W_enc[:, 20] = torch.nan
        sharded, _ = parted(whole, 1, 3)
        same_acts(sharded.encode(x).gathered(), whole.encode(x), str(kind))
        assert bool(sharded(x).isnan().all(1).eq(whole(x).isnan().all(1)).all())


def test_nan_is_selected_as_one_process_selects_it(ranks: Ranks) -> None:
    ranks.run(3, with_nan)


def running_threshold() -> None:
    """A BatchTopK's running threshold sees the smallest value that any rank keeps."""
    whole = problems.sae(23, BatchTopK(4), semantics="dictionary_learning_0_1")
    sharded, mesh = parted(whole, 2, 2)
    rows = rows_of(mesh, N)
    x = batch()
    for step in range(4):
        y: Tensor = x * (1 + step)
        if step % 2:
            whole.loss(y)
            sharded.loss(y[rows])
        else:
            whole.encode(y)
            sharded.encode(y[rows])
        assert torch.equal(sharded.ema_threshold, whole.ema_threshold), step
    whole.eval()
    sharded.eval()
    with counted() as sent:
        acts = sharded.encode(x[rows])
    assert sent == []
    same_acts(acts.gathered(), whole.encode(x)[rows])


def running_thresholds_of_layers() -> None:
    whole = problems.randomised(gsf.Crosscoder(3, D, 23, BatchTopK(2.5), ema_decay=0.9))
    sharded, mesh = parted(whole, 2, 2)
    rows = rows_of(mesh, N)
    x = torch.randn(N, 3, D, generator=torch.Generator().manual_seed(4)).to(batch(0))
    for step in range(3):
        whole.encode(x * (1 + step))
        sharded.encode(x[rows] * (1 + step))
        assert torch.equal(sharded.ema_threshold, whole.ema_threshold), step
    whole.eval()
    sharded.eval()
    with counted() as sent:
        found = sharded.encode(x[rows])
    assert sent == []
    for mine, theirs in zip(found, whole.encode(x), strict=True):
        same_acts(mine.gathered(), theirs[rows])


@pytest.mark.parametrize("run", [running_threshold, running_thresholds_of_layers])
def test_the_running_threshold_is_that_of_one_process(ranks: Ranks, run: Any) -> None:
    ranks.run(4, run)
