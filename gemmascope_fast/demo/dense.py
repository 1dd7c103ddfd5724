"""The comparison: the same JumpReLU SAE in dense eager PyTorch, written to be fast.

    pre = x @ W_enc + b_enc;  acts = pre * (pre > threshold);  recon = acts @ W_dec + b_dec

One autograd function yields the activations and the sums of the gate that the penalties need, so
that no [n, d_sae] gate, and no gradient of it, is ever stored: only `pre` and `acts` are.
Source of the pseudo-derivatives: arXiv 2407.14435, section 3 (rectangle kernel).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class JumpReLUGate(torch.autograd.Function):
    """`(pre [n, d_sae], threshold [d_sae]) -> (acts [n, d_sae], l0 [n], counts [d_sae])`.

    d_pre = d_acts * H(pre - threshold); with K = [|pre - threshold| < bandwidth / 2],
    d_threshold = -(1 / bandwidth) * sum_i K * (threshold * d_acts + d_l0[i] + d_counts).
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, and count along both axes."""
        gate = pre > threshold
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * gate, gate.sum(1, dtype=pre.dtype), gate.sum(0, dtype=pre.dtype)

    @staticmethod
    def backward(
        ctx: Any, d_acts: Tensor, d_l0: Tensor, d_counts: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        """Straight-through gradients; the penalties' part is two reductions of the window."""
        pre, threshold = ctx.saved_tensors
        half = ctx.bandwidth / 2
        window = ((pre > threshold - half) & (pre < threshold + half)).to(pre.dtype)
        d_threshold = d_l0 @ window + d_counts * window.sum(0)
        d_threshold += threshold * window.mul_(d_acts).sum(0)
        return d_acts * (pre > threshold), d_threshold.div_(-ctx.bandwidth), None


class DenseSAE(nn.Module):
    """JumpReLU SAE with dense activations.

    Attributes:
        W_enc: `[d_in, d_sae]`, in the strides it is given.
        b_enc, threshold: `[d_sae]`.
        W_dec: `[d_sae, d_in]`.
        b_dec: `[d_in]`.
    """

    def __init__(self, parameters: dict[str, Tensor], bandwidth: float) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(parameters["W_enc"])
        self.b_enc = nn.Parameter(parameters["b_enc"])
        self.threshold = nn.Parameter(parameters["threshold"])
        self.W_dec = nn.Parameter(parameters["W_dec"])
        self.b_dec = nn.Parameter(parameters["b_dec"])
        self.bandwidth = bandwidth

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x [n, d_in] -> (recon [n, d_in], l0 [n], counts [d_sae])`."""
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        gated = JumpReLUGate.apply(pre, self.threshold, self.bandwidth)  # type: ignore[no-untyped-call]
        acts, l0, counts = gated
        return torch.addmm(self.b_dec, acts, self.W_dec), l0, counts
