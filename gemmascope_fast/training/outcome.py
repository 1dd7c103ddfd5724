"""What a loss evaluation returns: metrics, and a loss whose gradients are known already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operands import is_one
from .evaluation import Inputs
from .losses import LossTerm
from .objective import Objective

OP = "loss"


def precomputed(
    loss: Tensor,
    gradients: list[Tensor | None],
    inputs: Sequence[Tensor],
    receive: Callable[[Tensor], None] | None,
) -> Tensor:
    """The loss as a function of its inputs whose gradients are known already.

    Args:
        loss: its value.
        gradients: one per input; they become the `.grad`, None where there is none.
        inputs: what the loss depends on.
        receive: told of the backward pass and its scale, where a fused optimizer computes the
            gradients of weights later.
    """
    return _Precomputed.apply(loss, gradients, receive, *inputs)  # type: ignore[no-any-return, no-untyped-call]


class _Precomputed(torch.autograd.Function):
    """`precomputed`; what is passed back scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        gradients: list[Tensor | None],
        receive: Callable[[Tensor], None] | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.receive = receive
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{OP}: second derivatives are not supported: drop create_graph")
        if ctx.receive is not None:
            ctx.receive(scale)
        saved = ctx.saved_tensors
        small = ctx.receive is not None and all(g is None or g.dim() < 2 for g in saved)
        if is_one(scale, small=small):  # loss.backward(): no copies, the buffers become the .grad
            return (None, None, None, *saved)
        return (None, None, None, *(None if g is None else g * scale.to(g.dtype) for g in saved))


def outcome(
    inputs: Inputs, terms: Sequence[LossTerm], objective: Objective, blocks: Mapping[bool, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics, once every block has added to the objective.

    Args:
        inputs: of the evaluation.
        terms: of the loss.
        objective: has their sums.
        blocks: how many took the dense path (True) and the sparse one.
    """
    sums, tokens = objective.totals(), max(inputs.tokens, 1)
    error, l0 = sums[len(terms) :]
    values = sums[: len(terms)] / tokens
    metrics = {term.name: value for term, value in zip(terms, values, strict=True)}
    metrics["fvu"] = error / objective.deviation
    metrics["l0"] = l0 / tokens
    metrics["density"] = metrics["l0"] / inputs.whole.d_sae(inputs.d_sae)
    metrics = {name: value.to(inputs.acc) for name, value in metrics.items()}
    metrics["dense_blocks"] = torch.tensor(blocks[True], device=sums.device)
    metrics["blocks"] = torch.tensor(sum(blocks.values()), device=sums.device)
    return values.sum().to(inputs.acc), metrics
