"""Latent-sharded SAEs and transcoders on gloo: values, gradients, selections and collectives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import sharded as problems
import torch
from ranks import Ranks
from sharded import JUMP, D, batch, close, parted, rows_of, same_acts, same_gradients

import gemmascope_fast as gsf
from gemmascope_fast import BatchTopK, TopK
from gemmascope_fast.distributed.layout import LATENTS

MESHES = [(1, 2), (1, 3), (1, 4), (2, 2)]
mesh_ids = [f"dp{dp}-tp{tp}" for dp, tp in MESHES]
KINDS = {"sae": problems.sae, "transcoder": problems.transcoder}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


# ---- encode, decode and their gradients


def as_one_process(
    dp: int, tp: int, kind: str, activation: Any, n: int = 11, d_sae: int = 37, **options: Any
) -> None:
    dtype = options.get("dtype", torch.float32)
    whole = KINDS[kind](d_sae, activation, **options)
    sharded, mesh = parted(whole, dp, tp)
    everything = batch(n, dtype=dtype)
    rows = rows_of(mesh, n)
    x = everything[rows].clone().requires_grad_()
    everything.requires_grad_()
    weights = torch.randn(n, whole.d_out, generator=torch.Generator().manual_seed(3)).to(x.device)
    extra = () if kind == "sae" else (everything,)
    expected = whole.encode(everything)
    target = whole.decode(expected, *extra, dtype=torch.float32)
    (target * weights).sum().add(expected.l0().square().sum() * 0.1).backward()

    acts = sharded.encode(x)
    same_acts(acts.gathered(), expected[rows], "entries")
    assert torch.equal(acts.l0(), expected[rows].l0())
    recon = sharded.decode(acts, *((x,) if extra else ()), dtype=torch.float32)
    close(recon, target[rows], "recon", dtype)
    (recon * weights[rows]).sum().add(acts.l0().square().sum() * 0.1).backward()
    close(x.grad, everything.grad[rows], "d_x", dtype)
    same_gradients(sharded, whole, dtype)
    close(sharded(x), whole(everything)[rows], "forward", dtype)
    assert sharded(x).dtype == x.dtype


ACTIVATIONS = [JUMP, TopK(5), BatchTopK(4.5)]


def every_kind(dp: int, tp: int) -> None:
    for kind, activation in itertools.product(KINDS, ACTIVATIONS):
        as_one_process(dp, tp, kind, activation)


@pytest.mark.parametrize(("dp", "tp"), MESHES, ids=mesh_ids)
def test_the_ranks_compute_what_one_process_does(ranks: Ranks, dp: int, tp: int) -> None:
    ranks.run(dp * tp, every_kind, dp, tp)


ODD: dict[str, list[dict[str, Any]]] = {
    "ranks without latents": [
        {"d_sae": 2, "activation": JUMP},
        {"d_sae": 2, "activation": TopK(2)},
        {"d_sae": 5, "activation": BatchTopK(2)},
    ],
    "k beyond a shard, and 0": [
        {"d_sae": 13, "activation": kind}
        for kind in (TopK(9), TopK(13), TopK(0), BatchTopK(100), BatchTopK(0))
    ],
    "no tokens": [{"n": 0, "activation": kind} for kind in ACTIVATIONS],
    "bfloat16": [{"dtype": torch.bfloat16, "activation": kind} for kind in ACTIVATIONS],
    "float64": [{"dtype": torch.float64, "activation": kind} for kind in ACTIVATIONS],
    "semantics": [
        {"semantics": "saelens_6", "activation": BatchTopK(5)},
        {"semantics": "saelens_6", "activation": JUMP},
        {"semantics": "sparsify_1_3", "activation": TopK(5)},
        {"semantics": "dictionary_learning_0_1", "activation": TopK(5)},
        {"semantics": "dictionary_learning_0_1", "activation": BatchTopK(5)},
    ],
}


def odd(name: str) -> None:
    for case in ODD[name]:
        as_one_process(1, 4, "sae", **case)


@pytest.mark.parametrize("name", ODD)
def test_it_holds_at_odd_sizes_dtypes_and_semantics(ranks: Ranks, name: str) -> None:
    ranks.run(4, odd, name)


def published_width() -> list[int]:
    sharded, _ = parted(gsf.SAE(D, 10_080, JUMP), 1, 3)
    return [sharded.latents.start, sharded.latents.stop, sharded.local.d_sae]


def test_10080_latents_over_three_ranks(ranks: Ranks) -> None:
    found = ranks.run(3, published_width)
    assert found == [[0, 3360, 3360], [3360, 6720, 3360], [6720, 10_080, 3360]]


# ---- the local module


def trained(fused: bool, activation: Any) -> None:
    """Steps of an optimizer over `local` are those of one process."""
    whole = problems.sae(37, activation)
    sharded, _ = parted(whole, 1, 3)
    x = batch(40)
    one = gsf.optim.Adam(whole, 1e-2, (0.0, 0.99), fused=fused)
    mine = gsf.optim.Adam(sharded.local, 1e-2, (0.0, 0.99), fused=fused)
    for step in range(4):
        for module, optimizer in ((whole, one), (sharded, mine)):
            optimizer.zero_grad()
            if step % 2:
                module.loss(x)[0].backward()
            else:
                module.decode(module.encode(x)).sub(x).square().sum().backward()
            if module is sharded:
                sharded.hand_gradients()
            optimizer.step()
    for name, p in whole.named_parameters():
        close(sharded.get_parameter(name).full_tensor(), p, name)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_over_the_local_module_trains_the_dtensors(ranks: Ranks, fused: bool) -> None:
    for activation in (JUMP, TopK(5)):
        ranks.run(3, trained, fused, activation)


def handed_beside_a_fused_step() -> None:
    """A gradient of `b_dec` on top of the one that the backward pass left in `local`."""
    sharded, _ = parted(problems.sae(37), 1, 2)
    fused, x = gsf.optim.Adam(sharded.local, 1e-2, fused=True), batch(8)
    loss = sharded.decode(sharded.encode(x)).square().sum()
    (loss + 3 * sharded.b_dec.to_local().sum()).backward()
    left = sharded.local.b_dec.grad.clone()
    sharded.hand_gradients()
    assert torch.equal(sharded.local.b_dec.grad, left + 3)
    fused.step()
    sharded.decode(sharded.encode(x)).square().sum().backward()
    sharded.local.b_dec.grad.mul_(2)
    with pytest.raises(RuntimeError, match="changed between backward"):
        fused.step()


def test_gradients_may_be_handed_over_beside_a_fused_step(ranks: Ranks) -> None:
    ranks.run(2, handed_beside_a_fused_step)


def accumulated(dp: int, tp: int) -> None:
    """Gradients summed over "dp" and handed over after each of several backward passes add up."""
    whole = problems.sae(37)
    sharded, mesh = parted(whole, dp, tp)
    for x in (batch(8), 2 * batch(8)):
        whole.loss(x)[0].backward()
        sharded.loss(x[rows_of(mesh, 8)])[0].backward()
        for p in sharded.parameters():
            p.grad = p.grad.redistribute(placements=p.placements)
        sharded.hand_gradients()
    here = sharded.latents
    for name, p in whole.named_parameters():
        dim = LATENTS.get(name)
        expected = p.grad if dim is None else p.grad[here] if dim == 0 else p.grad[:, here]
        close(sharded.local.get_parameter(name).grad, expected, name)
        assert sharded.get_parameter(name).grad is None


def test_handed_gradients_accumulate(ranks: Ranks) -> None:
    ranks.run(3, accumulated, 1, 3)
    ranks.run(4, accumulated, 2, 2)
