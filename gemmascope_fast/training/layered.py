"""`loss` of a `Crosscoder` or `CrossLayerTranscoder`: that of `blocked.py`, over all layers.

The batch is flat, `[n, L * d]`, and each layer's x a part of its columns. Gradients are computed in
the forward pass, block by block; with one sparse block a fused optimizer takes each layer's entries
instead, and no gradient of a matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations import JumpReLU, TopK
from ..arguments import check_count
from ..checks import check_device
from ..losses.sparsity import check_totals
from ..multilayer import CrossLayerTranscoder
from ..multilayer.base import MultiLayer, check_stack
from ..operands import autocast, widen
from .entry_paths import ENCODER
from .evaluation import Inputs
from .layered_paths import Joint, Sums, count_layers, layered_block
from .losses import LossTerm, Term, check_terms
from .losses_batch import BatchTerm
from .losses_weights import WeightTerm
from .objective import Objective
from .outcome import OP, outcome, precomputed
from .planning import DEFAULT_LIMITS, ENTRY_BYTES, Limits, plan_layers
from .weight_pass import weight_pass

MATRICES = ("W_dec", *ENCODER)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def layered_loss(
    module: MultiLayer,
    x: Tensor,
    target: Tensor | None,
    terms: Sequence[LossTerm],
    limits: Limits = DEFAULT_LIMITS,
    active: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of `module` on x; `MultiLayer.loss` documents them.

    `active` is that of `sae_loss`, layer after layer.
    """
    checked = check_terms(OP, terms)
    _check_fit(module, checked)
    target = _check_call(module, x, target)
    shared, layers = _tensors(module, x, target)
    joint = _joint(module, shared, layers)
    deferred = [d for d in module.deferred if d is not None]
    wanted = all(layer.needs >= {"W_enc", "W_dec"} for layer in joint.layers)
    deferrable = bool(deferred) and wanted and "x" not in joint.needs
    loss, metrics, sums = _evaluate(joint, checked, limits, deferrable, active)
    if module.training:
        for at, layer in enumerate(joint.layers):
            for smallest in layer.smallest:
                module.observe(at, smallest)
    if not joint.needs:
        return loss, metrics
    kept = [into.kept for into in sums.layers]
    receive = None
    if any(kept):
        receive = _all([d.keep(**k) for d, k in zip(deferred, kept, strict=True) if k is not None])
    found: list[Tensor | None] = []
    for name, t in shared.items():
        found.append(_gradient_of_x(sums, t) if name == "x" else sums.pop(name))
    for own, into in zip(layers, sums.layers, strict=True):
        late = MATRICES if into.kept is not None else ()
        found += [None if name in late else into.pop(name) for name in own]
    inputs = [*shared.values(), *(t for own in layers for t in own.values())]
    return precomputed(loss, found, inputs, receive), metrics


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def count_layered(
    module: MultiLayer, x: Tensor, limits: Limits = DEFAULT_LIMITS
) -> tuple[Tensor, int]:
    """Count the tokens on which each latent is active; `MultiLayer.count_latents`."""
    check_stack("count_latents", "x", x, module)
    joint = _joint(module, *_tensors(module, x, x))
    with torch.autocast(x.device.type, enabled=False):
        return count_layers(joint, list(plan_layers(joint.layers, limits))), joint.n


@torch.no_grad()
def _evaluate(
    joint: Joint,
    terms: tuple[LossTerm, ...],
    limits: Limits,
    deferrable: bool,
    active: list[Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor], Sums]:
    objective, sums = Objective(joint, terms), Sums(joint)
    blocks = {True: 0, False: 0}
    with torch.autocast(joint.tensors["x"].device.type, enabled=False):
        parts = list(plan_layers(joint.layers, limits))
        if objective.needs_counts and len(parts) != 1:
            objective.counts = count_layers(joint, parts)
        more = any(isinstance(term, WeightTerm) for term in terms)
        if deferrable and not more and len(parts) == 1 and not any(parts[0][1]):
            for into in sums.layers:
                into.kept = {}
        for rows, dense in parts:
            layered_block(joint, rows, dense, objective, sums)
            for apart in dense:
                blocks[apart] += 1
        if more and active is not None:
            active += [into.buffer("b_enc") != 0 for into in sums.layers]
        layers = list(zip(joint.layers, sums.layers, strict=True))
        for at, term in enumerate(terms):
            if isinstance(term, WeightTerm):
                rest, budget = objective.residual, limits.entry_bytes // ENTRY_BYTES
                value = weight_pass(OP, joint, term, rest, budget, sums, layers)
                objective.sums[at] = value * joint.tokens
    return *outcome(joint, terms, objective, blocks), sums


