"""Inputs of the CPU benchmarks: encoders and their x, sparse activations, a JumpReLU autoencoder.

Everything is drawn from a fixed seed. Thresholds are quantiles of sampled pre-activations, which
gives the wanted mean number of active latents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import firing_trace
import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import SparseActs

L0 = 64
BANDWIDTH = 0.02
"""Width of the straight-through window; 1 in 13 entries of `autoencoder` lies in it."""
MARGIN = 2e-5
"""Distance from a gate or the edge of its window; float32 sums in two orders differ by 2e-6."""
OUTLIERS = 8
"""Massive input dimensions, 60 times the rest, as in Gemma's residual stream."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRING = ("uniform", "log-normal", "trace")


@dataclass(frozen=True)
class Size:
    """n tokens of width d, d_sae latents."""

    n: int
    d: int
    d_sae: int

    def __str__(self) -> str:
        return f"n{self.n}-{self.d}x{self.d_sae}"

    def shape(self, inputs: str, l0: float = L0) -> dict[str, object]:
        named = {"n": self.n, "d": self.d, "d_sae": self.d_sae}
        return {**named, "l0": l0, "inputs": inputs}


# ---- encoders


@functools.lru_cache(maxsize=1)
def encoder_rows(d: int, d_sae: int) -> Tensor:
    """`[d_sae, d]` rows of about unit norm; the last ones are kept for the next case."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(d_sae, d, generator=generator).mul_(d**-0.5)


def encoder_inputs(size: Size, inputs: str) -> Tensor:
    """`[n, d]` Gaussian x, with eight massive dimensions side by side or scattered if asked for."""
    x = torch.randn(size.n, size.d, generator=torch.Generator().manual_seed(1))
    if inputs != "Gaussian":
        step = size.d // OUTLIERS - 1 if "scattered" in inputs else 1
        x[:, torch.arange(OUTLIERS) * step] *= 60
    return x


def threshold_for(x: Tensor, rows: Tensor, l0: float = L0) -> Tensor:
    """`[d_sae]` all equal: about `l0` of the latents of a token lie above it."""
    d_sae = rows.shape[0]
    sample = torch.cat([(x[:64] @ part.t()).flatten() for part in rows[:8192].split(1024)])
    kept = int(sample.numel() * (1 - l0 / d_sae))
    return sample.kthvalue(kept).values.expand(d_sae).contiguous()


# ---- sparse activations


def sized(size: Size, firing: str) -> Size:
    """`size`, with the latents of the recorded dictionary where the trace is asked for."""
    return replace(size, d_sae=firing_trace.recorded().d_sae) if firing == "trace" else size


@functools.cache
def batches(firing: str, n: int, d_sae: int, l0: int = L0, count: int = 4) -> list[SparseActs]:
    """Batches of sparse activations, none of whose latents a kernel of ours chose.

    Latents are drawn uniformly, or in proportion to log-normal rates, sigma = 2 nats, as trained
    dictionaries fire, `l0` a token; or are those of recorded tokens, as many as fired.
    """
    generator = torch.Generator().manual_seed(2)
    if firing == "trace":
        return [_traced(n, d_sae, generator) for _ in range(count)]
    rates = torch.ones(d_sae)
    if firing == "log-normal":
        rates = torch.exp(2 * torch.randn(d_sae, generator=generator))
    return [_drawn(rates, n, l0, generator) for _ in range(count)]


def _drawn(rates: Tensor, n: int, l0: int, generator: torch.Generator) -> SparseActs:
    rows = [torch.multinomial(rates, l0, generator=generator) for _ in range(n)]
    latents = torch.stack(rows).sort(1).values
    return _acts(torch.full((n,), l0), latents.flatten(), len(rates), generator)


def _traced(n: int, d_sae: int, generator: torch.Generator) -> SparseActs:
    trace = firing_trace.recorded()
    if d_sae != trace.d_sae:
        raise ValueError(f"the trace has {trace.d_sae} latents, got d_sae={d_sae}")
    return _acts(*trace.sample(n, generator), d_sae, generator)


def _acts(counts: Tensor, latents: Tensor, d_sae: int, generator: torch.Generator) -> SparseActs:
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.long().cumsum(0)])
    values = torch.rand(len(latents), generator=generator) + 0.5
    shape = (len(counts), d_sae)
    return SparseActs(offsets, latents.to(torch.int32), values, torch.ones_like(values), shape)


@functools.lru_cache(maxsize=2)
def decoders_of(dtype: str, d: int, d_sae: int) -> list[Tensor]:
    """Two random `[d_sae, d]` matrices; the last ones are kept for the next case."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(d_sae, d, generator=generator).to(DTYPES[dtype]) for _ in range(2)]


def forget() -> None:
    """Drop what was kept for a next case."""
    for kept in (encoder_rows, batches, decoders_of):
        kept.cache_clear()


def touched(acts: SparseActs) -> int:
    """Latents with an entry: rows that a sparse pass reads at least once."""
    return int(acts.indices.unique().numel())


# ---- a whole autoencoder


def autoencoder(size: Size, l0: float = L0) -> tuple[Tensor, gsf.SAE]:
    """x and a JumpReLU SAE as Gemma Scope initialises it, with the wanted mean L0.

    No pre-activation of x lies within `MARGIN` of a gate, so that no rounding decides one.
    """
    generator = torch.Generator().manual_seed(0)
    sae = gsf.SAE(size.d, size.d_sae, gsf.JumpReLU(bandwidth=BANDWIDTH), generator=generator)
    x = torch.randn(size.n, size.d, generator=generator)
    with torch.no_grad():
        assert sae.threshold is not None
        sae.threshold.copy_(threshold_for(x, sae.W_enc.t(), l0))
        clear(sae.threshold, torch.addmm(sae.b_enc, x, sae.W_enc))
    return x, sae


def clear(threshold: Tensor, pre: Tensor) -> None:
    """Raise each threshold until it and both edges of its window are off every pre-activation."""
    columns = torch.arange(len(threshold))
    while columns.numel():
        distance = (pre[:, columns] - threshold[columns]).abs_()
        near = distance < MARGIN
        near |= distance.sub_(BANDWIDTH / 2).abs_() < MARGIN
        columns = columns[near.any(0)]
        threshold[columns] += 3 * MARGIN
