"""`SAE.loss`: a loss and its gradients in blocks of rows, so that memory stays bounded.

The forward pass already computes the gradients, block by block, and drops each block's activations;
the backward pass hands them out, scaled. Dense starts need this: with threshold 0.001 and unit rows
about half of all latents fire on every token.

Algorithm: spans of rows; a sample of each span measures its density (share of latents that
are active or inside the straight-through window). Above the crossover the span takes the dense path
in tiles of a fixed number of bytes, else the sparse path in blocks whose predicted entries fit a
budget. TopK is sparse always. BatchTopK selects over the whole batch, hence is one sparse block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import check_encoder
from ..modules import SAE, BatchTopK, TopK
from .block_paths import count_block, dense_block, sparse_block
from .entry_paths import ENCODER
from .evaluation import Gradients, Inputs
from .losses import LossTerm, check_terms
from .losses_weights import WeightTerm
from .objective import Objective
from .preparing import check_call, check_fit, inputs_of, tensors_of
from .weight_pass import weight_pass
from .whole import WHOLE, Whole

OP = "loss"
SAMPLE_ROWS, SAMPLE_LATENTS = 64, 2048
"""Sample that measures a span's density: about 1 % of a step at n = 256, d = 1152, F = 65536. One
row and one latent per stratum, at a hashed place inside it: any fixed stride would meet the same
position of every sequence, the BOS tokens say."""

CROSSOVER = {"cpu": 1 / 4, "cuda": 1 / 184}
"""Density above which the dense path is faster, by device type.

CPU: sparse / dense milliseconds of a whole step at density 1/4, 3/16, 1/8, 1/16, two idle threads
with AVX2, n = 512: 187/200, 143/194, 122/197, 84/221 (d = 512, F = 8192); 941/920, 713/832,
527/835, 386/916 (d = 1152, F = 16384).
CUDA: the ratio of an H200's bandwidth to its rate of bfloat16 products, not measured on steps.
"""

ENTRY_BYTES = 40
"""Of a stored entry at the peak: index, value, gate and permutation (20), and their gradients."""


@dataclass(frozen=True)
class Limits:
    """Sizes of the blocks.

    Args:
        span_rows: rows for which one sample decides.
        tile_bytes: of one `[rows, d_sae]` tile of the dense path, which holds up to three.
        entry_bytes: of the entries of one sparse block, as predicted by the sample.
        crossover: density above which the dense path serves; None takes that of the device, or 0
            where only the reference serves the sparse ops.
    """

    span_rows: int = 8192
    tile_bytes: int = 64 << 20  # d = 1152, F = 65536: 8 MiB tiles are 33 % slower, 32 MiB 4 %
    entry_bytes: int = 256 << 20
    crossover: float | None = None


DEFAULT_LIMITS = Limits()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sae_loss(
    module: SAE,
    x: Tensor,
    target: Tensor | None,
    terms: Sequence[LossTerm],
    limits: Limits = DEFAULT_LIMITS,
    whole: Whole = WHOLE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of `module` on x; `SAE.loss` documents them."""
    checked, d_sae = check_terms(OP, terms), whole.d_sae(module.d_sae)
    check_fit(OP, module, checked, d_sae)
    target = check_call(OP, module, x, target, d_sae)
    tensors, activation = tensors_of(module, x, target)
    enabled = torch.is_grad_enabled()
    needs = frozenset(name for name, t in tensors.items() if enabled and t.requires_grad)
    inputs = inputs_of(module, tensors, activation, needs, whole)
    keep = getattr(module.deferred, "keep", None)  # a fused optimizer's
    deferrable = keep is not None and needs >= {"W_enc", "W_dec"} and "x" not in needs
    loss, metrics, gradients = _evaluate(inputs, checked, limits, deferrable)
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
        loss = _Precomputed.apply(loss, found, receive, *tensors.values())  # type: ignore[no-untyped-call]
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
        return _count(inputs, list(_plan(inputs, limits))), inputs.n


def _count(inputs: Inputs, plan: list[tuple[slice, bool]]) -> Tensor:
    """`[d_sae]` int64: tokens of the blocks on which each latent is active."""
    total = torch.zeros(inputs.d_sae, dtype=torch.int64, device=inputs.tensors["x"].device)
    for rows, dense in plan:
        total += count_block(inputs, rows, dense)
    return total


class _Precomputed(torch.autograd.Function):
    """The loss as a function of its inputs whose gradients are known already.

    `receive`, where a fused optimizer computes those of the weights later, is told of the backward
    pass and its scale.
    """

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
        if bool(scale == 1):  # plain loss.backward(): no copies, the buffers become the .grad
            return (None, None, None, *saved)
        return (None, None, None, *(None if g is None else g * scale.to(g.dtype) for g in saved))


