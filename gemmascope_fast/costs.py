"""Cost model of every op: floating-point operations and compulsory bytes, from its shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations and compulsory bytes of memory traffic."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def _encode_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    return Cost(2 * n * d * d_sae, itemsize * d * (n + d_sae) + 12 * nnz)


def _gather_cost(products: int, matrices: int, tokens: int) -> Callable[..., Cost]:
    """Cost of passes over the entries.

    Args:
        products: sparse products, 2 d operations an entry each.
        matrices: weights or gradients of which a row per touched latent is read or written;
            at most `d_sae` rows are, so give the touched latents as `d_sae` where they are known.
        tokens: `[n, d]` tensors read or written.
    """

    def cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
        rows = matrices * min(nnz, d_sae) + tokens * n
        return Cost(2 * products * nnz * d, itemsize * d * rows + 8 * nnz)

    return cost


def _sort_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    return Cost(0, 8 * (n + d_sae) + 12 * nnz)


def _adam_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    """Every touched row: gradient read, weight and second moment read and written."""
    rows = min(nnz, d_sae)
    return Cost(10 * rows * d, rows * d * (3 * itemsize + 8))


def _fused_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    """`sae_backward` without gradients to write, and both updates without gradients to read."""
    rows = min(nnz, d_sae)
    moved = 2 * rows * d * (2 * itemsize + 8) + 2 * n * d * itemsize
    return Cost(6 * nnz * d + 20 * rows * d, moved + 12 * nnz)


COSTS: dict[str, Callable[..., Cost]] = {
    "jumprelu_encode": _encode_cost,
    "topk_encode": _encode_cost,
    "batchtopk_encode": _encode_cost,
    "decode": _gather_cost(1, 1, 1),
    "decode_": _gather_cost(1, 1, 2),
    "encode_backward": _gather_cost(2, 2, 2),
    "decode_backward": _gather_cost(2, 2, 1),
    "sae_backward": _gather_cost(3, 3, 2),  # without the gradient of x
    "pre_at": _gather_cost(1, 1, 1),
    "by_feature": _sort_cost,
    "adam_step_": _adam_cost,
    "fused_sparse_step": _fused_cost,
}