def _tensors(
    module: MultiLayer, x: Tensor, target: Tensor
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What the layers share, and what each has beside its x; as autocast wants them."""
    n, width = math.prod(x.shape[:-2]), module.n_layers * module.d_model
    (flat,) = autocast(x.reshape(n, width))
    b_dec = widen(module.b_dec.reshape(-1))
    shared = {"x": flat, "target": target.reshape(n, width), "b_dec": b_dec}
    layers = []
    for at in range(module.n_layers):
        W_enc, W_dec = autocast(module.W_enc[at], module.W_dec[at])
        own = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": widen(module.b_enc[at])}
        threshold = module.gate(at)[1]
        if threshold is not None:
            own["threshold"] = widen(threshold)
        if isinstance(module, CrossLayerTranscoder) and module.W_skip is not None:
            own["W_skip"] = module.W_skip[at]
        layers.append(own)
    return shared, layers


def _joint(module: MultiLayer, shared: dict[str, Tensor], layers: list[dict[str, Tensor]]) -> Joint:
    """Inputs of the evaluation; sums are float64 where x or a weight is."""
    of_layers = [t for own in layers for t in own.values()]
    floats = [shared["x"], shared["b_dec"], *of_layers]
    acc = torch.float64 if any(t.dtype == torch.float64 for t in floats) else torch.float32
    n = shared["x"].shape[0]
    activation, made = module.gate(0)[0], []
    for at, own in enumerate(layers):
        part = shared["x"].detach().view(n, module.n_layers, module.d_model)[:, at]
        needs = _needs(own) | (_needs(shared) & {"x"})
        tensors = {"x": part} | {name: t.detach() for name, t in own.items()}
        made.append(Inputs(tensors, activation, needs, acc, tokens=n))
    tensors = {name: t.detach() for name, t in shared.items()}
    tensors["b_enc"] = tensors["b_dec"]  # whose device and dtype counts are differentiated in
    needs = _needs(shared).union(*(layer.needs for layer in made))
    return Joint(tensors, activation, needs, acc, tokens=n, layers=tuple(made))


def _needs(tensors: dict[str, Tensor]) -> frozenset[str]:
    enabled = torch.is_grad_enabled()
    return frozenset(name for name, t in tensors.items() if enabled and t.requires_grad)


def _gradient_of_x(sums: Sums, x: Tensor) -> Tensor | None:
    parts = [into.pop("x") for into in sums.layers]
    found = [part for part in parts if part is not None]
    return torch.cat(found, 1).view_as(x) if found else None


def _all(receivers: list[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def receive(scale: Tensor) -> None:
        for each in receivers:
            each(scale)

    return receive


def _check_call(module: MultiLayer, x: Any, target: Any) -> Tensor:
    """Raise on arguments that do not fit; return the target."""
    check_stack(OP, "x", x, module)
    if x.is_meta:
        raise ValueError(f"{OP}: x must have values, and is on the meta device")
    check_device(OP, "x", x, module.W_enc[0])
    activation = module.activation
    if isinstance(activation, TopK):
        check_count(OP, "k", activation.k, module.d_sae, "d_sae")
    learnt = module.threshold is not None and any(t.requires_grad for t in module.threshold)
    if isinstance(activation, JumpReLU) and activation.bandwidth == 0:
        if learnt and torch.is_grad_enabled():
            raise ValueError(
                f"{OP}: a threshold requires grad but the activation's bandwidth is 0: use "
                "JumpReLU(bandwidth=...) > 0, or requires_grad_(False)"
            )
    if target is None:
        if isinstance(module, CrossLayerTranscoder):
            raise ValueError(
                f"{OP}: target is needed, the activations that this CrossLayerTranscoder maps x "
                f"to: pass a tensor of shape {tuple(x.shape)}"
            )
        return x  # type: ignore[no-any-return]
    check_stack(OP, "target", target, module)
    check_device(OP, "target", target, module.W_enc[0])
    if target.shape != x.shape:
        raise ValueError(
            f"{OP}: target must have shape {tuple(x.shape)}, got {tuple(target.shape)}"
        )
    return target  # type: ignore[no-any-return]


def _check_fit(module: MultiLayer, terms: Sequence[LossTerm]) -> None:
    """The terms have a meaning for several layers."""
    latents = module.n_layers * module.d_sae
    for term in terms:
        if isinstance(term, WeightTerm):
            if not term.layered:
                raise ValueError(f"{OP}: {term.name} is for dictionaries of one layer")
            term.latents(OP, latents, module.b_dec.device)
        if isinstance(term, Term) and term.prefixes:
            raise ValueError(
                f"{OP}: {term.name} reconstructs from prefixes of the latents, and is for "
                "dictionaries of one layer"
            )
        if isinstance(term, BatchTerm):
            check_totals(f"{OP}: {term.name}", term.counts, term.tokens, latents)
