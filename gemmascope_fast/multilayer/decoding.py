"""`multi_decode`: several sparse codes decoded into one stack of outputs.

    recon[..., j, :] = b_dec[j] + skip[..., j, :] + sum over i of acts[i] @ W_dec[i][:, j]

Source by source, added in float32 into the columns of `recon` that the source reaches, so one
reconstruction exists however many sources there are. The gradient reads the same columns of
`d_recon` in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..checks import check_decoder, check_device, check_float, check_float_dtype
from ..operands import autocast, widen
from ..sparse import SparseActs

OP = "multi_decode"


def multi_decode(
    acts: Sequence[SparseActs],
    W_dec: Sequence[Tensor],
    b_dec: Tensor,
    *,
    skip: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Reconstruct L outputs from several sources, reading only the decoder rows of stored entries.

    `recon[..., j, :] = b_dec[j] (+ skip[..., j, :]) + sum_i acts[i] @ W_dec[i][j]`, where
    `W_dec[i][j]` are the d columns that source i has for output j. A source of `m * d` columns
    reaches the last m outputs: the causal triangle, packed. Memory beyond the result does not grow
    with the number of sources; sums are float32 and rounded once.

    Args:
        acts: activations of each source, of one batch shape.
        W_dec: `[d_sae, m * d]` per source, float32, bfloat16, float16 or float64, `1 <= m <= L`;
            the first has all L outputs. Fastest when its rows are contiguous.
        b_dec: `[L, d]`, used in float32.
        skip: `[*batch, L, d]` added to the result, or None.
        dtype: dtype of the result; default that of `W_dec[0]`.

    Returns:
        `[*batch, L, d]`, differentiable in the activations, W_dec, b_dec and skip.

    Raises:
        TypeError: `acts` holds something else than `SparseActs`, or a tensor is not floating point.
        ValueError: shapes, devices or the numbers of sources disagree.
        RuntimeError: an index of `acts` is out of range (CPU).
    """
    _check(acts, W_dec, b_dec, skip, dtype)
    dtype = W_dec[0].dtype if dtype is None else dtype
    sources: list[Tensor | None] = []
    for source, W in zip(acts, W_dec, strict=True):
        wanted = torch.is_grad_enabled() and W.requires_grad
        transpose = source.by_feature() if wanted else (None, None)
        (W,) = autocast(W)
        sources += [source.offsets, source.indices, widen(source.values), W, *transpose]
    flat = None if skip is None else skip.reshape(acts[0].n, b_dec.numel())
    # torch.export keeps no backward of a Function: ops that have their own stand in its program
    traced = torch.compiler.is_exporting() and torch.is_grad_enabled()
    run: Callable[..., Tensor] = _composed if traced else _MultiDecode.apply
    recon = run(b_dec.reshape(-1), flat, *sources)
    return recon.to(dtype).reshape(*acts[0].shape[:-1], *b_dec.shape)


class _Source(NamedTuple):
    """The operands of one source, as `decode_backward` takes them."""

    offsets: Tensor
    indices: Tensor
    values: Tensor
    W_dec: Tensor
    feature_offsets: Tensor | None
    permutation: Tensor | None

    def columns(self, recon: Tensor) -> Tensor:
        """The part of `recon [n, L * d]` that the source reaches."""
        return recon[:, recon.shape[1] - self.W_dec.shape[1] :]


FIRST = 2  # operands before those of the sources


class _MultiDecode(torch.autograd.Function):
    """`[n, L * d]` in float32 (float64 where an operand is) from `b_dec [L * d]` and the sources.

    Source: the chain rule; each source's gradients are those of `decode`.
    """

    @staticmethod
    def forward(ctx: Any, b_dec: Tensor, skip: Tensor | None, *operands: Tensor | None) -> Tensor:
        sources = list(_sources(operands))
        recon = _start(b_dec, skip, sources)
        for s in sources:
            add = ops.overload("decode_", recon, s.values, s.W_dec)
            add(s.columns(recon), s.offsets, s.indices, s.values, s.W_dec)
        ctx.save_for_backward(*operands)
        return recon

    @staticmethod
    def backward(ctx: Any, d_recon: Tensor) -> tuple[Tensor | None, ...]:
        d_recon = d_recon.contiguous()  # an expanded gradient: copied here, not once per source
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None, d_recon if needs[1] else None]
        for s in _sources(ctx.saved_tensors):
            _, _, values, weights, _, _ = needs[len(found) : len(found) + len(s)]
            need = values, weights, len(found) == FIRST and needs[0]  # the first sees all of b_dec
            op = ops.overload("decode_backward", d_recon, s.values, s.W_dec)
            results = op(s.columns(d_recon), *s, *need) if any(need) else (None,) * len(need)
            d_values, d_W_dec, d_b_dec = (
                result if wanted else None for result, wanted in zip(results, need, strict=True)
            )
            found += [None, None, d_values, d_W_dec, None, None]
            found[0] = d_b_dec if found[0] is None else found[0]
        return tuple(found)


