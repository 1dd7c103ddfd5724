"""Interrupted runs go on with the same bits; a bad batch or a full disk costs nothing saved."""

from __future__ import annotations

import math
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.artefacts import writing
from gemmascope_fast.training import checkpoint
from gemmascope_fast.training.settings import Settings
from gemmascope_fast.training.trainer import Trainer

FAST = gsf.Preset(lr=3e-3, bandwidth=0.1, statistics_tokens=200)
STEPS = 30


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def data(n: int = 700, d: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, d, generator=generator) * torch.linspace(3, 0.3, d) + 1


def train(x: Any, out: Path | None, **options: Any) -> gsf.SAE:
    defaults: dict[str, Any] = {"d_sae": 64, "steps": STEPS, "batch_size": 50, "preset": FAST}
    if "k" not in options:
        defaults["target_l0"] = 5
    defaults |= {"progress": False, "checkpoint_every": 4}
    return gsf.train(x, out=out, **defaults | options)


def bits(sae: gsf.SAE) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in sae.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Interrupt:
    """Raises in the callback of the given steps, once each."""

    def __init__(self, *steps: int) -> None:
        self.left = list(steps)

    def __call__(self, metrics: dict[str, float]) -> None:
        if self.left and metrics["step"] == self.left[0]:
            self.left.pop(0)
            raise KeyboardInterrupt


def interrupted(x: Any, out: Path, **options: Any) -> gsf.SAE:
    stop = Interrupt(3, 11, 12, 26)
    while stop.left:
        with pytest.raises(KeyboardInterrupt):
            train(x, out, on_metrics=stop, **options)
    return train(x, out, on_metrics=stop, **options)


# ---- resuming


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "topk", "k": 4},
        {"activation": "batchtopk", "k": 3.5},
        {"kind": "transcoder", "affine": True},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16, "moments": "8bit"},
        {"preset": replace(FAST, beta1=0.5), "rows": "live"},
    ],
    ids=["jumprelu", "topk", "batchtopk", "transcoder", "float64", "bf16 8bit", "momentum"],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    x: Any = data()
    if options.get("kind") == "transcoder":
        x = (x, x.flip(1)[:, :7] * 3)
    expected = bits(train(x, None, **options))
    assert same(bits(interrupted(x, tmp_path / "run", **options)), expected)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000000028.safetensors", "step-000000030.safetensors"]


def test_shards_resume_inside_a_block(tmp_path: Path) -> None:
    gsf.sources.write_shards(tmp_path / "x", data().split(130))  # type: ignore[no-untyped-call]
    expected = bits(train(tmp_path / "x", None))
    assert same(bits(interrupted(tmp_path / "x", tmp_path / "run")), expected)


