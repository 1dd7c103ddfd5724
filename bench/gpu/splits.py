"""Contender of the backward without dense products for the latents that fire most."""

from __future__ import annotations

import os

import torch

from gemmascope_fast import ops

from .timing import Call

UNSPLIT = "ours, without the split"
CHOICE = "GEMMASCOPE_FAST_SPLIT"


def unsplit(device: torch.device, call: Call) -> Call | str:
    """The same call with a pass over all latents; a reason where there is no split."""
    if device.type != "cuda" or ops.implementation("sae_backward", "cuda") != "native":
        return "kernels of a GPU"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "kernels of compute capability 9.0"

    def run() -> object:
        os.environ[CHOICE] = "never"
        try:
            return call()
        finally:
            del os.environ[CHOICE]

    return run
