"""`gsf.train(start=...)`: a run that begins with the weights of a module for raw activations."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_train_layers import D, F, L, rows
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.cli import main
from gemmascope_fast.training.trainer import Trainer

STILL = gsf.Preset(lr=1e-30, frequency=0.0, threshold_decay=0.9)
"""Steps of which no weight takes notice."""
KINDS = ("sae", "transcoder", "crosscoder", "clt")
ACTIVATIONS: dict[str, Any] = {
    "jumprelu": gsf.JumpReLU(0.3, 0.5),
    "topk": gsf.TopK(3),
    "batchtopk": gsf.BatchTopK(2.5),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def data(kind: str, n: int = 400) -> tuple[Tensor, ...]:
    """x, and the target of what maps; of several layers each on a scale of its own."""
    x = rows(n)
    pair = x, x.flip(-1) * torch.tensor([50.0, 1.0, 0.2])[:, None] + 2
    pair = pair if kind in ("crosscoder", "clt") else tuple(t[:, 1] for t in pair)
    return pair if kind in ("transcoder", "clt") else pair[:1]


def dictionary(kind: str, activation: str = "jumprelu", **options: Any) -> Any:
    """Random weights of the size of the activations; rows of any norm where a JumpReLU has them."""
    torch.manual_seed(4)
    given = ACTIVATIONS[activation]
    affine = {"affine": True} if kind in ("transcoder", "clt") else {}
    if kind in ("sae", "transcoder"):
        if activation == "batchtopk":
            options["semantics"] = gsf.Semantics(ema_decay=0.9)
        made: Any = {"sae": gsf.SAE, "transcoder": gsf.Transcoder}[kind](
            D, F, given, **affine, **options
        )
    else:
        if activation == "batchtopk":
            options["ema_decay"] = 0.9
        which = {"crosscoder": gsf.Crosscoder, "clt": gsf.CrossLayerTranscoder}[kind]
        made = which(L, D, F, given, **affine, **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if not name.startswith("W_dec") or activation == "jumprelu":
                p.add_(0.2 * torch.randn(p.shape))
        if activation == "batchtopk":
            made.train().encode(data(kind)[0])
            made.ema_threshold.mul_(1.03)  # not on an activation, where rounding decides
    return made.eval()


def train(kind: str, start: Any, **options: Any) -> Any:
    activation = options.setdefault("activation", "jumprelu")
    sparsity = {"target_l0": 6} if activation == "jumprelu" else {"k": 3}
    sizes = {"d_sae": F, "steps": 3, "batch_size": 100, "preset": STILL, "progress": False}
    given = data(kind)
    source = options.pop("source", given if len(given) > 1 else given[0])
    affine = getattr(start, "W_skip", None) is not None
    return gsf.train(
        source, kind=kind, start=start, **{"affine": affine} | sizes | sparsity | options
    )


def outcome(module: Any, kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """How much each latent writes, and the reconstruction: however rows are scaled."""
    with torch.no_grad():
        acts = module.encode(x)
        several = acts if isinstance(acts, list) else [acts]
        W_dec = list(module.W_dec) if isinstance(acts, list) else [module.W_dec]
        norms = [W.norm(dim=1) for W in W_dec]
        written = [a.to_dense() * n for a, n in zip(several, norms, strict=True)]
        return torch.cat(written, 1), module(x)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_step_the_result_is_the_start(kind: str, fused: bool, centred: bool) -> None:
    start, preset = dictionary(kind), replace(STILL, centred=centred)
    before = copy.deepcopy(start.state_dict())
    found = train(kind, start, fused=fused, preset=preset)
    assert type(found) is type(start) and not found.training
    x = data(kind)[0]
    ours, theirs = outcome(found, kind, x), outcome(start, kind, x)
    assert int((theirs[0] > 0).sum()) > len(x)
    for a, b in zip(ours, theirs, strict=True):
        assert float(((a - b).abs() > 1e-4 * b.abs().max()).float().mean()) < 1e-3
    for name, t in start.state_dict().items():
        assert torch.equal(t, before[name])


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_selects_goes_on_too(kind: str, activation: str) -> None:
    start, x = dictionary(kind, activation), data(kind)[0]
    run = started(kind, start, activation=activation)
    found = run.finish().eval()
    for a, b in zip(outcome(found, kind, x), outcome(start, kind, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    trained = train(kind, start, activation=activation)
    if activation == "batchtopk":
        assert not torch.equal(trained.ema_threshold, start.ema_threshold)
    assert trained.activation.k == 3


class Stop(Exception):
    """The run has been seen."""


def started(kind: str, start: Any, **options: Any) -> Any:
    """The trainer of `train(...)` before its first step."""
    found = []

    def step(trainer: Trainer) -> Any:
        found.append(trainer)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stop):
            train(kind, start, **options)
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_the_start(kind: str) -> None:
    start, seen = dictionary(kind), []
    given = data(kind)
    n = len(given[0])
    train(kind, start, batch_size=n, on_metrics=seen.append)
    with torch.no_grad():
        recon, x, y = start(given[0]), given[0], given[-1]
        error, size = (recon - y).square().sum(-1).double(), y.square().sum(-1).double().mean(0)
        acts = start.encode(x)
        l0 = sum(a.l0() for a in acts) if isinstance(acts, list) else acts.l0()
    expected = (error / size).reshape(n, -1).sum(1).mean()
    assert seen[0]["reconstruction"] == pytest.approx(float(expected), rel=1e-3)
    assert seen[0]["l0"] == pytest.approx(float(l0.mean()), rel=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_place_in_its_own_units(kind: str, activation: str) -> None:
    preset, start = replace(STILL, bandwidth=0.07), dictionary(kind, activation)
    run = started(kind, start, activation=activation, preset=preset)
    assert activation != "jumprelu" or run.module.activation.bandwidth == 0.07
    decoders = run.module.W_dec if kind in ("crosscoder", "clt") else [run.module.W_dec]
    for W_dec in decoders:
        torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(F))


def test_layers_are_assembled_and_trained_together() -> None:
    """From single-layer dictionaries to one, which learns to write to later layers."""
    x = rows(2000)
    preset = gsf.Preset(lr=3e-3, bandwidth=0.1, frequency=0.0, sparsity=0.02)
    options: dict[str, Any] = {"d_sae": F, "batch_size": 128, "preset": preset, "progress": False}
    singles = [gsf.train(x[:, at], target_l0=2, steps=60, **options) for at in range(L)]
    start, seen = gsf.Crosscoder.from_layers(singles), []
    options |= {"target_l0": 6, "kind": "crosscoder", "on_metrics": seen.append}
    found = gsf.train(x, steps=150, start=start, **options)
    before, after = gsf.evaluate(start, x), gsf.evaluate(found, x)
    assert seen[0]["fvu"] == pytest.approx(before.fvu, abs=0.15) and after.l0 < 9
    assert sum(after.fvu_by_layer) < 0.9 * sum(before.fvu_by_layer)
    assert not start.decoder(0)[:, 1:].any() and bool(found.decoder(0)[:, 1:].any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_one_without_a_stop(tmp_path: Path, kind: str) -> None:
    preset = gsf.Preset(lr=3e-3, bandwidth=0.1)
    options: dict[str, Any] = {"steps": 9, "checkpoint_every": 3, "preset": preset}
    start = dictionary(kind)
    expected = train(kind, start, **options)

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(kind, start, out=tmp_path, on_metrics=stop, **options)
    with torch.no_grad():  # what is there is not read again
        for p in start.parameters():
            p.zero_()
    found = train(kind, start, out=tmp_path, **options)
    for name, t in expected.state_dict().items():
        assert torch.equal(t, found.state_dict()[name]), name


def test_the_command_takes_an_artefact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = dictionary("sae")
    with torch.no_grad():
        start.threshold.abs_()
    start.save_pretrained(tmp_path / "start")
    save_file({"x": data("sae")[0].contiguous()}, tmp_path / "x.safetensors")
    argv = ["train", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "run")]
    argv += ["--d-sae", str(F), "--steps", "1", "--target-l0", "3", "--lr", "1e-30"]
    argv += ["--batch-size", "50", "--start", str(tmp_path / "start")]
    assert main(argv) == 0
    x = data("sae")[0]
    found, expected = (outcome(each, "sae", x)[1] for each in (gsf.load(tmp_path / "run"), start))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    argv[argv.index("--d-sae") + 1] = "7"
    assert main([*argv, "--no-resume"]) == 2
    assert "train: start must have d_sae=7, got 32" in capsys.readouterr().err


# ---- what does not fit

SAELENS = gsf.Semantics.preset("saelens_6")
WRONG: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("sae", lambda: dictionary("transcoder"), {}, TypeError, "must be of class SAE, as kind='sae'"),
    ("clt", lambda: dictionary("crosscoder"), {}, TypeError, "must be of class CrossLayerTransc"),
    ("sae", lambda: 3, {}, TypeError, "must be of class SAE, as kind='sae', got int"),
    ("sae", lambda: dictionary("sae"), {"d_sae": 40}, ValueError, "must have d_sae=40, got 32"),
    (
        "sae",
        lambda: dictionary("sae"),
        {"source": torch.randn(50, D + 1)},
        ValueError,
        "must have d_in=9, got 8",
    ),
    (
        "crosscoder",
        lambda: dictionary("crosscoder"),
        {"source": torch.randn(50, L + 1, D)},
        ValueError,
        "must have n_layers=4, got 3",
    ),
    (
        "clt",
        lambda: dictionary("clt"),
        {"affine": False},
        ValueError,
        "must have an affine skip connection exactly where affine=True, got affine=False",
    ),
    (
        "crosscoder",
        lambda: dictionary("crosscoder", packed=False),
        {},
        ValueError,
        "must not write backwards: its latents of layer 1 write to layer 0",
    ),
    (
        "sae",
        lambda: dictionary("sae", "topk"),
        {},
        ValueError,
        "must have activation='jumprelu' and Gemma Scope's semantics, got TopK(k=3)",
    ),
    (
        "sae",
        lambda: dictionary("sae", semantics=SAELENS),
        {},
        ValueError,
        "its to_jumprelu() is a start for activation='jumprelu'",
    ),
    (
        "sae",
        lambda: gsf.SAE(D, F, gsf.TopK(3), semantics=SAELENS),
        {"activation": "topk"},
        ValueError,
        "must have activation='topk' and Gemma Scope's semantics",
    ),
    ("sae", lambda: dictionary("sae").to("meta"), {}, ValueError, "is on the meta device"),
    ("sae", lambda: dictionary("sae"), {"mesh": 3}, ValueError, "is for one device: drop mesh"),
    ("sae", lambda: dictionary("sae"), {"init_l0": 3}, ValueError, "has its own: drop one"),
]


@pytest.mark.parametrize(("kind", "make", "options", "error", "text"), WRONG)
def test_what_does_not_fit_is_refused_before_anything_happens(
    kind: str, make: Any, options: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    seen: list[Any] = []
    options = {
        "affine": kind == "clt",
        "out": tmp_path / "run",
        "on_metrics": seen.append,
    } | options
    with pytest.raises(error, match=f"^train: .*start .*{re.escape(text)}"):
        train(kind, make(), **options)
    assert not seen and not (tmp_path / "run").exists()


def test_rows_of_different_norms_would_change_what_is_selected() -> None:
    for kind, text in (
        ("sae", "one norm, because TopK"),
        ("crosscoder", "one norm of layer 1, be"),
    ):
        start = dictionary(kind, "topk")
        with torch.no_grad():
            (start.W_dec if kind == "sae" else start.W_dec[1])[3].mul_(1.1)
        with pytest.raises(ValueError, match=f"train: start must have decoder rows of {text}"):
            train(kind, start, activation="topk")
