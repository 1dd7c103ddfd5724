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
from ..arguments import check_count, check_number
from ..checks import check_device, check_encoder, check_float, check_vector
from ..functional import _autocast, _widen
from ..modules import SAE, BatchTopK, JumpReLU, TopK, Transcoder
from .block_paths import ENCODER, dense_block, sparse_block
from .evaluation import Gradients, Inputs, Objective
from .losses import Term, check_terms

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
    terms: Sequence[Term],
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of `module` on x; `SAE.loss` documents them."""
    terms = check_terms(OP, terms)
    target = _check(module, x, target)
    tensors = _tensors(module, x, target)
    enabled = torch.is_grad_enabled()
    needs = frozenset(name for name, t in tensors.items() if enabled and t.requires_grad)
    acc = torch.float32
    if any(t.dtype == torch.float64 for name, t in tensors.items() if name != "target"):
        acc = torch.float64
    detached = {name: t.detach() for name, t in tensors.items()}
    inputs = Inputs(detached, module.activation, needs, acc)
    keep = getattr(module.deferred, "keep", None)  # a fused optimizer's
    deferrable = keep is not None and needs >= {"W_enc", "W_dec"} and "x" not in needs
    loss, metrics, gradients = _evaluate(inputs, terms, limits, deferrable)
    if needs:
        kept = gradients.kept
        receive = keep(**kept) if keep is not None and kept else None
        late = ("W_dec", *ENCODER) if kept else ()
        found = [None if name in late else gradients.pop(name) for name in tensors]
        loss = _Precomputed.apply(loss, found, receive, *tensors.values())  # type: ignore[no-untyped-call]
    return loss, metrics


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
    inputs: Inputs, terms: tuple[Term, ...], limits: Limits, deferrable: bool
) -> tuple[Tensor, dict[str, Tensor], Gradients]:
    objective, gradients = Objective(inputs, terms), Gradients(inputs)
    blocks = {True: 0, False: 0}
    with torch.autocast(inputs.tensors["x"].device.type, enabled=False):
        plan = list(_plan(inputs, limits))
        if deferrable and [dense for _, dense in plan] == [False]:
            gradients.kept = {}
        for rows, dense in plan:
            path = dense_block if dense else sparse_block
            path(inputs, rows, objective, gradients)
            blocks[dense] += 1
    sums, tokens = objective.sums, max(inputs.n, 1)
    error, deviation, l0 = sums[len(terms) :]
    values = sums[: len(terms)] / tokens
    metrics = {term.name: value for term, value in zip(terms, values, strict=True)}
    metrics["fvu"] = error / deviation
    metrics["l0"] = l0 / tokens
    metrics["density"] = metrics["l0"] / inputs.d_sae
    metrics = {name: value.to(inputs.acc) for name, value in metrics.items()}
    metrics["dense_blocks"] = torch.tensor(blocks[True], device=sums.device)
    metrics["blocks"] = torch.tensor(sum(blocks.values()), device=sums.device)
    return values.sum().to(inputs.acc), metrics, gradients


def _plan(inputs: Inputs, limits: Limits) -> Iterator[tuple[slice, bool]]:
    """Blocks of rows in order, and whether each takes the dense path."""
    n, d_sae, activation = inputs.n, inputs.d_sae, inputs.activation
    entries = max(limits.entry_bytes // ENTRY_BYTES, 1)
    if isinstance(activation, BatchTopK):
        yield from _split(0, n, n, False)
        return
    if isinstance(activation, TopK):
        yield from _split(0, n, entries // max(activation.k, 1), False)
        return
    tile = max(limits.tile_bytes // (d_sae * inputs.acc.itemsize), 1)
    crossover = _crossover(inputs) if limits.crossover is None else limits.crossover
    for start in range(0, n, limits.span_rows):
        stop = min(start + limits.span_rows, n)
        density = 1.0
        if crossover > 0:
            density = _measure(inputs, start, stop, min(tile, SAMPLE_ROWS))
        dense = density > crossover
        per_row = max(density * d_sae, 1.0)
        yield from _split(start, stop, tile if dense else int(entries / per_row), dense)


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
    """Share of entries that a strided sample would store, to the weights' precision."""
    x = inputs.tensors["x"]
    rows = start + _strata(stop - start, sample_rows).to(x.device)
    latents = _strata(inputs.d_sae, SAMPLE_LATENTS).to(x.device)
    W_enc, b_enc = inputs.tensors["W_enc"].t()[latents].t(), inputs.tensors["b_enc"][latents]
    pre = x[rows].to(W_enc.dtype) @ W_enc + b_enc
    limit = inputs.tensors["threshold"][latents] - inputs.bandwidth / 2
    return float(torch.gt(pre, limit, out=pre).mean(dtype=torch.float32))


def _strata(size: int, strata: int) -> Tensor:
    """One index from each of at most `strata` equal parts of `range(size)`, always the same."""
    width = math.ceil(size / strata)
    begin = torch.arange(0, size, width)
    hashed = (torch.arange(len(begin)) + 1) * 2654435761 % 2**32  # multiplicative hash
    return begin + hashed * torch.clamp(size - begin, max=width) // 2**32


def _check(module: SAE, x: Tensor, target: Tensor | None) -> Tensor:
    """Raise on arguments that do not fit; return the target."""
    check_encoder(OP, x, module.W_enc, module.b_enc)
    _check_activation(module)
    if target is None:
        if isinstance(module, Transcoder) or module.d_in != module.d_out:
            raise ValueError(
                f"{OP}: target is needed, the activation that this {type(module).__name__} maps x "
                f"to: pass a tensor of shape {(*x.shape[:-1], module.d_out)}"
            )
        return x
    check_float(OP, "target", target)
    expected = (*x.shape[:-1], module.d_out)
    if tuple(target.shape) != expected:
        raise ValueError(f"{OP}: target must have shape {expected}, got {tuple(target.shape)}")
    check_device(OP, "target", target, module.W_enc)
    return target


def _check_activation(module: SAE) -> None:
    activation = module.activation
    if isinstance(activation, TopK):
        check_count(OP, "k", activation.k, module.d_sae, "d_sae")
    if isinstance(activation, BatchTopK):
        check_number(OP, "k", activation.k)
    if not isinstance(activation, JumpReLU) or module.threshold is None:
        return
    check_vector(OP, "threshold", module.threshold, module.d_sae, module.W_enc)
    check_number(OP, "bandwidth", activation.bandwidth)
    if activation.bandwidth == 0 and torch.is_grad_enabled() and module.threshold.requires_grad:
        raise ValueError(
            f"{OP}: threshold requires grad but the activation's bandwidth is 0: use "
            "JumpReLU(bandwidth=...) > 0, or threshold.requires_grad_(False)"
        )


def _tensors(module: SAE, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Everything the loss depends on: x and target flat, weights as autocast wants them."""
    n = math.prod(x.shape[:-1])
    flat, W_enc, W_dec = _autocast(x.reshape(n, module.d_in), module.W_enc, module.W_dec)
    tensors = {"x": flat, "target": target.reshape(n, module.d_out), "W_enc": W_enc, "W_dec": W_dec}
    tensors |= {"b_enc": _widen(module.b_enc), "b_dec": _widen(module.b_dec)}
    if isinstance(module.activation, JumpReLU) and module.threshold is not None:
        tensors["threshold"] = _widen(module.threshold)
    skip = getattr(module, "W_skip", None)
    if skip is not None:
        tensors["W_skip"] = skip
    return tensors
