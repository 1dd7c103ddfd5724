"""What this backend reads of a SAELens module, and when it leaves the work to SAELens.

A module is served when every method that takes part in the call is SAELens' own and nobody watches
(`saelens_stock`). SAELens' dense path serves too where the activation function is another or the
weights are float64, and a JumpReLU so dense that matrix products are faster. Imports `sae_lens`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from sae_lens.saes import batchtopk_sae, jumprelu_sae, matryoshka_batchtopk_sae, sae, topk_sae
from sae_lens.saes import transcoder as transcoders
from torch import Tensor, nn

from .. import ops
from ..effective import decoder_norms
from ..sparse import SparseActs
from ..training.planning import CROSSOVER, sampled_density
from .saelens_pass import Encoder
from .saelens_stock import stock, watched

SAE, TrainingSAE = sae.SAE, sae.TrainingSAE
JumpReLU, JumpReLUTraining = jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUTrainingSAE
TopK, TopKTraining = topk_sae.TopKSAE, topk_sae.TopKTrainingSAE
BatchTopKTraining = batchtopk_sae.BatchTopKTrainingSAE
MatryoshkaTraining = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE
Transcoder, SkipTranscoder = transcoders.Transcoder, transcoders.SkipTranscoder
JumpReLUTranscoder = transcoders.JumpReLUTranscoder

NEEDED = ("jumprelu_encode", "topk_encode", "batchtopk_encode", "decode", "sae_backward")
DEVICES = tuple(
    device
    for device in CROSSOVER
    if all(ops.implementation(name, device) in ("native", "triton") for name in NEEDED)
)
"""Those with kernels."""


def _jumprelu(module: Any) -> Encoder | None:
    """Inference: ReLU, then a gate without gradient; a threshold below 0 acts as 0."""
    if type(module.activation_fn) is not nn.ReLU:
        return None
    return Encoder("jumprelu", module.threshold.detach().clamp(min=0))


def _relu(module: Any) -> Encoder | None:
    if type(module.activation_fn) is not nn.ReLU:
        return None
    return Encoder("jumprelu", torch.zeros_like(module.b_enc))


def _jumprelu_training(module: Any) -> Encoder | None:
    to_input = bool(module.cfg.jumprelu_ste_to_input)
    if module.bandwidth <= 0:
        return None
    return Encoder("jumprelu", module.threshold, float(module.bandwidth), to_input)


def _topk(module: Any) -> Encoder | None:
    chosen = module.activation_fn
    kinds = {topk_sae.TopK: "topk", batchtopk_sae.BatchTopK: "batchtopk"}
    if type(chosen) not in kinds:
        return None
    norms = None
    if module.cfg.rescale_acts_by_decoder_norm:
        norms = decoder_norms(module.W_dec.detach())
    return Encoder(kinds[type(chosen)], k=chosen.k, norms=norms)


ENCODERS: dict[FunctionType, Callable[[Any], Encoder | None]] = {
    JumpReLU.encode: _jumprelu,
    JumpReLUTranscoder.encode: _jumprelu,
    Transcoder.encode: _relu,
    TopK.encode: _topk,
    JumpReLUTraining.encode_with_hidden_pre: _jumprelu_training,
    TopKTraining.encode_with_hidden_pre: _topk,
}
"""By SAELens' function."""

TRAINED = (JumpReLUTraining, TopKTraining, BatchTopKTraining, MatryoshkaTraining)

# SAELens' functions, whatever stands on its classes later.
TRAINING_ENCODE = TrainingSAE.encode
TRANSCODER_DECODE, TRANSCODER_FORWARD = Transcoder.decode, Transcoder.forward
SKIP_FORWARD = SkipTranscoder.forward
JUMPRELU_STEP = JumpReLUTraining.training_forward_pass
MATRYOSHKA_STEP = MatryoshkaTraining.training_forward_pass
BATCH_STEPS = (BatchTopKTraining.training_forward_pass, MATRYOSHKA_STEP)


