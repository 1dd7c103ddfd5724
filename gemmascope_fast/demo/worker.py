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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .activations import read
from .dense import DenseSAE
from .recipe import Trainer
from .settings import Job

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


class SparseModel(nn.Module):
    """This library's SAE with the outputs the trainer wants; everything runs on stored entries."""

    def __init__(self, parameters: dict[str, Tensor], bandwidth: float) -> None:
        super().__init__()
        self.sae = make_sae(parameters, bandwidth)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x [n, d_in] -> (recon [n, d_in], l0 [n], counts [d_sae])`."""
        acts = self.sae.encode(x)
        return self.sae.decode(acts), acts.l0(), acts.counts()


def make_sae(parameters: dict[str, Tensor], bandwidth: float) -> Any:
    """Return a `gemmascope_fast.SAE` with copies of `parameters`."""
    import gemmascope_fast as gsf

    d_in, d_sae = parameters["W_enc"].shape
    sae = gsf.SAE(d_in, d_sae, activation=gsf.JumpReLU(bandwidth=bandwidth))
    with torch.no_grad():
        for name, value in parameters.items():
            getattr(sae, name).copy_(value)
    return sae


def folded(parameters: dict[str, Tensor], mean: Tensor, scale: float) -> dict[str, Tensor]:
    """Parameters that do to raw `x` what `parameters` do to `(x - mean) * scale`.

    pre / scale = x @ W_enc + (b_enc / scale - mean @ W_enc), hence threshold / scale, and
    recon / scale + mean = acts / scale @ W_dec + (b_dec / scale + mean).
    """
    W_enc = parameters["W_enc"]
    return {
        "W_enc": W_enc,
        "b_enc": parameters["b_enc"] / scale - mean @ W_enc,
        "threshold": parameters["threshold"] / scale,
        "W_dec": parameters["W_dec"],
        "b_dec": parameters["b_dec"] / scale + mean,
    }


class Run:
    """The state of one worker: data, trainer, and the memory it started from."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.job = Job.load(folder)
        self.settings = self.job.settings
        self.activations = read(Path(self.job.activations))
        self.mean, self.scale = self.activations.scaling()
        held_out = self.activations.held_out
        x = (self.activations.x - self.mean) * self.scale
        train, self.held_out = x[~held_out], x[held_out]
        del x
        torch.mm(train[:64], train[:64].t())  # threads and their stacks, before the baseline
        self.keeps_memory = keep_freed_memory()
        reset_peak()
        self.baseline = resident("VmRSS")
        parameters = load_file(folder / "initial.safetensors")
        parameters["W_enc"] = parameters.pop("W_enc_t").t()
        make = DenseSAE if kind == "dense" else SparseModel
        self.model = make(parameters, self.settings.bandwidth)
        del parameters
        self.parameters = {n.split(".")[-1]: p for n, p in self.model.named_parameters()}
        self.trainer = Trainer(self.model, self.parameters["W_dec"], train, self.settings)

    @torch.no_grad()
    def measure(self, x: Tensor) -> dict[str, Any]:
        """FVU (around the training mean, which is 0 here), L0 and firing counts on `x [n, d]`."""
        error, fired, total = 0.0, 0.0, 0.0
        counts = torch.zeros(self.settings.d_sae)
        for part in torch.split(x, self.settings.batch):
            recon, l0, part_counts = self.model(part)
            error += float((recon - part).square().sum(dtype=torch.float64))
            total += float(part.square().sum(dtype=torch.float64))
            fired += float(l0.sum(dtype=torch.float64))
            counts += part_counts
        return {"fvu": error / total, "l0": fired / x.shape[0], "counts": counts.int().tolist()}

    def train(self, steps: int) -> dict[str, Any]:
        """One turn: steps, the memory they took, and the held-out error after them."""
        done = [asdict(step) for step in self.trainer.train(steps)]
        peak = resident("VmHWM")
        known = peak is not None and self.baseline is not None
        held = self.measure(self.held_out)
        return {
            "steps": done,
            "held_out": {"step": self.trainer.step, "fvu": held["fvu"], "l0": held["l0"]},
            "peak_bytes": peak - self.baseline if known else None,  # type: ignore[operator]
        }

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Final numbers; the sparse run also saves its SAE and what it makes of held-out tokens."""
        held, train = self.measure(self.held_out), self.measure(self.trainer.x)
        counts = [a + b for a, b in zip(held["counts"], train["counts"], strict=True)]
        if self.kind == "sparse":
            values = {name: p.detach() for name, p in self.parameters.items()}
            sae = make_sae(folded(values, self.mean, self.scale), self.settings.bandwidth)
            sae.save_pretrained(
                self.folder.parent / "sae",
                l0=held["l0"],
                model_name=self.job.model_name,
                hf_hook_point_in=self.job.hook,
                hf_hook_point_out=self.job.hook,
            )
            acts = sae.encode(self.activations.x[self.activations.held_out])
            names = ("offsets", "indices", "values", "gate")
            save_file({n: getattr(acts, n) for n in names}, self.folder / "encoded.safetensors")
        return {"fvu": held["fvu"], "l0": held["l0"], "counts": counts}


def main(argv: list[str]) -> None:
    """Answer requests until the standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a library's print must not break the protocol
    run = Run(argv[0], Path(argv[1]))
    ready = {"threads": torch.get_num_threads(), "keeps_memory": run.keeps_memory}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = run.finish() if request["do"] == "finish" else run.train(request["steps"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
