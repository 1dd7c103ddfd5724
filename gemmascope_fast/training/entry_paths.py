"""The sparse path of a block: decode of its entries by prefix, and their gradients.

One `sae_backward` makes every gradient where all weights are trained and the window's gradient is
the op's own. Else `decode_backward` and `encode_backward` make the wanted ones apart, and between
them `window_gradients` weighs the entries near their threshold as the semantics say:

    step = w(u) / bandwidth * (s * d_values + d_gate)   d_threshold[j] -= sum_i step   d_pre += step
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..entries import row_offsets
from .evaluation import Gradients, Inputs

ENCODER = ("W_enc", "b_enc", "threshold")

NARROW = ("cuda",)
"""Devices whose passes over bfloat16 read gradients of reconstructions in it too. On an H200, n =
8,192, d = 5,376, F = 65,536, a loss and its gradients take 14.9 ms so and 16.6 ms in float32
(bench/results/cuda_h200.json)."""

Incoming = tuple[Tensor, Tensor | None, Tensor | None]
"""`d_recons [G, r, d_out]`, and per entry `d_values` and `d_gate`, or None."""


@dataclass(frozen=True)
class Block:
    """Entries of some rows, as the encoder ops return them, and the rows of x they come from."""

    x: Tensor
    offsets: Tensor
    indices: Tensor
    values: Tensor
    gate: Tensor
    feature_offsets: Tensor | None
    permutation: Tensor | None

    @property
    def tokens(self) -> Tensor:
        """`[nnz]` row of each entry."""
        positions = torch.arange(self.indices.shape[0], device=self.indices.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), positions, right=True)

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets, indices, values."""
        return self.offsets, self.indices, self.values

    @property
    def view(self) -> tuple[Tensor | None, Tensor | None]:
        """The feature-major view, where there is one."""
        return self.feature_offsets, self.permutation

    def group(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions of the entries of latents `start <= j < end`, and those apart.

        Returns:
            positions, offsets, indices counted from 0, values.
        """
        at = ((self.indices >= start) & (self.indices < end)).nonzero()[:, 0]
        offsets = row_offsets(self.tokens[at], self.x.shape[0])
        return at, offsets, self.indices[at] - start, self.values[at]


def decode_prefixes(inputs: Inputs, block: Block, ends: tuple[int, ...]) -> Tensor:
    """`[G, r, d_out]` reconstructions by the first latents; each adds to the one before."""
    W_dec, op = inputs.tensors["W_dec"], inputs.op("decode")
    b_dec = inputs.tensors["b_dec"] if inputs.whole.first else None
    if len(ends) == 1:
        found: Tensor = op(*block.entries, W_dec, b_dec, *block.view, inputs.acc)
        return found[None]
    recons: list[Tensor] = []
    start = 0
    for end in ends:
        _, *entries = block.group(start, end)
        bias = b_dec if start == 0 else None
        recon = op(*entries, W_dec[start:end], bias, None, None, inputs.acc)
        recons.append(recon if start == 0 else recons[-1] + recon)
        start = end
    return torch.stack(recons)


def backward(
    inputs: Inputs, block: Block, ends: tuple[int, ...], incoming: Incoming, gradients: Gradients
) -> Tensor:
    """Add the weights' gradients; returns d_x, of size 0 when not wanted."""
    if gradients.started("W_dec", *ENCODER):  # a term's own, the decoder norms of L1 say
        gradients.kept = None
    if gradients.kept is not None:  # a fused optimizer's step does the rest
        names = ("d_recon", "d_values", "d_gate")
        found = {"x": block.x, "entries": (*block.entries, block.gate), "transpose": block.view}
        gradients.kept |= found | {"ends": ends} | dict(zip(names, incoming, strict=True))
        return block.x.new_empty(0)
    if inputs.needs >= {"W_enc", "W_dec"} and inputs.semantics.own_gradient:
        return _merged(inputs, block, ends, incoming, gradients)
    need_values, need_W_dec = inputs.needs_any("x", *ENCODER), inputs.needs_any("W_dec")
    d_recons, d_values, d_gate = incoming
    if not (need_values or need_W_dec):
        return block.x.new_empty(0)
    needs = (need_values, need_W_dec, False)
    if len(ends) == 1:
        entries, W_dec = (*block.entries, inputs.tensors["W_dec"]), inputs.op("decode_backward")
        dot, d_W_dec, _ = W_dec(d_recons[0], *entries, *block.view, *needs)
        gradients.add("W_dec", d_W_dec)
    else:
        dot = _decode_backward_groups(inputs, block, ends, d_recons, gradients)
    if not need_values:
        return block.x.new_empty(0)
    d_values = dot if d_values is None else dot + d_values
    return _encode_backward(inputs, block, d_values, d_gate, gradients)


def gathered(inputs: Inputs, d_recons: Tensor) -> Tensor:
    """`d_recons` as the passes of one layer read its rows, one per entry.

    A GPU's passes are bound by those bytes: where x and the matrices are bfloat16 and the weights
    alone are trained, they are rounded to it, as the gradient that autograd hands `decode` is.
    """
    given = {inputs.tensors[name].dtype for name in ("x", "W_enc", "W_dec")}
    narrow = given == {torch.bfloat16} and not inputs.needs_any("x")
    return d_recons.bfloat16() if narrow and d_recons.device.type in NARROW else d_recons


def _merged(
    inputs: Inputs, block: Block, ends: tuple[int, ...], incoming: Incoming, gradients: Gradients
) -> Tensor:
    """All gradients in one pass over the entries."""
    tensors = inputs.tensors
    d_recons, d_values, d_gate = incoming
    encoder = (block.x, tensors["W_enc"], tensors.get("threshold"), inputs.bandwidth)
    d_x, d_W_enc, d_b_enc, d_threshold, d_W_dec, _ = inputs.op("sae_backward")(
        *(*encoder, tensors["W_dec"], d_recons, list(ends), *block.entries, _passes(inputs, block)),
        *(d_values, d_gate, *block.view, inputs.needs_any("x")),
    )
    gradients.add("W_enc", d_W_enc)
    gradients.add("b_enc", d_b_enc)
    gradients.add("threshold", d_threshold)
    gradients.add("W_dec", d_W_dec)
    return d_x  # type: ignore[no-any-return]


def _passes(inputs: Inputs, block: Block) -> Tensor:
    """1 for entries that pass their value's gradient to the pre-activation."""
    return torch.ones_like(block.gate) if inputs.semantics.zero_gradient else block.gate


def _decode_backward_groups(
    inputs: Inputs, block: Block, ends: tuple[int, ...], d_recons: Tensor, gradients: Gradients
) -> Tensor:
    """`decode_backward` of every prefix: `d_values [nnz]`; adds the gradient of W_dec."""
    need_values, need_W_dec = inputs.needs_any("x", *ENCODER), inputs.needs_any("W_dec")
    dot, start = torch.zeros_like(block.values), 0
    for group, end in enumerate(ends):
        at, *entries = block.group(start, end)
        view = inputs.op("by_feature")(*entries[:2], end - start) if need_W_dec else (None, None)
        seen, W_dec = d_recons[group:].sum(0), inputs.tensors["W_dec"][start:end]
        d_values, d_W_dec, _ = inputs.op("decode_backward")(
            *(seen, *entries, W_dec, *view, need_values, need_W_dec, False)
        )
        if need_values:
            dot[at] = d_values
        if need_W_dec:
            gradients.buffer("W_dec")[start:end] += d_W_dec
        start = end
    return dot


def _encode_backward(
    inputs: Inputs, block: Block, d_values: Tensor, d_gate: Tensor | None, gradients: Gradients
) -> Tensor:
    """The wanted gradients of the encoder from those of its entries."""
    tensors, threshold = inputs.tensors, inputs.tensors.get("threshold")
    needs = [inputs.needs_any(name) for name in ("x", *ENCODER)]
    bandwidth, gate = inputs.bandwidth, _passes(inputs, block)
    if bandwidth > 0 and not inputs.semantics.own_gradient:
        d_values, d_theta = window_gradients(inputs, block, d_values, d_gate)
        gradients.add("threshold", d_theta)
        needs[3], threshold, bandwidth, d_gate = False, None, 0.0, None
        gate = torch.ones_like(gate)
    d_x, *found = inputs.op("encode_backward")(
        *(d_values, d_gate, block.x, tensors["W_enc"], threshold, bandwidth),
        *(*block.entries, gate, *block.view, *needs),
    )
    for name, part, need in zip(ENCODER, found, needs[1:], strict=True):
        if need:
            gradients.add(name, part)
    return d_x  # type: ignore[no-any-return]


def window_gradients(
    inputs: Inputs, block: Block, d_values: Tensor, d_gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`d_pre [nnz]` and `d_threshold [d_sae]` by the semantics' kernel and slope."""
    semantics, tensors = inputs.semantics, inputs.tensors
    latents = block.indices.long()
    limits = tensors["threshold"].to(inputs.acc)[latents]
    near = (block.gate == 0) | (block.values < limits + inputs.emission / 2)
    at = near.nonzero()[:, 0]
    encoder = (block.x, tensors["W_enc"], tensors["b_enc"])
    pre = inputs.op("pre_at")(*encoder, block.tokens[at], latents[at])
    limit = limits[at]
    weight = semantics.weight(pre, limit, inputs.bandwidth)
    step = d_values[at] * (pre if semantics.slope == "pre" else limit)
    if d_gate is not None:
        through = d_gate[at]
        step = step + (through * block.gate[at] if semantics.gate_window == "active" else through)
    step = (step * weight).masked_fill(weight == 0, 0.0)
    d_pre = d_values * block.gate
    if semantics.gradient_to_x:
        d_pre = d_pre.index_put((at,), step, accumulate=True)
    d_theta = limits.new_zeros(inputs.d_sae).index_put((latents[at],), step, accumulate=True)
    return d_pre, -d_theta
