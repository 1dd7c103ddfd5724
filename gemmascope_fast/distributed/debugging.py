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


def check_agreement(
    op: str, name: str, t: Tensor, layout: Layout, everywhere: bool = False
) -> None:
    """`t` has the same shape and the same bytes on all ranks of "tp".

    With `everywhere` the ranks of "dp" hear of it too: for calls that they make together.

    Raises:
        RuntimeError: it has not.
    """
    found = torch.tensor([fingerprint(t), t.numel()], dtype=torch.int64, device=t.device)
    every = all_gather(all_gather(found, layout.tp_group), layout.dp_group if everywhere else None)
    ranks = layout.mesh.mesh.reshape(-1, layout.tp).to(t.device)
    if not everywhere:
        ranks = ranks[(ranks == dist.get_rank()).any(1)]
    differs = (every != every[:, :1]).any(2)
    wrong = [f"rank {int(rank)}" for rank in ranks[differs]]
    if wrong:
        usual = [f"rank {int(rank)}" for rank in ranks[differs.any(1), 0]]
        raise RuntimeError(
            f"{op}: {name} must be equal on all ranks of tp, and differs from that of "
            f"{', '.join(usual)} on {', '.join(wrong)}"
        )


def fingerprint(t: Tensor) -> int:
    """CRC-32 of the elements' bytes in order, with shape and dtype."""
    data = t.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    start = zlib.crc32(f"{tuple(t.shape)} {t.dtype}".encode())
    return zlib.crc32(data.numpy().data, start)