@torch.no_grad()
def _evaluate(
    inputs: Inputs, terms: tuple[LossTerm, ...], limits: Limits, deferrable: bool
) -> tuple[Tensor, dict[str, Tensor], Gradients]:
    objective, gradients = Objective(inputs, terms), Gradients(inputs)
    blocks = {True: 0, False: 0}
    with torch.autocast(inputs.tensors["x"].device.type, enabled=False):
        plan = list(_plan(inputs, limits))
        if objective.needs_counts and len(plan) != 1:
            objective.counts = inputs.whole.counts(_count(inputs, plan))
        deferrable = deferrable and not any(isinstance(term, WeightTerm) for term in terms)
        if deferrable and [dense for _, dense in plan] == [False]:
            gradients.kept = {}
        for rows, dense in plan:
            path = dense_block if dense else sparse_block
            path(inputs, rows, objective, gradients)
            blocks[dense] += 1
        for at, term in enumerate(terms):
            if isinstance(term, WeightTerm):
                rest, budget = objective.residual, limits.entry_bytes // ENTRY_BYTES
                value = weight_pass(OP, inputs, term, rest, budget, gradients)
                objective.sums[at] = value * inputs.tokens
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
    return values.sum().to(inputs.acc), metrics, gradients


def _plan(inputs: Inputs, limits: Limits) -> Iterator[tuple[slice, bool]]:
    """Blocks of rows in order, and whether each takes the dense path."""
    n, d_sae, activation = inputs.n, inputs.d_sae, inputs.activation
    entries = max(limits.entry_bytes // ENTRY_BYTES, 1)
    if isinstance(activation, BatchTopK):
        if inputs.tokens:  # an empty part of a batch takes part in its selection
            yield slice(0, n), False
        return
    if isinstance(activation, TopK):
        yield from _split(0, n, entries // max(activation.k, 1), False)
        return
    tile = max(limits.tile_bytes // (max(d_sae, 1) * inputs.acc.itemsize), 1)
    crossover = _crossover(inputs) if limits.crossover is None else limits.crossover
    spans, sizes = [], []
    for start in range(0, n, limits.span_rows):
        stop = min(start + limits.span_rows, n)
        density = 1.0
        if crossover > 0:
            density = _measure(inputs, start, stop, min(tile, SAMPLE_ROWS))
        dense = density > crossover
        per_row = max(density * d_sae, 1.0)
        spans.append((start, stop, dense))
        sizes.append(tile if dense else int(entries / per_row))
    for (start, stop, dense), rows in zip(spans, inputs.whole.smallest(sizes), strict=True):
        yield from _split(start, stop, rows, dense)


def _split(start: int, stop: int, rows: int, dense: bool) -> Iterator[tuple[slice, bool]]:
    """Blocks of at most `rows` rows (at least 1) and nearly equal size."""
    blocks = math.ceil((stop - start) / max(rows, 1))
    for block in range(blocks):
        low, high = ((stop - start) * at // blocks for at in (block, block + 1))
        yield slice(start + low, start + high), dense


def _crossover(inputs: Inputs) -> float:
    device = inputs.tensors["x"].device.type
    needed = ("jumprelu_encode", "decode", "sae_backward")
    if inputs.acc == torch.float32 and device in CROSSOVER:
        if all(ops.implementation(name, device) in ("native", "triton") for name in needed):
            return CROSSOVER[device]
    return 0.0  # the reference ops are dense themselves, and without tiles


def _measure(inputs: Inputs, start: int, stop: int, sample_rows: int) -> float:
    """Share of entries that a sample of the span would store, to the weights' precision."""
    encoder = (inputs.tensors["W_enc"], inputs.tensors["b_enc"])
    limit = inputs.tensors["threshold"] - inputs.emission / 2
    return sampled_density(inputs.tensors["x"][start:stop], *encoder, limit, sample_rows)


def sampled_density(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, limit: Tensor, sample_rows: int = SAMPLE_ROWS
) -> float:
    """Share of `pre > limit` in a strided sample of x `[n, d_in]` and of the latents."""
    if W_enc.shape[1] == 0:
        return 0.0
    if x.shape[0] > sample_rows:
        x = x[_strata(x.shape[0], sample_rows).to(x.device)]
    if W_enc.shape[1] > SAMPLE_LATENTS:  # else all of them, without a copy
        latents = _strata(W_enc.shape[1], SAMPLE_LATENTS).to(x.device)
        if W_enc.stride(1) == 1:  # along the rows of memory, and by index_select, which copies them
            W_enc = W_enc.index_select(1, latents)
        else:
            W_enc = W_enc.t().index_select(0, latents).t()
        b_enc, limit = b_enc[latents], limit[latents]
    pre = x.to(W_enc.dtype) @ W_enc + b_enc
    return float(torch.gt(pre, limit, out=pre).mean(dtype=torch.float32))


def _strata(size: int, strata: int) -> Tensor:
    """One index from each of at most `strata` equal parts of `range(size)`, always the same."""
    width = math.ceil(size / strata)
    begin = torch.arange(0, size, width, device="cpu")
    hashed = (
        (torch.arange(len(begin), device="cpu") + 1) * 2654435761 % 2**32
    )  # multiplicative hash
    return begin + hashed * torch.clamp(size - begin, max=width) // 2**32
