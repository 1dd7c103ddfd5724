"""What a module encodes with once its `Semantics` are applied, and the gradients they add.

`effective(module, x)` turns the parameters into those of a plain JumpReLU, TopK or BatchTopK, by
differentiable steps; `straight_through` gives stored entries the gradients that the ops lack, as
terms whose value is 0:

    values += s * step,   gate += step,
    step = w(u) / bandwidth * ((pre - theta) - constant(pre - theta))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .activations import Activation, BatchTopK, JumpReLU
from .arguments import check_number
from .functional import batchtopk_encode, decode, jumprelu_encode, pre_at, topk_encode
from .packing import PackedEncoder
from .screening import Screen
from .semantics import Semantics
from .sparse import SparseActs

if TYPE_CHECKING:
    from .modules import SAE

TINY = 1e-8
"""Smallest decoder norm that a rescaled activation is divided by."""


@dataclass(frozen=True)
class Effective:
    """Arguments of an encoder op.

    Attributes:
        activation: what selects: a BatchTopK with a running threshold is a JumpReLU when evaluated.
        x: `[*batch, d_in]`, centred where asked.
        W_enc: `[d_in, d_sae]`, rescaled where asked.
        b_enc: `[d_sae]`, likewise.
        threshold: `[d_sae]` that `pre` must exceed strictly, for a JumpReLU.
        norms: `[d_sae]` by which activations are divided before decoding, or None.
    """

    activation: Activation
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor | None
    norms: Tensor | None


def effective(module: SAE, x: Tensor, training: bool | None = None) -> Effective:
    """Apply the module's semantics to its parameters and to x; `training` is the module's mode."""
    training = module.training if training is None else training
    semantics, activation = module.semantics, module.activation
    W_enc: Tensor = module.W_enc
    b_enc: Tensor = module.b_enc
    threshold, norms = None, None
    if semantics.centers(activation) and module.centred:
        x = x - module.b_dec
    if semantics.rescale and not isinstance(activation, JumpReLU):
        norms = decoder_norms(module.W_dec)
        b_enc = b_enc * norms
        W_enc = W_enc * norms if module.packed is None else module.packed.W_enc
    if isinstance(activation, JumpReLU):
        threshold = gate_threshold(semantics, module.theta())
    elif isinstance(activation, BatchTopK) and module.ema_threshold is not None:
        if not training:
            limit = module.ema_threshold.clamp_min(0).to(b_enc.dtype)
            activation, threshold = JumpReLU(0.0), limit.expand(module.d_sae)
    return Effective(activation, x, W_enc, b_enc, threshold, norms)


def encode(module: SAE, x: Tensor, max_nnz: int | None = None) -> SparseActs:
    """Sparse activations of x under the module's semantics."""
    semantics, given = module.semantics, effective(module, x)
    encoder, activation = (given.x, given.W_enc, given.b_enc), given.activation
    if module.packed is not None:
        return packed_encode(module.packed, given, max_nnz)
    screened = (given.x, weights_of(module, given.W_enc), given.b_enc)
    if isinstance(activation, JumpReLU):
        assert given.threshold is not None
        threshold, bandwidth = given.threshold, activation.bandwidth
        inner = (threshold, *encoder) if semantics.gradient_to_x else (threshold,)
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inner)
        if semantics.own_gradient or bandwidth == 0 or not wanted:
            return jumprelu_encode(*screened, threshold, bandwidth=bandwidth, max_nnz=max_nnz)
        leaf = threshold.detach().requires_grad_()  # has the window stored; its gradient is dropped
        acts = jumprelu_encode(
            *screened, leaf, bandwidth=semantics.emission(bandwidth), max_nnz=max_nnz
        )
        return straight_through(semantics, acts, encoder, threshold, bandwidth)
    if isinstance(activation, BatchTopK):
        acts = _batchtopk(module, screened, activation.k, max_nnz)
        if module.training and module.ema_threshold is not None:
            module.observe(smallest_active(acts.values.detach(), acts.gate))
    else:
        acts = topk_encode(*screened, activation.k)
    return pass_zeros(acts, encoder) if semantics.zero_gradient else acts


