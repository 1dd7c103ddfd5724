"""dictionary_learning's trainers as subclasses whose losses never form `[n, dict_size]`.

    loss = mean_i |x - recon|^2 + alpha * auxk        (TopK, BatchTopK; Matryoshka: over prefixes)
    loss = mean_i |x - recon|^2 + lam * (L0 / target - 1)^2                              (JumpReLU)

Imports `dictionary_learning`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..effective import straight_through
from ..functional import decode, jumprelu_encode, topk_encode
from ..losses import matryoshka
from ..losses.dead import aux_denominator, aux_error
from ..semantics import Semantics
from ..sparse import SparseActs
from .dictionary_learning_dicts import (
    DICTIONARIES,
    batch_entries,
    batch_top_k,
    decoder,
    dense,
    encoder,
    feature_major_,
    jumprelu,
    nested,
    row_major_,
    top_k,
)
from .patching import fusing

__all__ = ["REPLACED", "feature_major_", "pairs", "row_major_"]

REPLACED = {"encode", "forward", "loss"}
"""Methods that `install` replaces."""


class TopKTrainer(top_k.TopKTrainer):  # type: ignore[misc]
    """`TopKTrainer` over entries, with a fused Adam."""

    strict_compat = False
    __init__ = fusing(top_k.TopKTrainer.__init__)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        """The library's loss, and its statistics."""
        feature_major_(self)
        acts = topk_encode(*encoder(self.ae, x), int(self.ae.k))
        values = acts.values.reshape(x.shape[0], -1)
        if step > self.threshold_start_step:
            self.update_threshold(values)
        recon = decode(acts, decoder(self.ae), self.ae.b_dec)
        self.effective_l0 = values.shape[1]
        count_idle(self, acts.indices.long(), x.shape[0])
        l2 = (x - recon).pow(2).sum(dim=-1).mean()
        aux: Any = auxiliary(self, x, (x - recon).detach()) if self.auxk_alpha > 0 else 0
        return _result(self, x, recon, acts, l2, aux, logging)


class BatchTopKTrainer(batch_top_k.BatchTopKTrainer):  # type: ignore[misc]
    """`BatchTopKTrainer` over entries, with a fused Adam."""

    strict_compat = False
    __init__ = fusing(batch_top_k.BatchTopKTrainer.__init__)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        """The library's loss, and its statistics."""
        feature_major_(self)
        acts = observed(self, x, step)
        recon = decode(acts, decoder(self.ae), self.ae.b_dec)
        l2 = (x - recon).pow(2).sum(dim=-1).mean()
        aux = auxiliary(self, x, (x - recon).detach())
        return _result(self, x, recon, acts, l2, aux, logging)


