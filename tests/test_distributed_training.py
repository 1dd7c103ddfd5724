"""Training on a mesh of gloo ranks: the run of one process, whatever the mesh, and its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import Ranks
from sharded import batch, clt, crosscoder, mesh_of, parted, rows_of, sae, whole_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gemmascope_fast as gsf
from gemmascope_fast.distributed import clip_grad_norm_, save_pretrained, saving, shard
from gemmascope_fast.distributed.layout import LATENTS, Layout
from gemmascope_fast.distributed.running import check_run
from gemmascope_fast.distributed.trainer import MeshTrainer
from gemmascope_fast.distributed.updates import sum_gradients_
from gemmascope_fast.training.settings import Settings
from gemmascope_fast.training.sources import TensorSource

FAST = gsf.Preset(lr=3e-3, bandwidth=0.1, statistics_tokens=200)
NOISE = 2e-5
"""Of float32 sums in another order, grown over a hundred updates, relative to the largest value."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


def data(n: int = 700, d: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, d, generator=generator) * torch.linspace(3, 0.3, d) + 1


def given(kind: str) -> Any:
    x = data()
    return (x, x.flip(1)[:, :7] * 3) if kind == "transcoder" else x


def options_of(changes: dict[str, Any]) -> dict[str, Any]:
    found = {"d_sae": 61, "steps": 100, "batch_size": 50, "preset": FAST, "target_l0": 5.0}
    if "k" in changes:
        del found["target_l0"]
    return found | changes


def trained(source: Any, mesh: Any, **options: Any) -> tuple[list[float], Any]:
    seen: list[float] = []
    module = gsf.train(
        source, mesh=mesh, on_metrics=lambda m: seen.append(m["loss"]), progress=False, **options
    )
    return seen, module


def on_mesh(dp: int, tp: int, changes: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    options = options_of(changes)
    seen, module = trained(given(options.get("kind", "sae")), mesh_of(dp, tp), **options)
    return seen, {name: whole_of(p).detach() for name, p in module.named_parameters()}


def close(found: Tensor, expected: Tensor, name: str) -> None:
    worst = float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())
    assert worst < NOISE, f"{name}: {worst}"


