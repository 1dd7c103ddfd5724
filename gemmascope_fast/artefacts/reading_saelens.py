"""`cfg.json` of SAELens, of version 6 and before, and the module that computes the same.

Its `standard` and its transcoders without thresholds rectify: a JumpReLU whose thresholds are 0.
"""

from __future__ import annotations

from typing import Any

from ..activations import Activation, JumpReLU, TopK
from ..semantics import Semantics
from .config import shown
from .peers import Peer, count, flag
from .validate import SKIP, Sizes
from .writing_saelens import RENAMED

SAES = ("standard", "jumprelu", "topk")
TRANSCODERS = (
    *("transcoder", "skip_transcoder"),
    *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
OLD = ("0", "1", "2", "3", "4", "5")  # versions whose configs have another form
STRUCTURE = {  # fields of the config that are no metadata
    *("architecture", "d_in", "d_sae", "d_out", "dtype", "device", "k", "metadata"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations", "activation_fn"),
    *("rescale_acts_by_decoder_norm", "activation_fn_str", "activation_fn_kwargs"),
    *("finetuning_scaling_factor", "sae_lens_version"),
}


def read(config: dict[str, Any], where: str) -> Peer:
    """What a config describes.

    Raises:
        ValueError: a value is not valid, or no module here computes what that class does.
    """
    config = _modern(config, where)
    architecture = config.get("architecture")
    if architecture not in (*SAES, *TRANSCODERS):
        raise ValueError(
            f"{where}: architecture must be one of {', '.join((*SAES, *TRANSCODERS))}, got "
            f"{shown(architecture)}"
        )
    if config.get("normalize_activations", "none") != "none":
        raise ValueError(
            f"{where}: normalize_activations must be none, got "
            f"{shown(config['normalize_activations'])}: fold the scale into the weights first"
        )
    maps, jumps = architecture in TRANSCODERS, architecture.startswith("jumprelu")
    affine = "skip" in architecture
    d_in, d_sae = count(config, "d_in", where), count(config, "d_sae", where)
    d_out = count(config, "d_out", where) if maps else d_in
    names = {name: name.replace("w_", "W_") for name in ("w_enc", "b_enc", "w_dec", "b_dec")}
    names |= {"threshold": "threshold"} if jumps else {}
    names |= {SKIP: "W_skip"} if affine else {}
    center = not maps and flag(config, "apply_b_dec_to_input", True, where)
    rescale = flag(config, "rescale_acts_by_decoder_norm", False, where)
    topk = architecture == "topk"
    activation: Activation = TopK(count(config, "k", where, d_sae)) if topk else JumpReLU()
    return Peer(
        sizes=Sizes(d_in, d_sae, d_out, affine),
        names=names,
        transposed=(SKIP,),
        zeros=() if jumps or topk else ("threshold",),
        activation=activation,
        semantics=Semantics.preset("saelens_6", center=center, rescale=rescale),
        config={**_metadata(config, where), "type": "transcoder" if maps else "sae"},
    )


def _modern(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config as version 6 writes it: before, the activation had fields of its own.

    Raises:
        ValueError: the activation is none that version 6 has a class for.
    """
    metadata = config.get("metadata")
    inner = metadata if isinstance(metadata, dict) else {}
    version = config.get("sae_lens_version") or inner.get("sae_lens_version") or "0"
    if not isinstance(version, str):
        raise ValueError(f"{where}: sae_lens_version must be a string, got {shown(version)}")
    if version.partition(".")[0] not in OLD:
        return config
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    made = {**config, "architecture": config.get("architecture", "standard")}
    if activation == "topk":
        arguments = config.get("activation_fn_kwargs")
        made |= {"architecture": "topk", **(arguments if isinstance(arguments, dict) else {})}
    elif activation != "relu":
        raise ValueError(f"{where}: activation_fn must be relu or topk, got {shown(activation)}")
    if config.get("finetuning_scaling_factor"):
        raise ValueError(f"{where}: finetuning_scaling_factor must be false, got true")
    if config.get("normalize_activations") in (None, False):
        made["normalize_activations"] = "none"
    return made


def _metadata(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Metadata under our names; before version 6 they stood among the other fields.

    Raises:
        ValueError: `metadata` is no object.
    """
    inner = config.get("metadata", {})
    if not isinstance(inner, dict):
        raise ValueError(f"{where}: metadata must be an object, got {shown(inner)}")
    ours = {theirs: name for name, theirs in RENAMED.items()}
    found = {key: value for key, value in config.items() if key not in STRUCTURE} | inner
    return {ours.get(key, key): value for key, value in found.items()}