class MatryoshkaBatchTopKTrainer(nested.MatryoshkaBatchTopKTrainer):  # type: ignore[misc]
    """`MatryoshkaBatchTopKTrainer` over entries, with a fused Adam."""

    strict_compat = False
    __init__ = fusing(nested.MatryoshkaBatchTopKTrainer.__init__)

    def loss(self, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        """The library's loss, and its statistics."""
        ae = self.ae
        acts = observed(self, x, step)
        count = ae.active_groups
        ends = [int(end) for end in ae.group_indices[1 : count + 1]]
        weights = [w / count for w in self.group_weights[:count]]
        l2 = matryoshka(acts, ae.W_dec, ae.b_dec, x, ends, weights)
        with torch.no_grad():
            recon = decode(acts, ae.W_dec, ae.b_dec)
        aux = auxiliary(self, x, x - recon)
        result = _result(self, x, recon, acts, l2, aux, logging)
        if logging:
            each = group_losses(acts.detach(), ae, x, ends, self.group_weights)
            result.losses["min_l2_loss"] = min(each)
            result.losses["max_l2_loss"] = max(each)
        return result


class JumpReluTrainer(jumprelu.JumpReluTrainer):  # type: ignore[misc]
    """`JumpReluTrainer` over entries, with a fused Adam."""

    strict_compat = False
    __init__ = fusing(jumprelu.JumpReluTrainer.__init__)

    def loss(self, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        """The library's loss, and its statistics."""
        ae = self.ae
        x = x.to(ae.W_enc.dtype)
        acts = gated(self, x)
        count_idle(self, fired(acts), x.shape[0])
        self.dead_features = int((self.num_tokens_since_fired > self.dead_feature_threshold).sum())
        recon = decode(acts, ae.W_dec, ae.b_dec)
        l2 = (x - recon).pow(2).sum(dim=-1).mean()
        excess = acts.l0().mean() / self.target_l0 - 1
        scale = self.sparsity_coefficient * self.sparsity_warmup_fn(step)
        loss = l2 + scale * excess.pow(2)
        if not logging:
            return loss
        losses = {"l2_loss": l2.item(), "loss": loss.item()}
        return _log("recon", x, recon, dense(acts, ae.b_dec), losses)


def gated(trainer: Any, x: Tensor) -> SparseActs:
    """A JumpReLU's entries, with the straight-through gradients that the trainer is asked for."""
    given = (x, trainer.ae.W_enc, trainer.ae.b_enc)
    threshold, bandwidth = trainer.ae.threshold, trainer.bandwidth
    if not trainer.strict_compat or not torch.is_grad_enabled():
        return jumprelu_encode(*given, threshold, bandwidth=bandwidth)
    semantics = Semantics.preset("dictionary_learning_0_1", strict_compat=True)
    leaf = threshold.detach().requires_grad_()  # has the window stored; its gradient is dropped
    acts = jumprelu_encode(*given, leaf, bandwidth=bandwidth)
    return straight_through(semantics, acts, given, threshold, bandwidth)


def observed(trainer: Any, x: Tensor, step: Any) -> SparseActs:
    """A BatchTopK's entries, counted, the running threshold moved."""
    acts = batch_entries(trainer.ae, x)
    if step > trainer.threshold_start_step:
        trainer.update_threshold(acts.values.detach())
    trainer.effective_l0 = trainer.k
    count_idle(trainer, fired(acts), x.shape[0])
    return acts


def fired(acts: SparseActs) -> Tensor:
    """Latents with an active entry."""
    return acts.latents()[acts.gate.detach() > 0]


@torch.no_grad()
def count_idle(trainer: Any, latents: Tensor, tokens: int) -> None:
    """Tokens since each latent fired."""
    trainer.num_tokens_since_fired += tokens
    trainer.num_tokens_since_fired[latents] = 0


def auxiliary(trainer: Any, x: Tensor, residual: Tensor) -> Tensor:
    """The dead latents' error of reconstructing the residual, over that of its mean."""
    dead = trainer.num_tokens_since_fired >= trainer.dead_feature_threshold
    trainer.dead_features = int(dead.sum())
    if trainer.dead_features == 0:
        trainer.pre_norm_auxk_loss = -1
        return residual.new_zeros(())
    x, W_enc, b_enc = encoder(trainer.ae, x)
    ids = dead.nonzero()[:, 0]
    weights = (W_enc.t()[ids].t(), b_enc[ids], decoder(trainer.ae)[ids])
    residual = residual.float()
    error = aux_error(residual, [(x, *weights)], trainer.top_k_aux) / residual.shape[0]
    trainer.pre_norm_auxk_loss = error
    return (error / aux_denominator("residual", residual, residual)).nan_to_num(0.0)


@torch.no_grad()
def group_losses(
    acts: SparseActs, ae: Any, x: Tensor, ends: list[int], weights: list[float]
) -> list[float]:
    """Weighted error of every prefix of the groups."""
    recon, start, found = ae.b_dec.expand_as(x), 0, []
    for end, weight in zip(ends, weights, strict=False):
        recon = recon + decode(acts.latent_range(start, end), ae.W_dec[start:end])
        found.append(float((x - recon).pow(2).sum(dim=-1).mean()) * weight)
        start = end
    return found


def _result(
    trainer: Any, x: Tensor, recon: Tensor, acts: SparseActs, l2: Tensor, aux: Any, logging: bool
) -> Any:
    loss = l2 + trainer.auxk_alpha * aux
    if not logging:
        return loss
    losses = {"l2_loss": l2.item(), "auxk_loss": float(aux), "loss": loss.item()}
    return _log("x_hat", x, recon, dense(acts, trainer.ae.b_dec), losses)


def _log(reconstruction: str, *parts: Any) -> Any:
    """What the library's trainers return for logging."""
    log: Any = namedtuple("LossLog", ["x", reconstruction, "f", "losses"])  # type: ignore[misc]
    return log(*parts)


def pairs() -> Iterator[tuple[type, type]]:
    """Each class of the library, and ours."""
    yield from DICTIONARIES
    for module, ours in (
        *((top_k, TopKTrainer), (batch_top_k, BatchTopKTrainer)),
        *((nested, MatryoshkaBatchTopKTrainer), (jumprelu, JumpReluTrainer)),
    ):
        yield getattr(module, ours.__name__), ours
