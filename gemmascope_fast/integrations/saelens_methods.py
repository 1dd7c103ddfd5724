"""The methods that stand in for SAELens' own; each falls back to the one it replaces.

`encode`, `decode` and `forward` here, `training_forward_pass` in `saelens_steps`; `PLACES` lists
all of them by class and name. Imports `sae_lens`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..effective import decoder_norms
from ..functional import decode as sparse_decode
from ..sparse import SparseActs
from . import saelens_host as host
from .lazy_acts import LazyActs
from .saelens_pass import sparse_pass
from .saelens_steps import training_forward_pass
from .saelens_stock import STOCK, intact, stock, transformed

Method = Callable[..., Any]
Fast = Callable[..., Any]

DENSE_SHARE = 1 / 16
"""Share of non-zeros above which `decode` multiplies the dense activations that it was given."""


def encode(module: Any, x: Tensor) -> Any:
    """Dense activations (COO where the configuration asks for it), made of the entries."""
    found = _entries(module, x, None)
    if found is NotImplemented:
        return found
    acts = host.scaled(module, found[1])
    acts = acts._replace(values=acts.values.to(module.W_enc.dtype))
    if getattr(module.cfg, "use_sparse_activations", False):
        return module.hook_sae_acts_post(_coo(acts))
    return module.hook_sae_acts_post(acts.to_dense())


def decode(module: Any, feature_acts: Any) -> Any:
    """Reconstruction of few non-zeros among the dense activations; with their gradient, SAELens'.

    A zero has a gradient too, the dot product with its decoder row.
    """
    W_dec: Tensor = module.W_dec
    if torch.compiler.is_compiling():
        return NotImplemented
    if isinstance(feature_acts, LazyActs) and not feature_acts.made:
        acts = feature_acts.acts
    elif _sparse_enough(feature_acts, W_dec):
        acts = SparseActs.from_dense(feature_acts)
    else:
        return NotImplemented
    if not host.supported(module) or acts.d_sae != W_dec.shape[0]:
        return NotImplemented
    if host.rescales(module):
        acts = acts._replace(values=acts.values / decoder_norms(W_dec)[acts.latents()])
    return host.finish(module, sparse_decode(acts, W_dec, module.b_dec))


def forward(module: Any, x: Tensor) -> Any:
    """Reconstruction without dense activations."""
    if module.use_error_term:
        return NotImplemented
    found = _entries(module, x, (module.W_dec, module.b_dec))
    if found is NotImplemented:
        return found
    recon = host.finish(module, found[0][0])
    own = stock(module, "forward")
    if own is host.SKIP_FORWARD:
        return recon + x @ module.W_skip.T.to(x.device)
    return recon if own is host.TRANSCODER_FORWARD else module.hook_sae_output(recon)


def _entries(module: Any, x: Tensor, decoder: tuple[Tensor, Tensor] | None) -> Any:
    """`sparse_pass` of a batch, or NotImplemented where SAELens has to serve."""
    encoder = host.encoder_of(module)
    if encoder is None:
        return NotImplemented
    sae_in = module.process_sae_in(x)
    if not host.fits(module, encoder, sae_in):
        return NotImplemented
    return sparse_pass(encoder, sae_in, module.W_enc, module.b_enc, decoder)


def _sparse_enough(feature_acts: Any, W_dec: Tensor) -> bool:
    """Whether dense activations without gradient have few enough non-zeros."""
    if not isinstance(feature_acts, Tensor) or feature_acts.layout != torch.strided:
        return False
    if feature_acts.dtype != W_dec.dtype or feature_acts.device != W_dec.device:
        return False
    if feature_acts.requires_grad and torch.is_grad_enabled() or feature_acts.dim() == 0:
        return False
    return int(torch.count_nonzero(feature_acts)) <= DENSE_SHARE * feature_acts.numel()


def _coo(acts: SparseActs) -> Tensor:
    """The entries as a sparse COO tensor `[*batch, d_sae]`."""
    tokens = torch.unravel_index(acts.tokens(), acts.shape[:-1])
    return torch.sparse_coo_tensor(torch.stack([*tokens, acts.latents()]), acts.values, acts.shape)


PLACES: list[tuple[type, str, Fast]] = [
    *((cls, "encode", encode) for cls in (host.JumpReLU, host.TopK, host.TrainingSAE)),
    *((cls, "encode", encode) for cls in (host.Transcoder, host.JumpReLUTranscoder)),
    *((cls, "decode", decode) for cls in (host.JumpReLU, host.TopK, host.Transcoder)),
    *((cls, "decode", decode) for cls in (host.TrainingSAE, host.TopKTraining)),
    *((cls, "forward", forward) for cls in (host.SAE, host.TopKTraining)),
    *((cls, "forward", forward) for cls in (host.Transcoder, host.SkipTranscoder)),
    *((cls, "training_forward_pass", training_forward_pass) for cls in host.TRAINED),
]
"""Class, method, and what serves in its place; NotImplemented asks for SAELens' own."""

SERVED: dict[Method, tuple[str, Fast]] = {
    getattr(cls, name): (name, serve) for cls, name, serve in PLACES
}
"""The same by SAELens' function."""


def replacement(own: Method, name: str, serve: Fast) -> Method:
    """A method that serves a module that runs SAELens' `own` as it is, and calls it otherwise."""

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if stock(self, name) is own and intact(self, name) and not transformed():
            found = serve(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return own(self, *args, **kwargs)

    setattr(method, STOCK, (method, own))
    return method


def bound(module: Any) -> dict[str, Method]:
    """The methods of one module that can be replaced, replaced, by name."""
    names = dict.fromkeys(name for _, name, _ in PLACES)
    found = {name: stock(module, name) for name in names if hasattr(module, name)}
    return {
        name: MethodType(replacement(own, *SERVED[own]), module)
        for name, own in found.items()
        if own in SERVED
    }
