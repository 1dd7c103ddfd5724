"""Loss and gradients on one block of rows, by two paths with the same result.

*Sparse*: an encoder op with its straight-through window, `decode`, then one feature-major
`sae_backward`; work and memory follow the stored entries. *Dense*: five matrix products on a
`[rows, d_sae]` tile. With `G = H(pre - threshold)` and K the unit rectangle,

    recon  = (pre * G) @ W_dec + b_dec (+ x @ W_skip)     l0 = sum_j G
    d_acts = d_recon @ W_dec.T     d_pre = d_acts * G     d_W_enc += x.T @ d_pre
    d_threshold -= 1 / bandwidth * sum_i K((pre - threshold) / bandwidth) (threshold d_acts + d_l0)

Sums run in float32, or in float64 where x or a weight is. Source of the pseudo-derivatives:
arXiv 2407.14435, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules import BatchTopK, TopK
from .evaluation import Gradients, Inputs, Objective

ENCODER = ("W_enc", "b_enc", "threshold")


def sparse_block(inputs: Inputs, rows: slice, objective: Objective, gradients: Gradients) -> None:
    """Add the rows' terms to `objective` and their gradients to `gradients`, entry by entry."""
    x = inputs.tensors["x"][rows]
    entries, transpose = _encode(inputs, x)
    offsets, indices, values, gate = entries
    weights = (inputs.tensors["W_dec"], inputs.tensors["b_dec"])
    recon = inputs.op("decode")(offsets, indices, values, *weights, *transpose, inputs.acc)
    _add_skip(inputs, x, recon)
    l0 = torch.segment_reduce(gate, "sum", offsets=offsets, unsafe=True, initial=0)
    d_recon, d_l0 = objective(recon, l0, rows, gradients)
    del recon
    if gradients.kept is not None:  # a fused optimizer's step does the rest
        gradients.kept |= {"x": x, "entries": entries, "transpose": transpose}
        gradients.kept |= {"d_recon": d_recon, "d_gate": _per_entry(d_l0, entries)}
        d_x = x.new_empty(0)
    else:
        merged = inputs.needs >= {"W_enc", "W_dec"}
        backward = _merged_backward if merged else _separate_backward
        d_x = backward(inputs, x, entries, transpose, d_recon, d_l0, gradients)
    _finish(inputs, x, rows, d_recon, d_x, gradients)


def dense_block(inputs: Inputs, rows: slice, objective: Objective, gradients: Gradients) -> None:
    """Add the rows' terms and gradients by matrix products; JumpReLU only.

    Holds two `[rows, d_sae]` tiles in the accumulation dtype and three of booleans.
    """
    x = inputs.tensors["x"][rows].to(inputs.acc)
    pre = _pre(inputs, x)
    inactive = pre <= inputs.wide("threshold")
    acts = torch.empty_like(pre)
    l0 = torch.logical_not(inactive, out=acts).sum(1)  # summing booleans would make int64 tiles
    torch.where(inactive, pre.new_zeros(()), pre, out=acts)
    recon = torch.addmm(inputs.wide("b_dec"), acts, inputs.wide("W_dec"))
    _add_skip(inputs, x, recon)
    d_recon, d_l0 = objective(recon, l0, rows, gradients)
    del recon
    if inputs.needs_any("W_dec"):
        gradients.buffer("W_dec").addmm_(acts.t(), d_recon)
    d_x = x.new_empty(0)
    if inputs.needs_any("x", *ENCODER):
        d_acts = torch.mm(d_recon, inputs.wide("W_dec").t(), out=acts)
        if inputs.needs_any("threshold"):
            part = _d_threshold(inputs, pre, inactive, d_acts, d_l0)
            gradients.buffer("threshold").add_(part)
        del pre
        d_x = _dense_encode_backward(inputs, x, d_acts.masked_fill_(inactive, 0.0), gradients)
    _finish(inputs, x, rows, d_recon, d_x, gradients)


