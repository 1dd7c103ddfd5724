"""What compute-sanitizer watches: every op of the table, and encoders on codes, on small inputs.

    compute-sanitizer --tool memcheck python bench/gpu/sanitized.py cuda

Inputs are made on the CPU by the tests' samples; on the device nothing runs but copies and the ops.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import samples  # noqa: E402
import torch  # noqa: E402

import gemmascope_fast as gsf  # noqa: E402
from gemmascope_fast import ops  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
SMALL = (13, 23, 37, 19)
LARGE = (130, 128, 600, 136)
"""n, d_in, d_sae, d_out: rows that nothing divides, and what Hopper's tiles take: two rows of them,
three columns, of which the last of each are in part outside."""
SPARSER = 1.5
"""Added to the thresholds of the large problem: a few per cent of its latents are active."""


def main(device: str) -> int:
    for size in (SMALL, LARGE):
        for dtype in DTYPES:
            p = samples.problem(*size, x_dtype=dtype, w_dtype=dtype)
            if size == LARGE:
                p = replace(p, threshold=p.threshold + SPARSER)
            table(p, device)
            screened(p, device)
    return 0


def table(p: samples.Problem, device: str) -> None:
    """Every op of the table."""
    for name, calls in samples.samples(p).items():
        for args in calls:
            moved = [moved_to(a, device) for a in args]
            getattr(torch.ops.gemmascope_fast, name).default(*moved)
        served = ops.implementation(name, torch.device(device).type)
        told(p, device, f"{name} ({served}), {len(calls)} calls")


def screened(p: samples.Problem, device: str) -> None:
    """The encoders on codes of their weights, where the device makes any."""
    x, W_enc, b_enc, threshold = (moved_to(t, device) for t in (*p.encoder, p.threshold))
    packed = gsf.pack(W_enc, precision="screened")
    gsf.jumprelu_encode(x, packed, b_enc, threshold)
    gsf.topk_encode(x, packed, b_enc, 8)
    gsf.batchtopk_encode(x, packed, b_enc, 8.0)
    told(p, device, f"encoders on codes ({gsf.explain().path})")


def told(p: samples.Problem, device: str, what: str) -> None:
    """Print that this is done once it is."""
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"done: {p.x.shape[0]} tokens, {p.x.dtype}, {what}", flush=True)


def moved_to(value: Any, device: str) -> Any:
    """Tensors, alone or in a list, on the device, in the strides they had."""
    if isinstance(value, list):
        return [moved_to(v, device) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
