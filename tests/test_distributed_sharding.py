"""How a module comes onto a mesh: parts, files, what the ranks compare, state and debug mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded as problems
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded import JUMP, D, batch, close, mesh_of, parted, same_acts
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gemmascope_fast as gsf
from gemmascope_fast.distributed import acts as acts_module
from gemmascope_fast.distributed import load, shard


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


# ---- parts


def parameters() -> None:
    whole = problems.transcoder(10)
    whole.b_enc.requires_grad_(False)
    sharded, mesh = parted(whole, 2, 2)
    at = mesh.get_group("tp").rank()
    assert sharded.latents == slice(5 * at, 5 * at + 5)
    assert (sharded.d_in, sharded.d_sae, sharded.d_out) == (D, 10, 7)
    placed = {"W_enc": Shard(1), "b_enc": Shard(0), "threshold": Shard(0), "W_dec": Shard(0)}
    for name, p in sharded.state_dict().items():
        assert isinstance(p, DTensor)
        assert p.placements == (Replicate(), placed.get(name, Replicate()))
        original = whole.get_parameter(name)
        assert p.shape == original.shape and p.stride() == original.stride()
        assert torch.equal(p.full_tensor(), original)
        mine, held = sharded.local.get_parameter(name), sharded.get_parameter(name)
        assert mine.data_ptr() == held.to_local().data_ptr() != original.data_ptr()
        assert mine.requires_grad == held.requires_grad == (name != "b_enc")
    assert type(sharded.local) is gsf.Transcoder and sharded.local.d_sae == 5
    with torch.no_grad():
        sharded.local.W_dec.fill_(3.0)
    assert bool((sharded.W_dec.full_tensor() == 3).all())


def test_parameters_are_dtensors_over_the_memory_of_the_local_module(ranks: Ranks) -> None:
    ranks.run(4, parameters)


def states() -> None:
    whole, other = problems.sae(13), problems.sae(13)
    sharded, mesh = parted(whole, 1, 3)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    placements = {name: p.placements for name, p in sharded.named_parameters()}
    state = {n: distribute_tensor(p.data, mesh, placements[n]) for n, p in other.named_parameters()}
    x = batch()
    for assign in (False, True):
        sharded.load_state_dict(state, assign=assign)
        same_acts(sharded.encode(x).gathered(), other.encode(x))
        assert torch.equal(sharded.local.W_dec, other.W_dec[sharded.latents])
    sharded.to(torch.bfloat16)
    other.to(torch.bfloat16)
    assert {p.dtype for p in sharded.parameters()} == {torch.float32, torch.bfloat16}
    same_acts(sharded.encode(x).gathered(), other.encode(x))
    sharded.activation = other.activation = gsf.TopK(3)
    same_acts(sharded.encode(x).gathered(), other.encode(x))


def test_states_are_loaded_and_dtypes_changed_in_place(ranks: Ranks) -> None:
    ranks.run(3, states)


def edited() -> None:
    """Activations of the whole dictionary are decoded by every rank's share of them."""
    whole = problems.sae(13)
    sharded, _ = parted(whole, 1, 3)
    x = batch()
    acts = sharded.encode(x).gathered().set([0, 6, 12], 2.0)
    recon = sharded.decode(acts)
    expected = whole.decode(whole.encode(x).set([0, 6, 12], 2.0))
    close(recon, expected, "recon")
    recon.square().sum().backward()
    expected.square().sum().backward()
    problems.same_gradients(sharded, whole)


def test_edited_activations_are_decoded_and_pass_gradients(ranks: Ranks) -> None:
    ranks.run(3, edited)


# ---- files


def from_files(single: str, layered: str, n: int) -> None:
    mesh = mesh_of(1, 3)
    x = batch()
    whole = gsf.load(single, dtype=torch.bfloat16)
    sharded = load(single, mesh=mesh, dtype=torch.bfloat16)
    assert sharded.local.d_sae == sharded.latents.stop - sharded.latents.start
    same_acts(sharded.encode(x).gathered(), whole.encode(x))
    empty = gsf.SAE(D, n, JUMP, device="meta", dtype=torch.bfloat16)
    again = shard(
        empty, mesh, load=lambda part: gsf.load(single, latents=part, dtype=torch.bfloat16)
    )
    whole.activation = JUMP  # whose window is wider than a loaded one's
    same_acts(again.encode(x).gathered(), whole.encode(x))
    stacks, clt = batch(5, 3), gsf.load(layered)
    parts = load(layered, mesh=mesh)
    close(parts(stacks), clt(stacks), "recon")
    assert [p.shape for p in parts.W_dec] == [p.shape for p in clt.W_dec]


