"""L0 and reconstruction of a module on a file of activations, a block of tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefacts.streaming import StreamedSAE
from ..modules import SAE, Transcoder
from .tokens import TokenFile, has, width_of

BLOCK = 256  # tokens at a time


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        tokens: how many.
        l0: mean active latents per token, of each layer.
        silent: latents of each layer that were active on no token.
        fvu: squared error over the squared deviation of the target from its mean, of each output
            layer; None where the file has no target.
    """

    tokens: int
    l0: list[float]
    silent: list[int]
    fvu: list[float] | None


@torch.no_grad()
def measure(module: Any, kind: str, path: Path) -> Measured:
    """Encode and decode the x of a file.

    Args:
        module: loaded or streamed.
        kind: type of the artefact. A transcoder's or CLT's target is the file's `target`.
        path: safetensors file with x, and target.

    Raises:
        ValueError: the file is damaged, has no token, or its tensors are of another shape.
    """
    x = TokenFile(path, "x", width_of(module))
    maps = kind in ("transcoder", "clt")
    target = TokenFile(path, "target", _target_width(module)) if maps and has(path, "target") else x
    if x.n == 0 or x.batch != target.batch:
        raise ValueError(f"{path}: x and target must have the same tokens, at least one")
    found = target if not maps or target is not x else None
    sums, error = Deviation(), torch.zeros((), dtype=torch.float64, device="cpu")
    counts: list[Tensor] = []
    for start in range(0, x.n, BLOCK):
        stop = min(start + BLOCK, x.n)
        block = x.rows(start, stop).to(module.b_dec.device)
        acts = module.encode(block)
        own = [a.counts().long().cpu() for a in (acts if isinstance(acts, list) else [acts])]
        counts = [a + b for a, b in zip(counts, own, strict=True)] if counts else own
        if found is not None:
            goal = found.rows(start, stop).double()
            recon = _decoded(module, acts, block).double().cpu()
            error = error + (recon - goal).square().sum((0, -1))
            sums.add(goal)
    fvu = None if found is None else (error / sums.squares).reshape(-1).tolist()
    l0 = [int(c.sum()) / x.n for c in counts]
    return Measured(x.n, l0, [int((c == 0).sum()) for c in counts], fvu)


class Deviation:
    """Squared deviation from the mean of what is added, in one pass (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, *torch.zeros(2, device="cpu")

    def add(self, block: Tensor) -> None:
        """Add tokens `[m, *, d]`."""
        count, mean = block.shape[0], block.mean(0)
        total, delta = self.n + count, mean - self.mean
        own = (block - mean).square().sum((0, -1))
        self.squares = self.squares + own + delta.square().sum(-1) * (self.n * count / total)
        self.n, self.mean = total, self.mean + delta * (count / total)


def _target_width(module: Any) -> tuple[int, ...]:
    width = width_of(module)
    return width if len(width) == 2 else (module.d_out,)


def _decoded(module: Any, acts: Any, x: Tensor) -> Tensor:
    needs_x = isinstance(module, (Transcoder, StreamedSAE)) or not isinstance(module, SAE)
    skip = getattr(module, "W_skip", None) is not None
    inputs = (acts, x) if needs_x and skip else (acts,)
    recon: Tensor = module.decode(*inputs, dtype=module.b_dec.dtype)
    return recon
