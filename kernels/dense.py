"""Dense products in place of passes over the entries, for small dictionaries and dense activations.

    entry_sum        out [n, d] = bias + A @ M            decode, d_x, and with latents for rows
                                                          d_W_dec = V^T @ d_recon, d_W_enc
    entry_dots       out[e] = (g @ W^T)[i, indices[e]]    d_values
    with A [n, F] the entries as a dense matrix, built a chunk of rows at a time (`densify.py`).

A pass over nnz entries gathers nnz * d * itemsize bytes at B bytes/s; a product is 2 P n d F
operations at R per second. d cancels: dense is faster beyond nnz / n = F * 2 P B / (R itemsize).
P = 1 for a float32 matrix and for dot products. Coefficients are float32, so beside a bfloat16
matrix they are split into bfloat16 terms: P = 2 for a 16-bit result (2^-17 of each coefficient is
lost), 3 for a float32 one (nothing is). Sums over a float16 matrix are products in float32: float16
has no exponents for coefficients as small as gradients are.
With what else a product moves (`sum_work`, `dots_work`), both should take as long at these entries
per token, for n = 8192, d = 5376, 690 TFLOP/s (float32: 50), 3.0 TB/s (in brackets 4.3); `MARGIN`
times as many are asked for:

    F                         1,024      4,096       16,384
    decode bfloat16         19 (23)    50 (66)    177 (239)
      into float32          28 (34)    74 (97)    265 (358)
    d_W_dec bfloat16        15 (19)    48 (64)    180 (242)
    dot products bfloat16     6 (8)    23 (31)     96 (127)
    decode float32          34 (48)  129 (183)    514 (728)

Measured on an H200: 690 TFLOP/s in bfloat16, copies at 4.3 TB/s. Other rates in
`configs/dense.json` are estimates, but for those of the compiled passes on sm_90.

The compiled CUDA kernels hand an op over to these launchers by the same model in C++
(`csrc/common/dense_work.h`), with the rates of their own passes: in token order 9.0 TB/s, since
slabs of columns stay in the L2 (5.6 GB in 0.60 ms at F = 16,384 on an H200; 5.7 TB/s at 65,536 and
uniform use: there the choice comes late), in latent order 3.9 TB/s (`sae_backward` in 3.06 ms at
F = 16,384). With 0.1 ms for the launches of each product they ask for so many entries per token:

    F                         1,024      4,096       16,384
    decode bfloat16             100        242          818
    sae_backward bfloat16        45        126          455

The choice rests on shapes, with the capacity for nnz: no waiting. With a fixed capacity nnz is
overestimated. Only stored entries count, as everywhere: rows of M that are not finite become zeros
in the product, and their entries are added one by one (`dense_remainder.py`).
The result has the same bits in every run, not those of the pass over entries.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .dense_gather import dense_gather
from .dense_remainder import dense_remainder
from .densify import densify
from .latent_order import GATE, LatentOrder
from .launching import choose
from .weight_gradient import weight_gradient

FORCED: bool | None = None
"""Always or never multiply densely, whatever the cost; for tests."""

MARGIN = 1.5
"""How many times faster a dense product must be expected to be: reuse in the L2 is not modelled."""

CHUNK_BYTES = 2**27
"""Largest dense piece of the entries, and largest product of it."""

LARGEST_MATRIX = 2**29
"""Elements of a matrix that may be copied for a product: 1 GiB in bfloat16, 95k rows of 5376."""


@dataclass(frozen=True)
class Work:
    """What one product costs, as a pass over the entries and densely."""

    gathered: int
    """bytes read by the pass"""
    moved: int
    """bytes that the dense product reads and writes"""
    operations: int
    wide: bool
    """multiplied in float32"""


def sum_work(capacity: int, n: int, matrix: Tensor, dtype: torch.dtype) -> Work:
    """Cost of `entry_sum` into a `dtype` result of n rows."""
    features, d = matrix.shape
    kind, parts = _split(matrix.dtype, dtype)
    chunks = -(-n // _rows(n, features, d, kind, parts))
    copies = (chunks + 3) * features * d * kind.itemsize  # each chunk, finite rows, their copy
    pieces = 2 * parts * n * (features * kind.itemsize + d * 4)
    return Work(
        capacity * (d * matrix.element_size() + 8),
        copies + pieces + 24 * capacity,
        2 * parts * n * features * d,
        kind == torch.float32,
    )


def dots_work(capacity: int, W: Tensor, g: Tensor) -> Work:
    """Cost of `entry_dots`."""
    (features, d), n = W.shape, g.shape[0]
    kind = _common(W, g)
    chunks = -(-n // _rows(n, features, d, torch.float32, 1))
    return Work(
        capacity * (d * W.element_size() + 8),
        (chunks + 2) * features * d * kind.itemsize + 8 * n * features + 40 * capacity,
        2 * n * features * d,
        kind == torch.float32,
    )


def pays(device: torch.device, *works: Work) -> bool:
    """All of `works` together are clearly faster as dense products."""
    if not sum(work.gathered for work in works) or not all(work.operations for work in works):
        return False
    if FORCED is not None:
        return FORCED
    if device.type != "cuda" or not _available():
        return False
    rates = choose("dense", device)
    gather, dense = 0.0, 0.0
    for work in works:
        rate = rates["TERAFLOPS_32" if work.wide else "TERAFLOPS_16"]
        gather += work.gathered / (rates["GATHERED_GIGABYTES"] * 1e9)
        dense += work.moved / (rates["GIGABYTES"] * 1e9) + work.operations / (rate * 1e12)
    return gather > MARGIN * dense


def sum_pays(capacity: int, n: int, matrix: Tensor, dtype: torch.dtype) -> bool:
    """`entry_sum` is clearly faster than `token_sum`."""
    work = sum_work(capacity, n, matrix, dtype)
    return matrix.numel() <= LARGEST_MATRIX and pays(matrix.device, work)


def dots_pay(capacity: int, W: Tensor, g: Tensor) -> bool:
    """`entry_dots` is clearly faster than `gathered_dot`."""
    return W.numel() <= LARGEST_MATRIX and pays(W.device, dots_work(capacity, W, g))


def entry_sum(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """`out[i] = bias + sum_e coefficients[e] * matrix[indices[e]]`; arguments of `accumulate`."""
    features, d = matrix.shape
    n = out.shape[0]
    kind, parts = _split(matrix.dtype, out.dtype)
    offsets, indices, coefficients = (t.contiguous() for t in (offsets, indices, coefficients))
    finite = _finite_rows(matrix)
    usable = torch.where(finite[:, None], matrix, 0.0).to(kind)
    left = torch.empty_like(indices)
    rows = _rows(n, features, d, kind, parts)
    buffer = torch.empty(parts * rows * features, dtype=kind, device=matrix.device)
    for start in range(0, n, rows):
        target = out[start : start + rows]
        count = target.shape[0]
        span = offsets[start : start + count + 1]
        dense = buffer[: parts * count * features].view(parts, count, features).zero_()
        any_left = densify(span, indices, coefficients, finite, dense, left)
        terms = _product(dense.flatten(0, 1), usable).view(parts, count, d)
        total = functools.reduce(torch.add, reversed(terms.unbind()))  # the smallest first
        dense_remainder(span, left, coefficients, matrix, any_left, total)
        if bias is not None:
            total += bias
        if add:
            total += target
        target.copy_(total)


def entry_dots(offsets: Tensor, indices: Tensor, W: Tensor, g: Tensor) -> Tensor:
    """Dot products `[capacity]` of the entries; arguments and result of `gathered_dot`."""
    (features, d), n = W.shape, g.shape[0]
    kind = _common(W, g)
    W, g = W.to(kind), g.to(kind)
    offsets, indices = offsets.contiguous(), indices.contiguous()
    out = torch.zeros(indices.shape[0], dtype=torch.float32, device=W.device)
    rows = _rows(n, features, d, torch.float32, 1)
    for start in range(0, n, rows):
        part = g[start : start + rows]
        products = _product(part, W.t())
        dense_gather(offsets[start : start + part.shape[0] + 1], indices, products, out)
    return out


def latent_gradient(
    order: LatentOrder,
    coefficients: int,
    gated: bool,
    matrix: Tensor,
    gradient: Tensor,
    first: int = 0,
) -> None:
    """`weight_gradient`, as a dense product where that pays; its arguments.

    In latent order the entries are the rows of A^T, with tokens for indices. Stacked entry sets are
    left to the pass: a token would occur in a latent once per set.
    """
    latents, d_sae = gradient.shape[0], order.feature_offsets.shape[0] - 1
    share = order.tokens.shape[0] * latents // max(d_sae, 1)
    if order.rows != matrix.shape[0] or not sum_pays(share, latents, matrix, gradient.dtype):
        weight_gradient(order, coefficients, gated, matrix, gradient, first)
        return
    numbers = order.sources[coefficients]
    if gated:
        numbers = numbers * order.sources[GATE]
    spans = order.feature_offsets[first : first + latents + 1]
    entry_sum(spans, order.tokens, numbers, matrix, None, gradient, False)


def backward_pays(order: LatentOrder, W_dec: Tensor, g: Tensor, x: Tensor) -> bool:
    """Dot products and both weight gradients are clearly faster densely than in one pass.

    The pass reads g once for two of the three: the dot products gather nothing of their own.
    """
    capacity, latents = order.tokens.shape[0], W_dec.shape[0]
    if order.rows != x.shape[0] or max(t.numel() for t in (W_dec, g, x)) > LARGEST_MATRIX:
        return False
    sums = (sum_work(capacity, latents, matrix, W_dec.dtype) for matrix in (g, x))
    return pays(g.device, dots_work(0, W_dec, g), *sums)


def _split(matrix: torch.dtype, result: torch.dtype) -> tuple[torch.dtype, int]:
    """Dtype of the operands of a sum, and into how many terms its coefficients are split."""
    if matrix != torch.bfloat16:
        return torch.float32, 1
    return matrix, 2 if result.itemsize == 2 else 3


def _common(W: Tensor, g: Tensor) -> torch.dtype:
    return W.dtype if W.dtype == g.dtype else torch.float32


def _rows(n: int, features: int, d: int, kind: torch.dtype, parts: int) -> int:
    """Rows of a chunk."""
    largest = CHUNK_BYTES // (parts * max(features * kind.itemsize, d * 4, 1))
    return max(1, min(n, largest))


def _finite_rows(matrix: Tensor) -> Tensor:
    """Which rows hold finite numbers only, `[F]` bool, from one reading: NaN is both extremes."""
    smallest, largest = torch.aminmax(matrix, dim=1)
    return smallest.isfinite() & largest.isfinite()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32, whatever the dtype of the operands."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _available() -> bool:
    """The library's products take a float32 result, and repeat their bits if that is demanded."""
    if torch.version.hip is not None:
        return False
    if not torch.are_deterministic_algorithms_enabled():
        return True
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
