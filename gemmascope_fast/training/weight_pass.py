"""Evaluation of the terms of `losses_weights.py`: one autograd graph per block of rows.

The latents a term uses are gathered once; their gradients are summed in that compact form over the
blocks and added to the whole at the end, so a block costs what its latents cost.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from .evaluation import Gradients, Inputs
from .losses_weights import Dictionary, WeightTerm

WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec", "W_skip")
BY_LATENT = WEIGHTS[:4]


def weight_pass(
    op: str,
    inputs: Inputs,
    term: WeightTerm,
    residual: Tensor | None,
    entries: int,
    gradients: Gradients,
) -> Tensor:
    """Sum of the term over the tokens here, over the number of all; adds its gradients.

    In blocks of about `entries` entries.
    """
    whole, d_sae = inputs.whole, inputs.whole.d_sae(inputs.d_sae)
    ids = term.latents(op, d_sae, inputs.tensors["x"].device)
    latents = d_sae if ids is None else ids.shape[0]
    goal = inputs.tensors["target"].to(inputs.acc)
    if inputs.tokens == 0 or latents == 0:
        return goal.new_zeros(())
    factor = term.scale(residual, goal, latents, whole) / inputs.tokens
    ids = ids if ids is None else whole.own(ids)
    weights = _weights(inputs, ids)
    sums: dict[str, Tensor] = {}
    rows = max(entries // max(term.entries_per_token(latents), 1), 1)
    total = goal.new_zeros((), dtype=torch.float64)
    for start in range(0, inputs.n, rows):
        block = slice(start, start + rows)
        x = inputs.tensors["x"][block].requires_grad_("x" in inputs.needs)
        target = goal[block].detach().requires_grad_("target" in inputs.needs)
        rest = None if residual is None else residual[block]
        leaves = {"x": x, "target": target, **weights}
        wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
        with torch.set_grad_enabled(bool(wanted)):
            value = term.total(Dictionary(x, target, rest, **weights, whole=whole)) * factor
        total += value.detach().double()
        if not value.requires_grad:
            continue
        found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        for name, part in zip(wanted, found, strict=True):
            if part is None:
                continue
            if name in weights:
                wide = part.to(inputs.acc)
                sums[name] = sums[name].add_(wide) if name in sums else wide
            else:
                gradients.add_rows(name, block, part)
    for name, part in sums.items():
        _add(name, part, ids, gradients)
    return total


def _weights(inputs: Inputs, ids: Tensor | None) -> dict[str, Tensor]:
    """Leaves: the weights of the chosen latents, W_enc feature-major; absent ones are None."""
    found: dict[str, Tensor] = {}
    for field in fields(Dictionary):
        name = field.name
        if name not in WEIGHTS:
            continue
        t = inputs.tensors.get(name)
        if t is not None and name in BY_LATENT and ids is not None:
            t = t.t()[ids].t() if name == "W_enc" else t[ids]
        if t is not None:
            t = t.detach().requires_grad_(name in inputs.needs)
        found[name] = t  # type: ignore[assignment]
    return found


def _add(name: str, part: Tensor, ids: Tensor | None, gradients: Gradients) -> None:
    """Add the gradient of the chosen latents to the whole."""
    buffer = gradients.buffer(name)
    if name not in BY_LATENT or ids is None:
        buffer.add_(part)
    elif name == "W_enc":
        buffer.index_add_(1, ids, part)
    else:
        buffer.index_add_(0, ids, part)
