"""Inputs of the tests: random and integer-valued problems, memory layouts, samples of every op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [(x, w) for x in DTYPES for w in DTYPES]
"""Every pair of supported dtypes of x and of the weights."""

HANDED_OVER = (
    "decode",
    "decode_",
    "encode_backward",
    "decode_backward",
    "sae_backward",
    "fused_sparse_step",
)
"""Ops whose compiled CUDA kernels hand over to dense products where those pay."""


@dataclass(frozen=True)
class Problem:
    """Parameters of one sparse autoencoder and a batch `x [n, d_in]`."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """Apply `change` to every tensor."""
        return Problem(*(change(getattr(self, f.name)) for f in fields(self)))

    def double(self) -> Problem:
        """The same numbers in float64."""
        return self.map(torch.Tensor.double)

    def leaves(self) -> Problem:
        """Detached tensors of the same memory layout that require gradients."""
        return self.map(lambda t: t.detach().requires_grad_())

    def with_(self, **changes: Tensor) -> Problem:
        return replace(self, **changes)

    @property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.W_enc, self.b_enc


def problem(
    n: int = 13,
    d_in: int = 23,
    d_sae: int = 37,
    d_out: int = 19,
    *,
    x_dtype: torch.dtype = torch.float32,
    w_dtype: torch.dtype = torch.float32,
    integer: bool = False,
    seed: int = 0,
) -> Problem:
    """A random problem in the fast layout, with about half of the latents active.

    `integer`: small integers, so that every sum is exact in float32 in any order, pre-activations
    often equal their threshold and ties abound.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integer:
            return torch.randint(-2, 3, shape, generator=g, device="cpu").float()
        return torch.randn(*shape, generator=g, device="cpu")

    scale = 1.0 if integer else max(d_in, 1) ** -0.5
    return Problem(
        x=draw(n, d_in).to(x_dtype),
        W_enc=(draw(d_sae, d_in) * scale).to(w_dtype).t(),
        b_enc=draw(d_sae) * (1.0 if integer else 0.1),
        threshold=draw(d_sae)
        if integer
        else 0.2 + 0.3 * torch.rand(d_sae, generator=g, device="cpu"),
        W_dec=draw(d_sae, d_out).to(w_dtype),
        b_dec=draw(d_out),
    )


def _within(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype)


def _sliced(t: Tensor) -> Tensor:
    buffer = _within((t.shape[0] + 2, t.shape[1] + 5), t)
    view = buffer[1:-1, 3:-2]
    return view.copy_(t)


def _stepped(t: Tensor) -> Tensor:
    buffer = _within((2 * t.shape[0], 3 * t.shape[1]), t)
    return buffer[::2, 1::3].copy_(t)


def _offset(elements: int) -> Callable[[Tensor], Tensor]:
    def move(t: Tensor) -> Tensor:
        buffer = _within((t.numel() + elements + 8,), t)
        return buffer[elements : elements + t.numel()].view(t.shape).copy_(t)

    return move


def _transposed(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: inner(t.t()).t()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": _sliced,
    "sliced transposed": _transposed(_sliced),
    "stepped": _stepped,
    "stepped transposed": _transposed(_stepped),
    "flipped": lambda t: t.flip(0, 1).flip(0, 1),
    **{f"offset {i}": _offset(i) for i in range(1, 8)},
    **{f"offset {i} transposed": _transposed(_offset(i)) for i in (1, 3)},
}
"""A copy of a matrix in each memory layout; the memory around it is NaN."""


def weight_layouts(p: Problem, layout: str) -> Problem:
    """x, W_enc and W_dec in one of `LAYOUTS`."""
    move = LAYOUTS[layout]
    return p.with_(x=move(p.x), W_enc=move(p.W_enc), W_dec=move(p.W_dec))


