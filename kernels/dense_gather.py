"""dense_gather: the elements of a dense product at the entries of its rows.

    out[e] = products[i, indices[e]]  for e in [offsets[i], offsets[i + 1])

`products [rows, width]`, one program per row. Bound by one 32-byte sector and 8 bytes per entry.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import choose, launch


@triton.jit
def _dense_gather_kernel(
    out_ptr,  # [capacity] fp32
    products_ptr,  # [rows, width] fp32
    offsets_ptr,  # [rows + 1] int64
    indices_ptr,  # [capacity] int32
    capacity,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), capacity)
    products_ptr += row * width
    for at in range(begin, end, BLOCK):
        e = at + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + e, mask=e < end, other=-1)  # [BLOCK]
        valid = (index >= 0) & (index < width)
        product = tl.load(products_ptr + index.to(tl.int64), mask=valid, other=0.0)  # [BLOCK]
        tl.store(out_ptr + e, product, mask=valid)


def dense_gather(offsets: Tensor, indices: Tensor, products: Tensor, out: Tensor) -> None:
    """Write `out [capacity]` float32 at the entries whose index is in range, nowhere else.

    Args:
        offsets: `[rows + 1]` int64, a stretch of the batch's, contiguous.
        indices: `[capacity]` int32, contiguous.
        products: `[rows, width]` float32, contiguous.
        out: receives the elements.
    """
    rows, width = products.shape
    launch(
        _dense_gather_kernel,
        rows,
        *(out, products, offsets, indices, indices.shape[0], width),
        **choose("dense_gather", out.device),
    )