def _start(b_dec: Tensor, skip: Tensor | None, sources: Sequence[_Source]) -> Tensor:
    """A new `[n, L * d]` in the dtype of the sums, before any source is added."""
    floats = [b_dec, *(t for s in sources for t in (s.values, s.W_dec))]
    floats += [] if skip is None else [skip]
    double = any(t.dtype == torch.float64 for t in floats)
    bias = b_dec.to(torch.float64 if double else torch.float32)
    if skip is not None:
        return skip + bias
    n = sources[0].offsets.shape[0] - 1
    return bias.expand(n, -1).clone(memory_format=torch.contiguous_format)


def _composed(b_dec: Tensor, skip: Tensor | None, *operands: Tensor | None) -> Tensor:
    """`_MultiDecode` by `decode`, at the price of two copies of the result for each source."""
    sources = list(_sources(operands))
    recon = _start(b_dec, skip, sources)
    for s in sources:
        decode = ops.overload("decode", recon, s.values, s.W_dec)
        transpose = s.feature_offsets, s.permutation
        part = decode(s.offsets, s.indices, s.values, s.W_dec, None, *transpose, recon.dtype)
        recon = recon + torch.nn.functional.pad(part, (recon.shape[1] - part.shape[1], 0))
    return recon


def _sources(operands: Sequence[Any]) -> Iterator[_Source]:
    size = len(_Source._fields)
    for i in range(0, len(operands), size):
        yield _Source(*operands[i : i + size])


def _check(
    acts: Sequence[SparseActs],
    W_dec: Sequence[Tensor],
    b_dec: Tensor,
    skip: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    if not isinstance(acts, Sequence):
        raise TypeError(f"{OP}: acts must be a sequence of SparseActs, got {type(acts).__name__}")
    check_float(OP, "b_dec", b_dec)
    if b_dec.dim() != 2:
        raise ValueError(f"{OP}: b_dec must have shape [L, d], got {tuple(b_dec.shape)}")
    if len(acts) != len(W_dec) or len(acts) == 0:
        raise ValueError(
            f"{OP}: acts and W_dec must have one element per source, got {len(acts)} and "
            f"{len(W_dec)}"
        )
    layers, d = b_dec.shape
    batch = acts[0].shape[:-1] if isinstance(acts[0], SparseActs) else ()
    for i, (source, W) in enumerate(zip(acts, W_dec, strict=True)):
        check_decoder(f"{OP}: source {i}", source, W)
        check_device(OP, "b_dec", b_dec, W)
        if source.shape[:-1] != batch:
            raise ValueError(
                f"{OP}: acts must have one batch shape, got {batch} in source 0 and "
                f"{source.shape[:-1]} in source {i}"
            )
        outputs, rest = divmod(W.shape[1], d)
        if rest or not 1 <= outputs <= layers or (i == 0 and outputs < layers):
            size = layers if i == 0 else f"1 .. {layers}"
            raise ValueError(
                f"{OP}: W_dec[{i}] must have shape [d_sae, m * d] with m = {size} and d = {d}, as "
                f"b_dec is [L, d] = {[layers, d]}; got {tuple(W.shape)}"
            )
    if skip is not None:
        check_float(OP, "skip", skip)
        check_device(OP, "skip", skip, W_dec[0])
        if tuple(skip.shape) != (*batch, layers, d):
            raise ValueError(
                f"{OP}: skip must have shape {(*batch, layers, d)}, got {tuple(skip.shape)}"
            )
    if dtype is not None:
        check_float_dtype(OP, "dtype", dtype)