def test_metrics_go_on_where_they_stopped(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    whole: list[dict[str, float]] = []
    train(data(), None, on_metrics=whole.append)
    stop = Interrupt(13)

    def note(metrics: dict[str, float]) -> None:
        seen.append(metrics)
        stop(metrics)

    with pytest.raises(KeyboardInterrupt):
        train(data(), tmp_path, on_metrics=note)
    train(data(), tmp_path, on_metrics=note)
    assert [m["step"] for m in seen] == [*range(1, 14), *range(13, STEPS + 1)]
    for name in ("loss", "l0", "dead", "lr"):
        assert [m[name] for m in seen[13:]] == [m[name] for m in whole[12:]]


def test_a_finished_run_is_read_not_repeated(tmp_path: Path) -> None:
    expected = bits(train(data(), tmp_path))
    seen: list[Any] = []
    assert same(bits(train(data(), tmp_path, on_metrics=seen.append)), expected) and not seen


@pytest.mark.parametrize(
    "options, text",
    [
        ({"d_sae": 65}, "settings have d_sae=64, and now d_sae=65"),
        ({"seed": 1}, "settings have seed=0"),
        ({"steps": 31}, "settings have steps=30"),
        ({"preset": gsf.Preset()}, "settings have preset="),
        ({"x": data() + 1}, "source have digest="),
    ],
)
def test_another_run_is_not_continued(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    train(data(), tmp_path, steps=STEPS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = {"x": data()} | options
    with pytest.raises(ValueError, match=text):
        train(options.pop("x"), tmp_path, **options)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    train(data(), tmp_path, seed=1)
    assert same(bits(train(data(), tmp_path, resume=False)), bits(train(data(), None)))


def test_an_unreadable_checkpoint_is_passed_over_loudly(tmp_path: Path) -> None:
    expected = bits(train(data(), tmp_path))
    newest = checkpoint.found(tmp_path / "checkpoints")[-1][1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"030.safetensors is not a whole .*from step-000000028"):
        assert same(bits(train(data(), tmp_path)), expected)
    for _, path in checkpoint.found(tmp_path / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole checkpoint.*resume=False starts anew"):
        train(data(), tmp_path)


@pytest.mark.parametrize("newest_is_whole", [True, False])
def test_a_kill_before_old_ones_are_removed(tmp_path: Path, newest_is_whole: bool) -> None:
    """At the last step no later save makes up for it."""
    expected, folder = bits(train(data(), tmp_path)), tmp_path / "checkpoints"
    (_, old), (last, newest) = checkpoint.found(folder)
    for step in (20, 24):
        shutil.copy(old, folder / f"step-{step:09d}.safetensors")
    if not newest_is_whole:
        newest.write_bytes(b"")
    with nullcontext() if newest_is_whole else pytest.warns(UserWarning, match="resuming from"):
        assert same(bits(train(data(), tmp_path)), expected)
    assert [step for step, _ in checkpoint.found(folder)] == [28, last]


def test_a_checkpoint_of_other_shapes_changes_nothing(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.ones(3), "b": torch.ones(2)}, {})
    held = {"a": torch.zeros(3), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"b of .* must be torch.float32 \[3\], got F32 \[2\]"):
        checkpoint.load_into(path, held, "optimizer.")
    with pytest.raises(ValueError, match="does not fit this run: b"):
        checkpoint.load_into(path, {"a": held["a"]}, "optimizer.")
    assert not held["a"].any()


def test_checkpoints_hold_every_dtype_and_layout(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).to(dtype) for dtype in checkpoint.CODES}
    tensors |= {"optimizer.t": torch.rand(3, 5).t(), "optimizer.s": torch.rand(8, 4)[::2, 1:]}
    tensors |= {"optimizer.0": torch.tensor(2.5), "optimizer.e": torch.zeros(0, 3)}
    path = checkpoint.save(tmp_path, 1, tensors, {"a": [1, {"b": None}]})
    plain = {name: torch.zeros_like(t) for name, t in tensors.items() if "optimizer" not in name}
    checkpoint.load_into(path, plain, "optimizer.")
    read = checkpoint.read(path, "optimizer.") | plain
    assert same(read, tensors) and read["optimizer.t"].stride() == (1, 5)
    assert checkpoint.load_record(path) == {"a": [1, {"b": None}]}


def test_what_the_file_system_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(28, "No space left on device")

    def refuse(*_: Any) -> None:
        raise full

    file = tmp_path / "run" / "checkpoints" / "step-000000004.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", refuse)
        with pytest.raises(OSError, match=f"train: out cannot be written: No space.*{file}"):
            train(data(), tmp_path / "run")
        patch.setattr(writing, "sync", refuse)
        with pytest.raises(
            OSError, match="save_pretrained: path cannot be written: No.*/sae/params"
        ):
            gsf.SAE(4, 8).save_pretrained(tmp_path / "sae")
    with pytest.raises(FileNotFoundError, match="train: out cannot be written: .*/proc/xx/check"):
        train(data(), Path("/proc/xx"))


# ---- bad batches


class Poisoned(gsf.sources.TensorSource):
    """Row 3 of block 1 is NaN while `bad` says so."""

    bad = True

    def block(self, seed: int, index: int) -> Any:
        made = super().block(seed, index)
        if index == 1 and self.bad:
            x = made.x.clone()
            x[made.order[3]] = float("nan")
            return gsf.sources.Block(x, made.target, made.order)
        return made


@pytest.mark.parametrize("options", [{}, {"activation": "topk", "k": 4}], ids=["jumprelu", "topk"])
def test_a_nan_batch_stops_the_run_at_its_place(tmp_path: Path, options: dict[str, Any]) -> None:
    source, seen = Poisoned(data()), []
    with pytest.raises(
        gsf.NonFiniteError, match="nan at step 14, on the 50 tokens from row 0 of block 1"
    ) as caught:
        train(source, tmp_path, on_metrics=seen.append, **options)
    assert (caught.value.step, caught.value.position) == (14, (1, 0)) and len(seen) == 14
    assert [step for step, _ in checkpoint.found(tmp_path / "checkpoints")] == [8, 12]
    source.bad = False
    assert same(bits(train(source, tmp_path, **options)), bits(train(data(), None, **options)))


def test_a_nan_is_named_by_its_row_in_the_source() -> None:
    x = data()
    settings = Settings(16, 16, 64, STEPS, FAST, target_l0=5, batch_size=450)
    run = Trainer(gsf.sources.TensorSource(x), settings, torch.device("cpu"))
    x[611] = math.nan
    with pytest.raises(gsf.NonFiniteError, match="x is not finite in row 611 of the source; the"):
        for _ in range(2):
            run.step()


def test_weights_that_diverge_are_told_from_activations() -> None:
    settings = Settings(16, 16, 64, STEPS, FAST, target_l0=5, batch_size=50)
    run = Trainer(gsf.sources.TensorSource(data()), settings, torch.device("cpu"))
    with torch.no_grad():
        run.module.b_dec[0] = math.nan
    with pytest.raises(gsf.NonFiniteError, match="the activations are finite, the weights have"):
        run.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "value"), [("b_dec", math.inf), ("W_dec", -math.inf), ("W_enc", math.nan)]
)
def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, dtype: torch.dtype
) -> None:
    step = Trainer.step

    def spoil(trainer: Trainer) -> Any:
        metrics = step(trainer)
        if trainer.taken == 8:
            with torch.no_grad():
                getattr(trainer.module, name)[3].fill_(value)
        return metrics

    monkeypatch.setattr(Trainer, "step", spoil)
    message = f"{name} is not finite after step 8; no checkpoint"
    with pytest.raises(gsf.NonFiniteError, match=message):
        train(data(), tmp_path, dtype=dtype)
    assert [step for step, _ in checkpoint.found(tmp_path / "checkpoints")] == [4]


