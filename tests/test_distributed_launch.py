"""Processes that torchrun starts: from the command line to the artefact."""

from __future__ import annotations

import os
import re
import shlex
import socket
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
    assert "destroy_process_group" not in done.stderr  # of which torch warns with NCCL
    assert done.stdout.count("latents 0:16 of 32") == 1  # rank 0 alone speaks
    assert "32 latents on dp 1 x tp 2; per rank" in done.stderr
    assert len((tmp_path / "log").read_text().splitlines()) == 5
    one = gsf.train(x, progress=False, **TRAIN)  # type: ignore[arg-type]
    two = gsf.load(tmp_path / "two")
    for name, p in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), p, rtol=1e-5, atol=1e-6)


def commanded(folder: Path, world: int, source: str, before: str) -> list[tuple[str, str, int]]:
    """Output, errors and exit status of the command on each rank, `before` having run first.

    The last line of the output is whether the rank is still in a process group.
    """
    program = f"""import os, sys, torch.distributed as dist
from gemmascope_fast.cli import main
{before}
code = main(sys.argv[1:])
print(dist.is_initialized())
sys.exit(code)"""
    command = [sys.executable, "-c", program, "train", source, "--out", str(folder / "out")]
    command += ["--d-sae=16", "--target-l0=4", "--steps=3", "--device=cpu"]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(unused_port()), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, **pipes))
    return [(*process.communicate(timeout=120), process.returncode) for process in started]


def unused_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def test_the_command_says_an_error_of_another_rank_in_a_line(tmp_path: Path) -> None:
    """The data of the ranks differ: all of them name rank 1, none with a traceback."""
    save_file({"x": torch.randn(200, 12)}, tmp_path / "x0.safetensors")
    save_file({"x": torch.randn(200, 13)}, tmp_path / "x1.safetensors")
    own = 'sys.argv[2] += os.environ["RANK"] + ".safetensors"'
    for out, error, code in commanded(tmp_path, 2, str(tmp_path / "x"), own):
        assert (out, code) == ("False\n", 2)
        (line,) = [text for text in error.splitlines() if "Error" in text]
        said = "RankError: train: the ranks are to train different things: rank 1 has "
        assert line.startswith(said) and "Traceback" not in error
        assert "destroy_process_group" not in error


def test_the_command_ends_its_process_group(tmp_path: Path) -> None:
    """After an error, and after a run in the same process."""
    save_file({"x": torch.randn(200, 12)}, tmp_path / "x.safetensors")
    failing = 'print(main(["train", "none.safetensors", *sys.argv[3:]]), dist.is_initialized())'
    ((out, error, code),) = commanded(tmp_path, 1, str(tmp_path / "x.safetensors"), failing)
    assert error.startswith("FileNotFoundError: ") and out.startswith("2 False\n")
    assert out.splitlines()[-1] == "False" and code == 0, error


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    section = page.split("## Two processes on a CPU\n")[1].split("\n## ")[0]
    (script,) = re.findall(r"^```py\n(.*?)^```$", section, re.M | re.S)
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    (tmp_path / "two.py").write_text(script)
    programs = {"torchrun": ["-m", "torch.distributed.run"], "python": []}
    said = []
    for line in commands.splitlines():
        name, *rest = shlex.split(line)
        command = [sys.executable, *programs[name], *rest]
        env = os.environ | {"PYTHONPATH": str(Path(gsf.__file__).parents[1])}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    lines = re.findall(r"rank \d: .*?: (?:True|False)", said[0])  # which may come in one
    assert sorted(lines) == [
        f"rank {rank}: latents {500 * rank} to {500 * rank + 500}, as one process: True"
        for rank in range(2)
    ]
    assert said[1].startswith("run: ShardedSAE(latents 0:32 of 64") and len(said) == 3


def test_a_process_needs_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match="process 1 of this machine has no CUDA device, there are 1"
    ):
        mesh_of_torchrun(device_type="cuda")


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
