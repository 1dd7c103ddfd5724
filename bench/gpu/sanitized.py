"""What compute-sanitizer watches: every op of the table on small inputs, once per dtype.

    compute-sanitizer --tool memcheck python bench/gpu/sanitized.py cuda

Inputs are made on the CPU by the tests' samples; on the device nothing runs but copies and the ops.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import samples  # noqa: E402
import torch  # noqa: E402

from gemmascope_fast import ops  # noqa: E402


def main(device: str) -> int:
    for dtype in (torch.float32, torch.bfloat16):
        found = samples.samples(samples.problem(x_dtype=dtype, w_dtype=dtype))
        for name, calls in found.items():
            for args in calls:
                moved = [moved_to(a, device) for a in args]
                getattr(torch.ops.gemmascope_fast, name).default(*moved)
            if device == "cuda":
                torch.cuda.synchronize()
            served = ops.implementation(name, torch.device(device).type)
            print(f"done: {name} {dtype} ({served}), {len(calls)} calls", flush=True)
    return 0


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