RUNS: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "momentum": {"preset": replace(FAST, beta1=0.5), "fused": False},
    "mean pull": {"preset": replace(FAST, per_token=False)},
    "topk": {"activation": "topk", "k": 4},
    "dead topk": {"activation": "topk", "k": 2, "d_sae": 253},
    "topk of more than a rank has": {"activation": "topk", "k": 40, "steps": 3},
    "batchtopk": {"activation": "batchtopk", "k": 3.5},
    "matryoshka": {"matryoshka": [20, 30, 61]},
    "transcoder": {"kind": "transcoder", "affine": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_those_of_one_process(ranks: Ranks, name: str) -> None:
    options = options_of(RUNS[name])
    losses, module = trained(given(options.get("kind", "sae")), None, **options)
    for dp, tp in ((1, 3), (2, 2)):
        found = ranks.run(dp * tp, on_mesh, dp, tp, RUNS[name])
        close(torch.tensor(found[0][0]), torch.tensor(losses), "losses")
        assert all(not seen for seen, _ in found[1:])  # metrics are rank 0's
        for parameter, p in module.named_parameters():
            close(found[0][1][parameter], p.detach(), parameter)


# ---- replicas


def replicas(changes: dict[str, Any]) -> tuple[dict[str, Tensor], int, slice]:
    settings = Settings(16, 7, **options_of(changes))
    trainer = MeshTrainer(TensorSource(*given("transcoder")), settings, mesh_of(2, 2))
    for _ in range(12):
        trainer.step()
    tensors = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    for name, p in trainer.module.named_parameters():
        state = trainer.updates.optimizer.state[p]
        tensors |= {f"{name}.{k}": t.clone() for k, t in state.items() if isinstance(t, Tensor)}
    return tensors, trainer.taken, trainer.layout.latents


def test_copies_have_the_same_bits(ranks: Ranks) -> None:
    """Stochastic rounding too: over "dp" of everything, over "tp" of what has no latents."""
    changes = {"kind": "transcoder", "affine": True, "dtype": torch.bfloat16, "moments": "8bit"}
    found = ranks.run(4, replicas, changes)  # (0, 1) and (2, 3) share the rows
    for a, b, shared in ((0, 2, ""), (1, 3, ""), (0, 1, ("b_dec", "W_skip"))):
        names = [name for name in found[a][0] if name.startswith(shared)]
        assert all(torch.equal(found[a][0][name], found[b][0][name]) for name in names)
    assert found[0][2] == found[2][2] == slice(0, 31) and found[1][2] == slice(31, 61)


class Rounded(TensorSource):
    """A model's activations: every rank computes them a little differently."""

    repeatable = False

    def block(self, seed: int, index: int) -> Any:
        found = super().block(seed, index)
        return replace(found, x=found.x * (1 + 1e-3 * torch.distributed.get_rank()))


def on_rounded_rows() -> tuple[Tensor, list[float], Tensor]:
    settings = Settings(16, 16, **options_of({}))
    trainer = MeshTrainer(Rounded(data()), settings, mesh_of(2, 2))
    x, _ = trainer._batch()
    for _ in range(3):
        trainer.step()
    return x, [place.scale for place in trainer.maps], trainer.module.b_dec.detach().clone()


def test_ranks_of_one_copy_take_the_rows_of_their_first(ranks: Ranks) -> None:
    found = ranks.run(4, on_rounded_rows)  # (0, 1) and (2, 3) are a copy each
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(found[first][0], found[second][0])
    assert all(scale == found[0][1] for _, scale, _ in found)
    assert all(torch.equal(b_dec, found[0][2]) for _, _, b_dec in found)


class Matrices(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.W_enc = torch.nn.Parameter(torch.zeros(9, 5, dtype=dtype).t())
        self.W_dec = torch.nn.Parameter(torch.zeros(9, 7, dtype=dtype))
        self.b_enc = torch.nn.Parameter(torch.zeros(9))
        self.b_dec = torch.nn.Parameter(torch.zeros(7))


def summed(rows: dict[int, list[int]], dtype: torch.dtype) -> tuple[int, dict[str, Tensor], Any]:
    """Gradients with values at `rows[rank]`; what travelled, the sums, and the summands."""
    mesh = mesh_of(2, 1)
    group = mesh.get_group("dp")
    torch.manual_seed(group.rank())
    module = Matrices(dtype)
    for name, p in module.named_parameters():
        p.grad = torch.randint(-8, 9, p.shape).to(p.dtype)
        if name.startswith("W"):
            by_latent = p.grad.t() if name == "W_enc" else p.grad
            keep = torch.zeros(9, 1, dtype=torch.bool)
            keep[rows[group.rank()]] = True
            by_latent.mul_(keep)
        p.grad = p.grad.t().contiguous().t() if name == "W_enc" else p.grad
    before = {name: p.grad.clone() for name, p in module.named_parameters()}
    travelled = sum_gradients_(module, group)
    return travelled, {name: p.grad for name, p in module.named_parameters()}, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, expected", [({0: [1, 4], 1: [4, 8]}, 3), ({0: [*range(9)], 1: []}, 9)]
)
def test_touched_rows_alone_travel(
    ranks: Ranks, rows: dict[int, list[int]], expected: int, dtype: torch.dtype
) -> None:
    (n0, sums0, own0), (n1, sums1, own1) = ranks.run(2, summed, rows, dtype)
    assert n0 == n1 == expected
    for name in own0:
        assert torch.equal(sums0[name], own0[name] + own1[name])
        assert torch.equal(sums0[name], sums1[name])


def clipped(dp: int, tp: int, max_norm: float, handed: bool) -> float:
    """As one process clips, whether the gradients have been handed to `local` or not."""
    whole = sae(37)
    sharded, mesh = parted(whole, dp, tp)
    x = batch(8) * 30
    whole.loss(x)[0].backward()
    sharded.loss(x[rows_of(mesh, 8)])[0].backward()
    if dp > 1:
        with pytest.raises(ValueError, match="gradient of W_enc is not summed over dp: first do p"):
            clip_grad_norm_(sharded, max_norm)
    for p in sharded.parameters():
        p.grad = p.grad.redistribute(placements=p.placements)
    if handed:
        sharded.hand_gradients()
    expected = gsf.clip_grad_norm_(whole.parameters(), max_norm)
    found = clip_grad_norm_(sharded, max_norm)
    torch.testing.assert_close(found.float(), expected)
    if not handed:
        sharded.hand_gradients()
    for name, p in whole.named_parameters():
        dim, here = LATENTS.get(name), sharded.latents
        part = p.grad if dim is None else p.grad[here] if dim == 0 else p.grad[:, here]
        torch.testing.assert_close(sharded.local.get_parameter(name).grad, part)
    return float(found)


@pytest.mark.parametrize("handed", [False, True])
def test_gradients_are_clipped_by_the_norm_of_all_slices(ranks: Ranks, handed: bool) -> None:
    for dp, tp in ((1, 3), (2, 2)):
        found = ranks.run(dp * tp, clipped, dp, tp, 0.5, handed)
        assert len(set(found)) == 1 and found[0] > 20


def not_clipped() -> None:
    whole = sae(7)
    sharded, _ = parted(whole, 1, 2)
    with pytest.raises(TypeError, match="clip_grad_norm_: module must be what shard or load ret"):
        clip_grad_norm_(sharded.local, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_grad_norm_: max_norm must be finite and >= 0"):
        clip_grad_norm_(sharded, -1.0)
    assert float(clip_grad_norm_(sharded, 1.0)) == 0  # no gradient at all
    for module in (sharded.local, sharded):
        module.b_dec.grad = torch.zeros_like(module.b_dec)
    with pytest.raises(ValueError, match="b_dec has a gradient here and in local: call hand_gra"):
        clip_grad_norm_(sharded, 1.0)
    fused = gsf.optim.Adam(sharded.local, 1e-3, (0.0, 0.99), fused=True)
    fused.zero_grad()
    sharded.zero_grad()
    sharded(batch()).square().sum().backward()
    with pytest.raises(ValueError, match="pending in an optimizer with fused=True"):
        clip_grad_norm_(sharded, 1.0)


def test_gradients_that_cannot_be_clipped_are_refused(ranks: Ranks) -> None:
    ranks.run(2, not_clipped)


# ---- checkpoints


def stretch(dp: int, tp: int, folder: str, until: int, changes: dict[str, Any]) -> Any:
    """Go on from the newest checkpoint to step `until`, and save."""
    settings = Settings(16, 16, **options_of({"steps": 40, **changes}))
    source, place = TensorSource(data()), Path(folder)
    mesh, saved = mesh_of(dp, tp), saving.found(place)
    if saved:
        trainer = MeshTrainer.continued(source, settings, mesh, saved[-1][1])
    else:
        trainer = MeshTrainer(source, settings, mesh)
    while trainer.taken < until:
        metrics = trainer.step()
    trainer.save(place)
    whole = {name: whole_of(p) for name, p in trainer.sharded.named_parameters()}
    return float(metrics["loss"]), whole, trainer.stream.position


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "batchtopk", "k": 3.5}, {"preset": replace(FAST, beta1=0.5)}],
    ids=["jumprelu", "batchtopk", "momentum"],
)
def test_a_run_goes_on_on_another_mesh(
    ranks: Ranks, tmp_path: Path, changes: dict[str, Any]
) -> None:
    moved, stayed = str(tmp_path / "moved"), str(tmp_path / "stayed")
    ranks.run(4, stretch, 2, 2, moved, 8, changes)
    ranks.run(3, stretch, 1, 3, moved, 16, changes)
    loss, weights, position = ranks.run(2, stretch, 2, 1, moved, 24, changes)[0]
    expected, target, place = ranks.run(4, stretch, 2, 2, stayed, 24, changes)[0]
    assert loss == pytest.approx(expected, rel=NOISE) and position == place
    for name, p in target.items():
        close(weights[name], p, name)
    assert [step for step, _ in saving.found(Path(moved))] == [16, 24]