def _batchtopk(
    module: SAE, encoder: tuple[Any, Any, Any], k: float, max_nnz: int | None
) -> SparseActs:
    """With codes, the threshold of the batch before is the guess."""
    screen: Screen | None = module.screened if isinstance(encoder[1], PackedEncoder) else None
    guess = None if screen is None else screen.guess()
    acts = batchtopk_encode(*encoder, k, guess=guess, max_nnz=max_nnz)
    if screen is not None and acts.threshold is not None:
        screen.learn(acts.threshold)
    return acts


def weights_of(module: SAE, W_enc: Tensor) -> Tensor | PackedEncoder:
    """`W_enc` with the codes that the module keeps of it, if it does (`screen`)."""
    # Stand-ins that queries and wrapped modules make have no such attribute.
    screen: Screen | None = getattr(module, "screened", None)
    if screen is None or W_enc is not module.W_enc:
        return W_enc
    return screen.encoder(W_enc)


def packed_encode(
    packed: PackedEncoder, given: Effective, max_nnz: int | None = None
) -> SparseActs:
    """Sparse activations of a frozen module, which has no gradients of its own."""
    own = [given.b_enc] if given.threshold is None else [given.b_enc, given.threshold]
    if torch.is_grad_enabled() and any(t.requires_grad for t in [packed.W_enc, *own]):
        raise RuntimeError("encode: frozen parameters require gradients again; call unfreeze()")
    encoder, activation = (given.x, packed, given.b_enc), given.activation
    if isinstance(activation, JumpReLU):
        assert given.threshold is not None
        return jumprelu_encode(*encoder, given.threshold, max_nnz=max_nnz)
    if isinstance(activation, BatchTopK):
        return batchtopk_encode(*encoder, activation.k, max_nnz=max_nnz)
    return topk_encode(*encoder, activation.k)


def deferred_of(module: Any) -> Any:
    """What an optimizer put into the module, if it serves what is computed now."""
    deferred = module.deferred
    return deferred if deferred is not None and deferred.serves else None


def encoded(module: SAE, x: Tensor, max_nnz: int | None) -> SparseActs:
    """`encode`, with the backward that an optimizer put into the module, if one did."""
    acts, deferred = encode(module, x, max_nnz), deferred_of(module)
    return acts if deferred is None else deferred.encode(x, acts)


def decoded(module: SAE, acts: SparseActs, dtype: torch.dtype | None) -> Tensor:
    """Reconstruction, without an affine skip, likewise."""
    deferred = deferred_of(module)
    if deferred is not None:
        return deferred.decode(acts, module.b_dec, dtype)  # type: ignore[no-any-return]
    return decode(unscaled(module, acts), module.W_dec, module.b_dec, dtype=dtype)


