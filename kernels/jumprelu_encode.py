"""JumpReLU encoder: the active entries of `pre = x @ W_enc + b_enc` in CSR form.

    stored (i, j): pre > threshold[j], or pre > threshold[j] - bandwidth / 2 with value and gate 0

Source: arXiv 2407.14435, section 3.
Algorithm: `encode_tiles` records the hits of each tile in an arena, `scan_rows` turns the tiles'
counts into places, `place_entries` moves the records there, `insert_invalid` adds the first NaN of
each row. One host read sizes the result; with `max_nnz` there is none.
Bound by the product, 2 n d F operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .encode_tiles import encode_missing, encode_tiles
from .insert_invalid import insert_invalid
from .place_entries import place_entries
from .scan_rows import scan_rows

GUESSED_PER_ROW = 256
"""Entries per row that the first arena has room for: 2 KiB, whatever the number of latents."""
SMALLEST_ARENA = 65536


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    max_nnz: int | None,
    by_feature: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return offsets, indices, values, gate, needed and, when asked, the feature-major view.

    Without `max_nnz` the host waits once, for the size of the result. With it nothing waits, and
    more entries than `max_nnz` make every value NaN (indices 0, gate 1); `needed` is always true.
    `packed` is for CPUs.
    """
    n = x.shape[0]
    guess = max(SMALLEST_ARENA, GUESSED_PER_ROW * n)
    room = min(guess, n * W_enc.shape[1]) if max_nnz is None else max_nnz
    encoder = (x, W_enc, b_enc)
    tiles = encode_tiles(*encoder, room, threshold=threshold, bandwidth=bandwidth)
    offsets = scan_rows(tiles.counts, tiles.first_invalid)
    needed = offsets[-1].clone()
    if max_nnz is None:
        records, size = torch.stack([tiles.used, needed]).tolist()  # the one wait
        if records > room:
            tiles = encode_missing(tiles, records, *encoder, threshold, bandwidth)
    else:
        size = max_nnz
        offsets.clamp_(max=max_nnz)
    indices = torch.zeros(size, dtype=torch.int32, device=x.device)
    values = torch.zeros(size, dtype=torch.float32, device=x.device)
    gate = torch.zeros(size, dtype=torch.float32, device=x.device)
    place_entries(tiles, offsets, needed, indices, values, gate)
    assert tiles.first_invalid is not None
    insert_invalid(tiles.first_invalid, offsets, needed, indices, values, gate)
    if max_nnz is not None:
        values.masked_fill_(needed > max_nnz, float("nan"))
        gate.masked_fill_(needed > max_nnz, 1.0)
    return offsets, indices, values, gate, needed, *_view(offsets, indices, W_enc, by_feature)


def _view(offsets: Tensor, indices: Tensor, W_enc: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    if not wanted:
        return offsets.new_empty(0), offsets.new_empty(0)
    from .by_feature import by_feature

    return by_feature(offsets, indices, W_enc.shape[1])