def known(module: Any) -> bool:
    """Whether the module encodes by a method of SAELens' that is served."""
    return _encoding(module) in ENCODERS


def _encoding(module: Any) -> Any:
    found = stock(module, "encode")
    return stock(module, "encode_with_hidden_pre") if found is TRAINING_ENCODE else found


def encoder_of(module: Any) -> Encoder | None:
    """What the module encodes with, or None where SAELens has to."""
    if not supported(module) or watched(module):
        return None
    make = ENCODERS.get(_encoding(module))
    return None if make is None else make(module)


def supported(module: Any) -> bool:
    """Whether the ops have kernels for the module's weights."""
    W_enc: Tensor = module.W_enc
    return W_enc.dtype != torch.float64 and W_enc.device.type in DEVICES


def fits(module: Any, encoder: Encoder, sae_in: Tensor) -> bool:
    """Whether this input, as the encoder sees it, is ours: its dtype, its size, its density."""
    W_enc: Tensor = module.W_enc
    if sae_in.dtype != W_enc.dtype or sae_in.device != W_enc.device:
        return False
    if sae_in.shape[-1] != W_enc.shape[0]:
        return False
    if torch.compiler.is_compiling():
        return not encoder.to_input
    if encoder.threshold is None or sae_in.numel() == 0:
        return True
    limit = encoder.threshold.detach() - encoder.bandwidth / 2
    x = sae_in.detach().reshape(-1, sae_in.shape[-1])
    density = sampled_density(x, W_enc.detach(), module.b_enc.detach(), limit)
    return density <= CROSSOVER[W_enc.device.type]


def centred(module: Any, x: Tensor) -> bool:
    """Whether the encoder sees x less b_dec, and x is a constant."""
    plain = module.cfg.normalize_activations not in ("constant_norm_rescale", "layer_norm")
    plain = plain and not module.hook_z_reshaping_mode
    return plain and module.cfg.apply_b_dec_to_input is True and not x.requires_grad


def own_step(module: Any, step_input: Any) -> bool:
    """Whether a training step has nothing that only SAELens can do, its errors included."""
    if torch.compiler.is_compiling() and isinstance(module, MatryoshkaTraining):
        return False
    cfg, mask = module.cfg, step_input.dead_neuron_mask
    if mask is not None and mask.dtype != torch.bool:
        return False
    if isinstance(module, JumpReLUTraining):
        mode = cfg.jumprelu_sparsity_loss_mode
        return mode in ("step", "tanh") or (mode == "quadratic" and (cfg.target_l0 or 0) > 0)
    if cfg.normalize_activations not in ("constant_norm_rescale", "layer_norm"):
        return bool(cfg.d_in > 1)
    nested = stock(module, "training_forward_pass") is MATRYOSHKA_STEP
    return not nested and (mask is None or not bool(mask.any()))


def rescales(module: Any) -> bool:
    """Whether activations are multiplied by the norms of the decoder's rows."""
    topk = isinstance(module, (TopK, TopKTraining))
    return topk and bool(module.cfg.rescale_acts_by_decoder_norm)


def scaled(module: Any, acts: SparseActs) -> SparseActs:
    """The entries as SAELens' activations: times the norms of the decoder's rows where it does."""
    if not rescales(module):
        return acts
    return acts._replace(values=acts.values * decoder_norms(module.W_dec)[acts.latents()])


def rescaled(module: Any, pre: Tensor) -> Tensor:
    """Dense pre-activations likewise."""
    return pre * decoder_norms(module.W_dec) if rescales(module) else pre


def finish(module: Any, recon: Tensor) -> Tensor:
    """What SAELens does with a reconstruction: its hook, the input's norms, head dimensions."""
    recon = module.hook_sae_recons(recon)
    if stock(module, "decode") is TRANSCODER_DECODE:
        return recon
    recon = module.run_time_activation_norm_fn_out(recon)
    return module.reshape_fn_out(recon, module.d_head)  # type: ignore[no-any-return]
