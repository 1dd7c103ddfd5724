"""`training_forward_pass` of SAELens' JumpReLU, TopK, BatchTopK and Matryoshka BatchTopK SAEs.

The losses are SAELens', by its names and in its order, of `gemmascope_fast.losses` over the stored
entries. What comes back is a `TrainStepOutput` whose `feature_acts` are `LazyActs`, and whose
`hidden_pre`, which SAELens' trainer does not read, is computed when somebody reads it.
Imports `sae_lens`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from .. import losses
from ..effective import decoder_norms
from ..sparse import SparseActs
from . import saelens_host as host
from .lazy_acts import LazyActs
from .saelens_pass import sparse_pass
from .saelens_stock import stock

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Hidden:
    """Pre-activations of a batch, computed on demand while the weights are those of the step."""

    module: Any
    sae_in: Tensor
    versions: tuple[int, ...]
    differentiable: bool

    def dense(self) -> Tensor:
        """`[n, d_sae]`, rescaled where SAELens rescales.

        Raises:
            RuntimeError: the weights have changed since the step.
        """
        if self.versions and self.versions != versions(self.module):
            raise RuntimeError(
                "TrainStepOutput.hidden_pre: the weights have changed since the forward pass, "
                "which did not store it; read it before the optimizer's step"
            )
        with torch.set_grad_enabled(self.differentiable):
            pre = self.sae_in @ self.module.W_enc + self.module.b_enc
            return host.rescaled(self.module, pre)


def versions(module: Any) -> tuple[int, ...]:
    """Counters of the in-place changes of what pre-activations are made of."""
    return tuple(p._version for p in (module.W_enc, module.b_enc, module.W_dec))


class StepOutput(TrainStepOutput):  # type: ignore[misc]
    """A `TrainStepOutput` that holds entries; dense tensors are made by the uses that need one."""

    _feature_acts: Any
    _hidden_pre: Any

    @property
    def feature_acts(self) -> Any:
        """`[n, d_sae]` activations, dense where a use needs it."""
        if isinstance(self._feature_acts, SparseActs):
            self._feature_acts = LazyActs(self._feature_acts, self.sae_out.dtype)
        return self._feature_acts

    @feature_acts.setter
    def feature_acts(self, value: Any) -> None:
        self._feature_acts = value

    @property
    def hidden_pre(self) -> Any:
        """`[n, d_sae]` pre-activations."""
        if isinstance(self._hidden_pre, Hidden):
            self._hidden_pre = self._hidden_pre.dense()
        return self._hidden_pre

    @hidden_pre.setter
    def hidden_pre(self, value: Any) -> None:
        self._hidden_pre = value


@dataclass(frozen=True)
class Step:
    """One forward pass, as the losses see it.

    Attributes:
        module: SAELens'.
        given: its `TrainStepInput`.
        sae_in: `[n, d_in]`, as the encoder sees it.
        acts: entries before rescaling.
        recons: `[G, n, d_in]` by nested dictionaries; the last is of all latents.
    """

    module: Any
    given: Any
    sae_in: Tensor
    acts: SparseActs
    recons: Tensor


def training_forward_pass(module: Any, step_input: Any) -> Any:
    """Losses of a batch and their graph, without a dense tensor of activations."""
    own = stock(module, "training_forward_pass")
    if own is host.JUMPRELU_STEP:
        with torch.no_grad():  # as SAELens does: a threshold below 0 would pass negatives
            module.threshold.data.clamp_(min=0.0)
    encoder = host.encoder_of(module)
    if encoder is None or not host.own_step(module, step_input):
        return NotImplemented
    sae_in = module.process_sae_in(step_input.sae_in)
    if not host.fits(module, encoder, sae_in):
        return NotImplemented
    ends = module.cfg.matryoshka_widths if own is host.MATRYOSHKA_STEP else None
    weights = (module.W_enc, module.b_enc, (module.W_dec, module.b_dec))
    centred = host.centred(module, step_input.sae_in)
    recons, acts = sparse_pass(encoder, sae_in, *weights, ends, centred)
    step = Step(module, step_input, sae_in, acts, recons)
    sae_out = host.finish(module, recons[-1])
    found = {
        "mse_loss": _mse(step, sae_out),
        **AUX[stock(module, "calculate_aux_loss")](step, sae_out),
    }
    for width, recon in zip((ends or ())[:-1], recons, strict=False):
        found[f"inner_mse_loss_{width}"] = _mse(step, recon)
    output = StepOutput(
        sae_in=step_input.sae_in,
        sae_out=sae_out,
        feature_acts=host.scaled(module, acts),
        hidden_pre=Hidden(module, sae_in, versions(module), torch.is_grad_enabled()),
        loss=torch.stack([value.to(sae_out.dtype) for value in found.values()]).sum(),
        losses=found,
    )
    if encoder.kind == "batchtopk" and own in host.BATCH_STEPS:
        module.update_topk_threshold(output._feature_acts.values.detach())
        output.metrics["topk_threshold"] = module.topk_threshold
    return output


def _mse(step: Step, recon: Tensor) -> Tensor:
    return step.module.mse_loss_fn(recon, step.given.sae_in).sum(dim=-1).mean()  # type: ignore[no-any-return]


def _jumprelu(step: Step, sae_out: Tensor) -> Losses:
    """Sparsity, and the pull of dead latents where it is configured."""
    module, cfg, acts = step.module, step.module.cfg, step.acts
    mode = cfg.jumprelu_sparsity_loss_mode
    if mode == "tanh":
        penalty = losses.tanh(acts, module.W_dec, cfg.jumprelu_tanh_scale)
    elif mode == "quadratic":
        penalty = losses.quadratic_l0(acts, cfg.target_l0)
    else:
        penalty = losses.l0(acts)
    found = {"l0_loss": step.given.coefficients["l0"] * penalty}
    if cfg.pre_act_loss_coefficient is not None:
        dead = _dead(step)
        pull = sae_out.new_tensor(0.0)
        if dead is not None:
            encoder = (step.sae_in, module.W_enc, module.b_enc)
            pull = losses.pre_act(*encoder, dead, module.threshold, module.W_dec)
        found["pre_act_loss"] = cfg.pre_act_loss_coefficient * pull
    return found


def _topk(step: Step, sae_out: Tensor) -> Losses:
    """Dead latents reconstruct the residual."""
    dead = _dead(step)
    loss = sae_out.new_tensor(0.0)
    if dead is not None:
        loss = step.module.cfg.aux_loss_coefficient * _auxk(step, sae_out, dead)
    return {"auxiliary_reconstruction_loss": loss}


def _matryoshka(step: Step, sae_out: Tensor) -> Losses:
    """The same, or each level's dead latents the residual of that level."""
    module, dead = step.module, _dead(step)
    if dead is None or not module.cfg.use_matryoshka_aux_loss:
        return _topk(step, sae_out)
    widths = module.cfg.matryoshka_widths
    levels = []
    for recon, start, end in zip(step.recons, (0, *widths[:-1]), widths, strict=True):
        inside = dead[(dead >= start) & (dead < end)]
        if inside.numel():
            levels.append(_auxk(step, recon, inside))
    loss = module.cfg.aux_loss_coefficient * torch.stack(levels).sum()
    return {"auxiliary_reconstruction_loss": loss}


def _dead(step: Step) -> Tensor | None:
    """The dead latents, or None."""
    mask = step.given.dead_neuron_mask
    dead = None if mask is None else mask.nonzero()[:, 0]
    return None if dead is None or dead.numel() == 0 else dead


def _auxk(step: Step, recon: Tensor, dead: Tensor) -> Tensor:
    """AuxK of these latents; rescaling chooses among them as it does among the living."""
    module, target = step.module, step.given.sae_in
    W_enc, b_enc, W_dec = module.W_enc.t()[dead], module.b_enc[dead], module.W_dec[dead]
    if module.cfg.rescale_acts_by_decoder_norm:
        norms = decoder_norms(W_dec.detach())
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    everyone = torch.arange(dead.numel(), device=dead.device)
    rows = (W_enc.t(), b_enc, W_dec, everyone, target.shape[-1] // 2)
    return losses.auxk(step.sae_in, recon, target, *rows, rectified=False)


AUX: dict[Any, Callable[[Step, Tensor], Losses]] = {
    host.JumpReLUTraining.calculate_aux_loss: _jumprelu,
    host.TopKTraining.calculate_aux_loss: _topk,
    host.MatryoshkaTraining.calculate_aux_loss: _matryoshka,
}
"""By SAELens' function."""
