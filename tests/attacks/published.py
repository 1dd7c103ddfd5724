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
