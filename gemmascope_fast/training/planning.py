"""Which rows of a batch are evaluated together, and whether sparsely.

Spans of rows; a sample of each measures its density (share of latents that are active or inside the
straight-through window). Above the crossover the span takes the dense path in tiles of a fixed
number of bytes, else the sparse path in blocks whose predicted entries fit a budget. TopK is sparse
always. BatchTopK selects over the whole batch, hence is one sparse block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..modules import BatchTopK, TopK
from .evaluation import Inputs

SAMPLE_ROWS, SAMPLE_LATENTS = 64, 2048
"""Sample that measures a span's density: about 1 % of a step at n = 256, d = 1152, F = 65536. One
row and one latent per stratum, at a hashed place inside it: any fixed stride would meet the same
position of every sequence, the BOS tokens say."""

LAYER_LATENTS = 256
"""Least of that sample in each of several layers, which have one of that size together."""

CROSSOVER = {"cpu": 1 / 4, "cuda": 1 / 184}
"""Density above which the dense path is faster, by device type.

CPU: sparse / dense milliseconds of a whole step at density 1/4, 3/16, 1/8, 1/16, two idle threads
with AVX2, n = 512: 187/200, 143/194, 122/197, 84/221 (d = 512, F = 8192); 941/920, 713/832,
527/835, 386/916 (d = 1152, F = 16384).
CUDA: the ratio of an H200's bandwidth to its rate of bfloat16 products, not measured on steps.
"""

ENTRY_BYTES = 40
"""Of a stored entry at the peak: index, value, gate and permutation (20), and their gradients."""


@dataclass(frozen=True)
class Limits:
    """Sizes of the blocks.

    Args:
        span_rows: rows for which one sample decides.
        tile_bytes: of one `[rows, d_sae]` tile of the dense path, which holds up to three.
        entry_bytes: of the entries of one sparse block, as predicted by the sample.
        crossover: density above which the dense path serves; None takes that of the device, or 0
            where only the reference serves the sparse ops.
    """

    span_rows: int = 8192
    tile_bytes: int = 64 << 20  # d = 1152, F = 65536: 8 MiB tiles are 33 % slower, 32 MiB 4 %
    entry_bytes: int = 256 << 20
    crossover: float | None = None


DEFAULT_LIMITS = Limits()


def plan(inputs: Inputs, limits: Limits) -> Iterator[tuple[slice, bool]]:
    """Blocks of rows in order, and whether each takes the dense path."""
    for rows, (dense,) in plan_layers([inputs], limits):
        yield rows, dense


def plan_layers(
    sources: Sequence[Inputs], limits: Limits
) -> Iterator[tuple[slice, tuple[bool, ...]]]:
    """Blocks of rows in order, and which layers take the dense path there.

    Args:
        sources: of every layer, with the same rows.
        limits: of what the layers hold together; each dense tile is of one layer.
    """
    first, sparse = sources[0], (False,) * len(sources)
    n, d_sae, activation = first.n, first.d_sae, first.activation
    entries = max(limits.entry_bytes // ENTRY_BYTES, 1)
    if isinstance(activation, BatchTopK):
        if first.tokens:  # an empty part of a batch takes part in its selection
            yield slice(0, n), sparse
        return
    if isinstance(activation, TopK):
        for rows in _split(0, n, entries // max(activation.k * len(sources), 1)):
            yield rows, sparse
        return
    tile = max(limits.tile_bytes // (max(d_sae, 1) * first.acc.itemsize), 1)
    crossover = _crossover(first) if limits.crossover is None else limits.crossover
    spans, sizes = [], []
    for start in range(0, n, limits.span_rows):
        stop = min(start + limits.span_rows, n)
        densities = [1.0] * len(sources)
        if crossover > 0:
            densities = _measure(sources, start, stop, min(tile, SAMPLE_ROWS))
        dense = tuple(density > crossover for density in densities)
        stored = sum(d * d_sae for d, apart in zip(densities, dense, strict=True) if not apart)
        spans.append((start, stop, dense))
        fitting = int(entries / max(stored, 1.0))
        sizes.append(min(tile, fitting) if any(dense) else fitting)
    for (start, stop, dense), size in zip(spans, first.whole.smallest(sizes), strict=True):
        for rows in _split(start, stop, size):
            yield rows, dense


def _split(start: int, stop: int, rows: int) -> Iterator[slice]:
    """Blocks of at most `rows` rows (at least 1) and nearly equal size."""
    blocks = math.ceil((stop - start) / max(rows, 1))
    for block in range(blocks):
        low, high = ((stop - start) * at // blocks for at in (block, block + 1))
        yield slice(start + low, start + high)


def _crossover(inputs: Inputs) -> float:
    device = inputs.tensors["x"].device.type
    needed = ("jumprelu_encode", "decode", "sae_backward")
    if inputs.acc == torch.float32 and device in CROSSOVER:
        if all(ops.implementation(name, device) in ("native", "triton") for name in needed):
            return CROSSOVER[device]
    return 0.0  # the reference ops are dense themselves, and without tiles


def _measure(sources: Sequence[Inputs], start: int, stop: int, rows: int) -> list[float]:
    """Share of entries that each layer would store, from a sample, to the weights' precision."""
    latents, found = max(SAMPLE_LATENTS // len(sources), LAYER_LATENTS), []
    for inputs in sources:
        encoder = (inputs.tensors["W_enc"], inputs.tensors["b_enc"])
        limit = inputs.tensors["threshold"] - inputs.emission / 2
        found.append(_density(inputs.tensors["x"][start:stop], *encoder, limit, rows, latents))
    return torch.stack(found).tolist()  # one wait for all


def sampled_density(x: Tensor, W_enc: Tensor, b_enc: Tensor, limit: Tensor) -> float:
    """Share of `pre > limit` in a strided sample of x `[n, d_in]` and of the latents."""
    return float(_density(x, W_enc, b_enc, limit, SAMPLE_ROWS, SAMPLE_LATENTS))


def _density(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, limit: Tensor, rows: int, latents: int
) -> Tensor:
    """`sampled_density` of at most that many rows and latents, a scalar."""
    if W_enc.shape[1] == 0:
        return x.new_zeros((), dtype=torch.float32)
    if x.shape[0] > rows:
        x = x[_strata(x.shape[0], rows).to(x.device)]
    if W_enc.shape[1] > latents:  # else all of them, without a copy
        chosen = _strata(W_enc.shape[1], latents).to(x.device)
        if W_enc.stride(1) == 1:  # along the rows of memory, and by index_select, which copies them
            W_enc = W_enc.index_select(1, chosen)
        else:
            W_enc = W_enc.t().index_select(0, chosen).t()
        b_enc, limit = b_enc[chosen], limit[chosen]
    pre = x.to(W_enc.dtype) @ W_enc + b_enc
    return torch.gt(pre, limit, out=pre).mean(dtype=torch.float32)


def _strata(size: int, strata: int) -> Tensor:
    """One index from each of at most `strata` equal parts of `range(size)`, always the same."""
    width = math.ceil(size / strata)
    begin = torch.arange(0, size, width, device="cpu")
    hashed = (
        (torch.arange(len(begin), device="cpu") + 1) * 2654435761 % 2**32
    )  # multiplicative hash
    return begin + hashed * torch.clamp(size - begin, max=width) // 2**32
