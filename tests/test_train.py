"""`gsf.train`: what it learns, the way back to raw activations, schedules, bad input, metrics."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.training.calibration import thresholds
from gemmascope_fast.training.preset import GEMMA_SCOPE_2, GEMMA_SCOPE_2_LITERAL, find_preset
from gemmascope_fast.training.schedules import decay, glide, warmup
from gemmascope_fast.training.settings import Settings
from gemmascope_fast.training.sources import Block, TensorSource
from gemmascope_fast.training.trainer import Trainer

FAST = gsf.Preset(lr=3e-3, bandwidth=0.1, frequency=0.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def sparse_data(n: int = 6000, d: int = 24, features: int = 48, active: int = 3) -> Tensor:
    """Sums of `active` of `features` random directions, far from the origin, on a large scale."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(features, d, generator=generator)
    chosen = torch.rand(n, features, generator=generator).topk(active).indices
    strength = torch.rand(n, active, generator=generator) + 0.5
    return 40 * (strength[:, :, None] * directions[chosen]).sum(1) + 25


def train(x: Any, **options: Any) -> Any:
    defaults = {"d_sae": 96, "target_l0": 4, "steps": 8, "batch_size": 128, "preset": FAST}
    options = {"progress": False} | defaults | options
    if options.get("activation", "jumprelu") != "jumprelu":
        options["target_l0"] = None
    return gsf.train(x, **options)


# ---- learning


@pytest.mark.parametrize("centred", [False, True])
def test_jumprelu_learns_at_the_wanted_l0(centred: bool) -> None:
    x = sparse_data()
    sae = train(x[:5000], steps=400, preset=replace(FAST, sparsity=0.02, centred=centred))
    found = gsf.evaluate(sae, x[5000:])
    assert found.fvu < 0.25 and 3 < found.l0 < 6
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(96))
    assert sae.metadata["l0"] == pytest.approx(found.l0, rel=0.2)


