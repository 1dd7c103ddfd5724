"""Shapes, dtypes and strides of every op's outputs, for `torch.compile` and `torch.export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import _accumulate


def _entries(x: Tensor, capacity: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(capacity, dtype=torch.int32),
        x.new_empty(capacity, dtype=dtype),
        x.new_empty(capacity, dtype=dtype),
    )


def _transpose(x: Tensor, d_sae: Any, capacity: Any, wanted: bool) -> tuple[Tensor, Tensor]:
    sizes = (d_sae + 1, capacity) if wanted else (0, 0)
    return x.new_empty(sizes[0], dtype=torch.int64), x.new_empty(sizes[1], dtype=torch.int64)


def _capacity(max_nnz: int | None) -> Any:
    return torch.library.get_ctx().new_dynamic_size() if max_nnz is None else max_nnz


def _jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    max_nnz: int | None,
    by_feature: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    capacity = _capacity(max_nnz)
    return (
        *_entries(x, capacity, _accumulate(x, W_enc, b_enc)),
        x.new_empty((), dtype=torch.int64),
        *_transpose(x, W_enc.shape[1], capacity, by_feature),
    )


def _topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    by_feature: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    capacity = x.shape[0] * k
    return (
        *_entries(x, capacity, _accumulate(x, W_enc, b_enc)),
        *_transpose(x, W_enc.shape[1], capacity, by_feature),
    )


def _batchtopk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: float,
    guess: float | None,
    max_nnz: int | None,
    by_feature: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    capacity = _capacity(max_nnz)
    dtype = _accumulate(x, W_enc, b_enc)
    return (
        *_entries(x, capacity, dtype),
        x.new_empty((), dtype=torch.int64),
        x.new_empty((), dtype=dtype),
        *_transpose(x, W_enc.shape[1], capacity, by_feature),
    )


def _decode(
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return W_dec.new_empty((offsets.shape[0] - 1, W_dec.shape[1]), dtype=dtype)


def _decode_(
    recon: Tensor, offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor
) -> None:
    return None


def _encode_backward(
    d_values: Tensor | None,
    d_gate: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor | None,
    bandwidth: float,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    gate: Tensor,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    need_x: bool,
    need_W_enc: bool,
    need_b_enc: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sae = W_enc.shape[1]
    return (
        x.new_empty(x.shape if need_x else 0),
        torch.empty_like(W_enc) if need_W_enc else x.new_empty(0),
        values.new_empty(d_sae if need_b_enc else 0),
        values.new_empty(d_sae if need_threshold else 0),
    )


def _decode_backward(
    d_recon: Tensor,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    need_values: bool,
    need_W_dec: bool,
    need_b_dec: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        values.new_empty(values.shape if need_values else 0),
        torch.empty_like(W_dec) if need_W_dec else values.new_empty(0),
        values.new_empty(W_dec.shape[1] if need_b_dec else 0),
    )


def _sae_backward(
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor | None,
    bandwidth: float,
    W_dec: Tensor,
    d_recon: Tensor,
    group_ends: list[int],
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    gate: Tensor,
    d_values: Tensor | None,
    d_gate: Tensor | None,
    feature_offsets: Tensor,
    permutation: Tensor,
    need_x: bool,
) -> tuple[Tensor, ...]:
    d_sae = W_enc.shape[1]
    return (
        x.new_empty(x.shape if need_x else 0),
        torch.empty_like(W_enc),
        values.new_empty(d_sae),
        values.new_empty(d_sae if bandwidth > 0 else 0),
        torch.empty_like(W_dec),
        values.new_empty(W_dec.shape[1]),
    )


def _pre_at(x: Tensor, W_enc: Tensor, b_enc: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    return x.new_empty(rows.shape, dtype=_accumulate(x, W_enc, b_enc))


def _by_feature(offsets: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    return _transpose(offsets, d_sae, indices.shape[0], True)


def _adam_step_(
    weight: Tensor, state: list[Tensor], gradient: Tensor, rates: list[float], rule: list[int]
) -> None:
    return None


def _fused_sparse_step(
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor | None,
    bandwidth: float,
    W_dec: Tensor,
    d_recon: Tensor,
    group_ends: list[int],
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    d_sae = W_enc.shape[1]
    return (
        values.new_empty(d_sae),
        values.new_empty(d_sae if bandwidth > 0 else 0),
        values.new_empty(W_dec.shape[1]),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "jumprelu_encode": _jumprelu_encode,
    "topk_encode": _topk_encode,
    "batchtopk_encode": _batchtopk_encode,
    "decode": _decode,
    "decode_": _decode_,
    "encode_backward": _encode_backward,
    "decode_backward": _decode_backward,
    "sae_backward": _sae_backward,
    "pre_at": _pre_at,
    "by_feature": _by_feature,
    "adam_step_": _adam_step_,
    "fused_sparse_step": _fused_sparse_step,
}
