"""What a Gemma Scope 2 folder holds of a module: one file of tensors, or one for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modules import SAE, JumpReLU, Transcoder
from ..multilayer import Crosscoder, CrossLayerTranscoder
from . import config as configs
from .files import CONFIG
from .gemma_scope_2 import PARAMS
from .layer_files import layer_name
from .plans import OP, Plan, merged, present
from .validate import MATRICES, PARAMETERS, SKIP, check_tensors
from .writing_tensors import Stored, specs, stored, wide


def plan(
    module: SAE | Crosscoder | CrossLayerTranscoder,
    dtype: torch.dtype | None,
    metadata: Mapping[str, Any],
    d_sae: int | None = None,
) -> Plan:
    """The files and their contents.

    Args:
        module: any.
        dtype: of the matrices in the file; None keeps the module's.
        metadata: config values that take precedence over `module.metadata`; None is "not given".
        d_sae: latents of the dictionary of which the module is a slice, for the config.

    Raises:
        TypeError: `module.metadata` is no dict, or a value has no JSON form.
        ValueError: the format cannot express the module, or the config would not be read back.
    """
    if not isinstance(module.activation, JumpReLU):
        raise ValueError(
            f"{OP}: Gemma Scope 2's files hold JumpReLU only, got {module.activation}; save "
            "module.to_jumprelu() where a BatchTopK has a running threshold, keep "
            "module.state_dict() with torch.save, or choose another format"
        )
    if isinstance(module, SAE):
        tensors = {PARAMS: _single(module, dtype)}
    else:
        tensors = {layer_name(i): _layer(module, i, dtype) for i in range(module.n_layers)}
    config = {**merged(module, metadata), **_structure(module, d_sae or module.d_sae)}
    return Plan(tensors, CONFIG, configs.to_json(config, OP))


def _structure(module: SAE | Crosscoder | CrossLayerTranscoder, d_sae: int) -> dict[str, Any]:
    """What the weights decide of the config; `width` is the total over the layers."""
    kinds = {Crosscoder: "crosscoder", CrossLayerTranscoder: "clt", Transcoder: "transcoder"}
    kind = next((name for cls, name in kinds.items() if isinstance(module, cls)), "sae")
    layers = 1 if isinstance(module, SAE) else module.n_layers
    return {
        "type": kind,
        "architecture": "jump_relu",
        "width": layers * d_sae,
        "affine_connection": getattr(module, "W_skip", None) is not None,
    }


def _single(module: SAE, dtype: torch.dtype | None) -> dict[str, Stored]:
    if not module.semantics.plain_forward:
        raise ValueError(
            f"{OP}: Gemma Scope 2's files have no place for {module.semantics}: save "
            "module.to_jumprelu() instead, which folds it into the weights"
        )
    parameters = {n: (a, getattr(module, a, None)) for n, a in PARAMETERS.items()}
    if parameters[SKIP][1] is not None and not isinstance(module, Transcoder):
        raise ValueError(
            f"{OP}: W_skip must be None in a {type(module).__name__}, whose forward ignores it: "
            "delete it, or make a Transcoder(..., affine=True)"
        )
    tensors = {n: _stored(n, a, t, dtype) for n, (a, t) in parameters.items() if t is not None}
    check_tensors(OP, specs(tensors))
    return tensors


def _layer(
    module: Crosscoder | CrossLayerTranscoder, i: int, dtype: torch.dtype | None
) -> dict[str, Stored]:
    """The tensors of source layer i, with the decoder's zeros for the outputs before it."""
    parameters = {
        "w_enc": (f"W_enc[{i}]", module.W_enc[i]),
        "b_enc": (f"b_enc[{i}]", module.b_enc[i]),
        "b_dec": ("b_dec", module.b_dec[i]),
    }
    assert module.threshold is not None  # it is a JumpReLU
    parameters["threshold"] = (f"threshold[{i}]", module.threshold[i])
    if isinstance(module, CrossLayerTranscoder) and module.W_skip is not None:
        parameters[SKIP] = (f"W_skip[{i}]", module.W_skip[i])
    tensors = {name: _stored(name, a, t, dtype) for name, (a, t) in parameters.items()}
    tensors["w_dec"] = _decoder(f"W_dec[{i}]", module.W_dec[i], module.b_dec.shape, dtype)
    return tensors


def _decoder(
    parameter: str, W_dec: Tensor, outputs: torch.Size, dtype: torch.dtype | None
) -> Stored:
    """`[F, L, d]` of `W_dec [F, m * d]`, which reaches the last m of the outputs `[L, d]`."""
    W_dec = present(parameter, W_dec)
    n_layers, d = outputs
    reached = W_dec.shape[1] // d

    def rows(start: int, stop: int) -> Tensor:
        block = W_dec.new_zeros(stop - start, n_layers, d)
        block[:, n_layers - reached :] = W_dec[start:stop].view(-1, reached, d)
        return block

    shape = (W_dec.shape[0], n_layers, d)
    return Stored(parameter, shape, W_dec.dtype if dtype is None else dtype, rows)


def _stored(name: str, parameter: str, t: Tensor, dtype: torch.dtype | None) -> Stored:
    """Biases and thresholds stay wide, whatever the dtype of the matrices."""
    t = present(parameter, t)
    kept = t.dtype if dtype is None else dtype
    return stored(parameter, t, kept if name in MATRICES else wide(kept))
