"""The gradient of each differentiable op, in terms of other ops of the table.

`gradients(ops)` returns `{op name: (setup_context, backward)}` for one namespace, so that the
reference namespace differentiates through the reference and the native one through the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradient = tuple[Callable[..., None], Callable[..., Any]]


def gradients(ops: Any) -> dict[str, Gradient]:
    """Setup-context and backward functions per op; `ops` is `torch.ops.<namespace>`."""

    def encode_backward(ctx: Any, d_values: Tensor | None, d_gate: Tensor | None) -> list[Any]:
        x, W_enc, threshold, *entries = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3]) + [ctx.has_threshold and ctx.needs_input_grad[3]]
        if (d_values is None and d_gate is None) or not any(needs):
            return [None] * ctx.n_inputs
        if needs[3] and ctx.bandwidth == 0:
            raise RuntimeError(
                "jumprelu_encode: threshold requires grad but bandwidth is 0: pass a bandwidth "
                "> 0, or threshold.detach()"
            )
        results = ops.encode_backward(
            d_values, d_gate, x, W_enc, threshold, ctx.bandwidth, *entries, *needs
        )
        found = [r if need else None for r, need in zip(results, needs, strict=True)]
        return (found + [None] * ctx.n_inputs)[: ctx.n_inputs]

    def save_encode(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], threshold: Tensor | None
    ) -> None:
        ctx.set_materialize_grads(False)
        ctx.n_inputs = len(inputs)
        ctx.has_threshold = threshold is not None
        ctx.bandwidth = inputs[4] if threshold is not None else 0.0
        offsets, indices, values, gate = output[:4]
        transpose = output[-2:] if inputs[-2] else (None, None)  # by_feature, then packed
        ctx.save_for_backward(
            inputs[0], inputs[1], threshold, offsets, indices, values, gate, *transpose
        )
        fixed = [t for t in output[4:] if t.is_floating_point()]
        if threshold is None or not ctx.needs_input_grad[3]:
            fixed.append(gate)
        ctx.mark_non_differentiable(*fixed)

    def setup_jumprelu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save_encode(ctx, inputs, output, inputs[3])

    def setup_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save_encode(ctx, inputs, output, None)

    def encode_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return tuple(encode_backward(ctx, grads[2], grads[3]))

    def setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4], *inputs[5:7])

    def decode_gradient(ctx: Any, d_recon: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:5]
        results = ops.decode_backward(d_recon, *ctx.saved_tensors, *needs)
        found = [r if need else None for r, need in zip(results, needs, strict=True)]
        return (None, None, *found, None, None, None)

    def setup_pre_at(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], inputs[3], inputs[4])

    def pre_at_gradient(ctx: Any, d_pre: Tensor) -> tuple[Any, ...]:
        x, W_enc, rows, latents = ctx.saved_tensors
        ordered, order = torch.sort(rows, stable=True)
        bounds = torch.arange(x.shape[0] + 1, device=rows.device, dtype=rows.dtype)
        entries = (
            torch.searchsorted(ordered, bounds).to(torch.int64),
            latents[order].to(torch.int32),
            torch.zeros_like(d_pre),
            torch.ones_like(d_pre),
        )
        needs = ctx.needs_input_grad[:3]
        results = ops.encode_backward(
            d_pre[order], None, x, W_enc, None, 0.0, *entries, None, None, *needs, False
        )
        found = [r if need else None for r, need in zip(results[:3], needs, strict=True)]
        return (*found, None, None)

    table: dict[str, Gradient] = {
        "jumprelu_encode": (setup_jumprelu, encode_gradient),
        "topk_encode": (setup_topk, encode_gradient),
        "batchtopk_encode": (setup_topk, encode_gradient),
        "decode": (setup_decode, decode_gradient),
        "pre_at": (setup_pre_at, pre_at_gradient),
    }
    for name in ("encode_backward", "decode_backward", "sae_backward"):
        table[name] = _no_second_derivative(name)
    return table


def _no_second_derivative(name: str) -> Gradient:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"{name} is not differentiable: second derivatives of sparse encoders and decoders "
            "are not supported"
        )

    return setup, backward