def test_the_same_mesh_goes_on_with_the_same_bits(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"moments": "8bit", "dtype": torch.bfloat16}
    for until in (8, 11, 20):
        _, parts, _ = ranks.run(4, stretch, 2, 2, str(tmp_path / "a"), until, changes)[0]
    _, whole, _ = ranks.run(4, stretch, 2, 2, str(tmp_path / "b"), 20, changes)[0]
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_checkpoints_that_are_not_whole_are_named(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, stretch, 1, 2, str(tmp_path), 4, {})
    ((_, path),) = saving.found(tmp_path)
    shorter = next(path.glob("*.safetensors"))
    shorter.write_bytes(shorter.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"not a whole checkpoint: {shorter.name} has"):
        saving.load_record(path)
    shorter.unlink()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        saving.load_record(path)


def test_the_two_kinds_of_checkpoints_do_not_mix(ranks: Ranks, tmp_path: Path) -> None:
    options = options_of({"steps": 4, "out": tmp_path / "one"})
    trained(data(), None, **options)
    with pytest.raises(AssertionError, match="holds checkpoints of a run in one process"):
        ranks.run(2, on_mesh, 1, 2, options)
    ranks.run(2, on_mesh, 1, 2, options | {"out": tmp_path / "two"})
    with pytest.raises(ValueError, match="holds checkpoints of a run on a mesh"):
        trained(data(), None, **options | {"out": tmp_path / "two"})