@pytest.mark.parametrize("fused", [False, True])
def test_momentum_moves_latents_that_are_silent(fused: bool) -> None:
    """With beta1 > 0 alone; `rows="live"` stops where it has decayed: 24 steps at 0.5."""
    x = sparse_data()
    runs = {}
    for beta1 in (0.0, 0.5):
        for rows in ("exact", "live"):
            preset = replace(FAST, beta1=beta1)
            made = train(x, steps=60, d_sae=384, preset=preset, rows=rows, fused=fused)
            runs[beta1, rows] = made.W_enc.detach()
    assert torch.equal(runs[0.0, "exact"], runs[0.0, "live"])
    assert not torch.allclose(runs[0.5, "exact"], runs[0.0, "exact"], rtol=1e-3)
    assert not torch.equal(runs[0.5, "exact"], runs[0.5, "live"])
    torch.testing.assert_close(runs[0.5, "exact"], runs[0.5, "live"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_topk_learns(activation: str) -> None:
    x = sparse_data()
    sae = train(x[:5000], activation=activation, k=4, steps=200)
    found = gsf.evaluate(sae, x[5000:])
    assert found.fvu < 0.36 and found.l0 == pytest.approx(4, rel=0.25)
    assert not sae.training


@pytest.mark.parametrize("affine", [False, True])
def test_a_transcoder_learns_a_map_between_scales(affine: bool) -> None:
    x = sparse_data()
    target = x.square()[:, :10] * 7 + 3 * x[:, :10]
    both = (x[:5000], target[:5000])
    sae = train(both, kind="transcoder", affine=affine, steps=300)
    found = gsf.evaluate(sae, x[5000:], target[5000:])
    assert isinstance(sae, gsf.Transcoder) and (sae.W_skip is not None) == affine
    assert found.fvu < 0.45


@pytest.mark.parametrize(
    "options",
    [{"fused": False}, {"rows": "live"}, {"moments": "8bit"}, {"dtype": torch.bfloat16}],
    ids=["unfused", "live", "8bit", "bfloat16"],
)
def test_ways_to_save_memory_learn_as_much(options: dict[str, Any]) -> None:
    x = sparse_data(3000)
    exact, other = train(x, steps=120), train(x, steps=120, **options)
    assert other.W_enc.dtype == options.get("dtype", torch.float32)
    a, b = gsf.evaluate(exact, x), gsf.evaluate(other, x.to(other.W_enc.dtype))
    close = 1e-3 if "fused" in options or "rows" in options else 0.05
    assert b.fvu == pytest.approx(a.fvu, rel=close) and b.l0 == pytest.approx(a.l0, rel=close)


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
def test_prefixes_of_a_matryoshka_run_are_dictionaries(activation: str) -> None:
    x = sparse_data(3000)
    options = {"steps": 150, "activation": activation}
    options |= {"k": 4} if activation == "batchtopk" else {}
    nested, plain = train(x, matryoshka=[24, 96], **options), train(x, **options)

    def error(sae: Any) -> float:
        acts = sae.encode(x).to_dense()[:, :24]
        recon = acts @ sae.W_dec[:24] + sae.b_dec
        return float(((recon - x).square().sum() / (x - x.mean(0)).square().sum()).detach())

    assert error(nested) < 0.9 * error(plain)


def test_dead_latents_of_topk_have_a_loss_of_their_own() -> None:
    x = sparse_data(1000)
    seen: list[dict[str, float]] = []
    train(x, activation="topk", k=2, steps=40, d_sae=384, on_metrics=seen.append)
    revived = ["auxk" in m for m in seen]
    assert not any(revived[:8]) and revived[8:] == [m["dead"] > 0 for m in seen[7:-1]]
    assert any(revived)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_dead_latent_stays_dead_until_it_fires(activation: str) -> None:
    """Not until AuxK has given it a gradient."""
    settings = Settings(
        *(24, 24, 384, 40, FAST), activation=activation, k=2, batch_size=128, rows="exact"
    )
    trainer = Trainer(TensorSource(sparse_data(1000)), settings, CPU)
    draw, drawn, revived = trainer._batch, [], 0
    trainer._batch = lambda: drawn.append(draw()) or drawn[-1]  # type: ignore[func-returns-value, method-assign]
    for _ in range(20):
        dead, before = trainer.silent(), copy.deepcopy(trainer.module)
        metrics = trainer.step()
        fired = before.count_latents(drawn[-1][0])[0] > 0
        assert torch.equal(trainer.last_fired == trainer.taken, fired)
        assert int(metrics["fired"]) == int(fired.sum())
        revived += int((dead & ~fired).sum()) if "auxk" in metrics else 0
    assert revived > 50


def test_both_forms_of_the_pull() -> None:
    x = sparse_data(1000)
    for fused in (True, False):
        seen: list[dict[str, float]] = []
        preset = replace(FAST, per_token=False, frequency=0.01)
        train(x, preset=preset, fused=fused, on_metrics=seen.append)
        assert {"quadratic_mean_l0", "frequency"} <= set(seen[0]) and seen[0]["frequency"] > 0


def test_another_seed_is_another_run_and_the_same_seed_is_not() -> None:
    x = sparse_data(500)
    first, same, other = (train(x, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.W_dec, same.W_dec) and not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_gradients_that_a_notebook_switched_off_change_nothing(off: Any, activation: str) -> None:
    k = None if activation == "jumprelu" else 4
    with off():
        found = train(sparse_data(400), activation=activation, k=k)
        assert not torch.is_grad_enabled()
    expected = train(sparse_data(400), activation=activation, k=k)
    assert torch.equal(found.W_dec, expected.W_dec) and found.W_dec.requires_grad


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    x = sparse_data(800)
    exact, cast = train(x, steps=30), train(x, steps=30, autocast=torch.bfloat16)
    assert cast.W_enc.dtype == torch.float32
    assert not torch.equal(exact.W_enc, cast.W_enc)
    a, b = (gsf.evaluate(sae, x).fvu for sae in (exact, cast))
    assert a == pytest.approx(b, rel=0.05)


# ---- the start, and the way back


def test_thresholds_start_at_the_wanted_l0() -> None:
    x = sparse_data()
    for options, expected in (({}, 8), ({"init_l0": 20}, 20), ({"target_l0": 3}, 6)):
        seen: list[dict[str, float]] = []
        train(x, **{"steps": 1, "batch_size": 4096, "on_metrics": seen.append, **options})
        assert seen[0]["l0"] == pytest.approx(expected, rel=0.05)


def test_the_literal_recipe_starts_dense() -> None:
    seen: list[dict[str, float]] = []
    literal = replace(GEMMA_SCOPE_2_LITERAL, centred=True)
    train(sparse_data(1000), preset=literal, steps=1, on_metrics=seen.append)
    assert 0.4 < seen[0]["density"] < 0.6


def test_calibrated_thresholds_give_the_wanted_l0_evenly() -> None:
    torch.manual_seed(1)
    x, W_enc, b_enc = torch.randn(500, 12), torch.randn(12, 1100), torch.randn(1100)
    fires = torch.addmm(b_enc, x, W_enc) > thresholds(x, W_enc, b_enc, 110.0)
    assert float(fires.sum(1).float().mean()) == pytest.approx(110, rel=0.01)
    assert int(fires.sum(0).max()) - int(fires.sum(0).min()) <= 2


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_exported_weights_do_to_raw_activations_what_training_did(kind: str, centred: bool) -> None:
    x = sparse_data(600).double()
    target = None if kind == "sae" else 0.01 * x[:, :9].square() - 4
    settings = Settings(
        *(24, 24 if target is None else 9, 96, 5, replace(FAST, centred=centred)),
        **{"target_l0": 4, "batch_size": 64, "kind": kind, "affine": kind == "transcoder"},  # type: ignore[arg-type]
        dtype=torch.float64,
    )
    trainer = Trainer(TensorSource(x, target), settings, CPU)
    for _ in range(5):
        trainer.step()
    scaled, goal = trainer.scaled(x, target)
    assert float(scaled.square().sum(1).mean()) == pytest.approx(1, rel=1e-5)
    assert float(goal.square().sum(1).mean()) == pytest.approx(1, rel=1e-5)
    inside, outside = trainer.module.encode(scaled), trainer.exported().encode(x)
    assert torch.equal(inside.indices[inside.gate > 0], outside.indices[outside.gate > 0])
    back = trainer.maps[1]
    expected = trainer.module(scaled) / back.scale + back.mean
    torch.testing.assert_close(trainer.exported()(x), expected)
    raw = trainer.exported().activation.bandwidth * trainer.maps[0].scale  # type: ignore[union-attr]
    assert raw == pytest.approx(FAST.bandwidth)
    expected_copy = trainer.exported()
    assert torch.equal(trainer.finish().b_dec, expected_copy.b_dec)


def test_the_result_is_an_artefact(tmp_path: Path) -> None:
    x = sparse_data(500)
    sae = train(x, out=tmp_path / "run", metadata={"model_name": "m", "hf_hook_point_in": "h"})
    read = gsf.load(tmp_path / "run")
    assert torch.equal(read.encode(x).values, sae.encode(x).values[sae.encode(x).gate > 0])
    assert read.metadata["model_name"] == "m" and read.metadata["l0"] == sae.metadata["l0"]


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_a_topk_result_is_an_artefact(tmp_path: Path, kind: str) -> None:
    x = sparse_data(500)
    given = x if kind == "sae" else (x, x * 2)
    metadata = {"model_name": "m", "hf_hook_point_in": "h"}
    options = {"activation": "topk", "k": 4, "kind": kind, "metadata": metadata}
    options |= {"affine": kind == "transcoder", "out": tmp_path}
    made = train(given, **options)
    read = gsf.load(tmp_path)
    assert type(read) is type(made) and read.activation == gsf.TopK(4)
    assert torch.equal(read(x), made(x)) and read.metadata["model_name"] == "m"
    assert read.metadata["l0"] == made.metadata["l0"] and read.metadata["hf_hook_point_in"] == "h"
    again = train(given, **options)  # from the last checkpoint, over its own result
    assert torch.equal(again(x), made(x))


def test_a_folder_of_a_run_without_a_result_says_so(tmp_path: Path) -> None:
    options: dict[str, Any] = {"activation": "topk", "k": 4, "out": tmp_path}
    train(sparse_data(300).view(100, 3, 24), kind="crosscoder", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    with pytest.raises(FileNotFoundError, match="checkpoints of gsf.train and no artefact"):
        gsf.load(tmp_path)


@pytest.mark.parametrize("name", ["params.safetensors", "config.json"])
def test_somebody_elses_files_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"train: out would lose its {name}, which no run left"):
        train(sparse_data(300), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    for resume in (True, False):  # over its own
        train(sparse_data(300), out=tmp_path, resume=resume)
    assert gsf.load(tmp_path).d_sae == 96


# ---- schedules


def test_warmups_and_decay() -> None:
    assert warmup(0, 10, 0.1, "cosine") == pytest.approx(0.1)
    assert warmup(5, 10, 0.1, "cosine") == pytest.approx(0.55)
    assert warmup(2, 10, 0.0, "cosine") == pytest.approx((1 - math.cos(0.2 * math.pi)) / 2)
    assert warmup(2, 10, 0.0, "linear") == pytest.approx(0.2)
    assert warmup(10, 10, 0.1, "cosine") == warmup(99, 10, 0.1, "linear") == 1
    assert warmup(0, 0, 0.0, "linear") == 1
    assert decay(69, 100, 0.3) == 1 and decay(85, 100, 0.3) == pytest.approx(0.5)
    assert decay(5, 10, 0.0) == 1
    assert [glide(s, 4, 10.0, 2.0) for s in (0, 1, 4, 9)] == [10, 8, 2, 2]


def test_the_presets_schedules() -> None:
    literal, fitted = GEMMA_SCOPE_2_LITERAL, GEMMA_SCOPE_2
    assert literal.learning_rate(0, 10**6) == pytest.approx(7e-6)
    assert literal.learning_rate(500, 10**6) == pytest.approx(7e-5 * 0.55)
    assert literal.learning_rate(1000, 10**6) == 7e-5
    assert literal.sparsity_weight(25_000, 400) == literal.sparsity / 2
    assert fitted.sparsity_weight(25_000, 10**6) == literal.sparsity / 2
    assert (
        fitted.sparsity_weight(80, 400) == fitted.sparsity and fitted.sparsity_weight(0, 400) == 0
    )
    assert fitted.learning_rate(40, 400) == 7e-5
    gliding = replace(literal, target_l0_start=200.0)
    assert gliding.target_l0(25_000, 1, 50.0) == 125 and literal.target_l0(0, 1, 50.0) == 50


def test_presets_are_found_and_checked() -> None:
    assert find_preset("gemma_scope_2") is GEMMA_SCOPE_2 and find_preset(FAST) is FAST
    with pytest.raises(ValueError, match="preset must be one of gemma_scope_2, gemma_scope_2_lit"):
        find_preset("gemma_scope_3")
    for changes, text in (
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"bandwidth": -1.0}, "bandwidth must be finite and > 0"),
        ({"lr_warmup_shape": "step"}, "lr_warmup_shape must be cosine or linear"),
        ({"calibration_tokens": 1}, "calibration_tokens must be >= 2"),
        ({"target_l0_start": math.nan}, "target_l0_start must be finite"),
    ):
        with pytest.raises(ValueError, match=text):
            replace(FAST, **changes)


# ---- metrics


def test_metrics_are_plain_numbers_of_every_step() -> None:
    seen: list[dict[str, float]] = []
    train(sparse_data(600), steps=5, on_metrics=seen.append)
    assert [m["step"] for m in seen] == [1, 2, 3, 4, 5] and seen[2]["tokens"] == 3 * 128
    wanted = {"loss", "reconstruction", "quadratic_l0", "fvu", "l0", "fired", "dead", "lr"}
    assert wanted <= set(seen[0])
    assert all(type(v) in (int, float) for m in seen for v in m.values())


def test_dead_latents_are_those_that_did_not_fire_lately() -> None:
    x = sparse_data(600)
    settings = Settings(24, 24, 96, 20, FAST, target_l0=4, batch_size=64)
    trainer = Trainer(TensorSource(x), settings, CPU)
    with torch.no_grad():
        trainer.module.threshold[:30] = 1e9  # type: ignore[index]
    dead = []
    for _ in range(6):
        metrics = trainer.step()
        dead.append(int(trainer.silent().sum()))
        assert int(metrics["fired"]) <= 66
    assert dead[:4] == [0] * 4 and dead[4] >= 30  # a fifth of 20 steps


# ---- bad input

X = sparse_data(100)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"d_sae": 0}, ValueError, "d_sae must be >= 1"),
    ({"d_sae": 2.5}, TypeError, "d_sae must be an int"),
    ({"steps": 0}, ValueError, "steps must be >= 1"),
    ({"batch_size": -1}, ValueError, "batch_size must be >= 0|batch_size must be >= 1"),
    ({"activation": "relu"}, ValueError, "activation must be one of jumprelu, topk, batchtopk"),
    ({"target_l0": None}, ValueError, "jumprelu needs target_l0"),
    ({"k": 3}, ValueError, "jumprelu needs target_l0 .*, no k"),
    ({"target_l0": 96}, ValueError, "target_l0 must be below d_sae=96"),
    ({"target_l0": "4"}, TypeError, "target_l0 must be a number"),
    ({"init_l0": 0}, ValueError, "init_l0 must be finite and > 0"),
    ({"activation": "topk"}, ValueError, "topk needs k"),
    ({"activation": "topk", "k": 97}, ValueError, r"k must be in \[0, d_sae=96\]"),
    ({"activation": "topk", "k": 2.5}, TypeError, "k must be an int"),
    ({"activation": "batchtopk", "k": math.nan}, ValueError, "k must be finite"),
    ({"rows": "all"}, ValueError, "rows must be one of exact, live"),
    ({"moments": "fp8"}, ValueError, "moments must be one of fp32, 8bit"),
    ({"fused": 1}, TypeError, "fused must be a bool"),
    ({"resume": "no"}, TypeError, "train: resume must be a bool, got 'no'"),
    ({"progress": 2}, TypeError, "train: progress must be a bool, got 2"),
    ({"matryoshka": [8, 4, 96]}, ValueError, "matryoshka must be ascending"),
    ({"matryoshka": [8, 32]}, ValueError, "matryoshka must end with d_sae=96, got 32"),
    ({"matryoshka": 8}, TypeError, "matryoshka must be a sequence"),
    ({"kind": "autoencoder"}, ValueError, "kind must be one of sae, transcoder, crosscoder"),
    ({"kind": "transcoder"}, ValueError, "kind='transcoder' does not fit a source with no target"),
    ({"affine": True}, ValueError, "affine=True needs kind='transcoder'"),
    ({"seed": -1}, ValueError, "seed must be >= 0"),
    ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype"),
    ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
    ({"dtype": torch.float16}, TypeError, "train: dtype must not be float16"),
    ({"dtype": torch.float64, "moments": "8bit"}, ValueError, 'train: moments="8bit" is for'),
    ({"device": "meta"}, ValueError, "train: device must have memory, got meta"),
    ({"source": X.to("meta")}, ValueError, "train: x must have values, and is on the meta dev"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be >= 1"),
    ({"preset": 3}, TypeError, "preset must be a name or a Preset"),
    ({"on_metrics": 3}, TypeError, "on_metrics must be callable"),
    ({"out": 3}, TypeError, "train: out must be a str or a path, got int"),
    ({"device": "gpu"}, ValueError, "train: device must name a torch device, got 'gpu'"),
    ({"metadata": 3}, TypeError, "train: metadata must be a mapping, got int"),
    ({"metadata": {"l0": "9"}}, ValueError, "out could not hold the result: .*l0 must be a number"),
    ({"metadata": {"a": X}}, TypeError, "out could not hold the result: .*metadata must be plain"),
    ({"source": [1, 2, 3]}, TypeError, "source must be a tensor, a pair"),
    ({"source": (X, X)}, ValueError, "kind='sae' does not fit a source with a target"),
    ({"source": "no-such-folder"}, FileNotFoundError, "no-such-folder"),
    ({"source": X * math.nan}, ValueError, "x must be finite and not constant"),
    ({"source": torch.zeros(50, 4)}, ValueError, "x must be finite and not constant"),
]


