"""What a folder of SAELens 6 holds of a single-layer module, for `sae_lens.SAE.load_from_disk`.

    W_enc [d_in, d_sae]   b_enc, threshold [d_sae]   W_dec [d_sae, d_out]   b_dec [d_out]
    W_skip [d_out, d_in], applied as x @ W_skip.T: the transpose of ours

SAELens holds every tensor in the dtype that the config names. That is float32 (float64) here even
where the file's matrices have 16 bits, so that it never rounds thresholds and biases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..effective import gate_threshold
from ..modules import SAE, JumpReLU, TopK, Transcoder
from . import config as configs
from .plans import OP, Plan, merged, present
from .writing_tensors import Stored, stored, wide

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
VERSION = "6.0.0"  # since when the config has this form
RENAMED = {"hf_hook_point_in": "hf_hook_name", "hf_hook_point_out": "hf_hook_name_out"}
_POINT = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)")
_SITES = {  # below `model.layers.{layer}.` in transformers, below `blocks.{layer}.` in SAELens
    "output": "hook_resid_post",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "hook_mlp_in",
}


def plan(module: Any, dtype: torch.dtype | None, metadata: Mapping[str, Any]) -> Plan:
    """The file of tensors and the config.

    Args:
        module: an SAE or a transcoder.
        dtype: of the matrices in the file; None keeps the module's.
        metadata: values that take precedence over `module.metadata`; None is "not given".

    Raises:
        TypeError: `module.metadata` is no dict, or a value has no JSON form.
        ValueError: SAELens has no class that computes the same.
    """
    architecture = _architecture(module)
    kept = module.W_enc.dtype if dtype is None else dtype
    matrices = {"W_enc": module.W_enc, "W_dec": module.W_dec}
    if architecture.endswith("skip_transcoder"):
        matrices["W_skip"] = module.W_skip.t()
    vectors = {"b_enc": module.b_enc, "b_dec": module.b_dec}
    if module.threshold is not None:
        vectors["threshold"] = _threshold(module)
    tensors: dict[str, Stored] = {}
    for name, t in {**matrices, **vectors}.items():
        tensors[name] = stored(name, present(name, t), kept if name in matrices else wide(kept))
    config = {
        "architecture": architecture,
        "d_in": module.d_in,
        "d_sae": module.d_sae,
        "dtype": str(wide(kept)).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": module.centred and module.semantics.centers(module.activation),
        "normalize_activations": "none",
        "reshape_activations": "none",
        **_own_fields(module),
        "metadata": _metadata(merged(module, metadata)),
    }
    return Plan({WEIGHTS: tensors}, CONFIG, configs.plain_json(config, OP))


def _architecture(module: Any) -> str:
    """The name of the class of SAELens that computes the same.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(module, SAE):
        kind = type(module).__name__
        raise ValueError(f"{OP}: SAELens has no {kind}: use gemma_scope_2's format")
    jumps = isinstance(module.activation, JumpReLU)
    if isinstance(module, Transcoder):
        if jumps:
            return "jumprelu_transcoder" if module.W_skip is None else "jumprelu_skip_transcoder"
        raise ValueError(f"{OP}: SAELens has no transcoder with {module.activation}")
    if module.d_in != module.d_out:
        raise ValueError(
            f"{OP}: an SAE of SAELens has one width, got d_in={module.d_in} and "
            f"d_out={module.d_out}: make it a Transcoder"
        )
    if getattr(module, "W_skip", None) is not None:
        raise ValueError(f"{OP}: W_skip must be None in an SAE, whose forward ignores it")
    if not jumps and not isinstance(module.activation, TopK):
        raise ValueError(
            f"{OP}: SAELens saves a BatchTopK as the JumpReLU at its running threshold: save "
            "module.to_jumprelu()"
        )
    return "jumprelu" if jumps else "topk"


def _threshold(module: SAE) -> torch.Tensor:
    """What `pre` must exceed strictly.

    Raises:
        ValueError: a threshold is negative.
    """
    theta = present("threshold", module.theta())
    if bool((theta < 0).any()):
        at = int((theta < 0).nonzero()[0])
        raise ValueError(
            f"{OP}: SAELens rectifies what passes the gate, so thresholds must be >= 0, got "
            f"{float(theta[at]):.3g} for latent {at} ({int((theta < 0).sum())} are negative)"
        )
    return gate_threshold(module.semantics, theta).clamp_min(0)  # pre >= 0 and pre > 0: same values


def _own_fields(module: SAE) -> dict[str, Any]:
    """Fields of the config that only some classes have."""
    if isinstance(module, Transcoder):
        return {"d_out": module.d_out}
    if isinstance(module.activation, TopK):
        rescale = module.semantics.rescale
        return {"k": module.activation.k, "rescale_acts_by_decoder_norm": rescale}
    return {}


def _metadata(found: dict[str, Any]) -> dict[str, Any]:
    """Our metadata under SAELens' names, with the hook points in its spelling too."""
    named = {RENAMED.get(key, key): value for key, value in found.items()}
    for suffix in ("in", "out"):
        point = _POINT.fullmatch(str(found.get(f"hf_hook_point_{suffix}")))
        if point and point[2] in _SITES:
            key = "hook_name" if suffix == "in" else "hook_name_out"
            named.setdefault(key, f"blocks.{point[1]}.{_SITES[point[2]]}")
    return {"sae_lens_version": VERSION, "sae_lens_training_version": None, **named}