# ---- artefacts


def exported(
    dp: int, tp: int, kind: str, folder: str, bad: int | None = None, **options: Any
) -> str:
    whole = {"sae": sae, "crosscoder": crosscoder, "clt": clt}[kind](**options)
    whole.metadata["model_name"] = "m"
    sharded = shard(whole, mesh_of(dp, tp))
    if bad is not None and torch.distributed.get_rank() == bad:
        sharded.local.W_dec.data[3, 2] = torch.nan
    try:
        save_pretrained(sharded, folder, dtype=torch.bfloat16, l0=7)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("kind", ["sae", "crosscoder", "clt"])
def test_slices_make_the_files_of_the_whole(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    whole = {"sae": sae, "crosscoder": crosscoder, "clt": clt}[kind]()
    whole.metadata["model_name"] = "m"
    whole.save_pretrained(tmp_path / "whole", dtype=torch.bfloat16, l0=7)
    for dp, tp in ((1, 3), (2, 2)):
        folder = tmp_path / f"{dp}{tp}"
        assert set(ranks.run(dp * tp, exported, dp, tp, kind, str(folder), None)) == {""}
        assert {p.name for p in folder.iterdir()} == {
            p.name for p in (tmp_path / "whole").iterdir()
        }
        for path in folder.iterdir():
            found, expected = path.read_bytes(), (tmp_path / "whole" / path.name).read_bytes()
            size = int.from_bytes(expected[:8], "little")
            if path.suffix == ".safetensors" and kind != "sae":  # each save has its own token
                assert found[8 + size :] == expected[8 + size :] and len(found) == len(expected)
            else:
                assert found == expected


@pytest.mark.parametrize("d_sae", [5, 2])  # over four: 2, 2, 1, 0 and 1, 1, 0, 0
def test_ranks_with_one_latent_or_none_write_what_they_have(
    ranks: Ranks, tmp_path: Path, d_sae: int
) -> None:
    options: dict[str, Any] = {"d_sae": d_sae, "dtype": torch.bfloat16}
    whole = sae(**options)
    whole.metadata["model_name"] = "m"
    whole.save_pretrained(tmp_path / "whole", l0=7)
    assert set(ranks.run(4, exported, 1, 4, "sae", str(tmp_path / "parts"), **options)) == {""}
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and not t.is_meta and type(t) is Tensor:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return found


def largest_of_an_export(folder: str) -> tuple[int, int]:
    """Bytes of the largest tensor while files are written, and of a slice of a matrix."""
    sharded = shard(sae(3000), mesh_of(1, 3))
    with Largest() as seen:
        save_pretrained(sharded, folder)
    return seen.bytes, sharded.local.W_dec.nbytes


def test_no_rank_holds_the_whole_while_it_is_written(ranks: Ranks, tmp_path: Path) -> None:
    for largest, own in ranks.run(3, largest_of_an_export, str(tmp_path)):
        assert own // 2 < largest <= own, "a slice, and nothing is counted twice"


def two_at_once(folder: str) -> None:
    """Each row of a larger mesh saves a dictionary of its own."""
    row = torch.distributed.get_rank() // 2
    whole = sae(14)
    with torch.no_grad():
        whole.b_enc.add_(row)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("layer", "tp"))["tp"]
    save_pretrained(shard(whole, mesh), f"{folder}/{row}")
    assert torch.equal(gsf.load(f"{folder}/{row}").b_enc, whole.b_enc)