def jumprelu_entries(
    p: Problem, bandwidth: float = 0.4, max_nnz: int | None = None
) -> list[Tensor]:
    """offsets, indices, values, gate, needed, feature_offsets, permutation of the reference."""
    return list(reference.jumprelu_encode(*p.encoder, p.threshold, bandwidth, max_nnz, True))


def encode_backward_args(
    p: Problem, bandwidth: float = 0.4, max_nnz: int | None = None
) -> list[Any]:
    """Arguments of `encode_backward` with every gradient wanted."""
    offsets, indices, values, gate, _, *view = jumprelu_entries(p, bandwidth, max_nnz)
    g = torch.Generator().manual_seed(9)
    d_values, d_gate = (
        torch.randn(values.shape, generator=g, device="cpu").to(values.dtype) for _ in range(2)
    )
    inputs = [d_values, d_gate, p.x, p.W_enc, p.threshold, bandwidth]
    return [*inputs, offsets, indices, values, gate, *view, True, True, True, True]


def decode_backward_args(p: Problem, max_nnz: int | None = None) -> list[Any]:
    """Arguments of `decode_backward` with every gradient wanted."""
    offsets, indices, values, _, _, *view = jumprelu_entries(p, max_nnz=max_nnz)
    g = torch.Generator().manual_seed(9)
    d_recon = torch.randn(p.x.shape[0], p.W_dec.shape[1], generator=g, device="cpu").to(
        p.W_dec.dtype
    )
    return [d_recon, offsets, indices, values, p.W_dec, *view, True, True, True]


def sae_backward_args(
    p: Problem, bandwidth: float = 0.4, sets: int = 1, group_ends: tuple[int, ...] | None = None
) -> list[Any]:
    """Arguments of `sae_backward`; the entry sets beyond the first read a noisy x."""
    d_sae, d_out = p.W_dec.shape
    group_ends = (d_sae,) if group_ends is None else group_ends
    g = torch.Generator().manual_seed(9)
    stacked = torch.cat([p.x + s for s in range(sets)]).to(p.x.dtype)
    offsets, indices, values, gate, _, *view = jumprelu_entries(p.with_(x=stacked), bandwidth)
    shape = (len(group_ends), sets * p.x.shape[0], d_out)
    d_recon = torch.randn(shape, generator=g, device="cpu").to(p.W_dec.dtype)
    d_values, d_gate = (
        torch.randn(values.shape, generator=g, device="cpu").to(values.dtype) for _ in range(2)
    )
    inputs = [p.x, p.W_enc, p.threshold, bandwidth, p.W_dec, d_recon, list(group_ends)]
    return [*inputs, offsets, indices, values, gate, d_values, d_gate, *view, True]


