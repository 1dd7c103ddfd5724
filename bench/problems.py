"""Inputs of the CPU benchmarks: encoders and their x, sparse activations, a JumpReLU autoencoder.

Everything is drawn from a fixed seed. Thresholds are quantiles of sampled pre-activations, which
gives the wanted mean number of active latents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
TOKENS_OF_A_CLUSTER = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRING = ("uniform", "log-normal", "clustered")


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


@functools.cache
def batches(firing: str, n: int, d_sae: int, l0: int = L0, count: int = 4) -> list[SparseActs]:
    """Batches of `l0` entries a token, none of whose latents a kernel of ours chose.

    Latents are drawn uniformly; in proportion to log-normal rates, sigma = 2 nats, as trained
    dictionaries fire; or in clusters of 16 tokens that share three quarters of theirs.
    """
    generator = torch.Generator().manual_seed(2)
    if firing == "clustered":
        drawn = [_clustered(n, d_sae, l0, generator) for _ in range(count)]
    else:
        rates = torch.ones(d_sae)
        if firing == "log-normal":
            rates = torch.exp(2 * torch.randn(d_sae, generator=generator))
        drawn = [
            torch.stack([torch.multinomial(rates, l0, generator=generator) for _ in range(n)])
            for _ in range(count)
        ]
    return [_acts(latents.sort(1).values, d_sae, generator) for latents in drawn]


def _clustered(n: int, d_sae: int, l0: int, generator: torch.Generator) -> Tensor:
    rows, shared = [], l0 * 3 // 4
    for token in range(n):
        if token % TOKENS_OF_A_CLUSTER == 0:
            pool = torch.randperm(d_sae, generator=generator)[: 2 * l0]
        common = pool[torch.randperm(2 * l0, generator=generator)[:shared]]
        own = torch.randperm(d_sae, generator=generator)[: 2 * l0]
        rows.append(torch.cat([common, own[~torch.isin(own, common)][: l0 - shared]]))
    return torch.stack(rows)


def _acts(latents: Tensor, d_sae: int, generator: torch.Generator) -> SparseActs:
    n, l0 = latents.shape
    values = torch.rand(n * l0, generator=generator) + 0.5
    return SparseActs(
        torch.arange(0, n * l0 + 1, l0),
        latents.reshape(-1).to(torch.int32),
        values,
        torch.ones_like(values),
        (n, d_sae),
    )


@functools.lru_cache(maxsize=1)
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
