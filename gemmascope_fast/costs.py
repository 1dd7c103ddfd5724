"""Cost model of every op: floating-point operations and compulsory bytes, from its shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations and compulsory bytes of memory traffic."""

    flops: int
    bytes: int


def _encode_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    return Cost(2 * n * d * d_sae, itemsize * d * (n + d_sae) + 12 * nnz)


def _gather_cost(passes: int) -> Callable[..., Cost]:
    """Cost of `passes` sparse products over the entries, each entry reading one row of d."""

    def cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
        return Cost(2 * passes * nnz * d, itemsize * d * (min(nnz, d_sae) + n) * passes + 8 * nnz)

    return cost


def _sort_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    return Cost(0, 8 * (n + d_sae) + 12 * nnz)


def _adam_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    """Every touched row: gradient read, weight and second moment read and written."""
    rows = min(nnz, d_sae)
    return Cost(10 * rows * d, rows * d * (2 * itemsize + 12))


def _fused_cost(n: int, d: int, d_sae: int, nnz: int, itemsize: int = 4) -> Cost:
    """`sae_backward` without gradients to write, and both updates without gradients to read."""
    rows = min(nnz, d_sae)
    moved = 2 * rows * d * (2 * itemsize + 8) + 2 * n * d * itemsize
    return Cost(8 * nnz * d + 20 * rows * d, moved + 12 * nnz)


COSTS: dict[str, Callable[..., Cost]] = {
    "jumprelu_encode": _encode_cost,
    "topk_encode": _encode_cost,
    "batchtopk_encode": _encode_cost,
    "decode": _gather_cost(1),
    "decode_": _gather_cost(1),
    "encode_backward": _gather_cost(2),
    "decode_backward": _gather_cost(2),
    "sae_backward": _gather_cost(4),
    "pre_at": _gather_cost(1),
    "by_feature": _sort_cost,
    "adam_step_": _adam_cost,
    "fused_sparse_step": _fused_cost,
}
