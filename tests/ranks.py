"""Processes for tests of `torch.distributed`: started once, sent functions, watched.

    results = ranks.run(3, function, *args)      # [function(*args) of rank 0, 1, 2]

Every number of ranks has processes of its own, whose group lives as long as they do: DTensor
caches groups, so that a process cannot have one default group after another. An exception on a
rank, or a rank that does not answer in time, fails the test with the traceback of every rank, and
the processes are killed; the next run starts new ones. They come from a fork server that has
imported torch, because the import alone takes seconds.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

POLL = 0.05
PRELOADED = ["torch.distributed.tensor", "torch.distributed.checkpoint", "gemmascope_fast"]
GRACE = 5.0
"""Seconds that the other ranks get to end by themselves once one has failed."""

device = "cpu"
"""Of this process's tensors: in a rank what its `Ranks` was given, CUDA's current device say."""


class Ranks:
    """Pools of processes, one for each number of ranks.

    Args:
        timeout: seconds that a run may take; time during which this process stood still is free.
        backend: "gloo", or "nccl" with a device for each rank.
        device: "cpu" or "cuda".
    """

    def __init__(self, timeout: float = 60.0, backend: str = "gloo", device: str = "cpu") -> None:
        self.timeout, self.place = timeout, (backend, device)
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.started = 0
        self.pools: dict[int, list[_Worker]] = {}

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, **options: Any
    ) -> list[Any]:
        """What `function(*args, **options)` returns on each of `world` ranks.

        Raises:
            AssertionError: a rank raised, died, or did not answer in time.
        """
        if world not in self.pools:
            self.started += 1
            store = self.folder / f"store{self.started}"
            self.pools[world] = [_Worker(store, rank, world, *self.place) for rank in range(world)]
        workers = self.pools[world]
        for worker in workers:
            worker.send((function, args, options))
        answers = self._answers(workers)
        if all(answer is not None and answer[0] for answer in answers):
            return [answer[1] for answer in answers if answer is not None]
        texts = [
            f"rank {rank}: {worker.where() if answer is None else answer[1]}"
            for rank, (worker, answer) in enumerate(zip(workers, answers, strict=True))
            if answer is None or not answer[0]
        ]
        self._kill(self.pools.pop(world))
        raise AssertionError("\n\n".join(texts))

    def _answers(self, workers: list[_Worker]) -> list[tuple[bool, Any] | None]:
        """`(whether it worked, result or traceback)` of each; None of those that do not answer."""
        answers: list[tuple[bool, Any] | None] = [None] * len(workers)
        left = self.timeout
        while left > 0 and None in answers:
            for at, worker in enumerate(workers):
                if answers[at] is None and worker.ready():
                    answers[at] = worker.receive()
                    if not answers[at][0]:
                        left = min(left, GRACE)
            time.sleep(POLL / 10 if left > self.timeout - 1 else POLL)
            left -= POLL / 10 if left > self.timeout - 1 else POLL
        return answers

    def close(self) -> None:
        """End all processes."""
        while self.pools:
            self._kill(self.pools.popitem()[1])

    def _kill(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, store: Path, rank: int, world: int, *place: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.stacks = store.with_name(f"{store.name}-stacks{rank}")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, str(store), rank, world, str(self.stacks), *place)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def send(self, task: Any) -> None:
        self.pipe.send_bytes(pickle.dumps(task))

    def ready(self) -> bool:
        return self.pipe.poll() or not self.process.is_alive()

    def receive(self) -> tuple[bool, Any]:
        try:
            worked, found = pickle.loads(self.pipe.recv_bytes())
            return worked, found
        except EOFError:
            self.process.join(1)
            return False, f"died with exit code {self.process.exitcode}"

    def where(self) -> str:
        """The stacks of a process that does not answer."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        return "no answer\n" + self.stacks.read_text()


def _serve(
    pipe: Connection, store: str, rank: int, world: int, stacks: str, backend: str, kind: str
) -> None:
    """Run what comes through the pipe until it is closed."""
    import torch
    import torch.distributed as dist

    global device
    device = kind
    log = open(stacks, "w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=False)
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=10),
    )
    while True:
        try:
            function, args, options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = True, function(*args, **options)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
