"""Argument checks of the public functions: each message names op, argument, expectation, actual."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .arguments import check_count
from .sparse import SparseActs

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(op: str, name: str, t: Any) -> None:
    """A floating-point tensor of a supported dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
    check_float_dtype(op, name, t.dtype)
    if t.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got layout {t.layout}")


def check_float_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """A supported dtype."""
    if dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {dtype!r}"
        )


def check_encoder(op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    """x, W_enc and b_enc fit together."""
    check_float(op, "x", x)
    check_float(op, "W_enc", W_enc)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dimension [*batch, d_in], got a scalar")
    if W_enc.dim() != 2:
        raise ValueError(f"{op}: W_enc must have shape [d_in, d_sae], got {tuple(W_enc.shape)}")
    if W_enc.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{op}: x must have shape [*batch, d_in={W_enc.shape[0]}], W_enc being [d_in, d_sae] = "
            f"{list(W_enc.shape)}; got {tuple(x.shape)}"
        )
    check_device(op, "x", x, W_enc)
    check_vector(op, "b_enc", b_enc, W_enc.shape[1], W_enc)
    if x.dtype == torch.float16 and not torch.compiler.is_compiling():
        warnings.warn(
            "float16 overflows at 65504, below the residual stream of Gemma 3; prefer bfloat16",
            stacklevel=4,
        )


def check_decoder(
    op: str, acts: SparseActs, W_dec: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Activations and decoder fit together; the result can have `dtype`."""
    if not isinstance(acts, SparseActs):
        raise TypeError(f"{op}: acts must be a SparseActs, got {type(acts).__name__}")
    check_float(op, "W_dec", W_dec)
    if W_dec.dim() != 2 or W_dec.shape[0] != acts.shape[-1]:
        raise ValueError(
            f"{op}: W_dec must have shape [d_sae={acts.shape[-1]}, d_out], got {tuple(W_dec.shape)}"
        )
    check_float(op, "acts.values", acts.values)
    check_device(op, "acts", acts.values, W_dec)
    if dtype is not None:
        check_float_dtype(op, "dtype", dtype)


def skip_input(op: str, x: Any, acts: Any, W_skip: Tensor) -> Tensor:
    """The x of a skip connection, of which the activations were made."""
    if not isinstance(acts, SparseActs):
        raise TypeError(f"{op}: acts must be a SparseActs, got {type(acts).__name__}")
    if x is None:
        raise ValueError(f"{op}: this transcoder has an affine skip connection: pass x")
    check_float(op, "x", x)
    expected = (*acts.shape[:-1], W_skip.shape[0])
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{op}: x must have the shape that was encoded, {expected}, got {tuple(x.shape)}"
        )
    check_device(op, "x", x, W_skip)
    return x  # type: ignore[no-any-return]


def recon_2d(op: str, recon: Any, acts: SparseActs, W_dec: Tensor) -> Tensor:
    """`recon [*batch, d_out]`, which `op` writes, as a detached `[n, d_out]` view."""
    check_float(op, "recon", recon)
    expected = (*acts.shape[:-1], W_dec.shape[1])
    if tuple(recon.shape) != expected:
        raise ValueError(f"{op}: recon must have shape {expected}, got {tuple(recon.shape)}")
    check_device(op, "recon", recon, W_dec)
    if recon.is_neg():
        raise ValueError(
            f"{op}: recon must not be a negated view (recon.is_neg()): its memory holds the "
            "negated numbers; pass recon.resolve_neg(), a copy"
        )
    try:
        return recon.detach().view(acts.n, W_dec.shape[1])  # type: ignore[no-any-return]
    except RuntimeError:
        raise ValueError(
            f"{op}: recon of shape {expected} and strides {tuple(recon.stride())} has no view of "
            f"shape {(acts.n, W_dec.shape[1])}: pass recon.contiguous()"
        ) from None


def check_vector(op: str, name: str, t: Tensor, size: int, like: Tensor) -> None:
    """A `[size]` floating-point tensor beside `like`."""
    check_float(op, name, t)
    if t.dim() != 1 or t.shape[0] != size:
        raise ValueError(f"{op}: {name} must have shape [{size}], got {tuple(t.shape)}")
    check_device(op, name, t, like)


def check_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """One device for everything."""
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device}, the weights are on {like.device}")


def check_max_nnz(op: str, max_nnz: int | None, x: Tensor) -> None:
    """A capacity is None or an int >= 0; not None while a CUDA graph is captured."""
    if max_nnz is not None:
        check_count(op, "max_nnz", max_nnz, kind="an int or None")
    elif x.is_cuda and not torch.compiler.is_compiling():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{op}: a CUDA graph cannot wait for the number of entries: pass max_nnz"
            )


def check_guess(op: str, guess: float | None) -> None:
    """A guess is None or any number: it cannot change the result."""
    if guess is not None and (isinstance(guess, bool) or not isinstance(guess, (int, float))):
        raise TypeError(f"{op}: guess must be a number or None, got {type(guess).__name__}")


def check_pairs(op: str, rows: Any, latents: Any, like: Tensor) -> None:
    """Two 1-D integer tensors of equal length beside `like`."""
    for name, t in (("rows", rows), ("latents", latents)):
        if not isinstance(t, Tensor) or t.is_floating_point() or t.dtype == torch.bool:
            raise TypeError(f"{op}: {name} must be an integer tensor")
        if t.dim() != 1 or t.shape != rows.shape:
            raise ValueError(
                f"{op}: rows and latents must be 1-D of equal length, got "
                f"{tuple(rows.shape)} and {tuple(latents.shape)}"
            )
        check_device(op, name, t, like)
