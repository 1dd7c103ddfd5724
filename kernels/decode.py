"""decode and decode_: the sparse product of activations with the decoder.

    recon [n, d_out] = b_dec [d_out] + values * W_dec[indices]    (entries of a row in stored order)

`accumulate` is the same sum over any matrix of feature vectors; the encoder's gradient of x is one.
At n = 8192, d = 5376, L0 = 64 in bf16: 5.6 GB of rows named by the entries and 5.6 GFLOP, so
1.3 ms from DRAM at 4.3 TB/s, less where slabs of the decoder stay in the L2. See `token_sum`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .dense import entry_sum, sum_pays
from .launching import INTERPRETED, choose
from .token_sum import token_sum
from .token_sum_pieces import token_sum_pieces

COPY_ELEMENTS = 2**26
"""Elements of a matrix with columns apart that are copied at a time: 128 MiB in bf16."""


def decode(
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return `recon [n, d_out]` in `dtype`; the feature-major view is not needed."""
    recon = W_dec.new_empty(offsets.shape[0] - 1, W_dec.shape[1], dtype=dtype)
    accumulate(offsets, indices, values, W_dec, b_dec, recon, False)
    return recon


def decode_(recon: Tensor, offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> None:
    """Add the sum to `recon`, any float dtype and strides, rounding once.

    Raises:
        RuntimeError: `recon` overlaps itself or memory that is read meanwhile.
    """
    _check_target(recon, {"W_dec": W_dec, "values": values, "offsets": offsets, "indices": indices})
    accumulate(offsets, indices, values, W_dec, None, recon, True)


def accumulate(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """`out[i] = bias + sum_e coefficients[e] * matrix[indices[e]]` in float32, rounded once.

    Nothing waits for the device. Entries whose index is out of range contribute nothing.

    Args:
        offsets: `[n + 1]` int64.
        indices: `[capacity]` int32.
        coefficients: `[capacity]` float32.
        matrix: `[F, d]` float32, bfloat16 or float16, any strides; rows that are contiguous are
            read in place, others are copied first, part by part, when there are many entries.
        bias: `[d]` float32, or None for 0.
        out: `[n, d]`, any float dtype and strides.
        add: add to `out` rather than overwrite it.
    """
    if sum_pays(indices.shape[0], out.shape[0], matrix, out.dtype):
        entry_sum(offsets, indices, coefficients, matrix, bias, out, add)
        return
    if INTERPRETED and out.dtype == torch.bfloat16:  # the interpreter truncates to bfloat16
        wide = out.float()
        accumulate(offsets, indices, coefficients, matrix, bias, wide, add)
        out.copy_(wide)
        return
    entries = (offsets.contiguous(), indices.contiguous(), coefficients.contiguous())
    bias = None if bias is None else bias.contiguous()
    for start, rows in column_parts(matrix, indices.shape[0]):
        part = slice(start, start + rows.shape[1])
        part_of_bias = None if bias is None else bias[part]
        _accumulate(*entries, rows, part_of_bias, out[:, part], add)


def column_parts(matrix: Tensor, capacity: int) -> Iterator[tuple[int, Tensor]]:
    """Ranges of a matrix' columns as (first column, part), such that reading rows of them is fast.

    The matrix itself when its rows are contiguous, or when too few are read for copies to pay: a
    gathered element costs a 32-byte sector, a copy twice the size of every element. The order of
    sums within a column does not depend on it.
    """
    features, d = matrix.shape
    copies_cost = 2 * features * matrix.element_size()
    if matrix.stride(1) == 1 or 32 * capacity <= copies_cost:
        yield 0, matrix
        return
    width = max(COPY_ELEMENTS // max(features, 1), 64)
    for start in range(0, d, width):
        yield start, matrix[:, start : start + width].contiguous()


def _accumulate(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    (n, d), capacity = out.shape, indices.shape[0]
    config = choose("token_sum", matrix.device, n=n, d=d, itemsize=matrix.element_size())
    entries = (offsets, indices, coefficients, matrix)
    pieces = None
    if capacity > config["PIECE"]:
        slots = triton.cdiv(capacity, config["PIECE"])
        pieces = coefficients.new_empty(slots, d, dtype=torch.float32)
        token_sum_pieces(*entries, pieces, config)
    token_sum(*entries, bias, pieces, out, add, config)


def _check_target(recon: Tensor, read: dict[str, Tensor]) -> None:
    """Refuse targets for which the sum would depend on the order of the writes."""
    if not _distinct(recon):
        raise RuntimeError(
            f"decode_: recon must not overlap itself, got shape {list(recon.shape)} and strides "
            f"{list(recon.stride())}; pass recon.clone()"
        )
    begin, end = _span(recon)
    for name, tensor in read.items():
        other_begin, other_end = _span(tensor)
        if max(begin, other_begin) < min(end, other_end):
            raise RuntimeError(
                f"decode_: recon shares memory with {name}, which is read while recon is written; "
                f"pass {name}.clone()"
            )


def _distinct(t: Tensor) -> bool:
    """No two elements of a matrix lie in one place."""
    spans = sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True))
    reach = 0
    for stride, size in spans:
        if size > 1 and stride <= reach:
            return t.numel() == 0
        reach += (size - 1) * stride
    return True


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one after its last."""
    if t.numel() == 0 or t.is_meta:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
