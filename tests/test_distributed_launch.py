"""Processes that torchrun starts: from the command line to the artefact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gemmascope_fast as gsf
from gemmascope_fast.distributed import mesh_of_torchrun, save_pretrained
from gemmascope_fast.training import command

TRAIN = {"d_sae": 32, "target_l0": 4, "steps": 5, "batch_size": 40}


def test_torchrun_trains_the_artefact_of_one_process(tmp_path: Path) -> None:
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x.safetensors")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TRAIN.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + ["-m", "gemmascope_fast", "train", str(tmp_path / "x.safetensors"), "--tp=2"]
        + [f"--out={tmp_path / 'two'}", f"--metrics={tmp_path / 'log'}", "--device=cpu", *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("latents 0:16 of 32") == 1  # rank 0 alone speaks
    assert "32 latents on dp 1 x tp 2; per rank" in done.stderr
    assert len((tmp_path / "log").read_text().splitlines()) == 5
    one = gsf.train(x, progress=False, **TRAIN)  # type: ignore[arg-type]
    two = gsf.load(tmp_path / "two")
    for name, p in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), p, rtol=1e-5, atol=1e-6)


def test_a_mesh_needs_ranks_that_tp_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert mesh_of_torchrun() is None
    with pytest.raises(ValueError, match="tp needs several processes: start them with torchrun"):
        mesh_of_torchrun(2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="tp must divide the number of ranks, 4, got 3"):
        mesh_of_torchrun(3)
    with pytest.raises(TypeError, match="tp must be an int, got float"):
        mesh_of_torchrun(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout must be"):
        mesh_of_torchrun(2, timeout=0)
    with pytest.raises(ValueError, match="device_type must be cuda or cpu, got 'tpu'"):
        mesh_of_torchrun(2, device_type="tpu")


def test_a_module_that_is_not_sharded_has_its_own_save_pretrained(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="module must be what shard, load or train returned, got S"):
        save_pretrained(gsf.SAE(4, 8), tmp_path / "a")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_a_timeout_of_nothing_is_refused_by_the_command_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    options = ["--out=o", "--d-sae=8", "--steps=1", "--timeout=0", "--device=cpu"]
    assert command.main(["x.safetensors", *options]) == 2
    assert "timeout must be finite and > 0, got 0" in capsys.readouterr().err