@pytest.mark.parametrize("n", [13, 2])  # with 2 a rank has no latents
def test_every_rank_reads_its_latents_of_an_artefact(ranks: Ranks, tmp_path: Path, n: int) -> None:
    problems.sae(n).save_pretrained(tmp_path / "sae")
    layered = problems.crosscoder(n)
    with torch.no_grad():
        layered.W_dec[1][:, :D] = 0  # writes backwards, with its last latent only
        layered.W_dec[1][-1, :D] = 1.0
    layered.save_pretrained(tmp_path / "layers")
    ranks.run(3, from_files, str(tmp_path / "sae"), str(tmp_path / "layers"), n)


# ---- what the ranks compare


def message(make: Any) -> str:
    try:
        make()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def disagreeing(what: str) -> str:
    mesh = mesh_of(1, 3)
    module, odd = problems.sae(13), dist.get_rank() == 1
    if what == "dtype" and odd:
        module = problems.sae(13, dtype=torch.bfloat16)
    if what == "width" and odd:
        module = gsf.SAE(D + 1, 13, JUMP)
    if what == "latents" and odd:
        module = problems.sae(14)
    if what == "activation" and odd:
        module.activation = gsf.JumpReLU(0.1)
    if what == "frozen" and odd:
        module.freeze()

    def read(latents: slice) -> Any:
        if odd:
            raise OSError("the disk is gone")
        return problems.sae(latents.stop - latents.start)

    loader = read if what == "load" else None
    return message(lambda: shard(module, mesh, load=loader))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("dtype", "rank 1 has W_enc [12, F] torch.bfloat16, trained, others have [12, F] torch.fl"),
        ("width", "rank 1 has W_enc [13, F] torch.float32, trained, others have [12, F] torch.fl"),
        ("latents", "rank 1 has d_sae 14, others have 13"),
        ("activation", "rank 1 has activation JumpReLU(bandwidth=0.1"),
        ("frozen", "rank 1 failed: ValueError: module must not be frozen"),
        ("load", "rank 1 failed: OSError: the disk is gone"),
    ],
)
def test_every_rank_names_the_one_that_differs(ranks: Ranks, what: str, expected: str) -> None:
    for text in ranks.run(3, disagreeing, what):
        assert text.startswith("shard: ") and expected in text


def refused() -> None:
    module, mesh = problems.sae(13), mesh_of(2, 2)
    for call, kind, text in (
        (lambda: shard(module, None), TypeError, "shard: mesh must be a DeviceMesh, got NoneType"),
        (
            lambda: shard(module, DeviceMesh("cpu", [3, 1, 2, 0], mesh_dim_names=("tp",))),
            ValueError,
            "shard: mesh must have ascending ranks, got .3, 1, 2, 0",
        ),
        (lambda: shard(nn.Linear(2, 2), mesh), TypeError, "module must be one of SAE, Transcoder,"),
        (lambda: shard(module, mesh, load=3), TypeError, "load must be callable or None, got int"),
        (lambda: load("x", mesh=mesh, latents=3), TypeError, "distributed.load: latents is not an"),
        (lambda: load("/no/where", mesh=mesh), RuntimeError, "rank 0 failed: FileNotFoundError"),
        (
            lambda: shard(gsf.SAE(3, 9, device="meta"), mesh),
            RuntimeError,
            "rank 3 failed: ValueError: module is on the meta device: pass load=",
        ),
    ):
        with pytest.raises(kind, match=text.replace("(", r"\(")):
            call()
    sharded = shard(module, mesh)
    x = batch()
    for call, kind, text in (
        (lambda: sharded.encode(x[:, 1:]), ValueError, r"encode: x must have shape"),
        (lambda: sharded.decode(x), TypeError, "decode: acts must be ShardedActs or SparseActs"),
        (
            lambda: sharded.decode(problems.sae(12).encode(x)),
            ValueError,
            "acts must be of d_sae=13",
        ),
        (lambda: sharded.decode(shard(problems.sae(12), mesh).encode(x)), ValueError, "of latents"),
    ):
        with pytest.raises(kind, match=text):
            call()
    sharded.activation = gsf.BatchTopK(3)
    with pytest.raises(ValueError, match="encode: max_nnz is for a JumpReLU"):
        sharded.encode(x, max_nnz=7)
    with pytest.raises(ValueError, match=r"^ShardedSAE: k must be in \[0, d_sae=13\], got 14"):
        sharded.activation = gsf.TopK(14)
    every = gsf.TopK(13)  # more than a rank has
    module.activation = sharded.activation = every

    def read(latents: slice) -> Any:
        return gsf.SAE(D, latents.stop - latents.start, gsf.TopK(1))

    loaded = shard(gsf.SAE(D, 13, every, device="meta"), mesh, load=read)
    for made in (sharded, loaded, shard(module, mesh)):
        assert made.encode(x).gathered().nnz == 13 * len(x)