def _encode(
    inputs: Inputs, x: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Entries of the block, and their feature-major view when a weight needs a gradient."""
    tensors, activation = inputs.tensors, inputs.activation
    args = (x, tensors["W_enc"], tensors["b_enc"])
    by_feature = inputs.needs_any("W_dec", *ENCODER)
    if isinstance(activation, TopK):
        found = inputs.op("topk_encode")(*args, activation.k, by_feature)
    elif isinstance(activation, BatchTopK):
        k = float(activation.k)
        found = inputs.op("batchtopk_encode")(*args, k, None, None, by_feature)
    else:
        window = (tensors["threshold"], float(inputs.bandwidth), None, by_feature)
        found = inputs.op("jumprelu_encode")(*args, *window)
    offsets, indices, values, gate = found[:4]
    transpose = (found[-2], found[-1]) if by_feature else (None, None)
    return (offsets, indices, values, gate), transpose


def _merged_backward(
    inputs: Inputs,
    x: Tensor,
    entries: tuple[Tensor, ...],
    transpose: tuple[Tensor | None, ...],
    d_recon: Tensor,
    d_l0: Tensor | None,
    gradients: Gradients,
) -> Tensor:
    """All gradients in one pass over the entries; returns d_x, of size 0 when not wanted."""
    tensors = inputs.tensors
    encoder = (x, tensors["W_enc"], tensors.get("threshold"), inputs.bandwidth)
    d_x, d_W_enc, d_b_enc, d_threshold, d_W_dec, _ = inputs.op("sae_backward")(
        *(*encoder, tensors["W_dec"], d_recon[None], [inputs.d_sae], *entries),
        *(None, _per_entry(d_l0, entries), *transpose, inputs.needs_any("x")),
    )
    gradients.add("W_enc", d_W_enc)
    gradients.add("b_enc", d_b_enc)
    gradients.add("threshold", d_threshold)
    gradients.add("W_dec", d_W_dec)
    return d_x  # type: ignore[no-any-return]


def _separate_backward(
    inputs: Inputs,
    x: Tensor,
    entries: tuple[Tensor, ...],
    transpose: tuple[Tensor | None, ...],
    d_recon: Tensor,
    d_l0: Tensor | None,
    gradients: Gradients,
) -> Tensor:
    """The wanted gradients only, without a buffer for a frozen matrix; returns d_x, likewise."""
    tensors, bandwidth = inputs.tensors, inputs.bandwidth
    need_values, need_W_dec = inputs.needs_any("x", *ENCODER), inputs.needs_any("W_dec")
    offsets, indices, values, _ = entries
    if not (need_values or need_W_dec):
        return x.new_empty(0)
    d_values, d_W_dec, _ = inputs.op("decode_backward")(
        *(d_recon, offsets, indices, values, tensors["W_dec"], *transpose),
        *(need_values, need_W_dec, False),
    )
    gradients.add("W_dec", d_W_dec)
    if not need_values:
        return x.new_empty(0)
    needs = [inputs.needs_any(name) for name in ("x", *ENCODER)]
    d_x, *found = inputs.op("encode_backward")(
        *(d_values, _per_entry(d_l0, entries), x, tensors["W_enc"], tensors.get("threshold")),
        *(bandwidth, *entries, *transpose, *needs),
    )
    for name, part in zip(ENCODER, found, strict=True):
        gradients.add(name, part)
    return d_x  # type: ignore[no-any-return]


def _per_entry(d_l0: Tensor | None, entries: tuple[Tensor, ...]) -> Tensor | None:
    """Gradient of every entry's gate: that of its token's l0."""
    if d_l0 is None:
        return None
    offsets, indices = entries[:2]
    return d_l0.repeat_interleave(offsets.diff(), output_size=indices.shape[0])


def _pre(inputs: Inputs, x: Tensor) -> Tensor:
    """Pre-activations `[rows, d_sae]`; of a row's invalid (NaN) ones all but the first are -inf.

    The encoder ops store the first only, so that one bad token cannot fill the batch with entries.
    """
    pre = torch.addmm(inputs.wide("b_enc"), x, inputs.wide("W_enc"))
    suspect = pre.sum(1).isnan()  # every row with a NaN, and some with infinities
    if bool(suspect.any()):
        part = pre[suspect]
        invalid = part.isnan()
        first = invalid.to(torch.uint8).argmax(1, keepdim=True)
        kept = part.gather(1, first)
        pre[suspect] = part.masked_fill_(invalid, -torch.inf).scatter_(1, first, kept)
    return pre


def _d_threshold(
    inputs: Inputs, pre: Tensor, inactive: Tensor, d_acts: Tensor, d_l0: Tensor | None
) -> Tensor:
    """`[d_sae]` pseudo-gradient of the threshold over the tile; `pre` is overwritten.

    The comparisons are those of `reference.py`, to the last bit: in the window when above its lower
    end, and off or below its upper end.
    """
    threshold, half = inputs.wide("threshold"), inputs.bandwidth / 2
    outside = (pre < threshold + half).logical_or_(inactive)
    outside = outside.logical_and_(pre > threshold - half).logical_not_()
    summand = torch.mul(d_acts, threshold, out=pre)
    if d_l0 is not None:
        summand.add_(d_l0[:, None])
    return summand.masked_fill_(outside, 0.0).sum(0).div_(-inputs.bandwidth)


def _dense_encode_backward(
    inputs: Inputs, x: Tensor, d_pre: Tensor, gradients: Gradients
) -> Tensor:
    """Gradients of W_enc and b_enc from `d_pre [rows, d_sae]`; returns d_x, or size 0."""
    if inputs.needs_any("W_enc"):
        gradients.buffer("W_enc").addmm_(x.t(), d_pre)
    if inputs.needs_any("b_enc"):
        gradients.buffer("b_enc").add_(d_pre.sum(0))
    if inputs.needs_any("x"):
        return d_pre @ inputs.wide("W_enc").t()
    return d_pre.new_empty(0)


def _add_skip(inputs: Inputs, x: Tensor, recon: Tensor) -> None:
    """Add the affine skip connection, where there is one, to `recon` in place."""
    if "W_skip" in inputs.tensors:
        recon.addmm_(x.to(inputs.acc), inputs.wide("W_skip"))


def _finish(
    inputs: Inputs, x: Tensor, rows: slice, d_recon: Tensor, d_x: Tensor, gradients: Gradients
) -> None:
    """Gradients of b_dec, W_skip and x, which both paths share."""
    if inputs.needs_any("b_dec"):
        gradients.add("b_dec", d_recon.sum(0))
    if inputs.needs_any("W_skip"):
        gradients.buffer("W_skip").addmm_(x.to(inputs.acc).t(), d_recon)
    if inputs.needs_any("x"):
        if "W_skip" in inputs.tensors:
            d_x = d_x.to(inputs.acc) + d_recon @ inputs.wide("W_skip").t()
        gradients.write("x", rows, d_x)
