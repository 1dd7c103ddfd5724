"""What a folder of sparsify 1.3 holds of a TopK, for `sparsify.SparseCoder.load_from_disk`.

    encoder.weight [d_sae, d]   encoder.bias [d_sae]   W_dec [d_sae, d]   b_dec [d]
    W_skip [d, d], applied as x @ W_skip.T: the transpose of ours

sparsify holds every tensor in one dtype, which is that of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modules import SAE, TopK, Transcoder
from . import config as configs
from .plans import OP, Plan, merged, present
from .writing_tensors import stored, wide

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
ROWS = 4096  # of W_enc.t() that are float64 at a time


def plan(module: Any, dtype: torch.dtype | None, metadata: Mapping[str, Any]) -> Plan:
    """The file of tensors and the config.

    Args:
        module: an SAE or a transcoder with `TopK`.
        dtype: of all tensors in the file; None is float32 (float64 if the matrices are), so that
            16-bit matrices do not round the biases.
        metadata: values that take precedence over `module.metadata`; None is "not given".

    Raises:
        TypeError: `module.metadata` is no dict, or a value has no JSON form.
        ValueError: sparsify cannot express the module.
    """
    _check(module)
    kept = wide(module.W_enc.dtype) if dtype is None else dtype
    parameters: dict[str, tuple[str, Tensor]] = {
        "encoder.weight": ("W_enc", module.W_enc.t()),
        "encoder.bias": ("b_enc", _bias(module)),
        "W_dec": ("W_dec", module.W_dec),
        "b_dec": ("b_dec", module.b_dec),
    }
    skip = getattr(module, "W_skip", None)
    if skip is not None:
        parameters["W_skip"] = ("W_skip", skip.t())
    found = merged(module, metadata)
    config = {
        **found,
        "activation": "topk",
        "expansion_factor": max(module.d_sae // module.d_in, 1),
        "normalize_decoder": found.get("normalize_decoder", False),
        "num_latents": module.d_sae,
        "k": module.activation.k,
        "multi_topk": found.get("multi_topk", False),
        "skip_connection": skip is not None,
        "transcode": isinstance(module, Transcoder),
        "d_in": module.d_in,
    }
    tensors = {n: stored(p, present(p, t), kept) for n, (p, t) in parameters.items()}
    return Plan({WEIGHTS: tensors}, CONFIG, configs.plain_json(config, OP))


def _check(module: Any) -> None:
    """Raise unless sparsify computes the same.

    Raises:
        ValueError: with what it lacks.
    """
    lacks = None
    if not isinstance(module, SAE):
        lacks = f"has no {type(module).__name__}: use gemma_scope_2's format"
    elif not isinstance(module.activation, TopK):
        lacks = (
            f"has TopK only, got {module.activation}; a threshold per latent has no place in its "
            "files: use saelens or gemma_scope_2"
        )
    elif module.semantics.rescale:
        lacks = "selects among the pre-activations themselves, not rescaled by decoder norms"
    elif module.d_in != module.d_out:
        lacks = f"has one width, got d_in={module.d_in} and d_out={module.d_out}"
    elif not isinstance(module, Transcoder) and getattr(module, "W_skip", None) is not None:
        lacks = "would apply W_skip, which the forward of an SAE ignores: delete it"
    if lacks is not None:
        raise ValueError(f"{OP}: sparsify {lacks}")


def _bias(module: SAE) -> Tensor:
    """The encoder's bias once its input is `x - b_dec`, which sparsify subtracts in every SAE."""
    present("W_enc", module.W_enc)
    if isinstance(module, Transcoder) or module.semantics.centers(module.activation):
        return module.b_enc
    b_dec = module.b_dec.detach().double()
    blocks = torch.split(module.W_enc.detach().t(), ROWS)
    shift = torch.cat([rows.double() @ b_dec for rows in blocks])
    return module.b_enc.detach() + shift.to(module.b_enc.dtype)
