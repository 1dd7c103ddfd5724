"""`gsf.train` of crosscoders and CLTs: start, learning, way back, resuming, results, `evaluate`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.cli import main
from gemmascope_fast.training.calibration_layers import LayersAffine, fold_layers_
from gemmascope_fast.training.settings import Settings
from gemmascope_fast.training.sources import TensorSource
from gemmascope_fast.training.trainer_layers import LayersTrainer, trainer_of

L, D, F = 3, 8, 32
CPU = torch.device("cpu")
FAST = gsf.Preset(lr=3e-3, bandwidth=0.1, frequency=0.0, sparsity=0.02)
KINDS = ("crosscoder", "clt")
NORMS = torch.tensor([1.0, 10.0, 100.0])[:, None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def rows(n: int = 1500) -> Tensor:
    """`[n, L, D]`: features with a direction in every layer; each layer on a scale of its own."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(24, L, D, generator=generator)
    present = torch.rand(n, 24, generator=generator) < 0.1
    strength = present * (torch.rand(n, 24, generator=generator) + 0.5)
    return NORMS * (torch.einsum("nf,fld->nld", strength, directions) + 0.5)


def source(kind: str, x: Tensor) -> Any:
    """x, and for a CLT a target that is a map of it, on other scales."""
    if kind == "crosscoder":
        return x
    return x, x.flip(-1) * torch.tensor([50.0, 1.0, 0.2])[:, None] + 2


def train(kind: str, x: Tensor, **options: Any) -> Any:
    sizes = {"d_sae": F, "target_l0": 6, "steps": 8, "batch_size": 128, "preset": FAST}
    if options.get("activation", "jumprelu") != "jumprelu":
        sizes["target_l0"] = None
    options = {"progress": False, "affine": kind == "clt"} | sizes | options
    return gsf.train(source(kind, x), kind=kind, **options)


def settings(kind: str, **options: Any) -> Settings:
    sizes: dict[str, Any] = {"d_sae": F, "steps": 20, "preset": FAST, "batch_size": 128}
    sizes |= {"target_l0": 6, "kind": kind, "layers": L, "affine": kind == "clt"}
    return Settings(D, D, **sizes | options)


def trainer(kind: str, x: Tensor, **options: Any) -> LayersTrainer:
    given = source(kind, x)
    pair = given if isinstance(given, tuple) else (given,)
    return LayersTrainer(TensorSource(*pair), settings(kind, **options), CPU)


