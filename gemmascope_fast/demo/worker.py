"""One training run in a process of its own, so that its speed and its memory are its own.

    python -m gemmascope_fast.demo.worker {dense,sparse} FOLDER

Speaks JSON, one object a line: `{"do": "train", "steps": 25}` and `{"do": "finish"}` on the
standard input, answers on the standard output. FOLDER holds `job.json` and `initial.safetensors`.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..training.calibration import Affine
from ..training.settings import Settings as Run
from ..training.sources import Stream, TensorSource
from ..training.trainer import Trainer
from .activations import read
from .dense import DenseSAE
from .recipe import DenseTrainer, Step, run
from .settings import Job, Settings

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks, so that a 16 MiB matrix is not page-faulted in at every use.

    Without it dense PyTorch spends a good part of a step in the kernel. False where there is no
    glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what was freed so far must not hide in the baseline
        # 32 MiB, glibc's upper limit for this threshold; a matrix [512, 8192] is 16 MiB.
        return bool(libc.mallopt(M_MMAP_THRESHOLD, 32 << 20) & libc.mallopt(M_TRIM_THRESHOLD, -1))
    except (OSError, AttributeError):
        return False


def resident(field: str) -> int | None:
    """Bytes of this process's `VmRSS` (now) or `VmHWM` (peak); None where Linux's /proc is not."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else None


def reset_peak() -> None:
    """Start `VmHWM` anew from `VmRSS`, where the kernel lets a process do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


class Sparse:
    """The run of this library: the trainer that `gsf.train` uses."""

    def __init__(self, source: TensorSource, settings: Run) -> None:
        self.trainer = Trainer(source, settings, torch.device("cpu"))

    def step(self) -> Step:
        """One step, its time everything from gathering the batch to the renormalised decoder."""
        started = time.perf_counter()
        found = self.trainer.step()
        loss, fvu, l0 = (float(found[name]) for name in ("loss", "fvu", "l0"))
        return Step(loss, fvu, l0, time.perf_counter() - started)

    def scaled(self, x: Tensor) -> Tensor:
        """Raw activations in the units of the run."""
        scaled: Tensor = self.trainer.maps[0](x)
        return scaled

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(recon [n, d], l0 [n], counts [d_sae])` of scaled x."""
        module = self.trainer.module
        acts = module.encode(x)
        return module.decode(acts, dtype=x.dtype), acts.l0(), acts.counts()


class Dense:
    """The comparison in plain PyTorch, from the same weights (`initial`) on the same batches."""

    def __init__(
        self, source: TensorSource, initial: Mapping[str, Tensor], settings: Settings
    ) -> None:
        start = dict(initial)
        scale = float(start.pop("scale"))
        self.scaled = Affine(start.pop("mean"), scale)
        start["W_enc"] = start.pop("W_enc_t").t()
        self.outputs = model = DenseSAE(start, settings.bandwidth)
        stream = Stream(source, settings.seed)
        self.step = DenseTrainer(model, model.W_dec, stream, self.scaled, settings).step


def warm_up(x: Tensor, settings: Settings) -> None:
    """Take a small step of either kind: threads, and what torch imports at first use."""
    small = replace(settings, d_sae=64, batch=32, steps=2, target_l0=4.0, initial_l0=8.0)
    Trainer(TensorSource(x), run(x.shape[1], small), torch.device("cpu")).step()
    weight = torch.nn.Parameter(x.new_ones(8))
    weight.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.Adam([weight], fused=True).step()


@torch.no_grad()
def measure(run: Sparse | Dense, x: Tensor, batch: int) -> dict[str, Any]:
    """FVU (around the training mean), L0 and firing counts on raw `x [n, d]`."""
    error, fired, total, counts = 0.0, 0.0, 0.0, torch.zeros(())
    for rows in torch.split(x, batch):
        part = run.scaled(rows)
        recon, l0, part_counts = run.outputs(part)
        error += float((recon - part).square().sum(dtype=torch.float64))
        total += float(part.square().sum(dtype=torch.float64))
        fired += float(l0.sum(dtype=torch.float64))
        counts = counts + part_counts
    return {"fvu": error / total, "l0": fired / x.shape[0], "counts": counts.int().tolist()}


class Worker:
    """The state of one process: data, run, and the memory it started from."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.job = Job.load(folder)
        self.settings = self.job.settings
        held = read(Path(self.job.activations))
        self.train_x, self.held_out = held.x[~held.held_out], held.x[held.held_out]
        del held
        self.taken = 0
        warm_up(self.train_x[:256], self.settings)
        self.keeps_memory = keep_freed_memory()
        self.baseline = resident("VmRSS")
        source = TensorSource(self.train_x)
        self.run: Sparse | Dense
        if kind == "sparse":
            self.run = Sparse(source, run(source.d_in, self.settings))
        else:
            self.run = Dense(source, load_file(folder / "initial.safetensors"), self.settings)
        reset_peak()  # calibration is over; what it left counts

    def train(self, steps: int) -> dict[str, Any]:
        """One turn: steps, the memory they took, and the held-out error after them."""
        steps = min(steps, self.settings.steps - self.taken)
        done = [asdict(self.run.step()) for _ in range(steps)]
        self.taken += steps
        peak = resident("VmHWM")
        known = peak is not None and self.baseline is not None
        held = measure(self.run, self.held_out, self.settings.batch)
        return {
            "steps": done,
            "held_out": {"step": self.taken, "fvu": held["fvu"], "l0": held["l0"]},
            "peak_bytes": peak - self.baseline if known else None,  # type: ignore[operator]
        }

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Final numbers; the sparse run also saves its SAE and what it makes of held-out tokens."""
        held, train = (
            measure(self.run, x, self.settings.batch) for x in (self.held_out, self.train_x)
        )
        counts = [a + b for a, b in zip(held["counts"], train["counts"], strict=True)]
        if isinstance(self.run, Sparse):
            sae = self.run.trainer.exported()
            sae.save_pretrained(
                self.folder.parent / "sae",
                l0=held["l0"],
                model_name=self.job.model_name,
                hf_hook_point_in=self.job.hook,
                hf_hook_point_out=self.job.hook,
            )
            acts = sae.encode(self.held_out)
            names = ("offsets", "indices", "values", "gate")
            save_file({n: getattr(acts, n) for n in names}, self.folder / "encoded.safetensors")
        return {"fvu": held["fvu"], "l0": held["l0"], "counts": counts}


def main(argv: list[str]) -> None:
    """Answer requests until the standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a library's print must not break the protocol
    worker = Worker(argv[0], Path(argv[1]))
    ready = {"threads": torch.get_num_threads(), "keeps_memory": worker.keeps_memory}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = worker.finish() if request["do"] == "finish" else worker.train(request["steps"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
