"""Peak resident memory of a training run in a process of its own; prints JSON.

python memory_of_a_run.py '{"d_in": 512, "d_sae": 16384, ...}'

With "out", a folder, a second call reads the checkpoint that the first has left.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path

import torch

import gemmascope_fast as gsf


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def main(options: dict) -> dict:
    d_in, tokens = options.pop("d_in"), options.pop("tokens", 4096)
    preset = gsf.Preset(calibration_tokens=1024, **options.pop("preset", {}))
    options["dtype"] = getattr(torch, options.get("dtype", "float32"))
    if "autocast" in options:
        options["autocast"] = getattr(torch, options["autocast"])
    generator = torch.Generator().manual_seed(0)
    layers = options.pop("layers", None)
    rows = (tokens,) if layers is None else (tokens, layers)
    x = torch.randn(*rows, d_in, generator=generator) * torch.linspace(3, 0.1, d_in)
    d_out = options.pop("d_out", None)
    y = None if d_out is None else torch.randn(*rows, d_out, generator=generator)
    source = x if y is None else (x, y)
    small = {"d_sae": 64, "batch_size": 64, "steps": 2, "progress": False}
    names = ("activation", "fused", "moments", "dtype", "kind", "affine", "autocast")
    kept = {k: v for k, v in options.items() if k in names}
    sparsity = {"k": 4} if "k" in options else {"target_l0": 4}
    gsf.train(source, **small, **kept, **sparsity)  # threads, code, their first buffers
    resume = (Path(options.get("out", "")) / "checkpoints").exists()
    ctypes.CDLL(None).malloc_trim(0)  # what the small run left must not be used again
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    gsf.train(source, progress=False, preset=preset, **options)
    measured = resident("VmHWM") - before
    for name in ("steps", "out"):
        options.pop(name, None)
    sizes = {"d_in": d_in, "d_out": d_out, "layers": layers, "resume": resume}
    found = gsf.estimate_memory(**sizes, source_bytes=16 * tokens, preset=preset, **options)
    return {"measured": measured, "estimated": found.peak_bytes, "parts": str(found)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