def test_bad_arguments_are_named(ranks: Ranks) -> None:
    ranks.run(4, refused)


# ---- debug mode


def differing_replica() -> str:
    module, mesh = problems.sae(13), mesh_of(1, 3)
    with torch.no_grad():
        module.b_dec[0] += dist.get_rank() == 2
    return message(lambda: shard(module, mesh, debug=True))


def test_debug_mode_compares_what_every_rank_holds(ranks: Ranks) -> None:
    for text in ranks.run(3, differing_replica):
        assert "rank 2 has b_dec [12] torch.float32, trained, bits " in text


def differing_input() -> list[str]:
    whole = problems.sae(13)
    checked, _ = parted(whole, 2, 2, debug=True)
    x = batch()
    same_acts(checked.encode(x).gathered(), whole.encode(x))
    checked.loss(x)
    if dist.get_rank() == 3:
        x[4, 2] += 1e-6
    return [message(lambda: checked.encode(x)), message(lambda: checked.loss(x))]


def test_debug_mode_names_the_rank_with_another_input(ranks: Ranks) -> None:
    found = ranks.run(4, differing_input)
    said = "x must be equal on all ranks of tp, and differs from that of rank 2 on rank 3"
    assert found[:2] == [["nothing was raised", f"loss: {said}"]] * 2  # loss sums over "dp" too
    assert found[2:] == [[f"encode: {said}", f"loss: {said}"]] * 2


def differing_indices() -> str:
    """One rank receives another index than the others."""
    sharded, _ = parted(problems.sae(13), 1, 3, debug=True)
    acts, received = sharded.encode(batch()), acts_module.all_gather

    def disturbed(t: Tensor, group: Any) -> Tensor:
        found = received(t, group)
        if dist.get_rank() == 2 and t.dim() == 2:  # the entries: indices, values, gate
            found[0, 0, 0] += 1
        return found

    acts_module.all_gather = disturbed
    try:
        return message(acts.gathered)
    finally:
        acts_module.all_gather = received


def test_debug_mode_compares_the_indices_that_ranks_agree_on(ranks: Ranks) -> None:
    said = "gathered: indices must be equal on all ranks of tp, and differs from that of rank 0 on "
    assert ranks.run(3, differing_indices) == [said + "rank 2"] * 3


def from_environment(value: str) -> Any:
    import os

    os.environ["GEMMASCOPE_FAST_DISTRIBUTED_DEBUG"] = value
    try:
        return parted(problems.sae(13), 1, 2)[0].layout.debug
    except ValueError as error:
        return str(error)
    finally:
        del os.environ["GEMMASCOPE_FAST_DISTRIBUTED_DEBUG"]


def test_the_environment_turns_debug_mode_on(ranks: Ranks) -> None:
    assert ranks.run(2, from_environment, "1") == [True] * 2
    assert ranks.run(2, from_environment, "0") == [False] * 2
    said = "GEMMASCOPE_FAST_DISTRIBUTED_DEBUG must be 0 or 1, got 'yes'"
    assert ranks.run(2, from_environment, "yes") == [said] * 2


# ---- the processes of these tests


def gathered_as_objects() -> None:
    sharded, mesh = parted(problems.transcoder(11), 2, 2)  # 6 and 5 latents
    x = batch(8)[problems.rows_of(mesh, 8)]
    sharded.loss(x, x[:, :7])[0].backward()
    for name, p in sharded.named_parameters():
        for t in (p.detach(), p.grad):  # the gradients are summands over "dp"
            assert torch.equal(problems.through_the_cpu(t), t.full_tensor()), name


def test_ranks_that_share_a_gpu_gather_what_torch_does(ranks: Ranks) -> None:
    ranks.run(4, gathered_as_objects)


def fails_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("broken")
    dist.barrier()


def test_a_failing_rank_shows_every_rank(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranks.GRACE", 2.0)
    with pytest.raises(AssertionError, match=r"(?s)rank 0: no answer.*barrier.*rank 1: .*KeyError"):
        ranks.run(2, fails_on_one)
    assert ranks.run(2, dist.get_rank) == [0, 1]
