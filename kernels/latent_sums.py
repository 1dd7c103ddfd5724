"""Gradients of the encoder's bias and of the threshold: sums over each latent's entries.

    d_b_enc[j] = sum gradient[e] gate[e]
    d_threshold[j] = -(1 / bandwidth) sum in_window[e] (threshold[j] gradient[e] + d_gate[e])
    in_window[e] = gate[e] == 0 or values[e] < threshold[j] + bandwidth / 2

Source: pseudo-derivatives of JumpReLU with a rectangle kernel, arXiv 2407.14435, section 3.
A program takes BLOCK_L latents and walks their segments side by side, BLOCK_E entries at a time;
the lanes of a latent are summed in a fixed tree at the end: no bit depends on its neighbours.
Bound by 16 bytes per entry, and latency: the longest segment takes count / BLOCK_E steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent_order import D_GATE, GATE, GRADIENT, VALUES, LatentOrder
from .launching import choose, launch


@triton.jit
def _latent_sums_kernel(
    d_b_enc,  # [d_sae] fp32
    d_threshold,  # [d_sae] fp32 or None
    feature_offsets,  # [d_sae + 1] int64
    values,  # [capacity] fp32, as the next three
    gate,
    gradient,
    d_gate,
    threshold,  # [d_sae] fp32 or None
    d_sae,
    capacity,
    bandwidth,
    half,  # bandwidth / 2
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    held = latent < d_sae
    begin = tl.maximum(tl.load(feature_offsets + latent, mask=held, other=0), 0)  # [BLOCK_L]
    end = tl.load(feature_offsets + latent + 1, mask=held, other=0)  # [BLOCK_L]
    end = tl.minimum(end, capacity)
    bias = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    window = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    if threshold is not None:
        theta = tl.load(threshold + latent, mask=held, other=0.0)[:, None]  # [BLOCK_L, 1]
    for at in range(0, tl.max(end - begin, axis=0), BLOCK_E):
        position = (begin + at)[:, None] + tl.arange(0, BLOCK_E)[None, :]
        inside = position < end[:, None]
        d = tl.load(gradient + position, mask=inside, other=0.0)  # [BLOCK_L, BLOCK_E]
        on = tl.load(gate + position, mask=inside, other=0.0)  # [BLOCK_L, BLOCK_E]
        bias += d * on
        if threshold is not None:
            value = tl.load(values + position, mask=inside, other=0.0)  # [BLOCK_L, BLOCK_E]
            term = theta * d + tl.load(d_gate + position, mask=inside, other=0.0)
            in_window = inside & ((on == 0.0) | (value < theta + half))
            window += tl.where(in_window, term, 0.0)
    tl.store(d_b_enc + latent, tl.sum(bias, axis=1), mask=held)
    if threshold is not None:
        quotient = tl.div_rn(tl.sum(window, axis=1), tl.zeros([BLOCK_L], tl.float32) - bandwidth)
        tl.store(d_threshold + latent, quotient, mask=held)


def latent_sums(
    order: LatentOrder, threshold: Tensor | None, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """`d_b_enc [d_sae]`, and `d_threshold [d_sae]` or, without a threshold, `[0]`.

    Args:
        order: the entries in latent order, with all four sources.
        threshold: `[d_sae]` float32, or None.
        bandwidth: width of the window, > 0 with a threshold.
    """
    d_sae, capacity = order.feature_offsets.shape[0] - 1, order.tokens.shape[0]
    device = order.tokens.device
    d_b_enc = torch.empty(d_sae, dtype=torch.float32, device=device)
    wanted = d_sae if threshold is not None else 0
    d_threshold = torch.empty(wanted, dtype=torch.float32, device=device)
    per_latent = triton.cdiv(capacity, max(d_sae, 1))
    config = choose("latent_sums", device, entries=per_latent)
    launch(
        _latent_sums_kernel,
        triton.cdiv(d_sae, config["BLOCK_L"]),
        *(d_b_enc, d_threshold if wanted else None, order.feature_offsets),
        *(order.sources[k] for k in (VALUES, GATE, GRADIENT, D_GATE)),
        *(None if threshold is None else threshold.contiguous(), d_sae, capacity),
        *(float(bandwidth), bandwidth / 2),
        **config,
    )
    return d_b_enc, d_threshold
