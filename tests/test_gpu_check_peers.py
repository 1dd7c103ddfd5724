"""Parts of `bench/gpu_check.py` against sparsify's kernels, with momentum, and of touched rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from gpu import checks, momentum, passes, peers, problem, sparsify_files, supervise, targets  # noqa: E402
from gpu.context import Context, Settings, Shape, Skip  # noqa: E402
from gpu.rows import OURS, compose  # noqa: E402
from gpu.state import Results  # noqa: E402
from gpu.steps import entries_of, sparse_step  # noqa: E402

CPU = torch.device("cpu")
DECODER = """
import torch
def xformers_embedding_bag(indices, weight, per_sample_weights):
    assert indices.dtype == torch.int64 and weight.dtype == per_sample_weights.dtype
    return torch.nn.functional.embedding_bag(
        indices, weight, per_sample_weights=per_sample_weights, mode="sum")
"""
ENCODER = """
from typing import NamedTuple
import torch
class EncoderOutput(NamedTuple):
    top_acts: torch.Tensor
    top_indices: torch.Tensor
    pre_acts: torch.Tensor
def fused_encoder(input, weight, bias, k, activation):
    assert activation == "topk"
    pre = torch.nn.functional.linear(input, weight, bias).relu()
    return EncoderOutput(*pre.topk(k, sorted=False), pre)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two files, computed by torch."""
    folder = tmp_path / "sparsify"
    folder.mkdir()
    (folder / "xformers.py").write_text(DECODER)
    (folder / "fused_encoder.py").write_text(ENCODER)
    monkeypatch.setenv(sparsify_files.FOLDER, str(folder))
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    supervise.work("sparsify", Settings("cpu", quick=True, only_latents=(512,)), path, 100)
    return Results(path).rows("sparsify")


# ---- sparsify


def test_both_sides_of_sparsify_are_measured(package: Path, tmp_path: Path) -> None:
    found = rows_of(tmp_path / "r.json")
    kinds = [f"{kind} F=512 L0=8" for kind in ("decode", "gradients")]
    names = [f"{kinds[0]} uniform", f"{kinds[0]} log-normal", f"{kinds[1]} uniform"]
    assert [r["name"] for r in found] == names
    assert {r["status"] for r in found} == {"done"}, found
    assert all(r["ratios"]["sparsify"] > 0 and r["l0"] == 8 and r["error"] < 0.01 for r in found)
    assert 0 < found[0]["error_of_sparsify"] < peers.NEAR
    assert set(found[2]["error_of_sparsify"]) == {"d_W_enc", "d_b_enc", "d_W_dec"}


def test_what_sparsify_computes_wrongly_is_told_and_not_timed(
    package: Path, tmp_path: Path
) -> None:
    (package / "xformers.py").write_text(DECODER.replace('"sum")', '"sum") * 1.1'))
    found = rows_of(tmp_path / "r.json")
    assert [r["status"] for r in found] == ["done"] * 3
    told = [r["times"]["sparsify"]["unavailable"] for r in found]
    assert all("sparsify's reconstruction is off by" in text for text in told[:2])
    assert "sparsify's d_W_enc is off by" in told[2]


@pytest.mark.parametrize("at", range(3))
def test_each_gradient_of_sparsify_is_compared(package: Path, at: int) -> None:
    p = problem.problem(Shape(64, 32, 512, 8), CPU)
    d_recon = passes.random_gradient(p)
    latents, values, theirs = peers.their_gradients(p, d_recon, 8)
    e = peers.entries_of_rows(latents, values, 512)
    ours = peers.gradients(p, e, d_recon)()
    for mine, viewed in zip(ours, peers.gradients(p, e, d_recon, e.view)(), strict=True):
        assert torch.equal(mine, viewed)
    other = (e.feature_offsets, e.permutation.flip(0))
    with pytest.raises(RuntimeError, match="permutation"):  # it is used as it is given
        peers.gradients(p, e, d_recon, other)()
    checks.differentiated(p, e, d_recon, ours, 0.0)
    grads = [t.clone() for t in theirs()]
    peers.differing(e, ours, tuple(grads))
    grads[at] *= 1.1
    with pytest.raises(AssertionError, match=("d_W_enc", "d_b_enc", "d_W_dec")[at]):
        peers.differing(e, ours, tuple(grads))
    wrong = [*ours]
    wrong[(0, 1, 3)[at]] = 1.1 * ours[(0, 1, 3)[at]]
    with pytest.raises(AssertionError, match=("d_W_enc", "d_b_enc", "d_W_dec")[at]):
        checks.differentiated(p, e, d_recon, wrong, 0.0)


def test_without_sparsify_its_rows_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sparsify_files.FOLDER, raising=False)
    monkeypatch.setattr(sparsify_files.importlib.util, "find_spec", lambda name: None)
    found = rows_of(tmp_path / "r.json")
    assert {(r["status"], r["reason"]) for r in found} == {("skipped", sparsify_files.ABSENT)}
    rows = {r["name"]: r for r in found}
    assert len(targets.unmeasured(rows)) == len(targets.unmeasured({})) == 1
    rows["decode"] = {"part": "sparsify", "status": "done", "ratios": {}}  # its kernel failed
    assert len(targets.unmeasured(rows)) == 1
    rows["decode"]["ratios"] = {targets.SPARSIFY: 1.5}
    assert targets.unmeasured(rows) == []


def test_the_installed_package_is_found_and_not_imported(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(sparsify_files.FOLDER)
    (package / "__init__.py").write_text("raise ImportError('heavy')")
    monkeypatch.syspath_prepend(str(package.parent))
    assert sparsify_files.folder() == package
    assert callable(sparsify_files.load("fused_encoder").fused_encoder)
    (package / "xformers.py").write_text("import nothing_of_this_name")
    with pytest.raises(Skip, match="cannot be loaded: ModuleNotFoundError"):
        sparsify_files.load("xformers")
    (package / "xformers.py").unlink()
    with pytest.raises(Skip, match="not installed"):
        sparsify_files.folder()
    monkeypatch.setenv(sparsify_files.FOLDER, str(package))
    with pytest.raises(Skip, match="lacks xformers or fused_encoder"):
        sparsify_files.folder()


@pytest.mark.parametrize("firing", ["uniform", "log-normal"])
def test_latents_are_drawn_by_their_rates(firing: str) -> None:
    latents = peers.drawn(Shape(4096, 8, 4096, 16, firing), CPU)
    assert latents.shape == (4096, 16) and bool((latents.diff(dim=1) > 0).all())
    counts = torch.bincount(latents.flatten(), minlength=4096).double()
    rates = problem.firing_rates(4096, 16, firing)
    largest = rates.topk(64).indices
    assert float(counts[largest].sum() / rates[largest].sum()) == pytest.approx(4096, rel=0.06)
    assert float(torch.corrcoef(torch.stack([counts, rates]))[0, 1]) > 0.9 or firing == "uniform"


def test_drawing_goes_on_until_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = torch.ones(64, dtype=torch.float64)
    rates[5] = 1000  # 32 latents drawn at once would be three distinct ones
    monkeypatch.setattr(peers, "firing_rates", lambda *args: rates)
    latents = peers.drawn(Shape(512, 8, 64, 8), CPU)
    assert latents.shape == (512, 8) and bool((latents.diff(dim=1) > 0).all())
    assert bool((latents == 5).any(1).all()) and int(latents.max()) < 64


# ---- momentum


def test_every_row_moves_or_those_of_the_tail_do() -> None:
    shape = Shape(32, 16, 512, 8, "log-normal")
    p = problem.problem(shape, CPU)
    last = momentum.last_fired(shape, CPU)
    assert int(last.min()) == 1 and int(last.max()) == momentum.STEPS
    fired = {}
    for rows in ("exact", "live"):
        call, adam = momentum.aged(p, shape, rows)
        before = p.W_dec.clone()
        for state in adam.state.values():
            state["exp_avg"].fill_(1.0)
        call()
        assert torch.equal(p.W_dec, before)
        state = next(s for w, s in adam.state.items() if w.shape == p.W_dec.shape)
        fired[rows] = (state["exp_avg"] != 1).any(1)
        assert state["step"] == momentum.STEPS + 1
    assert bool(fired["exact"].all())
    touched = state["touched_at"] == momentum.STEPS + 1
    assert torch.equal(fired["live"], touched | (last >= momentum.STEPS + 1 - 60))


def test_latents_fire_last_as_their_rates_have_it() -> None:
    shape = Shape(100, 8, 4096, 8)  # 1 - (1 - 8 / 4096)^100 = 0.178 in each step
    waited = momentum.STEPS - momentum.last_fired(shape, CPU)
    assert float(waited.double().mean()) == pytest.approx(4.63, rel=0.1)


def test_wrong_moments_are_caught() -> None:
    shape = Shape(32, 16, 512, 8)
    p = problem.problem(shape, CPU)
    _, found, grads = sparse_step(p)
    touched = (entries_of(found).feature_offsets.diff() > 0).nonzero()[:, 0]
    call, adam = momentum.aged(p, shape, "exact")
    call()
    assert momentum.moments(adam, grads, touched) < 0.01
    for name, shaped in (("d_W_enc", p.W_enc.shape), ("d_W_dec", p.W_dec.shape)):
        state = next(s for w, s in adam.state.items() if w.shape == shaped)
        state["exp_avg"] *= 1.1
        with pytest.raises(AssertionError, match=name):
            momentum.moments(adam, grads, touched)
        state["exp_avg"] /= 1.1


def test_large_dictionaries_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(momentum, "LATENTS", 512)
    results = Results(tmp_path / "r.json")
    momentum.momentum(Context("momentum", Settings("cpu", quick=True), results, 100))
    assert {r["shape"]["d_sae"] for r in results.rows("momentum")} == {512}


# ---- row-sparse gradients


@pytest.mark.parametrize("firing", ["uniform", "log-normal"])
def test_gradients_of_touched_rows_equal_those_of_all(firing: str) -> None:
    shape = Shape(32, 64, 2048, 16, firing)
    p = problem.problem(shape, CPU)
    e = problem.entries(shape, p.threshold)
    d_recon = passes.random_gradient(p)
    whole = passes.sparse_backward(p, e, d_recon)()
    apart = passes.row_sparse_backward(p, e, d_recon)()
    assert apart[0].shape[0] == e.touched < 2048 and apart[4].shape == (e.touched, 64)
    assert passes.same_rows(e, whole, apart)
    for at, name in enumerate(("d_W_enc", "d_b_enc", "d_threshold", "d_W_dec", "d_b_dec"), 1):
        wrong = [t.clone() for t in apart]
        wrong[at] *= 1.05
        with pytest.raises(AssertionError, match=f"row-sparse {name}"):
            passes.same_rows(e, whole, wrong)
    moved = [t.clone() for t in apart]
    between = next(i for i in range(e.touched) if i not in checks.sampled(e.touched, 64))
    moved[4][between] *= 1.5
    assert not passes.same_rows(e, whole, moved), "beside the sampled rows"
    moved[0][-1] -= 1
    with pytest.raises(AssertionError, match="other latents"):
        passes.same_rows(e, whole, moved)


# ---- verdicts


def verdict(part: str, d_sae: int, times: dict[str, float]) -> list[tuple[Any, ...]]:
    taken = {k: {"median_s": v, "peak_extra_bytes": 1000} for k, v in times.items()}
    told = compose(part, Shape(8192, 5376, d_sae, 64), taken, floor_s=None, floor="")["targets"]
    return [(v["goal"], v["found"], v["met"]) for v in told]


def test_targets_of_the_new_contenders() -> None:
    times = {OURS: 2.0, targets.MOMENTUM_CAPPED: 3.0, targets.DENSE_ADAM: 6.0}
    assert verdict("momentum", 2**16, times) == [(2.5, 3.0, True)]
    assert verdict("momentum", 2**18, times) == [(3.3, 3.0, False)]
    assert verdict("momentum", 2**18, times | {targets.MOMENTUM_CAPPED: 1.5}) == [(3.3, 4.0, True)]
    times = {OURS: 1.0, targets.OURS_ROWS: 0.5, "dense eager": 35.0}
    found = [(40, 35.0, False), (0.8, None, None), (60, 70.0, True)]
    assert verdict("backward", 2**20, times) == found
    times = {OURS: 1.0, targets.SPARSIFY: 3.0}
    assert verdict("sparsify decode", 2**20, times) == [(1.2, 3.0, True)]
    assert verdict("sparsify gradients", 2**20, times) == [(4.0, 3.0, False)]
    assert verdict("sparsify gradients", 2**18, times) == []
