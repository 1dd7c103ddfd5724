"""Attacks on the files of several layers: missing, mixed up, of different sizes."""

import json

import numpy as np

from . import write
from .published import layers
from .tensors import entry, safetensors

VALID = layers()
CLT = {"type": "clt", "architecture": "jump_relu", "width": 30}


def changed(layer, **tensors):
    """The valid layers, with tensors of one replaced (None: left out)."""
    made = [dict(shard) for shard in VALID]
    made[layer] = {k: v for k, v in (made[layer] | tensors).items() if v is not None}
    return made


def without(*missing):
    return {i: shard for i, shard in enumerate(VALID) if i not in missing}


NAN = np.where(VALID[1]["w_dec"] > 1, np.nan, VALID[1]["w_dec"]).astype(np.float32)
HIDDEN = VALID[2]["w_dec"].copy()
HIDDEN[3, 0, 2] = np.nan  # where a packed decoder would not look

CASES = {  # name: layers, config, the message that refuses them
    "first missing": (without(0), CLT, "params_layer_0.safetensors is missing"),
    "middle missing": (without(1), CLT, "params_layer_1.safetensors is missing"),
    "last missing": (without(2), CLT, "params_layer_2.safetensors is missing"),
    "one too many": (
        [*VALID, VALID[0]],
        CLT,
        "the last file must be params_layer_2.*got params_la",
    ),
    "another number of layers": (
        changed(1, w_dec=layers(4)[1]["w_dec"]),
        CLT,
        r"params_layer_1.*: w_dec must be as in params_layer_0.safetensors, \[10, 3, 6\]",
    ),
    "another width": (
        [*VALID[:2], layers(d_sae=11)[2]],
        CLT,
        r"params_layer_2.*: w_enc must be as in .* \[6, 10\] of torch.float32, got \[6, 11\]",
    ),
    "another d": ([VALID[0], layers(d=5)[1], VALID[2]], CLT, "params_layer_1.*: w_enc must be as"),
    "another dtype": (
        changed(2, b_enc=VALID[2]["b_enc"].astype(np.float16)),
        CLT,
        "b_enc must be as in .*torch.float32, got .*torch.float16: the layers do not belong",
    ),
    "a skip in one": (
        changed(1, affine_skip_connection=np.eye(6, dtype=np.float32)),
        CLT,
        r"params_layer_1.*: affine_skip_connection must be as in .*, none, got \[6, 6\]",
    ),
    "no threshold in one": (changed(2, threshold=None), CLT, "params_layer_2.* lacks threshold"),
    "decoder of one layer": (
        changed(0, w_dec=np.zeros((10, 6), np.float32)),
        CLT,
        r"w_dec must be of 3 dimensions \[d_sae, n_layers, d\]",
    ),
    "decoder of no layers": (changed(0, w_dec=np.zeros((10, 0, 6), np.float32)), CLT, "no size 0"),
    "decoder to another d": (
        changed(0, w_dec=np.zeros((10, 3, 7), np.float32)),
        CLT,
        r"w_dec must have shape \[10, 3, 6\]",
    ),
    "bias of every layer": (
        changed(1, b_dec=np.zeros((3, 6), np.float32)),
        CLT,
        r"b_dec must have shape \[6\].*got \[3, 6\]",
    ),
    "unknown tensor": (changed(1, w_up=VALID[0]["b_dec"]), CLT, "params_layer_1.*unknown 'w_up'"),
    "NaN": (changed(1, w_dec=NAN), CLT, "w_dec must be finite, and holds NaN"),
    "NaN before its layer": (changed(2, w_dec=HIDDEN), CLT, "w_dec must be finite, and holds NaN"),
    "width of one layer": (
        VALID,
        CLT | {"width": 10},
        "width is 10, but w_enc has 10 in each of 3",
    ),
    "width of more": (VALID, CLT | {"width": 31}, "width is 31, but w_enc has 10 in each of 3 f"),
    "type of a single layer": (
        VALID,
        {"type": "sae"},
        "type is sae, whose tensors are in params.saf",
    ),
    "affine without tensor": (
        VALID,
        CLT | {"affine_connection": True},
        "affine_connection is True, but there is no affine_skip_connection",
    ),
    "a skip in a crosscoder": (
        layers(affine=True),
        {"type": "crosscoder"},
        "type is crosscoder, but only a transcoder or clt has affine_skip_connection",
    ),
    "type unknown": (VALID, {}, "crosscoder or a clt must be said by a config.json"),
    "huge decoder": (
        {0: VALID[0] | {"w_dec": entry([10, 1 << 58, 6], [0, 240])}},
        CLT,
        "must be a complete safetensors file",
    ),
}


def make(name, folder):
    shards, config, _ = CASES[name]
    for layer, tensors in shards.items() if isinstance(shards, dict) else enumerate(shards):
        header = {k: v for k, v in tensors.items() if isinstance(v, dict)}
        arrays = {k: v for k, v in tensors.items() if not isinstance(v, dict)}
        write(folder / f"params_layer_{layer}.safetensors", safetensors(arrays, header))
    if config:
        write(folder / "config.json", json.dumps(config).encode())
