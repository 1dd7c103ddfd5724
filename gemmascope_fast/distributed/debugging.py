"""Debug mode: the ranks of "tp" compare what has to be equal on all of them.

On with `GEMMASCOPE_FAST_DISTRIBUTED_DEBUG=1`, or `shard(..., debug=True)`. One all-gather of 16
bytes per check, and the error names the ranks that differ, on every rank.
"""

from __future__ import annotations

import os
import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from .communication import all_gather
from .layout import Layout

VARIABLE = "GEMMASCOPE_FAST_DISTRIBUTED_DEBUG"


def debug_mode() -> bool:
    """Whether the environment asks for it.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def check_agreement(op: str, name: str, t: Tensor, layout: Layout) -> None:
    """`t` has the same shape and the same bytes on all ranks of "tp".

    Raises:
        RuntimeError: it has not.
    """
    found = torch.tensor([fingerprint(t), t.numel()], dtype=torch.int64, device=t.device)
    every = all_gather(found, layout.tp_group)
    wrong = (every != every[0]).any(1).nonzero()[:, 0].tolist()
    if wrong:
        ranks = dist.get_process_group_ranks(layout.tp_group)
        raise RuntimeError(
            f"{op}: {name} must be equal on all ranks of tp, and differs from rank {ranks[0]}'s on "
            f"rank {', '.join(str(ranks[at]) for at in wrong)}"
        )


def fingerprint(t: Tensor) -> int:
    """CRC-32 of the elements' bytes in order, with shape and dtype."""
    data = t.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    start = zlib.crc32(f"{tuple(t.shape)} {t.dtype}".encode())
    return zlib.crc32(data.numpy().data, start)