# ---- the file system


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """`file_limit(n)`: writing a file beyond n bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    def fill(metrics: dict[str, float]) -> None:
        if metrics["step"] == 10:
            file_limit(5000)

    with pytest.raises(OSError, match="File too large"):
        train(data(), tmp_path, on_metrics=fill)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000004.safetensors", "step-000000008.safetensors"]
    file_limit(resource.RLIM_INFINITY)
    assert same(bits(train(data(), tmp_path)), bits(train(data(), None)))


def test_one_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    def nested(metrics: dict[str, float]) -> None:
        train(data(), tmp_path)

    with pytest.raises(ValueError, match="another run is writing to"):
        train(data(), tmp_path, on_metrics=nested)


# ---- killed


def killed_after(seconds: float, out: Path) -> bool:
    """Run in a child that is killed after `seconds`; whether it had finished."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(data(), out, checkpoint_every=1)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code == 0


KILLS = int(os.environ.get("GEMMASCOPE_FAST_TEST_KILLS", "4"))


def test_kill_9_at_random_moments_changes_no_bit(tmp_path: Path) -> None:
    """A checkpoint after every step, so that many kills hit a save."""
    began = time.monotonic()
    train(data(), tmp_path / "whole", checkpoint_every=1)
    length, draw = time.monotonic() - began, random.Random(11)
    expected = bits(gsf.load(tmp_path / "whole"))
    kills = 0
    for attempt in range(10 * KILLS):
        out = tmp_path / f"killed-{attempt}"
        while not killed_after(draw.uniform(0.01, 0.7) * length, out):
            kills += 1
        assert same(bits(gsf.load(out)), expected)
        left = [path.name for path in (out / "checkpoints").iterdir()]
        assert len([name for name in left if not name.startswith(".")]) == 2
        if kills >= KILLS:
            break
    assert kills >= KILLS
