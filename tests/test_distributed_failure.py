"""A rank that fails, dies or stands still: what the others say, and what is left on the disk."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import PRELOADED
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

import gemmascope_fast as gsf
from gemmascope_fast.distributed import failure, saving
from gemmascope_fast.distributed.failure import RankError

FAST = gsf.Preset(lr=3e-3, bandwidth=0.1, statistics_tokens=200)
TIMEOUT = 4.0
"""Seconds after which a collective gives up on a rank that stands still."""
WORLD = 4

Event = Callable[[], None]


def data() -> Tensor:
    return torch.randn(300, 12, generator=torch.Generator().manual_seed(2)) + 1


class Eventful(gsf.sources.TensorSource):
    """Something happens on one rank when it asks for the second block, or before the first."""

    def __init__(self, event: Event | None) -> None:
        super().__init__(data())
        self.event = event

    def identity(self) -> dict[str, Any]:
        if self.event is lost:
            self.event()
        return super().identity()

    def part(self, seed: int, index: int, rank: int, ranks: int) -> Any:
        if index == 1 and self.event is not None:
            self.event()
        return super().part(seed, index, rank, ranks)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def refused() -> None:
    raise OSError("the disk is on fire")


def lost() -> None:
    raise FileNotFoundError("no such folder here")


def killed_in_a_save() -> None:
    import torch.distributed.checkpoint as dcp

    dcp.HuggingFaceStorageWriter.write_data = lambda *args: killed()  # type: ignore[method-assign]


def work(rank: int, folder: str, event: Event | None, on: int, pipe: Any) -> None:
    """Train; send the loss of every step, or the error."""
    torch.set_num_threads(1)
    failure.BEAT = 0.3
    dist.init_process_group(
        *("gloo", f"file://{folder}/store-{os.getppid()}-{on}-{getattr(event, '__name__', '')}"),
        **{"rank": rank, "world_size": WORLD, "timeout": timedelta(seconds=60)},
    )
    _set_pg_timeout(timedelta(seconds=TIMEOUT))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    source = Eventful(event if rank == on else None)
    options: dict[str, Any] = {"d_sae": 24, "target_l0": 4, "steps": 12, "batch_size": 40}
    options |= {"preset": FAST, "checkpoint_every": 4, "progress": False, "out": f"{folder}/run"}
    seen: list[float] = []
    try:
        gsf.train(source, mesh=mesh, on_metrics=lambda m: seen.append(m["loss"]), **options)
    except Exception as error:
        pipe.send((type(error).__name__, str(error), getattr(error, "ranks", None)))
    else:
        pipe.send(("done", seen, None))
        dist.destroy_process_group()


def outcomes(folder: Path, event: Event | None, on: int = 0) -> tuple[list[Any], float]:
    """What each rank sent, None of those that could not; and the seconds until the last did."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
    ranks = [
        context.Process(target=work, args=(rank, str(folder), event, on, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    began, found = time.monotonic(), []
    for rank, (mine, theirs) in enumerate(pipes):
        theirs.close()
        said = None
        if not (event in (killed, stopped, killed_in_a_save) and rank == on) and mine.poll(60):
            said = mine.recv()
        found.append(said)
    took = time.monotonic() - began
    for process in ranks:
        process.kill()
        process.join()
    return found, took


def checkpoints(folder: Path) -> list[int]:
    """Steps of those that are whole."""
    return [
        saving.load_record(path)["step"] for _, path in saving.found(folder / "run/checkpoints")
    ]


@pytest.mark.parametrize(
    "event, on, text",
    [
        (killed, 2, r"rank 2 of 4 died or stands still"),
        (stopped, 1, r"rank 1 of 4 died or stands still"),
        (refused, 3, r"rank 3 failed: OSError: the disk is on fire"),
        (killed, 0, r"rank 0 of 4 died or stands still"),
    ],
    ids=["killed", "stopped", "failed", "killed first"],
)
def test_every_other_rank_names_the_one_that_is_lost(
    tmp_path: Path, event: Event, on: int, text: str
) -> None:
    found, took = outcomes(tmp_path, event, on)
    own = found.pop(on)
    assert own == (("OSError", "the disk is on fire", None) if event is refused else None)
    for kind, message, ranks in found:
        assert (kind, ranks) == (RankError.__name__, [on]) and text in message.replace("\\", "")
    assert checkpoints(tmp_path) == [4]  # 300 rows in batches of 40: the second block is at step 8
    assert took < TIMEOUT + 30  # the machine may be busy; alone it takes TIMEOUT + PATIENCE


def test_a_rank_that_fails_before_the_first_step_is_named_too(tmp_path: Path) -> None:
    found, _ = outcomes(tmp_path, lost, 1)
    assert found.pop(1) == ("FileNotFoundError", "no such folder here", None)
    said = "train: rank 1 failed: FileNotFoundError: no such folder here"
    assert found == [(RankError.__name__, said, [1])] * 3


def test_the_thread_of_a_run_has_ended_when_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in a call of the store when the process exits aborts it."""
    calling = threading.Event()

    class Slow(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            calling.set()
            time.sleep(4 * failure.BEAT)

    monkeypatch.setattr(failure, "BEAT", 0.05)
    monkeypatch.setattr(failure, "_get_default_store", Slow)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    with failure.guarded("train"):
        assert calling.wait(60)
    assert "gemmascope_fast" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("error", [None, ValueError, RankError])
def test_a_run_ends_after_its_process_group_has_let_go(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    """gloo's threads need the interpreter for that: where it is ending, they abort the process."""
    slept: list[float] = []
    monkeypatch.setattr(failure, "_get_default_store", dist.HashStore)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    raised = None if error is None else error("train", []) if error is RankError else error()
    with pytest.raises(error) if error else nullcontext():
        with failure.guarded("train", alike=(RankError,)):
            monkeypatch.setattr(time, "sleep", slept.append)
            if raised:
                raise raised
    assert slept and slept[-1] == failure.SETTLE > 0


def test_a_rank_that_dies_in_a_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    found, _ = outcomes(tmp_path, killed_in_a_save, 1)
    assert [said and said[2] for said in found] == [[1], None, [1], [1]]
    assert checkpoints(tmp_path) == [4]
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in folder.glob(".*")] == [".step-000000008.tmp"]
    resumed, _ = outcomes(tmp_path, None)
    assert [said[0] for said in resumed] == ["done"] * 4 and len(resumed[0][1]) == 8
    assert checkpoints(tmp_path) == [8, 12] and not list(folder.glob(".*"))
    shutil.copytree(folder / "step-000000008", folder / "step-000000004")
    resumed, _ = outcomes(tmp_path, None, 1)  # as if killed before the last save removed it
    assert [said[0] for said in resumed] == ["done"] * 4 and not resumed[0][1]
    assert not (folder / "step-000000004").exists() and checkpoints(tmp_path) == [8, 12]
