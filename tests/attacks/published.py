"""Files as they are published: Gemma Scope 2 folders and Gemma Scope 1 archives."""

import json

import numpy as np
from safetensors.numpy import save_file

UPPER = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
UPPER |= {"threshold": "threshold"}
CONFIG = {
    "type": "sae",
    "architecture": "jump_relu",
    "width": 10,
    "l0": 20,
    "affine_connection": False,
    "model_name": "gemma-v3-4b-pt",
    "hf_hook_point_in": "model.layers.17.output",
    "hf_hook_point_out": "model.layers.17.output",
}


def scope_2(folder, tensors, **config):
    """A folder as it is published."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def scope_1(path, tensors, save=np.savez):
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **{UPPER[name]: t for name, t in tensors.items()})
    return path


def layers(n_layers=3, d=6, d_sae=10, affine=False, seed=0):
    """Source layers of a CLT or crosscoder: decoders causal, exact zeros before their own layer."""
    random = np.random.default_rng(seed)
    made = []
    for layer in range(n_layers):
        shapes = {"w_enc": (d, d_sae), "w_dec": (d_sae, n_layers, d), "b_enc": (d_sae,)}
        shapes |= {"b_dec": (d,), "threshold": (d_sae,)}
        shapes |= {"affine_skip_connection": (d, d)} if affine else {}
        tensors = {k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        tensors["w_dec"][:, :layer] = 0
        made.append(tensors)
    return made


def scope_2_layers(folder, shards, **config):
    """A folder of several layers as it is published."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer, tensors in enumerate(shards):
        save_file(tensors, folder / f"params_layer_{layer}.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense_layers(shards, x):
    """The published maths in float64, `[n, L, d]`: absolute output layers, `x_j @ A_j`."""
    t = [{name: array.astype(np.float64) for name, array in shard.items()} for shard in shards]
    x = x.astype(np.float64)
    y = np.stack([np.broadcast_to(shard["b_dec"], x[:, 0].shape) for shard in t], 1)
    for i, shard in enumerate(t):
        pre = x[:, i] @ shard["w_enc"] + shard["b_enc"]
        f = np.where(pre > shard["threshold"], pre, 0)
        y = y + np.einsum("nf,fjd->njd", f, shard["w_dec"])
        if "affine_skip_connection" in shard:
            y[:, i] += x[:, i] @ shard["affine_skip_connection"]
    return y
