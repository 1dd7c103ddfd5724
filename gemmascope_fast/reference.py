"""The maths of every op in plain PyTorch: the specification, the oracle and the last resort.

Each function has the signature of its row in `ops.py`. Encoders densify to `[n, d_sae]`: this is
meant for checking and for float64, not for speed. Sums run in float64 when an input is float64,
else in float32. Products of activations read stored entries only: an Inf in a row of weights that
no entry uses stays out of the result, where a dense product makes 0 * inf = NaN of it. Sources:
JumpReLU and its pseudo-derivatives, arXiv 2407.14435, section 3; TopK, arXiv 2406.04093; BatchTopK,
arXiv 2412.06410.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "CapacityError",
    "adam_step_",
    "batchtopk_encode",
    "by_feature",
    "decode",
    "decode_",
    "decode_backward",
    "encode_backward",
    "fused_sparse_step",
    "jumprelu_encode",
    "pre_at",
    "sae_backward",
    "topk_encode",
]


class CapacityError(RuntimeError):
    """More entries than `max_nnz` allows; the message names the size that is needed."""


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float = 0.0,
    max_nnz: int | None = None,
    by_feature: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`pre * H(pre - threshold)`, with the entries of the straight-through window when asked."""
    pre = _pre(x, W_enc, b_enc)
    theta = threshold.to(pre.dtype)
    active = pre > theta
    invalid = pre.isnan() | theta.isnan()
    first_invalid = invalid & (invalid.cumsum(1) == 1)
    stored = active | first_invalid
    if bandwidth > 0:
        stored |= pre > theta - bandwidth / 2
    values = torch.where(active, pre, 0.0).masked_fill(first_invalid, float("nan"))
    gate = (active | first_invalid).to(pre.dtype)
    offsets, indices, values, gate, needed = _compress(
        "jumprelu_encode", stored, values, gate, max_nnz
    )
    transpose = _transpose(offsets, indices, W_enc.shape[1], by_feature)
    return offsets, indices, values, gate, needed, *transpose


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    by_feature: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Keep the k largest of `relu(pre)` per row; ties go to the smaller latent."""
    acts = _relu(_pre(x, W_enc, b_enc))
    stored = torch.zeros_like(acts, dtype=torch.bool)
    stored.scatter_(1, _descending(acts)[:, :k], True)
    offsets, indices, values, gate, _ = _compress("topk_encode", stored, acts, _fires(acts), None)
    transpose = _transpose(offsets, indices, W_enc.shape[1], by_feature)
    return offsets, indices, values, gate, *transpose


def batchtopk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: float,
    guess: float | None = None,
    max_nnz: int | None = None,
    by_feature: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Keep the `int(k * n)` largest positive entries of the batch; ties go to (row, latent)."""
    acts = _relu(_pre(x, W_enc, b_enc))
    fires = _fires(acts).flatten()
    count = int(k * x.shape[0])
    chosen = _descending(acts.flatten())[: min(count, int(fires.sum()))]
    stored = torch.zeros_like(fires, dtype=torch.bool)
    stored[chosen] = True
    reached = 0 < count == chosen.numel()
    threshold = acts.flatten()[chosen[-1]] if reached else acts.new_zeros(())
    offsets, indices, values, gate, needed = _compress(
        "batchtopk_encode", stored.view_as(acts), acts, _fires(acts), max_nnz
    )
    transpose = _transpose(offsets, indices, W_enc.shape[1], by_feature)
    return offsets, indices, values, gate, needed, threshold.clone(), *transpose


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
    """`acts @ W_dec + b_dec`."""
    acc = _accumulate(values, W_dec)
    acts = _sparse("decode", offsets, indices, values.to(acc), W_dec.shape[0])
    recon = _product(acts, W_dec)
    if b_dec is not None:
        recon = recon + b_dec.to(acc)
    return recon.to(dtype)


