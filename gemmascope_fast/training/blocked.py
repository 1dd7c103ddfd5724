"""`SAE.loss`: a loss and its gradients in blocks of rows, so that memory stays bounded.

The forward pass already computes the gradients, block by block, and drops each block's activations;
the backward pass hands them out, scaled. Dense starts need this: with threshold 0.001 and unit rows
about half of all latents fire on every token.

`planning.py` cuts the rows into blocks, `block_paths.py` evaluates one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_encoder
from ..modules import SAE
from .block_paths import count_block, dense_block, sparse_block
from .entry_paths import ENCODER
from .evaluation import Gradients, Inputs
from .losses import LossTerm, check_terms
from .losses_weights import WeightTerm
from .objective import Objective
from .outcome import OP, outcome, precomputed
from .planning import DEFAULT_LIMITS, ENTRY_BYTES, Limits, plan
from .preparing import check_call, check_fit, inputs_of, tensors_of
from .weight_pass import weight_pass
from .whole import WHOLE, Whole


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sae_loss(
    module: SAE,
    x: Tensor,
    target: Tensor | None,
    terms: Sequence[LossTerm],
    limits: Limits = DEFAULT_LIMITS,
    whole: Whole = WHOLE,
    active: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of `module` on x; `SAE.loss` documents them.

    Where terms give latents a gradient that were not active, `active` receives those that were.
    """
    checked, d_sae = check_terms(OP, terms), whole.d_sae(module.d_sae)
    check_fit(OP, module, checked, d_sae)
    target = check_call(OP, module, x, target, d_sae)
    tensors, activation = tensors_of(module, x, target)
    enabled = torch.is_grad_enabled()
    needs = frozenset(name for name, t in tensors.items() if enabled and t.requires_grad)
    inputs = inputs_of(module, tensors, activation, needs, whole)
    keep = getattr(module.deferred, "keep", None)  # a fused optimizer's
    deferrable = keep is not None and needs >= {"W_enc", "W_dec"} and "x" not in needs
    loss, metrics, gradients = _evaluate(inputs, checked, limits, deferrable, active)
    if module.training:
        for smallest in inputs.smallest:
            module.observe(smallest)
    if needs:
        kept = gradients.kept
        receive = keep(**kept) if keep is not None and kept else None
        late = ("W_dec", *ENCODER) if kept else ()
        found = [None if name in late else gradients.pop(name) for name in tensors]
        if found[0] is not None:  # of x, the first tensor; here are the summands of these latents
            found[0] = whole.over_latents(found[0])
        loss = precomputed(loss, found, list(tensors.values()), receive)
    return loss, metrics


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def count_latents(module: SAE, x: Tensor, limits: Limits = DEFAULT_LIMITS) -> tuple[Tensor, int]:
    """Count the tokens on which each latent is active: one encode in blocks, no gradients.

    Args:
        module: the dictionary.
        x: `[*batch, d_in]` floating point.
        limits: sizes of the blocks.

    Returns:
        counts `[d_sae]` int64 and the number of tokens: totals for a `BatchTerm`, once added up
        over the parts of a batch.

    Raises:
        TypeError: x is not floating point.
        ValueError: shapes or devices disagree.
    """
    check_encoder("count_latents", x, module.W_enc, module.b_enc)
    goal = x.new_empty((*x.shape[:-1], module.d_out))
    tensors, activation = tensors_of(module, x, goal)
    inputs = inputs_of(module, tensors, activation, frozenset())
    with torch.autocast(x.device.type, enabled=False):
        return _count(inputs, list(plan(inputs, limits))), inputs.n


def _count(inputs: Inputs, parts: list[tuple[slice, bool]]) -> Tensor:
    """`[d_sae]` int64: tokens of the blocks on which each latent is active."""
    total = torch.zeros(inputs.d_sae, dtype=torch.int64, device=inputs.tensors["x"].device)
    for rows, dense in parts:
        total += count_block(inputs, rows, dense)
    return total


@torch.no_grad()
def _evaluate(
    inputs: Inputs,
    terms: tuple[LossTerm, ...],
    limits: Limits,
    deferrable: bool,
    active: list[Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor], Gradients]:
    objective, gradients = Objective(inputs, terms), Gradients(inputs)
    blocks = {True: 0, False: 0}
    with torch.autocast(inputs.tensors["x"].device.type, enabled=False):
        parts = list(plan(inputs, limits))
        if objective.needs_counts and len(parts) != 1:
            objective.counts = inputs.whole.counts(_count(inputs, parts))
        more = any(isinstance(term, WeightTerm) for term in terms)
        if deferrable and not more and [dense for _, dense in parts] == [False]:
            gradients.kept = {}
        for rows, dense in parts:
            path = dense_block if dense else sparse_block
            path(inputs, rows, objective, gradients)
            blocks[dense] += 1
        if more and active is not None:
            active.append(gradients.buffer("b_enc") != 0)
        for at, term in enumerate(terms):
            if isinstance(term, WeightTerm):
                rest, budget = objective.residual, limits.entry_bytes // ENTRY_BYTES
                value = weight_pass(OP, inputs, term, rest, budget, gradients)
                objective.sums[at] = value * inputs.tokens
    return *outcome(inputs, terms, objective, blocks), gradients
