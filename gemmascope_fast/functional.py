"""The public functions: argument checks, leading dimensions, autocast, then one op of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .arguments import check_count, check_number
from .checks import (
    check_decoder,
    check_encoder,
    check_guess,
    check_max_nnz,
    check_pairs,
    check_vector,
    recon_2d,
)
from .explaining import note_encode
from .operands import autocast, codes_of, encoder_args, weights_need_grad, widen
from .packing import PackedEncoder, unpacked
from .reference import CapacityError
from .sparse import SparseActs


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor | PackedEncoder,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float = 0.0,
    max_nnz: int | None = None,
) -> SparseActs:
    """Encode by JumpReLU without forming the pre-activation matrix.

    `acts = pre * H(pre - threshold)`, `pre = x @ W_enc + b_enc`, H(0) = 0. When the threshold
    requires gradients (and they are enabled), entries with `pre > threshold - bandwidth / 2` that
    are not active are stored too, with value and gate 0, so that its straight-through gradient
    `-(threshold / bandwidth) K((pre - threshold) / bandwidth)`, K the unit rectangle, is exact.

    Args:
        x: `[*batch, d_in]` float32, bfloat16, float16 or float64, any strides.
        W_enc: `[d_in, d_sae]`, same dtypes; fastest when `W_enc.t()` is contiguous. Or `pack`ed.
        b_enc: `[d_sae]`, used in float32.
        threshold: `[d_sae]`, used in float32.
        bandwidth: width of the window, in units of `pre`; > 0 when `threshold` requires grad.
        max_nnz: fixed capacity of the entry arrays; None sizes them exactly, which waits for a GPU.

    Returns:
        `SparseActs` of shape `[*batch, d_sae]`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or `max_nnz` not an int.
        ValueError: shapes or devices disagree, `bandwidth` is negative or not finite, or 0 while
            `threshold` requires grad.
        CapacityError: more than `max_nnz` entries (CPU; on CUDA see `SparseActs.check`).
        RuntimeError: a CUDA graph is captured without `max_nnz`.

    Source: Rajamanoharan et al. 2024, arXiv 2407.14435, section 3.
    """
    op = "jumprelu_encode"
    W_enc, packed = unpacked(W_enc)
    check_encoder(op, x, W_enc, b_enc)
    check_vector(op, "threshold", threshold, W_enc.shape[1], W_enc)
    bandwidth = check_number(op, "bandwidth", bandwidth)
    check_max_nnz(op, max_nnz, x)
    window = torch.is_grad_enabled() and threshold.requires_grad
    if window and bandwidth == 0:
        raise ValueError(
            f"{op}: threshold requires grad but bandwidth is 0: pass bandwidth > 0, or "
            "threshold.detach()"
        )
    args = encoder_args(x, W_enc, b_enc)
    transpose = weights_need_grad(W_enc, b_enc, threshold)
    width = bandwidth if window else 0.0
    theta = widen(threshold)
    codes = codes_of(packed, W_enc, args[1])
    serve = ops.overload(op, *args, theta)
    result = _call(op, W_enc, serve, *args, theta, width, max_nnz, transpose, codes)
    return _acts(result, x, W_enc, transpose, max_nnz)


def topk_encode(x: Tensor, W_enc: Tensor | PackedEncoder, b_enc: Tensor, k: int) -> SparseActs:
    """Encode keeping the k largest of `relu(x @ W_enc + b_enc)` per token.

    Every token stores exactly k entries (`SparseActs.as_topk` views them as matrices); a selected
    latent whose pre-activation is <= 0 has value 0, gate 0 and passes no gradient. Ties go to the
    smaller latent; NaN ranks largest.

    Args:
        x: `[*batch, d_in]` float32, bfloat16, float16 or float64, any strides.
        W_enc: `[d_in, d_sae]`, same dtypes; fastest when `W_enc.t()` is contiguous. Or `pack`ed.
        b_enc: `[d_sae]`, used in float32.
        k: entries per token, in `[0, d_sae]`.

    Returns:
        `SparseActs` of shape `[*batch, d_sae]` with `k` entries per token.

    Raises:
        TypeError: an argument is not a floating-point tensor, or k is not an int.
        ValueError: shapes or devices disagree, or k is out of range.

    Source: Gao et al. 2024, arXiv 2406.04093, section 2.3.
    """
    op = "topk_encode"
    W_enc, packed = unpacked(W_enc)
    check_encoder(op, x, W_enc, b_enc)
    k = check_count(op, "k", k, W_enc.shape[1], "d_sae")
    args = encoder_args(x, W_enc, b_enc)
    transpose = weights_need_grad(W_enc, b_enc)
    codes = codes_of(packed, W_enc, args[1])
    result = _call(op, W_enc, ops.overload(op, *args), *args, k, transpose, codes)
    return _acts(result, x, W_enc, transpose)


def batchtopk_encode(
    x: Tensor,
    W_enc: Tensor | PackedEncoder,
    b_enc: Tensor,
    k: float,
    *,
    guess: float | None = None,
    max_nnz: int | None = None,
) -> SparseActs:
    """Encode keeping the `int(k * n)` largest positive entries of the whole batch.

    `acts.threshold` is the smallest kept activation, or 0 when the batch has fewer positive
    entries than that. Ties go to (token, latent) in ascending order.

    Args:
        x: `[*batch, d_in]` float32, bfloat16, float16 or float64, any strides.
        W_enc: `[d_in, d_sae]`, same dtypes; fastest when `W_enc.t()` is contiguous. Or `pack`ed.
        b_enc: `[d_sae]`, used in float32.
        k: mean entries per token, finite and >= 0; may be fractional.
        guess: expected threshold (the last batch's, say); changes the speed, never the result.
        max_nnz: fixed capacity of the entry arrays; None sizes them exactly, which waits for a GPU.

    Returns:
        `SparseActs` of shape `[*batch, d_sae]`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or k is not a number.
        ValueError: shapes or devices disagree, or k is negative or not finite.
        CapacityError: more than `max_nnz` entries (CPU; on CUDA see `SparseActs.check`).
        RuntimeError: a CUDA graph is captured without `max_nnz`.

    Source: Bussmann et al. 2024, arXiv 2412.06410, section 3.
    """
    op = "batchtopk_encode"
    W_enc, packed = unpacked(W_enc)
    check_encoder(op, x, W_enc, b_enc)
    k = check_number(op, "k", k)
    check_guess(op, guess)
    check_max_nnz(op, max_nnz, x)
    args = encoder_args(x, W_enc, b_enc)
    transpose = weights_need_grad(W_enc, b_enc)
    codes = codes_of(packed, W_enc, args[1])
    serve = ops.overload(op, *args)
    result = _call(op, W_enc, serve, *args, k, guess, max_nnz, transpose, codes)
    return _acts(result, x, W_enc, transpose, max_nnz, threshold=result[5])


def decode(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Reconstruct: `acts @ W_dec + b_dec`, reading only the decoder rows of stored entries.

    Args:
        acts: activations over `d_sae` latents.
        W_dec: `[d_sae, d_out]` float32, bfloat16, float16 or float64; fastest when its rows are
            contiguous.
        b_dec: `[d_out]`, used in float32, or None.
        dtype: dtype of the result; default that of `W_dec`.

    Returns:
        `[*batch, d_out]`.

    Raises:
        TypeError: `acts` is not a `SparseActs`, or a tensor is not floating point.
        ValueError: shapes or devices disagree.
        RuntimeError: an index of `acts` is out of range (CPU).
    """
    check_decoder("decode", acts, W_dec, dtype)
    if b_dec is not None:
        check_vector("decode", "b_dec", b_dec, W_dec.shape[1], W_dec)
    dtype = W_dec.dtype if dtype is None else dtype
    transpose: tuple[Tensor | None, Tensor | None] = (None, None)
    if torch.is_grad_enabled() and W_dec.requires_grad:
        transpose = acts.by_feature()
    (W_dec,) = autocast(W_dec)
    values = widen(acts.values)
    bias = None if b_dec is None else widen(b_dec)
    operands = [t for t in (values, W_dec, bias) if t is not None]
    wide = dtype != torch.float64 or any(t.dtype == torch.float64 for t in operands)
    entries = (acts.offsets, acts.indices, values, W_dec, bias, *transpose)
    serve = ops.overload("decode", *operands)
    recon: Tensor = ops.call(serve, *entries, dtype if wide else torch.float32).to(dtype)
    return recon if len(acts.shape) == 2 else recon.reshape(*acts.shape[:-1], W_dec.shape[1])


def decode_(recon: Tensor, acts: SparseActs, W_dec: Tensor) -> Tensor:
    """Add `acts @ W_dec` to `recon` in place, without autograd; returns `recon`.

    Args:
        recon: `[*batch, d_out]` float32, bfloat16, float16 or float64.
        acts: activations over `d_sae` latents.
        W_dec: `[d_sae, d_out]`.

    Raises:
        TypeError: `acts` is not a `SparseActs`, or a tensor is not floating point.
        ValueError: shapes or devices disagree, or `recon` cannot be viewed as `[n, d_out]`.
        RuntimeError: an index of `acts` is out of range (CPU); `recon` is then unchanged.
    """
    check_decoder("decode_", acts, W_dec)
    flat = recon_2d("decode_", recon, acts, W_dec)
    with torch.no_grad():
        values = widen(acts.values.detach())
        op = ops.overload("decode_", values, W_dec, recon)
        op(flat, acts.offsets, acts.indices, values, W_dec.detach())
    return recon


def pre_at(x: Tensor, W_enc: Tensor, b_enc: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    """Ungated pre-activations `(x @ W_enc + b_enc)[rows, latents]` of chosen pairs.

    Args:
        x: `[*batch, d_in]`; rows count tokens in flattened order.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        rows: `[p]` integer token of each pair, in `[0, n)`.
        latents: `[p]` integer latent of each pair, in `[0, d_sae)`.

    Returns:
        `[p]` float32, differentiable in x, W_enc and b_enc.

    Raises:
        TypeError: a tensor has the wrong kind of dtype.
        ValueError: shapes or devices disagree.
        RuntimeError: an index is out of range (CPU).
    """
    op = "pre_at"
    check_encoder(op, x, W_enc, b_enc)
    check_pairs(op, rows, latents, W_enc)
    args = encoder_args(x, W_enc, b_enc)
    result = ops.overload(op, *args)(*args, rows.to(torch.int64), latents.to(torch.int64))
    return result  # type: ignore[no-any-return]


def _call(op: str, W_enc: Tensor, serve: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """Call an encoder; a CapacityError arrives as a RuntimeError with that prefix."""
    if torch.compiler.is_compiling():
        return serve(*args)  # type: ignore[no-any-return]
    try:
        result = ops.call(serve, *args)
        note_encode(op, serve, args[0], args[1], W_enc)
        return result  # type: ignore[no-any-return]
    except RuntimeError as error:
        _, found, text = str(error).partition("CapacityError: ")
        if not found:
            raise
        raise CapacityError(text.splitlines()[0]) from None


def _acts(
    result: tuple[Tensor, ...],
    x: Tensor,
    W_enc: Tensor,
    transpose: bool,
    max_nnz: int | None = None,
    threshold: Tensor | None = None,
) -> SparseActs:
    """Name the outputs of an encoder: entries first, then `needed` if any, the transpose last."""
    fixed = max_nnz is not None
    feature_offsets, permutation = result[-2:] if transpose else (None, None)
    offsets, indices, values, gate = result[:4]
    return SparseActs(
        *(offsets, indices, values, gate),
        (*x.shape[:-1], W_enc.shape[1]),
        needed=result[4] if fixed else None,
        threshold=threshold,
        feature_offsets=feature_offsets,
        permutation=permutation,
        padded=fixed,
    )