def dense(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`(recon [n, L, D], gate [n, L, F])` in float64, every decoder written out."""
    wide = {name: p.detach().double() for name, p in module.named_parameters()}
    recon = wide["b_dec"].expand(len(x), L, D).clone()
    gates = []
    for i in range(L):
        part = x[:, i].double()
        pre = part @ wide[f"W_enc.{i}"] + wide[f"b_enc.{i}"]
        gates.append(pre > wide[f"threshold.{i}"])
        first = L - wide[f"W_dec.{i}"].shape[1] // D
        for at, j in enumerate(range(first, L)):
            recon[:, j] += (pre * gates[-1]) @ wide[f"W_dec.{i}"][:, at * D : (at + 1) * D]
        if f"W_skip.{i}" in wide:
            recon[:, i] += part @ wide[f"W_skip.{i}"]
    return recon, torch.stack(gates, 1)


# ---- the start


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_unit_mean_squared_norm_by_itself(kind: str, centred: bool) -> None:
    x = rows()
    run = trainer(kind, x, preset=replace(FAST, centred=centred))
    y = x if kind == "crosscoder" else source(kind, x)[1]
    for place, raw in zip(run.maps, (x, y), strict=True):
        scaled = place(raw.flatten(1))
        assert scaled.shape == (len(x), L, D)
        torch.testing.assert_close(scaled.square().sum(2).mean(0), torch.ones(L))
        if centred:
            torch.testing.assert_close(scaled.mean(0), torch.zeros(L, D), rtol=0, atol=1e-5)
        else:
            assert float(place.mean.abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_dictionary_starts_at_the_wanted_l0(kind: str) -> None:
    x = rows()
    for options, expected in (({}, 12), ({"init_l0": 30}, 30)):
        run = trainer(kind, x, **options)
        l0 = dense(run.module, run.maps[0](x.flatten(1)))[1].sum(2).float().mean(0)
        assert float(l0.sum()) == pytest.approx(expected, rel=0.02)
        torch.testing.assert_close(l0, torch.full((L,), expected / L), rtol=0.02, atol=0)


def test_biases_start_at_the_means() -> None:
    x = rows(300)
    run = trainer("clt", x)
    scaled, goal = run.maps[0](x.flatten(1)), run.maps[1](source("clt", x)[1].flatten(1))
    torch.testing.assert_close(run.module.b_dec, goal.mean(0), check_dtype=False)
    for at in range(L):
        expected = -scaled[:, at].mean(0) @ run.module.W_enc[at]
        torch.testing.assert_close(run.module.b_enc[at], expected)


def test_the_first_loss_is_that_of_the_scaled_layers_together() -> None:
    """In units of raw activations: `sum_j |recon_j - y_j|^2 / mean |y_j|^2`."""
    for kind in KINDS:
        x = rows(300)
        run = trainer(kind, x, batch_size=300)
        y = x if kind == "crosscoder" else source(kind, x)[1]
        recon, gate = dense(run.exported(), x)
        square = y.double().square().sum(2).mean(0)
        found = run.step()
        expected = ((recon - y).square().sum(2) / square).sum(1).mean()
        assert float(found["reconstruction"]) == pytest.approx(float(expected), rel=1e-4)
        assert float(found["l0"]) == pytest.approx(float(gate.sum((1, 2)).double().mean()))


def test_a_constant_layer_is_named() -> None:
    x = rows(200)
    x[:, 1] = 0
    with pytest.raises(ValueError, match="x of layer 1 must be finite and not constant"):
        train("crosscoder", x)


# ---- learning


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_at_the_wanted_l0(kind: str, fused: bool) -> None:
    seen: list[dict[str, float]] = []
    x = rows(3000)
    module = train(kind, x[:2500], steps=300, fused=fused, on_metrics=seen.append)
    assert seen[-1]["loss"] < 0.2 * seen[0]["loss"] and 4.5 < seen[-1]["l0"] < 9.5
    held = source(kind, x[2500:])
    found = gsf.evaluate(module, *(held if kind == "clt" else (held,)))
    assert max(found.fvu_by_layer) < 0.35 and 4.5 < found.l0 < 9.5
    assert module.metadata["l0"] == pytest.approx(found.l0, rel=0.15)
    kinds = {"crosscoder": gsf.Crosscoder, "clt": gsf.CrossLayerTranscoder}
    assert type(module) is kinds[kind] and not module.training and not module.deferred
    assert [W.shape[1] for W in module.W_dec] == [3 * D, 2 * D, D]


def test_fused_and_buffered_updates_are_the_same_run() -> None:
    for kind in KINDS:
        one, other = (train(kind, rows(400), steps=5, fused=fused) for fused in (True, False))
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            largest = float(b.detach().abs().max())
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


def test_topk_keeps_k_in_every_layer(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    out = tmp_path / "run"
    options: dict[str, Any] = {"activation": "topk", "k": 2, "out": out, "d_sae": 96}
    module = train("crosscoder", rows(), steps=40, on_metrics=seen.append, **options)
    assert seen[-1]["loss"] < seen[0]["loss"] and seen[-1]["dead"] > 0
    assert all(m["l0"] <= 2 * L for m in seen)
    revived = ["auxk" in m for m in seen]
    assert not any(revived[:8]) and revived[8:] == [m["dead"] > 0 for m in seen[7:-1]]
    assert any(revived)
    assert module.metadata["l0"] == pytest.approx(2 * L, abs=0.2)
    assert [path.name for path in out.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batchtopk_learns_and_becomes_a_jumprelu(kind: str, fused: bool, tmp_path: Path) -> None:
    """Each layer keeps k on average; what it encodes with afterwards is a threshold of its own."""
    seen: list[dict[str, float]] = []
    x = rows(3000)
    options: dict[str, Any] = {"activation": "batchtopk", "k": 2.5, "out": tmp_path}
    preset = replace(FAST, threshold_decay=0.9)
    module = train(
        kind, x[:2500], steps=300, preset=preset, fused=fused, on_metrics=seen.append, **options
    )
    assert seen[-1]["loss"] < 0.4 * seen[0]["loss"] and seen[-1]["l0"] == 2.5 * L
    assert module.activation == gsf.BatchTopK(2.5) and not module.training
    held = source(kind, x[2500:])
    pair = held if kind == "clt" else (held, held)
    found = gsf.evaluate(module, *pair)
    assert max(found.fvu_by_layer) < 0.45
    assert found.l0_by_layer == pytest.approx([2.5] * L, rel=0.15)
    assert module.metadata["l0"] == pytest.approx(2.5 * L, rel=0.15)
    loaded = gsf.load(tmp_path)
    assert (
        isinstance(loaded.activation, gsf.JumpReLU)
        and loaded.metadata["l0"] == module.metadata["l0"]
    )
    for layer, threshold in enumerate(loaded.threshold):
        assert torch.equal(threshold, module.ema_threshold[layer].float().expand(F))
    with torch.no_grad():
        encoded = zip(loaded.encode(x), module.encode(x), strict=True)
        assert all(torch.equal(a.values, b.values) for a, b in encoded)
        assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dead_latents_have_a_loss_of_their_own_until_they_fire(kind: str, fused: bool) -> None:
    given: dict[str, Any] = {"activation": "topk", "k": 2, "target_l0": None, "d_sae": 96}
    run, moved = trainer(kind, rows(), fused=fused, **given), 0
    draw, drawn = run._batch, []
    run._batch = lambda: drawn.append(draw()) or drawn[-1]  # type: ignore[func-returns-value, method-assign]
    for _ in range(12):
        silent, before = run.silent(), copy.deepcopy(run.module)
        found = run.step()
        fired = before.count_latents(drawn[-1][0])[0] > 0
        assert torch.equal(run.last_fired == run.taken, fired)
        assert ("auxk" in found) == bool(silent.any())
        pairs = zip(run.module.W_dec, before.W_dec, strict=True)
        changed = torch.cat([(a != b).any(1) for a, b in pairs])
        moved += int((silent & ~fired & changed).sum())
    assert moved > 10


def test_latents_of_all_layers_are_counted() -> None:
    run = trainer("crosscoder", rows(600), batch_size=64)
    with torch.no_grad():
        run.module.threshold[1][:] = 1e9
        run.module.threshold[2][:5] = 1e9
    for _ in range(5):
        found = run.step()
    silent = run.silent().view(L, F)
    assert bool(silent[1].all()) and bool(silent[2, :5].all()) and not bool(silent[0].all())
    assert int(found["fired"]) <= L * F - F - 5 and run.dead() == int(silent.sum())


@pytest.mark.parametrize("fused", [False, True])
def test_fired_are_the_latents_that_were_active_in_the_batch(fused: bool) -> None:
    x = rows(300)
    for kind in KINDS:
        run = trainer(kind, x, batch_size=300, fused=fused, init_l0=0.5)
        with torch.no_grad():
            run.module.threshold[1][:] = 1e9
        gate = dense(run.module, run.maps[0](x.flatten(1)))[1]
        run.step()
        fired = (run.last_fired == 1).view(L, F)
        if fused:
            assert torch.equal(fired, gate.any(0))
        else:
            assert bool((gate.any(0) | ~fired).all()) and int(fired.sum()) > F / 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    x = rows(400)
    run = trainer("crosscoder", x, batch_size=400)
    run.step()
    x[7, 2, 0] = math.nan
    before = copy.deepcopy(run.module).state_dict()
    with pytest.raises(gsf.NonFiniteError, match="the loss is nan at step 1"):
        run.step()
    assert all(torch.equal(p, before[name]) for name, p in run.module.state_dict().items())
    run = trainer("clt", rows(200))
    with torch.no_grad():
        run.module.W_dec[1][0, 0] = math.inf
    with pytest.raises(gsf.NonFiniteError, match=r"W_dec\.1 is not finite"):
        run.save(tmp_path / "other")


# ---- the way back to raw activations


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", [gsf.Crosscoder, gsf.CrossLayerTranscoder])
def test_folded_weights_do_to_raw_activations_what_scaled_ones_did(kind: Any, packed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"dtype": torch.float64, "packed": packed, "generator": generator}
    if kind is gsf.CrossLayerTranscoder:
        options["affine"] = True
    module = kind(L, D, F, gsf.JumpReLU(0.01), **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    maps = [
        LayersAffine(torch.randn(L, D, generator=generator), scale)
        for scale in ((0.5, 2.0, 30.0), (7.0, 0.1, 3.0))
    ]
    x = torch.randn(50, L * D, generator=generator, dtype=torch.float64)
    folded = copy.deepcopy(module)
    fold_layers_(folded, *maps)
    raw, scaled = x.view(50, L, D), maps[0](x)
    t, mean = torch.tensor(maps[1].scale, dtype=torch.float64)[:, None], maps[1].mean.double()
    torch.testing.assert_close(folded(raw), module(scaled) / t + mean, rtol=1e-9, atol=1e-9)
    for a, b, s in zip(folded.encode(raw), module.encode(scaled), maps[0].scale, strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense() / s, rtol=1e-9, atol=1e-9)
    assert folded.activation.bandwidth == pytest.approx(0.01 / (0.5 * 2 * 30) ** (1 / 3))


def test_running_thresholds_go_back_with_their_layers() -> None:
    run = trainer("clt", rows(500), activation="batchtopk", k=2.5, target_l0=None)
    for _ in range(3):
        run.step()
    scaled, exported = run.module.ema_threshold, run.exported()
    expected = scaled / torch.tensor(run.maps[0].scale, dtype=torch.float64)
    torch.testing.assert_close(exported.ema_threshold, expected, rtol=1e-12, atol=0)
    x = rows(50)
    pairs = (exported.eval(), x), (run.module.eval(), run.maps[0](x.flatten(1)))
    raw, inside = (module.encode(t) for module, t in pairs)
    for layer, scale in enumerate(run.maps[0].scale):
        a, b = raw[layer].to_dense(), inside[layer].to_dense() / scale
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 / scale)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_and_finished_are_the_same_and_compute_what_training_did(kind: str) -> None:
    x = rows(500)
    run = trainer(kind, x, preset=replace(FAST, centred=True))
    for _ in range(3):
        run.step()
    recon = dense(run.module, run.maps[0](x.flatten(1)))[0]
    goal = run.maps[1]
    expected = recon / torch.tensor(goal.scale)[:, None].double() + goal.mean
    exported, at = run.exported(), copy.deepcopy(run.module)
    found = dense(exported, x)[0]
    error = (found - expected).abs().amax((0, 2)) / expected.abs().amax((0, 2))
    assert float(error.max()) < 1e-4  # a gate within rounding of its threshold apart
    for a, b in zip(at.parameters(), run.module.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(exported.parameters(), run.finish().parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_an_artefact(tmp_path: Path, kind: str) -> None:
    x = rows(300)
    named = {"model_name": "toy", "hf_hook_point_in": "model.layers.{0,1,2}.output"}
    module = train(kind, x, out=tmp_path, metadata=named)
    loaded = gsf.load(tmp_path)
    for name, p in module.state_dict().items():
        assert torch.equal(p, loaded.state_dict()[name])
    with torch.no_grad():
        pairs = zip(module.encode(x), loaded.encode(x), strict=True)
    for a, b in pairs:
        assert torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["type"] == kind and config["width"] == L * F and config["l0"] > 0
    assert loaded.metadata["hf_hook_point_in"] == named["hf_hook_point_in"]


# ---- resuming


class Killed(Exception):
    """The end of a process."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": False},
        {"moments": "8bit"},
        {"preset": replace(FAST, beta1=0.5, centred=True)},
        {"activation": "batchtopk", "k": 2.5},
    ],
    ids=["fused", "buffered", "8bit", "momentum", "batchtopk"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_one_without_a_stop(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    x, whole, halves = rows(500), [], []
    options = {"steps": 10, "checkpoint_every": 3} | options
    expected = train(kind, x, out=tmp_path / "a", on_metrics=whole.append, **options)

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        train(kind, x, out=tmp_path / "b", on_metrics=stop, **options)
    found = train(kind, x, out=tmp_path / "b", on_metrics=halves.append, **options)
    assert [m["step"] for m in halves] == [7, 8, 9, 10]
    for a, b in zip(whole[6:], halves, strict=True):
        a.pop("seconds"), b.pop("seconds")
        assert a == b
    assert expected.state_dict().keys() == found.state_dict().keys()
    for name, a in expected.state_dict().items():
        assert torch.equal(a, found.state_dict()[name]), name


def test_another_number_of_layers_is_another_run(tmp_path: Path) -> None:
    x = rows(300)
    train("crosscoder", x, out=tmp_path)
    (tmp_path / "config.json").unlink()
    for path in tmp_path.glob("params*"):
        path.unlink()
    with pytest.raises(ValueError, match="whose settings have layers=3, and now layers=2"):
        train("crosscoder", x[:, :2], out=tmp_path)


def test_records_of_one_layer_say_nothing_of_layers() -> None:
    one = Settings(D, D, F, 5, FAST, target_l0=6)
    assert "layers" not in one.record() and settings("clt").record()["layers"] == L
    assert trainer_of(one) is not LayersTrainer and trainer_of(settings("clt")) is LayersTrainer


# ---- evaluate


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_against_dense_float64(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = rows(200)
    y = x if kind == "crosscoder" else source(kind, x)[1]
    if kind == "crosscoder":
        module: Any = gsf.Crosscoder(L, D, F, gsf.JumpReLU(init_threshold=2.0), generator=generator)
    else:
        module = gsf.CrossLayerTranscoder(
            *(L, D, F, gsf.JumpReLU(init_threshold=2.0)), affine=True, generator=generator
        )
        for W in module.W_skip:
            torch.nn.init.normal_(W, generator=generator)
    with torch.no_grad():
        for W in module.W_dec:
            W.add_(torch.randn(W.shape, generator=generator), alpha=0.1)
        module.threshold[1][::2] = 1e6
    shaped = [t.view(4, 50, L, D) for t in ((x,) if kind == "crosscoder" else (x, y))]
    found = gsf.evaluate(module, *shaped, batch_size=77)
    recon, gate = dense(module, x)
    y, l0 = y.double(), gate.sum(2).double()
    error, deviation = (recon - y).square(), (y - y.mean(0)).square()
    near = {"rel": 1e-5}
    assert found.fvu == pytest.approx(float(error.sum() / deviation.sum()), **near)
    by_layer = (error.sum((0, 2)) / deviation.sum((0, 2))).tolist()
    assert found.fvu_by_layer == pytest.approx(by_layer, **near)
    cosine = torch.cosine_similarity(recon, y, dim=2).mean()
    assert found.cosine == pytest.approx(float(cosine), **near)
    assert found.l0 == pytest.approx(float(l0.sum(1).mean()), **near)
    assert found.l0_std == pytest.approx(float(l0.sum(1).std(correction=0)), **near)
    assert found.l0_by_layer == pytest.approx(l0.mean(0).tolist(), **near)
    assert torch.equal(found.counts, gate.sum(0).flatten()) and found.tokens == 200
    assert found.dead >= F // 2 and found.l0_quantiles[1.0] == l0.sum(1).max()
    said = json.loads(json.dumps(found.summary()))
    assert said["l0_by_layer"] == pytest.approx(l0.mean(0).tolist(), **near)


def test_evaluation_of_one_layer_has_no_layers() -> None:
    found = gsf.evaluate(gsf.SAE(D, F), rows(20)[:, 0])
    assert found.fvu_by_layer == () == found.l0_by_layer and "l0_by_layer" not in found.summary()


def test_evaluation_refuses() -> None:
    crosscoder, x = gsf.Crosscoder(L, D, F), rows(20)
    clt = gsf.CrossLayerTranscoder(L, D, F)
    for args, error, text in (
        ((crosscoder, x[:, 0]), ValueError, r"activations must have shape \[\*batch, n_layers=3"),
        ((crosscoder, x[:0]), ValueError, "at least one"),
        ((clt, x), ValueError, "target is needed by a CrossLayerTranscoder"),
        ((clt, x, x[:, :2]), ValueError, r"target must have shape \[\*batch, n_layers=3"),
        ((clt, x, x[:7]), ValueError, "the same tokens"),
        ((x, crosscoder), TypeError, r"a module or a model comes first, got \(Tensor, Crosscoder"),
        ((torch.nn.Linear(2, 2), x), TypeError, "module must be an SAE, Transcoder, Crosscoder"),
    ):
        with pytest.raises(error, match=f"evaluate: .*{text}"):
            gsf.evaluate(*args)


# ---- bad input

X = rows(100)


class Odd(gsf.sources.TensorSource):
    """Rows that are no whole number of layers, or whose target has another width."""

    def __init__(self, d_in: int, d_out: int | None = None) -> None:
        target = None if d_out is None else torch.randn(9, d_out)
        super().__init__(torch.randn(9, d_in), target)
        self.layers = L


BAD: list[tuple[dict[str, Any], str]] = [
    ({"source": X[:, 0]}, "kind='crosscoder' does not fit a source with no target, of one layer"),
    ({"source": (X, X)}, "kind='crosscoder' does not fit a source with a target, of 3 layers"),
    ({"kind": "clt"}, "kind='clt' does not fit a source with no target, of 3 layers"),
    ({"kind": "sae"}, "kind='sae' does not fit a source with no target, of 3 layers"),
    (
        {"kind": "transcoder", "source": (X, X)},
        "kind='transcoder' does not fit a source with a target, of 3 layers",
    ),
    ({"activation": "batchtopk", "k": F + 0.5}, r"k must be in \(0, d_sae=32\], got 32.5"),
    ({"matryoshka": [8, F]}, r"matryoshka=\(8, 32\) is for kind='sae' and kind='transcoder'"),
    ({"precision": "screened"}, "precision='screened' is for kind='sae'"),
    ({"affine": True}, "affine=True needs kind='transcoder' or kind='clt'"),
    ({"target_l0": L * F}, r"target_l0 must be below layers \* d_sae = 3 \* 32, got 96"),
    ({"init_l0": L * F + 1}, "init_l0 must be below layers"),
    ({"activation": "topk", "k": F + 1}, r"k must be in \[0, d_sae=32\]"),
    ({"activation": "topk"}, "topk needs k"),
    ({"mesh": object()}, "kind='crosscoder' is for one device: drop mesh"),
    ({"source": X * math.nan}, "x of layer 0 must be finite"),
    ({"source": Odd(L * D + 1)}, "a source of 3 layers has rows of d_in=25"),
    (
        {"kind": "clt", "source": Odd(L * D, 2 * L * D)},
        "the target of several layers must be as wide",
    ),
]


@pytest.mark.parametrize("options, text", BAD, ids=[str(list(b[0])) for b in BAD])
def test_bad_input_is_refused_before_anything_happens(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    options = {"d_sae": F, "target_l0": 6, "steps": 2, "source": X, "progress": False} | options
    if "activation" in options:
        options["target_l0"] = None
    seen: list[Any] = []
    options = {"kind": "crosscoder", "out": tmp_path / "run", "on_metrics": seen.append} | options
    with pytest.raises(ValueError, match=f"^train: .*{text}"):
        gsf.train(options.pop("source"), **options)
    assert not seen and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_layers_belong_to_kinds_that_have_them() -> None:
    for kind, options, text in (
        ("sae", {"affine": False}, "layers is for kind='crosscoder' and kind='clt', got layers=3"),
        ("clt", {"layers": None}, "kind='clt' needs layers"),
        ("clt", {"layers": 0}, "layers must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            settings(kind, **options)
    for kind, name in (("crosscoder", "a crosscoder"), ("clt", "a CLT")):
        with pytest.raises(ValueError, match=f"{name}'s target must be as wide as x, 8, got 9"):
            Settings(D, D + 1, F, 5, FAST, target_l0=6, kind=kind, layers=L)


def test_a_folder_that_cannot_hold_the_result_is_told_before_the_run(tmp_path: Path) -> None:
    gsf.SAE(D, F).save_pretrained(tmp_path / "one")
    gsf.Crosscoder(L + 1, D, F).save_pretrained(tmp_path / "four")
    gsf.Crosscoder(L, D, F).save_pretrained(tmp_path / "three")
    seen: list[Any] = []
    for name, text in (("one", "a single-layer artefact"), ("four", "an artefact of more layers")):
        with pytest.raises(ValueError, match=f"train: out could not hold the result: .*{text}"):
            train("crosscoder", X, out=tmp_path / name, on_metrics=seen.append)
    with pytest.raises(ValueError, match="out would lose its params_layer_0.safetensors"):
        train("crosscoder", X, out=tmp_path / "three", on_metrics=seen.append)
    assert not seen


# ---- the command line


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_layers(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    given = source(kind, rows(300))
    pair = given if isinstance(given, tuple) else (given,)
    save_file(dict(zip(("x", "target"), pair, strict=False)), tmp_path / "rows.safetensors")
    argv = ["train", str(tmp_path / "rows.safetensors"), "--out", str(tmp_path / "run")]
    argv += ["--kind", kind, "--d-sae", "32", "--steps", "3", "--target-l0", "6"]
    assert main([*argv, "--batch-size", "64"]) == 0
    name = "Crosscoder" if kind == "crosscoder" else "CrossLayerTranscoder"
    printed = capsys.readouterr().out
    assert f"{name}(n_layers=3, d_model=8, d_sae=32" in printed and "L0 " in printed
    assert type(gsf.load(tmp_path / "run")).__name__ == name
    at = argv.index("--target-l0")
    argv[at : at + 2] = ["--activation", "batchtopk", "--k", "2.5", "--no-resume"]
    assert main([*argv, "--batch-size", "64"]) == 0
    assert f"{name}(n_layers=3, d_model=8, d_sae=32, BatchTopK(k=2.5))" in capsys.readouterr().out
    assert isinstance(gsf.load(tmp_path / "run").activation, gsf.JumpReLU)