def decoder_norms(W_dec: Tensor) -> Tensor:
    """`[d_sae]` norms of the decoder's rows, at least `TINY`."""
    wide = W_dec.to(torch.promote_types(W_dec.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return norms.clamp_min(TINY)


def gate_threshold(semantics: Semantics, theta: Tensor) -> Tensor:
    """What `pre` must exceed strictly; differentiable in theta with derivative 1."""
    if semantics.gate == "strict":
        return theta
    fixed = theta.detach()
    below = torch.nextafter(fixed, torch.full_like(fixed, -torch.inf))
    return theta + torch.where(fixed.isfinite(), below - fixed, 0.0)


def unscaled(module: SAE, acts: SparseActs) -> SparseActs:
    """Activations over the decoder norms by which the module's encoder rescaled them, if it did."""
    if not module.semantics.rescale or isinstance(module.activation, JumpReLU):
        return acts
    padded = torch.nn.functional.pad(decoder_norms(module.W_dec), (0, 1), value=1.0)
    return acts._replace(values=acts.values / padded[acts.latents()])


def straight_through(
    semantics: Semantics,
    acts: SparseActs,
    encoder: tuple[Tensor, Tensor, Tensor],
    theta: Tensor,
    bandwidth: float,
) -> SparseActs:
    """`acts`, whose window entries pass their gradients as the semantics say."""
    latents, tokens = acts.latents(), acts.tokens()
    padded = torch.nn.functional.pad(theta, (0, 1))
    limits, values, gate = padded[latents], acts.values.detach(), acts.gate.detach()
    half = semantics.emission(bandwidth) / 2
    near = ((gate == 0) | (values < limits.detach() + half)) & (latents < acts.d_sae)
    at = near.nonzero()[:, 0]
    x, W_enc, b_enc = encoder
    if not semantics.gradient_to_x:
        x, W_enc, b_enc = x.detach(), W_enc.detach(), b_enc.detach()
    pre = pre_at(x, W_enc, b_enc, tokens[at], latents[at]).to(values.dtype)
    limit, fixed = limits[at], limits[at].detach()
    weight = semantics.weight(pre.detach(), fixed, bandwidth)
    step = weight * ((pre - pre.detach()) - (limit - fixed))
    slope = pre.detach() if semantics.slope == "pre" else fixed
    counted = step * gate[at] if semantics.gate_window == "active" else step
    return acts._replace(
        values=acts.values.index_add(0, at, slope * step),
        gate=gate.index_add(0, at, counted),
    )


def pass_zeros(acts: SparseActs, encoder: tuple[Tensor, Tensor, Tensor]) -> SparseActs:
    """`acts`, whose selected zeros pass their gradient to the pre-activation."""
    at = ((acts.gate.detach() == 0) & (acts.latents() < acts.d_sae)).nonzero()[:, 0]
    pre = pre_at(*encoder, acts.tokens()[at], acts.latents()[at])
    return acts._replace(values=acts.values.index_add(0, at, pre - pre.detach()))


def smallest_active(values: Tensor, gate: Tensor) -> Tensor:
    """Smallest active value, without waiting: inf where nothing is active, NaN where one is."""
    active = torch.where(gate > 0, values, torch.inf)
    return torch.cat([active, active.new_full((1,), torch.inf)]).amin()


@torch.no_grad()
def folded(module: Any, bandwidth: float) -> Any:
    """A JumpReLU of the default semantics with the weights that evaluation mode amounts to."""
    op = "to_jumprelu"
    bandwidth = check_number(op, "bandwidth", bandwidth)
    given = effective(module, module.W_enc.new_zeros(0, module.d_in), training=False)
    if given.threshold is None:
        raise ValueError(
            f"{op}: {module.activation} has no thresholds: only a JumpReLU, or a BatchTopK whose "
            "semantics have ema_decay, becomes a JumpReLU"
        )
    if isinstance(module.activation, BatchTopK) and float(module.ema_threshold) < 0:
        raise ValueError(f"{op}: the running threshold has not seen a batch yet: train first")
    options: dict[str, Any] = {"d_out": module.d_out, "dtype": module.W_enc.dtype}
    if getattr(module, "W_skip", None) is not None:
        options["affine"] = True
    made = type(module)(module.d_in, module.d_sae, JumpReLU(bandwidth), device="meta", **options)
    plain = made.to_empty(device=module.W_enc.device)  # nothing is drawn
    b_enc, W_dec = given.b_enc, module.W_dec
    if module.semantics.centers(module.activation) and module.centred:
        b_enc = b_enc - module.b_dec @ given.W_enc.to(module.b_dec.dtype)
    if given.norms is not None:
        W_dec = W_dec / given.norms[:, None]
    tensors = {"W_enc": given.W_enc, "b_enc": b_enc, "threshold": given.threshold, "W_dec": W_dec}
    tensors |= {"b_dec": module.b_dec, "W_skip": getattr(module, "W_skip", None)}
    for name, t in tensors.items():
        if t is not None:
            getattr(plain, name).copy_(t)
    plain.metadata = dict(module.metadata)
    plain.train(module.training)
    return plain