def _backward_samples(p: Problem) -> dict[str, list[list[Any]]]:
    encode, decode = encode_backward_args(p), decode_backward_args(p)
    plain = [encode[0], None, *encode[2:4], None, 0.0, *encode[6:10], None, None]
    groups = (p.W_dec.shape[0] // 3, p.W_dec.shape[0])
    sae = sae_backward_args(p)
    return {
        "encode_backward": [encode, [*plain, True, False, True, False]],
        "decode_backward": [decode, [*decode[:5], None, None, True, False, True]],
        "sae_backward": [
            sae,
            [*sae[:2], None, 0.0, *sae[4:11], None, None, *sae[13:15], False],
            sae_backward_args(p, sets=2, group_ends=groups),
        ],
    }


def adam_state(weight: Tensor, moments: str = "fp32", beta1: float = 0.0) -> list[Tensor]:
    """exp_avg, exp_avg_sq, exponents, touched_at of `weight [r, c]` before the first step."""
    r, c = weight.shape
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    blocks = -(-c // reference.MOMENT_BLOCK)
    codes = moments == "8bit"
    return [
        torch.zeros(r, c, dtype=wide) if beta1 else torch.zeros(0, dtype=wide),
        torch.zeros(r, c, dtype=torch.uint8 if codes else wide),
        torch.zeros((r, blocks) if codes else (0, 0), dtype=torch.uint8),
        torch.zeros(r, dtype=torch.int64),
    ]


def adam_step_args(
    weight: Tensor, beta1: float = 0.0, moments: str = "fp32", tail: int = 0
) -> list[Any]:
    """Arguments of `adam_step_` at step 3; half of the rows have a gradient."""
    g = torch.Generator().manual_seed(9)
    gradient = torch.randn(weight.shape, generator=g, device="cpu")
    gradient[::2] = 0
    state = adam_state(weight, moments, beta1)
    return [weight, state, gradient, [0.1, beta1, 0.9, 1e-8], [3, tail, 1, 1, 11]]


def fused_sparse_step_args(
    p: Problem, beta1: float = 0.0, moments: str = "fp32", tail: int = 0, **entries: Any
) -> list[Any]:
    """Arguments of `fused_sparse_step` at step 1; fp16 weights become bf16, which it updates."""
    if p.W_enc.dtype == torch.float16:
        p = p.with_(W_enc=p.W_enc.bfloat16(), W_dec=p.W_dec.bfloat16())
    rows = p.with_(W_enc=p.W_enc.t().contiguous().t(), W_dec=p.W_dec.contiguous())
    rates = [[0.1, beta1, 0.9, 1e-8], [0.2, beta1, 0.9, 1e-8]]
    rules = [[1, tail, 0, 0, 5], [1, tail, 1, 1, 6]]
    states = [adam_state(w, moments, beta1) for w in (rows.W_enc.t(), rows.W_dec)]
    return [*sae_backward_args(rows, **entries)[:-1], *states, *rates, *rules]


def _optimizer_samples(p: Problem) -> dict[str, list[list[Any]]]:
    weight = p.W_dec.float() if p.W_dec.dtype == torch.float16 else p.W_dec
    weight = weight.contiguous()
    groups = (p.W_dec.shape[0] // 3, p.W_dec.shape[0])
    return {
        "adam_step_": [
            adam_step_args(weight),
            adam_step_args(weight, 0.5, "8bit", 10),
            adam_step_args(weight.bfloat16(), 0.0, "8bit"),
        ],
        "fused_sparse_step": [
            fused_sparse_step_args(p),
            fused_sparse_step_args(p, 0.5, "8bit", 10, sets=2, group_ends=groups),
        ],
    }


def samples(p: Problem | None = None) -> dict[str, list[list[Any]]]:
    """Positional arguments of every op: `{name: [args, ...]}`, each option used at least once."""
    p = problem() if p is None else p
    n, d_sae = p.x.shape[0], p.W_enc.shape[1]
    capacity = n * d_sae
    offsets, indices, values, _, _, *view = jumprelu_entries(p)
    rows = torch.arange(2 * n) % max(n, 1)
    latents = (torch.arange(2 * n) * 5) % d_sae
    return {
        "jumprelu_encode": [
            [*p.encoder, p.threshold, 0.0, None, False],
            [*p.encoder, p.threshold, 0.4, None, True],
            [*p.encoder, p.threshold, 0.4, capacity, True],
        ],
        "topk_encode": [[*p.encoder, min(5, d_sae), flag] for flag in (False, True)],
        "batchtopk_encode": [
            [*p.encoder, 2.5, None, None, False],
            [*p.encoder, 2.5, 0.7, capacity, True],
        ],
        "decode": [
            [offsets, indices, values, p.W_dec, p.b_dec, *view, p.W_dec.dtype],
            [offsets, indices, values, p.W_dec, None, None, None, torch.bfloat16],
        ],
        "decode_": [[torch.ones(n, p.W_dec.shape[1]), offsets, indices, values, p.W_dec]],
        "pre_at": [[*p.encoder, rows, latents]],
        "by_feature": [[offsets, indices, d_sae]],
        **_optimizer_samples(p),
        **_backward_samples(p),
    }