@pytest.mark.parametrize(
    "options, error, text", BAD, ids=[str(list(b[0].items()))[:40] for b in BAD]
)
def test_bad_input_is_refused_before_anything_happens(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    options = {"d_sae": 96, "target_l0": 4, "steps": 2, "source": X, "progress": False} | options
    if "activation" in options:
        options["target_l0"] = None
    seen: list[Any] = []
    options = {"on_metrics": seen.append, "out": tmp_path / "run"} | options
    with pytest.raises(error, match=text):
        gsf.train(options.pop("source"), **options)
    assert not seen
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


class Counting(TensorSource):
    """Rows that say whether anybody asked for them."""

    asked = 0

    def block(self, seed: int, index: int) -> Block:
        self.asked += 1
        return super().block(seed, index)


def test_a_place_that_cannot_hold_the_result_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link, other = tmp_path / "file", tmp_path / "link", tmp_path / "other"
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    gsf.SAE(24, 96, gsf.TopK(3)).save_pretrained(other, format="sparsify")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    source = Counting(X)
    cases = {
        file: "train: out must be a folder, and .*file is a file",
        file / "below": "train: out must be a folder, and .*file is a file",
        link: "train: out must be a folder, and .*link is a link that leads nowhere",
        tmp_path / "run": "train: out must be a folder, and .*checkpoints is a file",
        other: "train: out could not hold the result: .*holds an artefact of sparsify",
        tmp_path / "folder": "train: out could not hold the result: .*config.json is a folder",
    }
    before = sorted(path for path in tmp_path.rglob("*"))
    for out, text in cases.items():
        with pytest.raises(ValueError, match=text):
            gsf.train(source, d_sae=96, target_l0=4, steps=2, out=out, progress=False)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match="train: out cannot be written: no permission for"):
        gsf.train(source, d_sae=96, target_l0=4, steps=2, out=tmp_path / "a", progress=False)
    assert sorted(path for path in tmp_path.rglob("*")) == before and source.asked == 0


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_float64_activations_train_as_float32_ones(kind: str, activation: str) -> None:
    check_float64(kind, activation)


def test_float64_activations_of_several_layers() -> None:
    check_float64("crosscoder", "topk")


def check_float64(kind: str, activation: str) -> None:
    x = sparse_data(300).double()
    given: Any = {"sae": x, "transcoder": (x, x[:, :7]), "crosscoder": x.view(100, 3, 24)}[kind]
    narrow = tuple(t.float() for t in given) if kind == "transcoder" else given.float()
    options = {"activation": activation, "k": 4, "kind": kind, "preset": "gemma_scope_2"}
    made, expected = train(given, **options), train(narrow, **options)
    assert next(made.parameters()).dtype == torch.float32
    for name, p in expected.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), p, rtol=1e-4, atol=1e-5)
