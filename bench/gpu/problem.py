"""Random problems with a wanted L0: weights, thresholds, and entries that no kernel of ours made.

Rows of W_enc have unit norm and x is standard normal, so that pre - b_enc is N(0, 1) for every
latent, and `threshold_j = b_enc_j + z(1 - rate_j)` makes latent j fire with probability `rate_j`.
Rates are equal, or log-normal (sigma = 2 nats) as those of trained dictionaries are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .context import Shape

SIGMA = 2.0
LARGEST_RATE = 0.25
"""No latent fires on more tokens than this: thresholds stay positive."""
BANDWIDTH = 0.02
"""Width of the straight-through window: a few per cent more entries."""
ENTRY_BANDWIDTH = 0.5
"""The same for drawn entries: bfloat16 has steps of 1/64 where thresholds lie."""
OFF = 0.03
"""Share of drawn entries that lie in the window below their threshold."""
CHUNK = 1 << 16
"""Latents per block of what is computed in float32: 1.4 GB at d = 5376."""


@dataclass(frozen=True)
class Problem:
    """A batch and the parameters of one sparse autoencoder, feature-major."""

    x: Tensor  # [n, d]
    W_enc: Tensor  # [d, F], W_enc.t() contiguous
    b_enc: Tensor  # [F] float32
    threshold: Tensor  # [F] float32
    W_dec: Tensor  # [F, d]; empty when not asked for
    b_dec: Tensor  # [d] float32


@dataclass(frozen=True)
class Entries:
    """CSR entries and their feature-major view."""

    offsets: Tensor  # [n + 1] int64
    indices: Tensor  # [nnz] int32
    values: Tensor  # [nnz] float32
    gate: Tensor  # [nnz] float32
    feature_offsets: Tensor  # [F + 1] int64
    permutation: Tensor  # [nnz] int64
    rows: Tensor  # [nnz] int64

    @property
    def nnz(self) -> int:
        return self.indices.shape[0]

    @property
    def touched(self) -> int:
        """Latents that fire at all: what a sparse pass must read once."""
        return int((self.feature_offsets.diff() > 0).sum())

    @property
    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offsets, self.indices, self.values

    @property
    def view(self) -> tuple[Tensor, Tensor]:
        return self.feature_offsets, self.permutation


def firing_rates(d_sae: int, l0: float, firing: str, seed: int = 0) -> Tensor:
    """`[d_sae]` float64 on the CPU: probability that each latent fires; they sum to `l0`."""
    if l0 >= LARGEST_RATE * d_sae:
        raise ValueError(f"L0 = {l0} of {d_sae} latents is denser than {LARGEST_RATE}")
    if firing == "uniform":
        return torch.full((d_sae,), l0 / d_sae, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    weights = (SIGMA * torch.randn(d_sae, generator=generator, dtype=torch.float64)).exp()
    low, high = 0.0, 1.0
    while float((high * weights).clamp(max=LARGEST_RATE).sum()) < l0:
        high *= 2
    for _ in range(60):  # bisection to the last bit
        middle = (low + high) / 2
        reached = float((middle * weights).clamp(max=LARGEST_RATE).sum()) >= l0
        low, high = (low, middle) if reached else (middle, high)
    return (high * weights).clamp(max=LARGEST_RATE)


def thresholds(rates: Tensor, b_enc: Tensor) -> Tensor:
    """`[d_sae]` float32: `b_enc + z(1 - rate)`, z the normal quantile."""
    return b_enc - torch.special.ndtri(rates).to(b_enc)


def unit_rows(rows: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random `[rows, d]` of unit rows; the only large temporary is one block."""
    found = torch.empty(rows, d, dtype=dtype, device=generator.device)
    for block in found.split(CHUNK):
        wide = torch.randn(block.shape, generator=generator, device=generator.device)
        block.copy_(torch.nn.functional.normalize(wide, dim=1))
    return found


def problem(
    shape: Shape,
    device: torch.device,
    *,
    decoder: bool = True,
    encoder: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:
    """A problem of this shape; without `decoder` or `encoder` that matrix has no rows."""
    g = torch.Generator(device).manual_seed(seed)
    b_enc = 0.1 * torch.randn(shape.d_sae, generator=g, device=device)
    rates = firing_rates(shape.d_sae, shape.l0, shape.firing)
    return Problem(
        x=torch.randn(shape.n, shape.d, generator=g, device=device).to(dtype),
        W_enc=unit_rows(shape.d_sae if encoder else 0, shape.d, dtype, g).t(),
        b_enc=b_enc,
        threshold=thresholds(rates.to(device), b_enc),
        W_dec=unit_rows(shape.d_sae if decoder else 0, shape.d, dtype, g),
        b_dec=0.1 * torch.randn(shape.d, generator=g, device=device),
    )


def entries(shape: Shape, threshold: Tensor, seed: int = 0) -> Entries:
    """Entries as an encoder would find them: every pair fires with the probability of its latent.

    Hits per latent are Poisson(-n log(1 - rate)) on random tokens, doubles dropped: exactly
    independent Bernoulli(rate) pairs. Values lie 0.1 to 1.1 above their threshold, or are off, 0.1
    below it: rounded to bfloat16 they stay on their side.
    """
    device, n, d_sae = threshold.device, shape.n, shape.d_sae
    g = torch.Generator(device).manual_seed(seed + 1)
    rates = firing_rates(d_sae, shape.l0, shape.firing).to(device)
    hits = torch.poisson((-n * torch.log1p(-rates)).float(), generator=g).long()
    latents = torch.repeat_interleave(torch.arange(d_sae, device=device), hits)
    tokens = torch.randint(n, latents.shape, generator=g, device=device)
    pairs = torch.unique(tokens * d_sae + latents)
    rows, latents = pairs // d_sae, pairs % d_sae
    above = torch.rand(pairs.shape, generator=g, device=device) + 0.1
    gate = (torch.rand(pairs.shape, generator=g, device=device) >= OFF).float()
    return Entries(
        offsets=_starts(rows, n),
        indices=latents.to(torch.int32),
        values=torch.where(gate > 0, threshold[latents] + above, 0),
        gate=gate,
        feature_offsets=_starts(latents, d_sae),
        permutation=latents.argsort(stable=True),
        rows=rows,
    )


def dense_pre(found: Entries, shape: Shape, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """`[n, d_sae]` pre-activations of which exactly the entries are active or in the window."""
    latents = found.indices.long()
    pre = (threshold - 1).to(dtype).expand(shape.n, -1).contiguous()
    values = torch.where(found.gate > 0, found.values, threshold[latents] - 0.1)
    pre[found.rows, latents] = values.to(dtype)
    return pre


def dense_acts(found: Entries, shape: Shape, dtype: torch.dtype) -> Tensor:
    """`[n, d_sae]` activations of the entries."""
    acts = torch.zeros(shape.n, shape.d_sae, dtype=dtype, device=found.values.device)
    acts[found.rows, found.indices.long()] = found.values.to(dtype)
    return acts


def _starts(ids: Tensor, count: int) -> Tensor:
    starts = torch.zeros(count + 1, dtype=torch.int64, device=ids.device)
    starts[1:] = torch.bincount(ids, minlength=count).cumsum(0)
    return starts
