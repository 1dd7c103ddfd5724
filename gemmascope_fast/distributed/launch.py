"""The mesh of the processes that `torchrun` started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..arguments import check_count, check_number

TIMEOUT = 600.0
"""Seconds that a rank may stand still."""


def mesh_of_torchrun(
    tp: int | None = None, *, timeout: float = TIMEOUT, device_type: str | None = None
) -> DeviceMesh | None:
    """Join the process group and cut its ranks into ("dp", "tp"); None without `torchrun`.

    Args:
        tp: ranks that share the latents, neighbours of each other; default all.
        timeout: seconds after which a collective gives up on a rank that stands still.
        device_type: "cuda", one device per process of a machine, or "cpu"; default CUDA where there
            is one.

    Raises:
        TypeError: tp or timeout is no number.
        ValueError: tp does not divide the number of ranks, there is no `torchrun` to share with, a
            machine has more processes than devices, or timeout or device_type is out of range.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        if tp is not None:
            raise ValueError("train: tp needs several processes: start them with torchrun")
        return None
    world = int(os.environ["WORLD_SIZE"])
    tp = world if tp is None else tp
    if check_count("train", "tp", tp) < 1 or world % tp != 0:
        raise ValueError(f"train: tp must divide the number of ranks, {world}, got {tp}")
    limit = timedelta(seconds=check_number("train", "timeout", timeout, positive=True))
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"train: device_type must be cuda or cpu, got {kind!r}")
    if kind == "cuda":
        _take_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=limit)
    return init_device_mesh(kind, (world // tp, tp), mesh_dim_names=("dp", "tp"))


def _take_device(at: int) -> None:
    """Make a device of its own the current one: NCCL and object collectives use that."""
    devices = torch.cuda.device_count()
    if at >= devices:
        raise ValueError(
            f"train: process {at} of this machine has no CUDA device, there are {devices}: start "
            "one process per device, or choose the CPU"
        )
    torch.cuda.set_device(at)