def test_parts_of_a_larger_mesh_save_artefacts_of_their_own(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(4, two_at_once, str(tmp_path))


def test_a_module_that_the_format_refuses_is_refused_on_every_rank(
    ranks: Ranks, tmp_path: Path
) -> None:
    for said in ranks.run(3, exported, 1, 3, "sae", str(tmp_path), activation=gsf.TopK(3)):
        assert said.startswith("ValueError: save_pretrained: Gemma Scope 2's files hold JumpReLU")


def test_a_slice_that_cannot_be_written_leaves_what_was_there(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(3, exported, 1, 3, "sae", str(tmp_path), None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = ranks.run(3, exported, 1, 3, "sae", str(tmp_path), 2)
    assert found[2].startswith("ValueError: save_pretrained: W_dec must be finite")
    assert found[0] == found[1] == f"RankError: save_pretrained: rank 2 failed: {found[2]}"
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_result_is_an_artefact(ranks: Ranks, tmp_path: Path) -> None:
    for changes in ({}, {"activation": "batchtopk", "k": 3.5}):
        folder = tmp_path / changes.get("activation", "jumprelu")
        options = {"steps": 6, "out": folder, "metadata": {"model_name": "m"}} | changes
        _, weights = ranks.run(4, on_mesh, 2, 2, options)[0]
        read = gsf.load(folder)
        assert torch.equal(read.W_dec, weights["W_dec"]) and read.metadata["model_name"] == "m"
        assert torch.equal(read.W_enc, weights["W_enc"]) and read.threshold is not None


# ---- before the first step


def mismatched(changes: dict[str, Any], own: dict[str, Any], rank: int) -> str:
    mine = changes | own if torch.distributed.get_rank() == rank else changes
    settings = Settings(16, 16, **options_of(mine))
    try:
        layout = Layout(mesh_of(2, 2), settings.d_sae)
        check_run(layout, TensorSource(data() + mine.get("shift", 0)), settings)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_that_are_to_train_other_things_are_named(ranks: Ranks) -> None:
    found = ranks.run(4, mismatched, {}, {"dtype": torch.bfloat16, "d_sae": 60}, 3)
    assert len(set(found)) == 1 and found[0].startswith("RankError: train: the ranks are to")
    assert 'rank 3 has settings: dtype = "torch.bfloat16", rank 0 has "torch.float32"' in found[0]
    assert "rank 3 has settings: d_sae = 60, rank 0 has 61" in found[0]
    assert set(ranks.run(4, mismatched, {}, {}, 0)) == {""}
    found = ranks.run(4, mismatched, {"d_sae": 1, "target_l0": 0.5}, {}, 0)
    assert found == ["ValueError: train: d_sae=1 cut over tp=2 leaves a rank without latents: "
                     "choose a smaller tp"] * 4  # fmt: skip
    found = ranks.run(4, mismatched, {"batch_size": 1}, {}, 0)
    assert found == ["ValueError: train: batch_size must be at least dp=2, got 1"] * 4


def placed_wrongly(out: str) -> str:
    try:
        on_mesh(1, 2, {"steps": 2, "out": out})
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_every_rank_hears_that_the_result_has_no_place(ranks: Ranks, tmp_path: Path) -> None:
    gsf.SAE(16, 61, gsf.TopK(3)).save_pretrained(tmp_path, format="sparsify")
    mine, other = ranks.run(2, placed_wrongly, str(tmp_path))
    text = f"train: out could not hold the result: save_pretrained: {tmp_path} holds an artefact of"
    assert mine.startswith(f"ValueError: {text}")
    assert other.startswith(f"RankError: train: rank 0 failed: ValueError: {text}")


def test_slices_of_a_vector_that_were_touched_at_other_steps_become_one_row() -> None:
    """Adam's v decays by beta2 in every step, so that of step 3 has two steps more to go."""
    state = {"exp_avg_sq": torch.ones(3), "touched_at": torch.zeros(1, dtype=torch.int64)}
    trainer: Any = SimpleNamespace(settings=SimpleNamespace(preset=gsf.Preset(beta2=0.5)))
    saving._join(state, torch.tensor([3, 5, 5]), trainer)
    assert state["exp_avg_sq"].tolist() == [0.25, 1, 1] and state["touched_at"].tolist() == [5]
