"""Evaluation of the terms of `losses_weights.py`: one autograd graph per block of rows.

The latents a term uses are gathered once; their gradients are summed in that compact form over the
blocks and added to the whole at the end, so a block costs what its latents cost.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    layers: Sequence[tuple[Inputs, Gradients]] = (),
) -> Tensor:
    """Sum of the term over the tokens here, over the number of all; adds its gradients.

    In blocks of about `entries` entries. Of several layers, `layers` are theirs and `inputs` and
    `gradients` what they share.
    """
    whole, d_sae = inputs.whole, inputs.whole.d_sae(inputs.d_sae)
    layers = layers or [(inputs, gradients)]
    ids = term.latents(op, d_sae, inputs.tensors["x"].device)
    latents = d_sae if ids is None else ids.shape[0]
    goal = inputs.tensors["target"].to(inputs.acc)
    if inputs.tokens == 0 or latents == 0:
        return goal.new_zeros(())
    factor = term.scale(residual, goal, latents / len(layers), whole) / inputs.tokens
    ids = ids if ids is None else whole.own(ids)
    parts = [_Gathered(*of, its) for of, its in zip(layers, _split(ids, layers), strict=True)]
    rows = max(entries // max(term.entries_per_token(latents) * len(layers), 1), 1)
    total = goal.new_zeros((), dtype=torch.float64)
    for start in range(0, inputs.n, rows):
        block = slice(start, start + rows)
        target = goal[block].detach().requires_grad_("target" in inputs.needs)
        rest = None if residual is None else residual[block]
        leaves = [part.leaves(block) for part in parts]
        wanted = [target] if target.requires_grad else []
        wanted += [t for own in leaves for t in own.values() if t is not None and t.requires_grad]
        with torch.set_grad_enabled(bool(wanted)):
            dictionaries = [
                Dictionary(target=target, residual=rest, whole=whole, **own)  # type: ignore[arg-type]
                for own in leaves
            ]
            value = term.total(*dictionaries) * factor
        total += value.detach().double()
        if not value.requires_grad:
            continue
        found = dict(
            zip(map(id, wanted), torch.autograd.grad(value, wanted, allow_unused=True), strict=True)
        )
        if found.get(id(target)) is not None:
            gradients.add_rows("target", block, found[id(target)])
        for part, own in zip(parts, leaves, strict=True):
            part.add(block, {name: found.get(id(t)) for name, t in own.items()})
    for part in parts:
        part.finish()
    return total


def _split(ids: Tensor | None, layers: Sequence[tuple[Inputs, Gradients]]) -> list[Tensor | None]:
    """The latents of each layer, counted from its first one."""
    if ids is None or len(layers) == 1:
        return [ids] * len(layers)
    found, first = [], 0
    for inputs, _ in layers:
        found.append(ids[(ids >= first) & (ids < first + inputs.d_sae)] - first)
        first += inputs.d_sae
    return found  # type: ignore[return-value]


class _Gathered:
    """The latents of a layer that a term uses, and the sums of their gradients."""

    def __init__(self, inputs: Inputs, gradients: Gradients, ids: Tensor | None) -> None:
        self._inputs, self._gradients, self._ids = inputs, gradients, ids
        self._weights = _weights(inputs, ids)
        self._sums: dict[str, Tensor] = {}

    def leaves(self, block: slice) -> dict[str, Tensor | None]:
        """X of the rows, and the weights."""
        x = self._inputs.tensors["x"][block].requires_grad_("x" in self._inputs.needs)
        return {"x": x, **self._weights}

    def add(self, block: slice, found: dict[str, Tensor | None]) -> None:
        """Add the gradients of a block."""
        for name, part in found.items():
            if part is None:
                continue
            if name == "x":
                self._gradients.add_rows(name, block, part)
                continue
            wide = part.to(self._inputs.acc)
            self._sums[name] = self._sums[name].add_(wide) if name in self._sums else wide

    def finish(self) -> None:
        """Add the sums to the gradients of all latents."""
        for name, part in self._sums.items():
            _add(name, part, self._ids, self._gradients)


def _weights(inputs: Inputs, ids: Tensor | None) -> dict[str, Tensor | None]:
    """Leaves: the weights of the chosen latents, W_enc feature-major; absent ones are None."""
    found: dict[str, Tensor | None] = {}
    for field in fields(Dictionary):
        name = field.name
        if name not in WEIGHTS:
            continue
        t = inputs.tensors.get(name)
        if t is not None and name in BY_LATENT and ids is not None:
            t = t.t()[ids].t() if name == "W_enc" else t[ids]
        if t is not None:
            t = t.detach().requires_grad_(name in inputs.needs)
        found[name] = t
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