def decode_(recon: Tensor, offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> None:
    """`recon += acts @ W_dec`."""
    acc = _accumulate(recon, values, W_dec)
    acts = _sparse("decode_", offsets, indices, values.to(acc), W_dec.shape[0])
    recon.copy_(recon.to(acc) + _product(acts, W_dec))


def encode_backward(
    d_values: Tensor | None,
    d_gate: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor | None,
    bandwidth: float,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    gate: Tensor,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    need_x: bool,
    need_W_enc: bool,
    need_b_enc: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of an encoder from those of its `values` and `gate`.

    `d_pre = d_values * gate`; `d_threshold[j] = -(1 / bandwidth) sum_i K (threshold_j d_values +
    d_gate)` with K = 1 for entries inside the window (off, or below `threshold + bandwidth / 2`).
    """
    acc = _accumulate(values, x, W_enc)
    d_sae = W_enc.shape[1]
    valid = _valid(offsets, indices.shape[0])
    zero = torch.zeros_like(values, dtype=acc)
    d_values = zero if d_values is None else torch.where(valid, d_values.to(acc), zero)
    d_gate = zero if d_gate is None else torch.where(valid, d_gate.to(acc), zero)
    d_pre = _sparse("encode_backward", offsets, indices, d_values * gate, d_sae)
    latents = torch.where(valid, indices, 0).long()
    d_threshold = zero.new_empty(0)
    if need_threshold:
        assert threshold is not None
        theta = threshold.to(acc)[latents] if d_sae else zero
        in_window = (gate == 0) | (values < theta + bandwidth / 2)
        d_theta = torch.where(in_window & valid, theta * d_values + d_gate, zero)
        stored = valid.nonzero()[:, 0]
        sums = zero.new_zeros(d_sae).index_add_(0, latents[stored], d_theta[stored])
        d_threshold = sums / -bandwidth
    return (
        _product(d_pre, W_enc.T).to(x.dtype) if need_x else x.new_empty(0),
        _like(_product(d_pre.t(), x).T, W_enc) if need_W_enc else x.new_empty(0),
        zero.new_zeros(d_sae).index_add_(0, d_pre._indices()[1], d_pre._values())
        if need_b_enc
        else zero.new_empty(0),
        d_threshold,
    )


def decode_backward(
    d_recon: Tensor,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    feature_offsets: Tensor | None,
    permutation: Tensor | None,
    need_values: bool,
    need_W_dec: bool,
    need_b_dec: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`d_values = <W_dec[j], d_recon[i]>`, `d_W_dec = acts.T @ d_recon`, `d_b_dec`."""
    acc = _accumulate(values, W_dec)
    d_recon = d_recon.to(acc)
    acts = _sparse("decode_backward", offsets, indices, values.to(acc), W_dec.shape[0])
    d_values = values.new_empty(0)
    if need_values:
        d_values = torch.zeros_like(values, dtype=acc)
        rows, latents = acts._indices()
        d_values[: rows.shape[0]] = (d_recon @ W_dec.to(acc).T)[rows, latents]
    return (
        d_values,
        _like(_product(acts.t(), d_recon), W_dec) if need_W_dec else values.new_empty(0),
        d_recon.sum(0) if need_b_dec else values.new_empty(0),
    )


def sae_backward(
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
    need_x: bool,
) -> tuple[Tensor, ...]:
    """Backward of encoder and decoder at once, over stacked entry sets and nested prefixes.

    Row r of the `m = S * n` entry rows reads `x[r % n]`; latent j sees the reconstruction gradients
    of all groups that end after it. Equal to `decode_backward`, then `encode_backward`.
    """
    acc = _accumulate(values, x, W_enc, W_dec)
    d_sae, m = W_dec.shape[0], d_recon.shape[1]
    nnz = _nnz("sae_backward", offsets, indices.shape[0])
    _check_range("sae_backward", "indices", indices[:nnz], d_sae, "d_sae")
    sets = m // x.shape[0] if x.shape[0] else 0
    rows = _rows(offsets, indices.shape[0])
    latents = indices.long()
    d_dot = torch.zeros_like(values, dtype=acc)
    d_W_dec = W_dec.new_zeros(W_dec.shape, dtype=acc)
    start = 0
    for group, end in enumerate(group_ends):
        seen = d_recon[group:].to(acc).sum(0)
        inside = (latents >= start) & (latents < end) & _valid(offsets, indices.shape[0])
        r, j = rows[inside], latents[inside]
        d_dot[inside] = (seen @ W_dec.to(acc).T)[r, j]
        acts = _coo(r, j, values[inside].to(acc), m, d_sae)
        d_W_dec += _product(acts.t(), seen)
        start = end
    if d_values is not None:
        d_dot = d_dot + d_values.to(acc)
    repeated = x.to(acc).repeat(sets, 1)
    d_x, d_W_enc, d_b_enc, d_threshold = encode_backward(
        *(d_dot, d_gate, repeated, W_enc, threshold, bandwidth, offsets, indices, values, gate),
        *(None, None, need_x, True, True, bandwidth > 0),
    )
    d_x = d_x.view(sets, *x.shape).sum(0).to(x.dtype) if need_x else x.new_empty(0)
    return d_x, d_W_enc, d_b_enc, d_threshold, _like(d_W_dec, W_dec), d_recon.to(acc).sum((0, 1))


def pre_at(x: Tensor, W_enc: Tensor, b_enc: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    """Ungated pre-activations `pre[rows[p], latents[p]]` of p pairs."""
    _check_range("pre_at", "rows", rows, x.shape[0], "n")
    _check_range("pre_at", "latents", latents, W_enc.shape[1], "d_sae")
    return _pre(x, W_enc, b_enc)[rows.long(), latents.long()]


def by_feature(offsets: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Feature-major view of CSR entries: stable sort of their positions by latent."""
    stored = indices[: _nnz("by_feature", offsets, indices.shape[0])]
    _check_range("by_feature", "indices", stored, d_sae, "d_sae")
    counts = torch.bincount(stored.long(), minlength=d_sae)
    feature_offsets = torch.zeros(d_sae + 1, dtype=torch.int64, device=indices.device)
    feature_offsets[1:] = counts.cumsum(0)
    permutation = torch.zeros(indices.shape[0], dtype=torch.int64, device=indices.device)
    permutation[: stored.shape[0]] = stored.argsort(stable=True)
    return feature_offsets, permutation


# ---- optimizer


def adam_step_(
    weight: Tensor, state: list[Tensor], gradient: Tensor, rates: list[float], rule: list[int]
) -> None:
    """Adam on the rows of `weight [r, c]` that have a gradient, or had one at most `tail` ago.

    With k the steps since the row's moments were brought up to date (1 for a row updated in the
    last step) and t the number of this step:

        g -= <g, w> / <w, w> w                      if remove_parallel
        m = beta1^k m + (1 - beta1) g               v = beta2^k v + (1 - beta2) g^2
        w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        w /= |w|                                    if unit_norm

    A row has a gradient when an element of it is not 0. With beta1 = 0 the others do not move in
    dense Adam either: `tail = 0` is Adam exactly.

    Args:
        weight: float32, float64 or bfloat16; the last is rounded stochastically.
        state: `exp_avg` (m, of size 0 when beta1 = 0), `exp_avg_sq` (v), both like weight in
            float32 (float64), v optionally in 8-bit codes (uint8) with `exponents
            [r, ceil(c / 128)]` uint8 (of size 0 without codes), and `touched_at [r]` int64, the
            last step at which the row had a gradient.
        gradient: `[r, c]`.
        rates: lr, beta1, beta2, eps.
        rule: step t (from 1), tail, remove_parallel, unit_norm, seed of the rounding.

    Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
    """
    exp_avg, exp_avg_sq, exponents, touched_at = state
    lr, beta1, beta2, eps = rates
    step, tail, remove_parallel, unit_norm, seed = rule
    touched = (gradient != 0).any(1)
    rows = (touched | ((touched_at > 0) & (step - touched_at <= tail))).nonzero()[:, 0]
    gap = step - (touched_at[rows] + min(tail, step)).clamp(max=step - 1)
    acc = _accumulate(weight)
    w, g = weight[rows].to(acc), gradient[rows].to(acc)
    if remove_parallel:
        share = (g * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True)
        g = g - share.masked_fill((w == 0).all(1, keepdim=True), 0.0) * w
    v = exp_avg_sq[rows]
    v = decode_moment(v, exponents[rows]) if exponents.numel() else v
    v = v * _decay(beta2, gap, acc) + (1 - beta2) * g * g
    m = g if beta1 == 0 else exp_avg[rows] * _decay(beta1, gap, acc) + (1 - beta1) * g
    scale = 1 / math.sqrt(1 - beta2**step)
    root = v.double().sqrt().to(acc)  # correctly rounded; torch's float32 root is not everywhere
    w = w - lr / (1 - beta1**step) * m / (root * scale + eps)
    if unit_norm:
        norm = (w * w).sum(1, keepdim=True).sqrt()
        w = w / norm.masked_fill(norm == 0, 1.0)
    if beta1 != 0:
        exp_avg[rows] = m
    random = random_words(rows, v.shape[1], step, seed)
    if exponents.numel():
        exp_avg_sq[rows], exponents[rows] = encode_moment(v, random)
    else:
        exp_avg_sq[rows] = v
    if weight.dtype == torch.bfloat16:
        w = round_stochastically(w, random)
    weight[rows] = w
    touched_at[touched] = step


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
    encoder_state: list[Tensor],
    decoder_state: list[Tensor],
    encoder_rates: list[float],
    decoder_rates: list[float],
    encoder_rule: list[int],
    decoder_rule: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`sae_backward`, then `adam_step_` on the rows of `W_enc.t()` and of `W_dec`.

    The gradients stay in float32 (float64), also where the weights are bfloat16. Returns
    `d_b_enc`, `d_threshold` (of size 0 when bandwidth is 0) and `d_b_dec`.
    """
    nnz = _nnz("fused_sparse_step", offsets, indices.shape[0])
    _check_range("fused_sparse_step", "indices", indices[:nnz], W_dec.shape[0], "d_sae")
    entries = (offsets, indices, values, gate, d_values, d_gate, feature_offsets, permutation)
    wide_enc, wide_dec = W_enc.to(values.dtype), W_dec.to(values.dtype)
    inputs = (x, wide_enc, threshold, bandwidth, wide_dec, d_recon, group_ends, *entries)
    _, d_W_enc, d_b_enc, d_threshold, d_W_dec, d_b_dec = sae_backward(*inputs, False)
    adam_step_(W_enc.t(), encoder_state, d_W_enc.t(), encoder_rates, encoder_rule)
    adam_step_(W_dec, decoder_state, d_W_dec, decoder_rates, decoder_rule)
    return d_b_enc, d_threshold, d_b_dec


MOMENT_BLOCK = 128
"""Columns that share one exponent in the 8-bit form of the second moment."""


def decode_moment(codes: Tensor, exponents: Tensor) -> Tensor:
    """Float32 values of 8-bit codes `[r, c]`: 5 exponent and 3 mantissa bits below the block's.

    `value = 2^(e - 31) 2^(code // 8) (1 + code % 8 / 8)`, e the block's exponent; code 0 is 0.
    """
    base = exponents.long().repeat_interleave(MOMENT_BLOCK, 1)[:, : codes.shape[1]] - 31
    bits = ((base << 23) + (codes.long() << 20)).clamp(min=0)
    return bits.masked_fill(codes == 0, 0).to(torch.int32).view(torch.float32)


def encode_moment(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block exponents of `v [r, c]` >= 0, rounded up with the probability of the rest.

    Unbiased: the decay by beta2 = 0.999 is far below a code's step, and rounding to nearest would
    never move. NaN is code 255 of a block whose exponent is 255. The upper 20 bits of `random`
    decide; `round_stochastically` takes the lower 16, so that one word serves an element.
    """
    bits = v.view(torch.int32).long() & 0x7FFFFFFF  # a NaN may be negative
    count = -(-v.shape[1] // MOMENT_BLOCK)
    padding = count * MOMENT_BLOCK - v.shape[1]
    blocks = torch.nn.functional.pad(bits, (0, padding)).reshape(v.shape[0], count, MOMENT_BLOCK)
    exponents = (blocks.amax(2) + (1 << 20) >> 23).clamp(max=255)
    base = exponents.repeat_interleave(MOMENT_BLOCK, 1)[:, : v.shape[1]] - 31 << 23
    codes = (bits - base + (random >> 12) >> 20).clamp(0, 255)
    codes = codes.masked_fill(bits == 0, 0).masked_fill(v.isnan(), 255)
    return codes.to(torch.uint8), exponents.to(torch.uint8)


def round_stochastically(w: Tensor, random: Tensor) -> Tensor:
    """Float32 `w` as bfloat16: up with the probability of the part that is cut off."""
    bits = w.view(torch.int32).long()
    rounded = (bits + (random & 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(w.isfinite(), rounded, w.to(torch.bfloat16))


def random_words(rows: Tensor, columns: int, step: int, seed: int) -> Tensor:
    """32 random bits (int64) for each of `[rows, columns]`: Philox 4x32-7, counter-based.

    Word c % 4 of the counter (c // 4, row, row // 2^32, step) under the key `seed`.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; seven rounds are the
    fewest that pass BigCrush there.
    """
    low = 0xFFFFFFFF
    quad = torch.arange((columns + 3) // 4, device=rows.device).expand(rows.shape[0], -1)
    row = rows[:, None].expand_as(quad)
    counter = [quad & low, row & low, row >> 32, torch.full_like(quad, step)]
    counter[3] = counter[3] & low
    key = [seed & low, (seed >> 32) & low]
    for _ in range(7):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((second >> 32) & low) ^ counter[1] ^ key[0],
            second & low,
            ((first >> 32) & low) ^ counter[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return torch.stack(counter, 2).flatten(1)[:, :columns]


def _decay(beta: float, gap: Tensor, dtype: torch.dtype) -> Tensor:
    """`beta^gap` as a column, each power rounded once."""
    powers = {k: beta**k for k in set(gap.tolist())}
    column = [[powers[k]] for k in gap.tolist()]
    return torch.tensor(column, dtype=dtype, device=gap.device).reshape(-1, 1)


def _accumulate(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _pre(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    acc = _accumulate(x, W_enc, b_enc)
    return x.to(acc) @ W_enc.to(acc) + b_enc.to(acc)


def _relu(pre: Tensor) -> Tensor:
    return torch.where(pre <= 0, 0.0, pre)  # keeps NaN, turns -0.0 into 0.0


def _fires(acts: Tensor) -> Tensor:
    return ((acts > 0) | acts.isnan()).to(acts.dtype)


def _descending(acts: Tensor) -> Tensor:
    return acts.argsort(dim=-1, descending=True, stable=True)  # NaN first


def _compress(
    op: str, stored: Tensor, values: Tensor, gate: Tensor, max_nnz: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CSR arrays of the entries where `stored`, padded with zeros up to `max_nnz`."""
    offsets = torch.zeros(stored.shape[0] + 1, dtype=torch.int64, device=stored.device)
    offsets[1:] = stored.sum(1).cumsum(0)
    rows, latents = stored.nonzero(as_tuple=True)
    nnz = rows.shape[0]
    if max_nnz is not None and nnz > max_nnz:
        raise CapacityError(
            f"CapacityError: {op}: max_nnz={max_nnz} is too small, {nnz} entries are needed; "
            f"pass max_nnz >= {nnz}"
        )
    padding = (0, 0 if max_nnz is None else max_nnz - nnz)
    pad = torch.nn.functional.pad
    return (
        offsets,
        pad(latents.to(torch.int32), padding),
        pad(values[rows, latents], padding),
        pad(gate[rows, latents], padding),
        torch.tensor(nnz, device=stored.device),
    )


def _transpose(offsets: Tensor, indices: Tensor, d_sae: int, wanted: bool) -> tuple[Tensor, Tensor]:
    if wanted:
        return by_feature(offsets, indices, d_sae)
    return offsets.new_empty(0), offsets.new_empty(0)


def _valid(offsets: Tensor, capacity: int) -> Tensor:
    return torch.arange(capacity, device=offsets.device) < offsets[-1]


def _rows(offsets: Tensor, capacity: int) -> Tensor:
    """Row of each entry; n for padding."""
    positions = torch.arange(capacity, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), positions, right=True)


def _sparse(op: str, offsets: Tensor, indices: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """Checked entries as a sparse `[n, d_sae]` matrix, padding left out."""
    nnz = _nnz(op, offsets, indices.shape[0])
    _check_range(op, "indices", indices[:nnz], d_sae, "d_sae")
    rows = _rows(offsets, nnz)
    return _coo(rows, indices[:nnz].long(), values[:nnz], offsets.shape[0] - 1, d_sae)


def _coo(rows: Tensor, latents: Tensor, values: Tensor, n: int, d_sae: int) -> Tensor:
    where = torch.stack([rows, latents])
    return torch.sparse_coo_tensor(where, values, (n, d_sae), check_invariants=False)


def _product(sparse: Tensor, dense: Tensor) -> Tensor:
    """`sparse @ dense` in the dtype of `sparse`."""
    return sparse @ dense.to(sparse.dtype).contiguous()


def _nnz(op: str, offsets: Tensor, capacity: int) -> int:
    """Number of entries of checked offsets."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise RuntimeError(f"{op}: offsets[0] = {first}, expected 0")
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0])
        raise RuntimeError(
            f"{op}: offsets[{at + 1}] = {int(offsets[at + 1])} is less than offsets[{at}] = "
            f"{int(offsets[at])}; offsets must ascend"
        )
    if last > capacity:
        at = offsets.shape[0] - 1
        raise RuntimeError(f"{op}: offsets[{at}] = {last} exceeds len(indices)={capacity}")
    return last


def _check_range(op: str, name: str, indices: Tensor, end: int, end_name: str) -> None:
    bad = ((indices < 0) | (indices >= end)).nonzero()
    if bad.numel():
        at = int(bad[0])
        raise RuntimeError(
            f"{op}: {name}[{at}] = {int(indices[at])} is out of range [0, {end_name}={end})"
        )


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return the gradient in the dtype and strides of its parameter."""
    return torch.empty_like(parameter).copy_(gradient)
