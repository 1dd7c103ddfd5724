"""fused_sparse_step: sae_backward without d_x, then Adam on both matrices, row by row.

    d_W_dec[j], d_W_enc[:, j], d_b_enc, d_threshold, d_b_dec as sae_backward;  adam_step_ on row j

A program walks the entries of one latent as `latent_backward.py` does, and both gradient rows are
still in registers when `adam_row.py` consumes them: no gradient is written, and a latent without
entries that is not live costs three loads. Rows that do not fit (8,192 elements), and what is
faster as dense products, are composed of the backward's passes and `adam_step_`, with gradients in
float32. Both give the bits of the two ops apart. Bound by nnz * (d_in + d_out) * itemsize gathered
bytes and, per element of a touched row, 16 in float32, 8 with bfloat16 weights and 8-bit moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam_matrix import AdamMatrix, adam_matrix
from .adam_row import update_row
from .adam_step import step_rows
from .dense import backward_pays
from .latent_backward import add_pieces, fits, later_sums, walk
from .latent_order import LatentOrder, latent_order
from .latent_sums import latent_sums
from .launching import launch
from .sae_backward import Groups, composed_gradients, groups_of
from .weight_gradient import adjacent_columns

OP = "fused_sparse_step"


class Entries(NamedTuple):
    """One kernel argument: the entries in latent order, and the rows that they read."""

    partial: Tensor
    """`[windows, d_in + d_out]` float32, sums of later pieces"""
    sources: Tensor
    """`[4, capacity]` float32"""
    feature_offsets: Tensor
    """`[d_sae + 1]` int64"""
    tokens: Tensor
    """`[capacity]` int32"""
    W_dec: Tensor
    """`[d_sae, d_out]`, columns adjacent, as the next two"""
    g: Tensor
    """`[m, d_out]`"""
    x: Tensor
    """`[n, d_in]`"""
    first: int
    """latent of the first program"""
    capacity: int
    n: int
    w_stride: int
    g_stride: int
    x_stride: int


@triton.jit(
    do_not_specialize=[f"{side}_{of}" for side in ("enc", "dec") for of in ("step", "tail", "seed")]
)
def _fused_sparse_step_kernel(
    entries,  # Entries
    encoder,  # adam_matrix.Rows of W_enc.t(), [d_sae, D_IN]
    decoder,  # adam_matrix.Rows of W_dec, [d_sae, D_OUT]
    enc_step,
    enc_tail,
    enc_seed,
    dec_step,
    dec_tail,
    dec_seed,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    STACKED: tl.constexpr,
    ENC_PARALLEL: tl.constexpr,
    ENC_NORM: tl.constexpr,
    DEC_PARALLEL: tl.constexpr,
    DEC_NORM: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64) + entries.first
    begin = tl.maximum(tl.load(entries.feature_offsets + latent), 0)
    end = tl.minimum(tl.load(entries.feature_offsets + latent + 1), entries.capacity)
    col_out = tl.arange(0, BLOCK_OUT)
    read = tl.where(begin < end, D_OUT, 0)  # nothing of a latent without entries
    w = tl.load(  # [1, BLOCK_OUT]
        entries.W_dec + latent * entries.w_stride + col_out[None, :],
        mask=((col_out < D_OUT) & (col_out < read))[None, :],
        other=0.0,
    )
    # fmt: off
    enc, dec = walk(
        begin, tl.minimum(begin + SEGMENT, end), w, entries.sources, entries.tokens, entries.g,
        entries.x, entries.capacity, entries.n, entries.g_stride, entries.x_stride,
        D_IN, D_OUT, BLOCK_IN, BLOCK_OUT, BLOCK_E, STAGES, STACKED,
    )
    # fmt: on
    enc, dec = add_pieces(enc, dec, entries.partial, begin, end, D_IN, D_OUT, SEGMENT)
    update_row(decoder, latent, dec, dec_step, dec_tail, dec_seed, D_OUT, DEC_PARALLEL, DEC_NORM)
    update_row(encoder, latent, enc, enc_step, enc_tail, enc_seed, D_IN, ENC_PARALLEL, ENC_NORM)


def fused_sparse_step(
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
    encoder_state: Sequence[Tensor],
    decoder_state: Sequence[Tensor],
    encoder_rates: Sequence[float],
    decoder_rates: Sequence[float],
    encoder_rule: Sequence[int],
    decoder_rule: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`d_b_enc`, `d_threshold`, `d_b_dec`; matrices and states change in place; never waits."""
    if permutation.shape != indices.shape:
        raise RuntimeError(
            f"{OP}: permutation must have shape {list(indices.shape)}, got "
            f"{list(permutation.shape)}"
        )
    encoder = adam_matrix(OP, "W_enc", W_enc.t(), encoder_state, encoder_rates, encoder_rule)
    decoder = adam_matrix(OP, "W_dec", W_dec, decoder_state, decoder_rates, decoder_rule)
    sources = (values, gate, d_values, d_gate)
    order = latent_order(offsets, indices, feature_offsets, permutation, sources)
    dense = backward_pays(order, W_dec, d_recon[-1], x)
    groups = groups_of(d_recon, group_ends)
    if fits(x.shape[1], W_dec.shape[1]) and not dense:
        in_registers(order, x, groups, encoder, decoder)
    else:
        enc, dec = (
            torch.empty(rows.shape, dtype=torch.float32, device=x.device)
            for rows in (W_enc.t(), W_dec)
        )
        order = composed_gradients(order, offsets, x, W_dec, groups, enc, dec)
        step_rows(encoder, enc)
        step_rows(decoder, dec)
    sums = latent_sums(order, threshold if bandwidth > 0 else None, bandwidth)
    return *sums, d_recon.sum((0, 1), dtype=torch.float32)


def in_registers(
    order: LatentOrder, x: Tensor, groups: Groups, encoder: AdamMatrix, decoder: AdamMatrix
) -> None:
    """Backward and update in one pass; the gradients in `order` become complete."""
    x, W_dec, capacity = adjacent_columns(x), decoder.rows.weight, order.tokens.shape[0]
    rules = {f"ENC_{name}": on for name, on in encoder.options.items()}
    rules |= {f"DEC_{name}": on for name, on in decoder.options.items()}
    for first, last, seen in groups:
        g = adjacent_columns(seen)
        partial, options = later_sums(order, W_dec, g, x, first, last)
        entries = Entries(
            *(partial, order.sources, order.feature_offsets, order.tokens),
            *(W_dec, g, x, first, capacity, x.shape[0]),
            *(W_dec.stride(0), g.stride(0), x.stride(0)),
        )
        launch(
            _fused_sparse_step_kernel,
            last - first,
            *(entries, encoder.rows, decoder.rows, *encoder.clock, *decoder.clock),
            **options,
            **rules,
        )
