"""Baselines, all firings of a dictionary over the corpus, and whether two runs agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import Progress
from .turns import History

FVU_TOLERANCE = 0.01  # relative; seeds differ by 1.6 %, rounding by 0.1 %
L0_TOLERANCE = 0.02


@dataclass(frozen=True)
class Firings:
    """Every active entry of a dictionary over a corpus, sorted by latent, then token.

    Attributes:
        offsets: `[d_sae + 1]` int64; latent j owns entries `offsets[j]:offsets[j + 1]`.
        tokens: `[m]` int64. values: `[m]` float32.
        n: tokens in the corpus.
    """

    offsets: Tensor
    tokens: Tensor
    values: Tensor
    n: int

    @property
    def counts(self) -> Tensor:
        """`[d_sae]`: tokens on which each latent fires."""
        return self.offsets.diff()

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """`(tokens, values)` of one latent."""
        span = slice(int(self.offsets[latent]), int(self.offsets[latent + 1]))
        return self.tokens[span], self.values[span]


@torch.no_grad()
def firings(sae: Any, x: Tensor, progress: Progress | None = None, rows: int = 4096) -> Firings:
    """Encode `x [n, d]` in blocks of `rows` and collect the active entries."""
    latents, tokens, values = [], [], []
    for start in range(0, x.shape[0], rows):
        acts = sae.encode(x[start : start + rows])
        lengths = acts.offsets.diff()
        active = acts.gate > 0
        owner = torch.repeat_interleave(torch.arange(start, start + len(lengths)), lengths)
        latents.append(acts.indices[active].long())
        tokens.append(owner[active])
        values.append(acts.values[active])
        if progress is not None:
            progress(min(start + rows, x.shape[0]), x.shape[0])
    latent, order = torch.cat(latents).sort(stable=True)
    offsets = torch.searchsorted(latent, torch.arange(sae.W_enc.shape[1] + 1))
    return Firings(offsets, torch.cat(tokens)[order], torch.cat(values)[order], x.shape[0])


def fvu(x: Tensor, recon: Tensor, mean: Tensor) -> float:
    """Fraction of variance unexplained: `sum |x - recon|^2 / sum |x - mean|^2`."""
    error = (x - recon).square().sum(dtype=torch.float64)
    return float(error / (x - mean).square().sum(dtype=torch.float64))


def pca_fvu(train: Tensor, held_out: Tensor, rank: int) -> float:
    """FVU on `held_out [m, d]` of the best rank-`rank` projection of `train [n, d]`."""
    mean = train.mean(0)
    centred = train - mean
    _, vectors = torch.linalg.eigh(centred.t() @ centred)  # ascending eigenvalues
    top = vectors[:, vectors.shape[1] - rank :]
    return fvu(held_out, (held_out - mean) @ top @ top.t() + mean, mean)


def token_mean_fvu(
    train: Tensor, train_tokens: Tensor, held_out: Tensor, held_out_tokens: Tensor
) -> float:
    """FVU of predicting, from the token id alone, that id's mean activation in `train`.

    An id that `train` lacks is predicted by the overall mean.
    """
    mean = train.mean(0)
    size = int(max(train_tokens.max(), held_out_tokens.max())) + 1
    counts = torch.bincount(train_tokens, minlength=size)[:, None]
    sums = train.new_zeros(size, train.shape[1]).index_add_(0, train_tokens, train)
    table = torch.where(counts > 0, sums / counts.clamp(min=1), mean)
    return fvu(held_out, table[held_out_tokens], mean)


@dataclass(frozen=True)
class Check:
    """One claim of the demo: what was compared, and whether it holds."""

    text: str
    holds: bool


def checks(dense: History, sparse: History, reload_identical: bool) -> list[Check]:
    """Return the claims a full run must satisfy."""
    fvu_gap = sparse.final["fvu"] / dense.final["fvu"] - 1
    l0_gap = sparse.final["l0"] / dense.final["l0"] - 1
    speedup = dense.step_seconds / sparse.step_seconds
    found = [
        Check(
            f"held-out FVU differs by {fvu_gap:+.2%} (at most {FVU_TOLERANCE:.0%})",
            abs(fvu_gap) <= FVU_TOLERANCE,
        ),
        Check(
            f"held-out L0 differs by {l0_gap:+.2%} (at most {L0_TOLERANCE:.0%})",
            abs(l0_gap) <= L0_TOLERANCE,
        ),
        Check(f"a training step is {speedup:.2f}x as fast as dense PyTorch's", speedup > 1),
        Check("the saved dictionary, reloaded, encodes bit-identically", reload_identical),
    ]
    if dense.peak_bytes and sparse.peak_bytes:
        ratio = sparse.peak_bytes / dense.peak_bytes
        found.insert(3, Check(f"training needs {ratio:.2f}x dense PyTorch's memory", ratio < 1))
    return found
